"""Answer the requests in a file, many at a time. Requests that have a result in --out already are skipped.

A line of IN.jsonl is a JSON object: a prompt, token ids or a chat, and if needed how it is continued.

  {"prompt": "In the beginning", "max_new_tokens": 20}
  {"id": "two", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7, "seed": 1}
  {"custom_id": "three", "body": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}}

The last is a line of OpenAI's batch API. Its id is the custom_id, and what its body leaves out has the defaults of this
command (temperature 0, 128 tokens). A field that is not supported, and would change the result, is an error of its
line. A line of OUT.jsonl has the id, the text, the tokens and why they end, or the error.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from rich.live import Live
from rich.table import Table

from helix_jax.cli.app import FAILED, OK
from helix_jax.cli.console import Reporter
from helix_jax.cli.jsonl import RejectedLine, RequestLine, ResultCounter, ResultsFile, read_requests
from helix_jax.cli.options import DecodeSetup, add_decode_arguments, make_setup, open_devices, report_drafts
from helix_jax.engine import Engine, EngineStats, FinishedEvent
from helix_jax.engine.requests import sample_ids
from helix_jax.folder import ModelFolder
from helix_jax.processes import on_first_process
from helix_jax.validation import check_int

REQUESTS_PER_ROW = 4  # requests in the engine per row: enough to keep the rows busy without reading all of IN
REFRESH_S = 0.25


EXAMPLE = """helix-jax batch IN.jsonl --out OUT.jsonl --model DIR --cp 4 --rows 16
  helix-jax batch QUESTIONS.jsonl --out ANSWERS.jsonl --model DIR --chat"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax batch` to its parser."""
    group = parser.add_argument_group("requests and results")
    add = group.add_argument
    add("requests", type=Path, metavar="IN.jsonl", help="requests, one per line, or a pipe")
    text = "results are appended as they arrive; requests with a result are skipped, failed ones are repeated"
    add("--out", type=Path, required=True, metavar="OUT.jsonl", help=text)
    text = "each text prompt is a message to the model, which answers it (needs the chat template of the model folder)"
    add("--chat", action="store_true", help=text)
    add = parser.add_argument_group("batch").add_argument
    add("--rows", type=int, default=8, metavar="N", help="requests that decode together (default: 8)")
    text = "cache pages per device (default: as many as all rows can use, or as fit into memory)"
    add("--pages", type=int, metavar="N", help=text)
    text = "maximum length of a request, prompt and output (default: the model's maximum)"
    add("--max-len", type=int, metavar="TOKENS", help=text)
    add_decode_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run `helix-jax batch` and return its exit code: 1 if a request failed."""
    reporter = Reporter()
    folder = ModelFolder.open(options.model)
    _check(options, folder)
    setup = make_setup(options, folder, open_devices(options), options.max_len or folder.config.max_positions)
    answer_s = 0.0
    with _open_requests(options) as lines, _open_results(options.out) as results:
        _report_earlier_results(options.out, results, reporter)
        requests = _valid_requests(read_requests(lines, results.done, chat=options.chat), results)
        first = next(requests, None)
        if first is not None:  # otherwise the weights are not needed
            setup.report_devices(reporter)
            engine = _make_engine(options, setup, reporter)
            reporter.info(f"prefix caching is {engine.prefix_caching_status}")
            start_s, most = time.perf_counter(), REQUESTS_PER_ROW * options.rows
            try:
                _answer_all(engine, folder, chain([first], requests), results, most, reporter)
                answer_s = time.perf_counter() - start_s
                report_drafts(engine, reporter)
            except KeyboardInterrupt:
                reporter.info(f"'{options.out}' has the {results.answered} lines answered: the same command continues")
                raise
    return _report_end(options.out, results, answer_s, reporter)


def _check(options: argparse.Namespace, folder: ModelFolder) -> None:
    """Check what the engine checks too, before weights are read, and that there is a chat template if it is needed."""
    for name in ("rows", "pages", "max_len"):
        value = getattr(options, name)
        if value is not None:
            check_int(f"--{name.replace('_', '-')}", value, least=1)
    positions = folder.config.max_positions
    if options.max_len and options.max_len > positions:
        raise ValueError(f"--max-len is {options.max_len}: give at most the model's {positions} positions")
    if options.chat:
        _ = folder.chat_template  # raises if there is none


def _open_requests(options: argparse.Namespace) -> BinaryIO:
    if options.out.exists() and options.requests.exists() and options.out.samefile(options.requests):
        raise ValueError(f"--out '{options.out}' is the input file: give another file")
    try:
        return options.requests.open("rb")  # no check before: the file may be a pipe
    except OSError as error:
        raise ValueError(f"'{options.requests}' cannot be read: {error.strerror}") from None


def _open_results(out: Path) -> ResultCounter:
    """Open the results on the first process, which writes them, and share with the others which requests are done."""
    opened: list[ResultsFile] = []

    def open_file() -> list[str]:
        opened.append(ResultsFile(out))
        return sorted(opened[0].done)

    done = on_first_process(open_file)
    return opened[0] if opened else ResultCounter(done)


def _report_earlier_results(out: Path, results: ResultCounter, reporter: Reporter) -> None:
    if isinstance(results, ResultsFile) and results.truncated:
        reporter.info(f"the last line of '{out}' was incomplete: it was removed, and its request is repeated")
    if results.done:
        reporter.info(f"'{out}' has {len(results.done)} results: their requests are skipped")


def _valid_requests(lines: Iterator[RequestLine | RejectedLine], results: ResultCounter) -> Iterator[RequestLine]:
    """Yield the valid requests, and write the errors of the other lines."""
    for line in lines:
        if isinstance(line, RejectedLine):
            results.add_error(line)
        else:
            yield line


def _answer_all(
    engine: Engine,
    folder: ModelFolder,
    requests: Iterator[RequestLine],
    results: ResultCounter,
    max_active: int,
    reporter: Reporter,
) -> None:
    """Keep `max_active` requests or samples in the engine, and write the result of each when it finishes.

    A request is submitted with all of its samples.
    """
    active: dict[str, RequestLine] = {}
    with _live_stats(reporter) as show:
        while True:
            while len(active) < max_active and (request := next(requests, None)):
                try:
                    active |= _submit(engine, folder, request)
                except (TypeError, ValueError) as error:
                    results.add_error(RejectedLine(request.line, request.id, str(error)))
            if not active:
                return
            for event in engine.step():
                if isinstance(event, FinishedEvent) and (request := active.pop(event.id, None)):
                    results.add(request.id, event.result, event.result.index if request.params.n > 1 else None)
            show(engine, results)


def _submit(engine: Engine, folder: ModelFolder, request: RequestLine) -> dict[str, RequestLine]:
    """Submit a request, and cancel its samples that have a result already. Return the ids of the others."""
    prompt = folder.encode("the prompt", request.prompt)
    ids = sample_ids(engine.submit(prompt, request.params, str(request.id)), request.params.n)
    for index in request.done:
        engine.cancel(ids[index])
    return {id: request for index, id in enumerate(ids) if index not in request.done}


def _make_engine(options: argparse.Namespace, setup: DecodeSetup, reporter: Reporter) -> Engine:
    engine = Engine(
        setup.load(reporter),
        setup.plan,
        rows=options.rows,
        pages=options.pages,
        page=setup.page,
        max_len=options.max_len,
        chunk=setup.chunk,
        tokenizer=setup.folder.tokenizer,
        **setup.load_drafts(reporter),
    )
    reporter.info("compiling: this takes a minute or more for a large model")
    with reporter.compiling():
        compile_s = engine.warm_up()  # so that the times of requests do not include it
    reporter.info(f"compiled in {compile_s:.1f} s")
    return engine


@contextmanager
def _live_stats(reporter: Reporter) -> Iterator[Callable[[Engine, ResultCounter], None]]:
    """Yield a function that updates a table of statistics on a terminal, and does nothing elsewhere."""
    if not reporter.console.is_terminal:
        yield lambda engine, results: None
        return
    next_refresh = 0.0
    with Live(console=reporter.console, auto_refresh=False, transient=True) as live:

        def show(engine: Engine, results: ResultCounter) -> None:
            nonlocal next_refresh
            if time.monotonic() >= next_refresh:
                live.update(_table(engine.stats(), results), refresh=True)
                next_refresh = time.monotonic() + REFRESH_S

        yield show


def _table(stats: EngineStats, results: ResultCounter) -> Table:
    in_use = f"{min(stats.pages_in_use)} to {max(stats.pages_in_use)}"
    columns: list[dict[str, object]] = [
        {"answered": results.answered, "failed": results.failed, "": ""},
        {"running": stats.running, "waiting": stats.waiting, "preempted": stats.preemptions},
        {"tokens/s": f"{stats.tokens_per_s:.1f}", "decoded": stats.decoded_tokens, "prefilled": stats.prefilled_tokens},
        {"pages per rank": stats.pages, "in use": in_use, "cached": stats.pages_cached},
    ]
    table = Table(show_header=False)
    for line in zip(*(column.items() for column in columns), strict=True):
        table.add_row(*(str(cell) for pair in line for cell in pair))
    return table


def _report_end(out: Path, results: ResultCounter, answer_s: float, reporter: Reporter) -> int:
    """Report the first error and, in the last line, what was done in `answer_s`, which excludes compilation."""
    if results.first_failed is not None:
        reporter.info(f"the first that failed is line {results.first_failed.line}: {results.first_failed.error}")
    counts = f"{results.answered} lines answered, {results.failed} failed, in '{out}'"
    if results.answered:
        counts += f": {results.tokens:,} new tokens in {answer_s:.1f} s, {results.tokens / answer_s:.1f} tokens/s"
    reporter.info(counts)
    return OK if results.first_failed is None else FAILED
