"""The command `helix-jax`: results on stdout, everything else on stderr."""

import importlib
import io
import sys
from collections.abc import Sequence

from helix_jax import __version__
from helix_jax.cli.app import PROGRAM, Parser, run_command

__all__ = ["main"]

# A module with `add_arguments(parser)` and `run(options)` for each subcommand, imported only if it is used.
_COMMANDS = {
    "layout": "show which rank stores which tokens",
    "generate": "continue a prompt",
    "batch": "answer a file of requests",
    "train": "train a model",
    "eval": "evaluate long contexts on each placement",
    "plan": "predict which mesh decodes best on some devices",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        arguments: The command line without the program, default `sys.argv[1:]`.

    Returns:
        0; 1 (--verify found a difference, a line of a batch failed, or placements differ in an evaluation); 2 (bad
        input); 3 (another process was lost). Ctrl-C exits with 130.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text is shown on a terminal without UTF-8 too
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    options = _parser(arguments).parse_args(arguments)
    return options.run(options)


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(PROGRAM, description="Decode over a key/value cache that is sharded along the sequence.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="|".join(_COMMANDS), prog=PROGRAM)
    used = next((argument for argument in arguments if argument in _COMMANDS), None)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == used:
            module = importlib.import_module(f"helix_jax.cli.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
