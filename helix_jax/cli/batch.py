"""Answers a file of requests, one a line, many at a time. What --out holds already is not done again."""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from jax.sharding import Mesh
from rich.live import Live
from rich.table import Table

from helix_jax.checkpoint import read_config
from helix_jax.cli.devices import open_mesh, processes_of
from helix_jax.cli.jsonl import RequestLine, RejectedLine, ResultsFile, NonWritingResults, read_requests
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_shared_arguments, make_setup
from helix_jax.config import ModelConfig
from helix_jax.engine import FinishedEvent, Engine, EngineStats
from helix_jax.processes import on_first_process
from helix_jax.text import open_tokenizer

OK, FAILED = 0, 1
AHEAD = 4  # requests for each row, those under way included: enough to keep the rows busy, whatever the length of IN
REFRESH_S = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "requests",
        type=Path,
        metavar="IN.jsonl",
        help='requests, one a line: {"id", "prompt" or "prompt_ids", "max_new_tokens", "temperature", ...}',
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="OUT.jsonl",
        help="results are added to it as they come; ids with a result are skipped, those that failed tried again",
    )
    add("--rows", type=int, default=8, metavar="N", help="requests that decode together (default: 8)")
    add(
        "--pages",
        type=int,
        metavar="N",
        help="cache pages of each rank (default: what all rows can fill, or memory holds)",
    )
    add("--max-len", type=int, metavar="TOKENS", help="of a request, prompt and all (default: the model's positions)")
    add_shared_arguments(parser)


def run(options: argparse.Namespace) -> int:
    reporter = Reporter()
    config = read_config(options.model)
    _check(options, config)
    mesh = open_mesh(options.platform, options.tp, options.cp, processes=processes_of(options))
    setup = make_setup(options, config, mesh)
    with _open_requests(options) as lines, _open_results(options.out) as results:
        _say_what_stands(options.out, results, reporter)
        asked = _good(read_requests(lines, results.done), results)
        first = next(asked, None)
        if first is not None:  # else there is no need of weights
            setup.report_devices(reporter)
            engine = _engine(options, setup, mesh, reporter)
            reporter.info(f"shared prefixes are {engine.sharing}")
            try:
                _answer_all(engine, chain([first], asked), results, AHEAD * options.rows, reporter)
            except KeyboardInterrupt:
                reporter.info(f"'{options.out}' keeps the {results.answered} lines answered: the same command goes on")
                raise
    return _end(options.out, results, reporter)


def _check(options: argparse.Namespace, config: ModelConfig) -> None:
    """What the engine would refuse, before weights are read."""
    for name in ("rows", "pages", "max_len", "page", "prefill_chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: give at least 1")
    if options.max_len and options.max_len > config.max_positions:
        raise ValueError(f"--max-len is {options.max_len}: the model has {config.max_positions} positions")


def _open_requests(options: argparse.Namespace) -> BinaryIO:
    """Opened, not looked at first: it may be a pipe."""
    if options.out.exists() and options.requests.exists() and options.out.samefile(options.requests):
        raise ValueError(f"--out '{options.out}' is the file of requests: give another")
    try:
        return options.requests.open("rb")
    except OSError as error:
        raise ValueError(f"'{options.requests}' cannot be read: {error.strerror}") from None


def _open_results(out: Path) -> ResultsFile:
    """The first process writes them; all know what is done."""
    opened: list[ResultsFile] = []

    def open_and_tell() -> list[str]:
        opened.append(ResultsFile(out))
        return sorted(opened[0].done)

    done = on_first_process(open_and_tell)
    return opened[0] if opened else NonWritingResults(done)


def _say_what_stands(out: Path, results: ResultsFile, reporter: Reporter) -> None:
    if results.mended:
        reporter.info(f"the last line of '{out}' was half written: it is gone, and done again")
    if results.done:
        reporter.info(f"'{out}' has {len(results.done)} results: these are skipped")


def _good(found: Iterator[RequestLine | RejectedLine], results: ResultsFile) -> Iterator[RequestLine]:
    """What can be submitted; of what cannot, the error is written."""
    for one in found:
        if isinstance(one, RejectedLine):
            results.add_error(one)
        else:
            yield one


def _answer_all(engine: Engine, asked: Iterator[RequestLine], results: ResultsFile, most: int, reporter: Reporter) -> None:
    """Reads on while fewer than `most` requests are under way; writes each when it ends."""
    under_way: dict[str, RequestLine] = {}
    with _board(reporter) as show:
        while True:
            while len(under_way) < most and (one := next(asked, None)):
                try:
                    under_way[engine.submit(one.prompt, one.params, str(one.id))] = one
                except ValueError as error:
                    results.add_error(RejectedLine(one.line, one.id, str(error)))
            if not under_way:
                return
            for event in engine.step():
                if isinstance(event, FinishedEvent):
                    results.add(under_way.pop(event.id).id, event.result)
            show(engine, results)


def _engine(options: argparse.Namespace, setup: DecodeSetup, mesh: Mesh, reporter: Reporter) -> Engine:
    tokenizer = open_tokenizer(setup.folder, setup.config)
    room = {"rows": options.rows, "pages": options.pages, "page": setup.page, "max_len": options.max_len}
    engine = Engine(setup.load(reporter), setup.plan, **room, chunk=setup.chunk, tokenizer=tokenizer)
    engine.warm_up()  # the times of a request are not to hold a compilation
    return engine


@contextmanager
def _board(reporter: Reporter) -> Iterator[Callable[[Engine, ResultsFile], None]]:
    """Shows how things stand, now and then; on a terminal only."""
    if not reporter.console.is_terminal:
        yield lambda engine, results: None
        return
    due = 0.0
    with Live(console=reporter.console, auto_refresh=False, transient=True) as live:

        def show(engine: Engine, results: ResultsFile) -> None:
            nonlocal due
            if time.monotonic() >= due:
                live.update(_table(engine.stats(), results), refresh=True)
                due = time.monotonic() + REFRESH_S

        yield show


def _table(now: EngineStats, results: ResultsFile) -> Table:
    used = f"{min(now.pages_in_use)} to {max(now.pages_in_use)}"
    columns: list[dict[str, object]] = [
        {"answered": results.answered, "failed": results.failed, "": ""},
        {"running": now.running, "waiting": now.waiting, "preempted": now.preemptions},
        {"tokens/s": f"{now.tokens_per_s:.1f}", "decoded": now.decoded_tokens, "prefilled": now.prefilled_tokens},
        {"pages of a rank": now.pages, "in use": used, "cached": now.pages_cached},
    ]
    table = Table(show_header=False)
    for line in zip(*(column.items() for column in columns), strict=True):
        table.add_row(*(str(cell) for pair in line for cell in pair))
    return table


def _end(out: Path, results: ResultsFile, reporter: Reporter) -> int:
    reporter.info(f"{results.answered} lines answered, {results.failed} failed, in '{out}'")
    if results.first_failed is None:
        return OK
    reporter.info(f"the first that failed is line {results.first_failed.line}: {results.first_failed.error}")
    return FAILED
