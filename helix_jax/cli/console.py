"""What a command prints besides its result: lines on stderr, and progress bars if stderr is a terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Reporter:
    """Prints lines and progress bars on stderr. The library's warnings are printed as such lines too."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        logger = logging.getLogger("helix_jax")
        logger.handlers, logger.propagate = [_ReportingHandler(self)], False

    def info(self, line: str) -> None:
        """Print a line."""
        self.console.print(f"helix-jax: {line}")

    def counting(self) -> Progress:
        """Return a progress bar that counts."""
        return self._bar(MofNCompleteColumn())

    def reading(self) -> Progress:
        """Return a progress bar of bytes and of bytes per second."""
        return self._bar(DownloadColumn(), TransferSpeedColumn())

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Show a spinner and the time, on a terminal, while programs are compiled."""
        columns = SpinnerColumn(), TextColumn("compiling"), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as shown:
            shown.add_task("compiling", total=None)
            yield

    def _bar(self, *columns: ProgressColumn) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)


class _ReportingHandler(logging.Handler):
    def __init__(self, reporter: Reporter):
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.info(record.getMessage())
