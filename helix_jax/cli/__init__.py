"""The command `helix-jax`: results on stdout, everything else on stderr."""

import importlib
import io
import sys
from collections.abc import Sequence

from helix_jax import __version__
from helix_jax.cli.app import PROGRAM, Parser, run_command

__all__ = ["main"]

_DESCRIPTION = """Run language models on long texts.

The key/value cache, which grows with a text, is sharded along the text over several devices (Helix parallelism), so
that each stores and reads a part of it. Results do not depend on the number of devices."""

_EXAMPLES = """examples:
  helix-jax generate --prompt "In the beginning" --cp 4       the demo model, on 4 fake devices if there is only a CPU
  helix-jax generate --model DIR --chat --prompt "Hello"      a model folder in Hugging Face format
  helix-jax batch --help                                      the options of a command"""

# For each subcommand, a module with EXAMPLE (command lines), `add_arguments(parser)` and `run(options)`. It is imported
# only if it is used.
_COMMANDS = {
    "layout": "show which device stores which tokens of a sequence",
    "generate": "continue one prompt, or answer one message",
    "batch": "answer a file of prompts or chats, many at a time",
    "train": "train a model",
    "eval": "check what a model recalls of long texts on several devices",
    "plan": "predict how fast some devices would decode, and how to use them",
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
    parser = Parser(PROGRAM, description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, title="commands", metavar="|".join(_COMMANDS), prog=PROGRAM)
    used = next((argument for argument in arguments if argument in _COMMANDS), None)
    for name, text in _COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name == used:
            module = importlib.import_module(f"helix_jax.cli.{name}")
            command.description, command.epilog = module.__doc__, f"example:\n  {module.EXAMPLE}"
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
