"""What a command says beside its result: lines on stderr, and bars, on a terminal only."""

import logging

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Reporter:
    """stderr. The library's own warnings come out here too, as lines like every other."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        log = logging.getLogger("helix_jax")
        log.handlers, log.propagate = [_Lines(self)], False

    def info(self, line: str) -> None:
        self.console.print(f"helix-jax: {line}")

    def counting(self) -> Progress:
        return self._bar(MofNCompleteColumn())

    def reading(self) -> Progress:
        """A bar of bytes, and of bytes per second."""
        return self._bar(DownloadColumn(), TransferSpeedColumn())

    def _bar(self, *columns: ProgressColumn) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


class _Lines(logging.Handler):
    def __init__(self, reporter: Reporter):
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.info(record.getMessage())
