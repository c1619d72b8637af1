"""Runs a command: turns errors into one line on stderr and an exit code, and makes Ctrl-C reliable.

The subcommands of `helix-jax` and the benchmarks in scripts/ use the same code.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import jax

from helix_jax import processes
from helix_jax.validation import MissingPackageError

OK, FAILED, BAD_INPUT, LOST_PROCESS, INTERRUPTED = 0, 1, 2, processes.LOST_PROCESS, 130
PROGRAM = "helix-jax"
_GRACE_S = 1.0  # until a command ends whose KeyboardInterrupt Python has swallowed


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line."""

    def __init__(self, prog: str | None = PROGRAM, description: str | None = None, **options) -> None:
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=as_written, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Report a mistake and exit."""
        sys.exit(report_error(f"{message} (see {self.prog} --help)", program=self.prog.split()[0]))


def run_command(command: Callable[[], int | None], program: str = PROGRAM) -> int:
    """Run a command and return its exit code.

    Args:
        command: Returns the exit code, or None for success.
        program: The name that error messages start with.

    Returns:
        What the command returned, 2 for bad input, 3 if another process was lost. After Ctrl-C the process exits with
        130.
    """
    try:
        with _lost_interrupts_exit(program):
            return command() or OK
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError, MissingPackageError) as error:
        return report_error(_describe(error), program=program)
    except jax.errors.JaxRuntimeError as error:
        return _report_runtime_error(error, program)
    except KeyboardInterrupt:
        _exit_interrupted(program)


def report_error(message: str, status: int = BAD_INPUT, program: str = PROGRAM) -> int:
    """Write one line on stderr and return `status`. One of several processes exits at once."""
    several = processes.process_count() > 1
    who = program if processes.is_first() else f"{program}, process {processes.process_index()}"
    print(f"{who}: {' '.join(message.split())}", file=sys.__stderr__ if several else sys.stderr)
    if several:
        processes.exit_now(status)
    return status


@contextmanager
def checked_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed.

    A loop that must end cleanly calls it in every iteration: Python swallows a KeyboardInterrupt that is raised while
    an object is destroyed.
    """
    interrupted = False

    def interrupt(*_: object) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    with _sigint_handler(interrupt):
        yield check


@contextmanager
def _lost_interrupts_exit(program: str) -> Iterator[None]:
    """End the process soon after Ctrl-C, even if Python swallows the KeyboardInterrupt."""

    def interrupt(*_: object) -> NoReturn:
        timer = threading.Timer(_GRACE_S, _exit_interrupted, [program])
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    with _sigint_handler(interrupt):
        yield


@contextmanager
def _sigint_handler(handler: Callable[..., NoReturn]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    previous, previous_hook = signal.signal(signal.SIGINT, handler), sys.unraisablehook
    sys.unraisablehook = partial(_report_unraisable, previous_hook)
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGINT, previous)


def _report_unraisable(report: Callable[[Any], None], unraisable: Any) -> None:
    """Report an exception that Python swallowed, except an interrupt: the end of the command reports that."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        report(unraisable)


def _describe(error: Exception) -> str:
    """Return the message of an error. Those of the system name a file, but not what to do."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"'{error.filename}' cannot be opened ({error.strerror}): check the path"
    return str(error)


def _exit_interrupted(program: str) -> NoReturn:
    print(f"\n{program}: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # XLA's threads are still running, and the interpreter's teardown may crash under them


def _report_runtime_error(error: Exception, program: str) -> int:
    if message := processes.lost_process_message(error):
        return report_error(message, LOST_PROCESS, program)
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return report_error(
        f"out of device memory ({str(error).splitlines()[0]}): use more devices, or less memory at once "
        f"(a shorter prompt, fewer rows, a smaller batch or more accumulation)",
        program=program,
    )
