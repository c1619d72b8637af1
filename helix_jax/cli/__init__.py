"""`helix-jax`: parse, call, print. ResultsFile on stdout, everything else on stderr."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import jax

from helix_jax import __version__, processes
from helix_jax.cli import batch, generate, layout

OK, BAD_INPUT, INTERRUPTED = 0, 2, 130
_GRACE_S = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0, 1 (--verify found a difference, a line of a batch failed), 2 (bad input), 3 (another process is gone) or 130
    (Ctrl-C).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows text all the same
    try:
        options = _parser().parse_args(arguments)
        with _interrupts_cannot_be_lost():
            return options.run(options)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError) as error:
        return _complain(str(error))
    except jax.errors.JaxRuntimeError as error:
        if said := processes.lost_process_message(error):
            return _complain(said, processes.LOST_PROCESS)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _complain(f"out of device memory ({str(error).splitlines()[0]}): take more devices or a shorter prompt")
    except KeyboardInterrupt:
        _leave()


def _leave() -> NoReturn:
    print("\nhelix-jax: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # XLA's threads still run: a teardown of the interpreter under them may crash


@contextmanager
def _interrupts_cannot_be_lost() -> Iterator[None]:
    """Python swallows what is raised while an object is destroyed, a Ctrl-C too: then a timer ends the command."""

    def interrupted(*_: object) -> NoReturn:
        timer = threading.Timer(_GRACE_S, _leave)
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there are signals handled
        yield
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        sys.exit(_complain(f"{message} (see {self.prog} --help)"))


def _complain(message: str, status: int = BAD_INPUT) -> int:
    who = "helix-jax" if processes.is_first() else f"helix-jax, process {processes.process_index()}"
    print(f"{who}: {' '.join(message.split())}", file=sys.__stderr__ if processes.process_count() > 1 else sys.stderr)
    if processes.process_count() > 1:
        processes.exit_now(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="helix-jax", description="Decode over a key/value cache sharded along the sequence.")
    parser.add_argument("--version", action="version", version=f"helix-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="layout|generate|batch")
    for name, command, text in (
        ("layout", layout, "show which rank holds which tokens"),
        ("generate", generate, "continue a prompt"),
        ("batch", batch, "answer a file of requests"),
    ):
        added = commands.add_parser(name, help=text, description=command.__doc__, allow_abbrev=False)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
