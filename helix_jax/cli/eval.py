"""Compare what a model recalls and predicts under each placement with one device."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from helix_jax.cli.app import FAILED, OK
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import (
    Group,
    add_cache_arguments,
    add_choice,
    add_device_arguments,
    add_mesh_arguments,
    add_model_arguments,
    load_model,
    open_devices,
    report_fake_devices,
)
from helix_jax.cli.output import new_figure, write_json
from helix_jax.config import ModelConfig
from helix_jax.evaluation import (
    ONE_DEVICE,
    NeedleOptions,
    NeedleResults,
    PerplexityOptions,
    PerplexityResults,
    TokenText,
    held_out_text,
    make_plans,
    run_needles,
    run_perplexity,
)
from helix_jax.evaluation.plots import plot_needles, plot_perplexity
from helix_jax.folder import ModelFolder
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import CP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.text import Tokenizer

DEFAULT_TEXT = Path(__file__).parents[2] / "scripts" / "data" / "kjv.txt"  # not part of an installed package

EXAMPLE = "helix-jax eval needles --model DIR --cp 4 --lengths 1024 4096 --plot needles.png"

NEEDLES = """Hide passkeys in held-out text, at every depth of contexts of every length.

Each passkey is asked for directly after its context, and again after --decoded
tokens of the model, which are stored on the ranks round-robin. A placement that
answers differently from one device makes the exit code 1. --zero-rank zeroes
what one rank has cached of the context before the first question, and skips
this comparison."""

PERPLEXITY = """Measure bits per byte of held-out text at several positions.

At each position the context before it is read, and then --span tokens one by
one as if they had been decoded, so they are stored on the ranks round-robin. A
placement under which the loss of a token differs by more than 1e-3 nats from
one device makes the exit code 1. (With an fp8 cache they may differ by more,
because rounding to float8 magnifies tiny differences; --json has the largest.)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the evaluations, and their options, to the parser of `helix-jax eval`."""
    commands = parser.add_subparsers(required=True, metavar="needles|perplexity")
    for name, text, description, add_own, evaluate in (
        ("needles", "find passkeys in long contexts", NEEDLES, _add_needle_arguments, _evaluate_needles),
        ("perplexity", "bits per byte by position", PERPLEXITY, _add_perplexity_arguments, _evaluate_perplexity),
    ):
        example = f"example:\n  helix-jax eval {name} --cp 4 --plot {name}.png"
        added = commands.add_parser(name, help=text, description=description, epilog=example)
        add_own(added.add_argument_group("evaluation"))
        _add_shared_arguments(added)
        added.set_defaults(evaluate=evaluate)


def run(options: argparse.Namespace) -> int:
    """Run the evaluation that `options` choose. Returns the exit code: 1 if a placement differs from one device."""
    reporter = Reporter()
    different = options.evaluate(options, reporter)
    for line in different:
        reporter.info(line)
    return FAILED if different else OK


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text").add_argument
    add("--text", type=Path, metavar="FILE", help="a text file (default: scripts/data/kjv.txt of a checkout)")
    add("--held-out", type=float, default=0.05, metavar="SHARE", help="share at its end to read (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write the results to a file")
    add("--plot", type=Path, metavar="FILE.png", help="draw the results")
    add_model_arguments(parser, "a folder in Hugging Face format, with its tokenizer")
    mesh = add_mesh_arguments(parser)
    add_choice(mesh, "--placement", PLACEMENTS, "placement to evaluate; may be repeated (default: all)", several=True)
    add_cache_arguments(parser)
    add_device_arguments(parser, processes=False)


def _add_needle_arguments(parser: Group) -> None:
    default = NeedleOptions()
    text = "tokens per context (default: 4 lengths that fit the model)"
    parser.add_argument("--lengths", type=int, nargs="+", default=[], metavar="TOKENS", help=text)
    _add_int(parser, "--depths", "N", "number of depths of passkeys", default.depths)
    _add_int(parser, "--trials", "N", "contexts per length and depth", default.trials)
    _add_int(parser, "--decoded", "TOKENS", "tokens to decode before asking again", default.decoded)
    parser.add_argument("--zero-rank", type=int, metavar="RANK", help="zero what this cp rank has cached")
    _add_int(parser, "--seed", "N", "seed of text and passkeys", default.seed)
    _add_int(parser, "--rows", "N", "contexts per batch", default.rows)


def _add_perplexity_arguments(parser: Group) -> None:
    default = PerplexityOptions()
    text = "tokens before each span (default: powers of 2 from 64)"
    parser.add_argument("--positions", type=int, nargs="+", default=[], metavar="TOKENS", help=text)
    _add_int(parser, "--span", "TOKENS", "tokens to score one by one", default.span)
    _add_int(parser, "--windows", "N", "places in the text", default.windows)


def _add_int(parser: Group, option: str, metavar: str, description: str, default: int) -> None:
    text = f"{description} (default: {default})"
    parser.add_argument(option, type=int, default=default, metavar=metavar, help=text)


def _evaluate_needles(options: argparse.Namespace, reporter: Reporter) -> list[str]:
    """Return a line for every placement that differs from one device."""
    needles = NeedleOptions(
        lengths=tuple(options.lengths),
        depths=options.depths,
        trials=options.trials,
        decoded=options.decoded,
        seed=options.seed,
        rows=options.rows,
        chunk=options.prefill_chunk,
        zero_rank=options.zero_rank,
    )
    task = _open_task(options, reporter, lambda config, tokenizer: needles.for_model(config.max_positions, tokenizer))
    with _Bars(reporter) as bars:
        results = run_needles(
            task.load, task.plans, task.text, task.options, on_progress=bars.update, on_result=task.write_json
        )
    _print(_needles_table(results))
    if task.figure:
        plot_needles(task.figure, results, list(task.plans)[1])
        task.figure.savefig(options.plot, dpi=150)
    if options.zero_rank is not None:
        return []
    return [
        f"under {name}, {count} of {len(results.needles)} needles are answered differently than on one device"
        for name, count in results.count_different().items()
    ]


def _evaluate_perplexity(options: argparse.Namespace, reporter: Reporter) -> list[str]:
    """Return a line for every placement that differs from one device."""
    perplexity = PerplexityOptions(
        tuple(options.positions), span=options.span, windows=options.windows, chunk=options.prefill_chunk
    )
    task = _open_task(options, reporter, lambda config, _: perplexity.for_model(config.max_positions))
    with _Bars(reporter) as bars:
        results = run_perplexity(
            task.load, task.plans, task.text, task.options, on_progress=bars.update, on_result=task.write_json
        )
    _print(_perplexity_table(results))
    if task.figure:
        plot_perplexity(task.figure, results)
        task.figure.savefig(options.plot, dpi=150)
    return [
        f"under {name}, the loss of a token differs by {gap:.2g} nats from one device"
        for name, gap in results.different().items()
    ]


@dataclass(frozen=True)
class _Task:
    """What an evaluation runs on. Everything but the weights has been checked and opened."""

    options: Any
    text: TokenText
    plans: dict[str, Plan]
    figure: Any
    load: Callable[[Plan], Transformer]
    write_json: Callable[[Any], None]


def _open_task(
    options: argparse.Namespace,
    reporter: Reporter,
    fill_in: Callable[[ModelConfig, Tokenizer], NeedleOptions | PerplexityOptions],
) -> _Task:
    """Check all input, then open the devices. `fill_in` returns the options of the evaluation for a model."""
    folder = ModelFolder.open(options.model)
    config, tokenizer = folder.config, folder.tokenizer
    if tokenizer is None:
        raise ValueError(f"'{folder.path}' has no tokenizer: add the tokenizer.json of the model")
    filled_in = fill_in(config, tokenizer)
    text = held_out_text(_read_text(options.text), options.held_out, tokenizer, config.vocab, filled_in.max_len)
    figure = new_figure("--plot", options.plot) if options.plot else None
    mesh = open_devices(options)
    choices = {"kernel": options.kernel, "cache_dtype": options.kv_cache_dtype}
    plans = make_plans(mesh, options.placement or PLACEMENTS, options.block, **choices)
    for plan in plans.values():
        plan.check_model(config)

    def load(plan: Plan) -> Transformer:
        if plan is plans[ONE_DEVICE]:  # the first one: by now all input is checked
            report_fake_devices(mesh, reporter)
        return load_model(folder.path, plan, jnp.float32, reporter)

    return _Task(
        options=filled_in,
        text=text,
        plans=plans,
        figure=figure,
        load=load,
        write_json=lambda results: write_json(options.json, {"cp": mesh.shape[CP]} | results.to_json()),
    )


def _read_text(file: Path | None) -> bytes:
    if file is None and not DEFAULT_TEXT.exists():
        raise ValueError(f"the default text '{DEFAULT_TEXT}' is only in a checkout of the repository: give --text FILE")
    return (file or DEFAULT_TEXT).read_bytes()


class _Bars:
    """A progress bar per plan, shown from its first report to its last. Without a terminal, a line per report."""

    def __init__(self, reporter: Reporter):
        self._reporter = reporter
        self._open: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._close()

    def update(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of the work under the plan `name` are done."""
        if not self._reporter.console.is_terminal:
            self._reporter.info(f"{name}: {done} of {total} done")
            return
        if self._open is None:
            bar = self._reporter.counting()
            bar.start()
            self._open = bar, bar.add_task(name, total=total)
        bar, task = self._open
        bar.update(task, completed=done)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open[0].stop()
            self._open = None


def _print(table: Table) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _needles_table(results: NeedleResults) -> Table:
    at = [needle.length for needle in results.needles]
    lengths = sorted(set(at))
    table = Table("passkeys found", *(f"{length:,} tokens" for length in lengths), "all")
    for name, found in results.plans.items():
        for index in range(results.questions):
            correct = results.correct(name, index)
            shares = [correct[[length == one for one in at]].mean() for length in lengths]
            label = f"  again after {results.options.decoded} tokens" if index else name
            table.add_row(label, *(f"{share:.1%}" for share in shares), f"{correct.mean():.1%}")
        if found.bits_per_byte is not None:
            empty = [""] * (len(lengths) - 1)
            table.add_row("  bits per byte after it", *empty, f"{found.bits_per_byte:.4f}", "")
    return table


def _perplexity_table(results: PerplexityResults) -> Table:
    table = Table("bits per byte after", *results.bits_per_byte)
    for index, position in enumerate(results.options.positions):
        table.add_row(f"{position:,} tokens", *(f"{bits[index]:.4f}" for bits in results.bits_per_byte.values()))
    return table
