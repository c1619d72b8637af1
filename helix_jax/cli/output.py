"""What the benchmarks share: errors of one line, a JSON file written as results come, a figure asked for in advance."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import jax

from helix_jax import processes

BAD_INPUT, INTERRUPTED = 2, 130


def complain(message: str, code: int = BAD_INPUT) -> int:
    who = Path(sys.argv[0]).name + ("" if processes.is_first() else f", process {processes.process_index()}")
    print(f"{who}: {' '.join(message.split())}", file=sys.__stderr__ if processes.process_count() > 1 else sys.stderr)
    if processes.process_count() > 1:
        processes.exit_now(code)
    return code


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str | None) -> None:
        shown_as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=shown_as_written, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        sys.exit(complain(f"{message} (see --help)"))


def exit_status(main: Callable[[], None], if_too_large: str) -> int:
    """The exit status. if_too_large: what to do when the memory of a device does not suffice."""
    try:
        main()
    except (ValueError, OSError) as error:
        return complain(str(error))
    except jax.errors.JaxRuntimeError as error:
        if said := processes.lost_process_message(error):
            return complain(said, processes.LOST_PROCESS)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return complain(f"out of device memory ({str(error).splitlines()[0]}): {if_too_large}")
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    return 0


@contextmanager
def interrupts_noticed() -> Iterator[Callable[[], None]]:
    """Gives what raises KeyboardInterrupt if one came: Python swallows what is raised while an object is destroyed."""
    came = False

    def interrupted(*_: object) -> NoReturn:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def notice() -> None:
        if came:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGINT, before)


def write_json(file: Path | None, found: Any) -> None:
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


def new_figure(option: str, file: Path) -> Any:
    """Before anything is measured: a figure that cannot be drawn is better known now."""
    if not file.suffix:
        raise ValueError(f"{option} '{file}' has no ending: give a file like runs.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"{option} needs matplotlib: pip install '.[plot]'") from None
    figure = Figure(layout="constrained")
    if file.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"{option} '{file}' is of no kind that matplotlib writes: give a file like runs.png")
    return figure
