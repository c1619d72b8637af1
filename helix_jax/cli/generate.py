"""Continues a prompt: streams the text, and ends with how the cache lies on the ranks and the time per token."""

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from helix_jax.cache import tokens_per_rank
from helix_jax.checkpoint import read_config
from helix_jax.cli.devices import open_mesh, processes_of
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_shared_arguments, make_setup
from helix_jax.cli.prompts import encode, read_ids, read_text
from helix_jax.generation import Compiled, Decoded, Prefilled, check_request, stream
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, TP, make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import process_index
from helix_jax.sampling import make_sampling
from helix_jax.text import Detokenizer, Tokenizer, chat_ids, open_tokenizer

OK, DIFFERENT = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file that holds the prompt")
    prompt.add_argument("--prompt-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="tokens to decode at most (default: 128)")
    add_shared_arguments(parser)
    add("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that reach P together (default: 1)",
    )
    add("--seed", type=int, default=0, help="a draw depends on it and the position alone (default: 0)")
    add("--chat", action="store_true", help="put the prompt into the model's chat template, as what the user says")
    add("--ignore-eos", action="store_true", help="go on past an end-of-sequence token")
    add("--verify", action="store_true", help="decode again on one device; exit 1 if a token differs")
    add("--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class Job:
    """One prompt and how to continue it, whatever the mesh."""

    setup: DecodeSetup
    prompt: list[int]
    tokenizer: Tokenizer | None
    options: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The new tokens, and what it took. Seconds leave compilation out."""

    tokens: list[int]
    compile_s: float
    prefill_s: float
    decode_s_per_token: float | None


def run(options: argparse.Namespace) -> int:
    reporter = Reporter()
    config = read_config(options.model)
    tokenizer = open_tokenizer(options.model, config)
    prompt = _prompt(options, tokenizer)
    shape = _request(options)
    check_request(config, [prompt], **shape)
    mesh = open_mesh(options.platform, options.tp, options.cp, processes=processes_of(options))
    setup = make_setup(options, config, mesh)
    job = Job(setup, prompt, tokenizer, {**shape, **_sampling(options)})
    done = _decode(job, setup.load(reporter), reporter, quiet=options.json)
    difference = _difference(job, done.tokens, mesh, reporter) if options.verify else None
    if options.json:
        print(json.dumps(_report(job, done, None if not options.verify else difference is None)))
    else:
        reporter.console.print(_table(job, done))
    if difference is not None:
        reporter.info(difference)
        return DIFFERENT
    if options.verify:
        reporter.info(f"verified: the {len(done.tokens)} tokens equal those of one device")
    return OK


def _prompt(options: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if options.prompt_ids is not None:
        if options.chat:
            raise ValueError("--chat needs text, not --prompt-ids: give --prompt or --prompt-file")
        return read_ids(options.prompt_ids)
    text, source = options.prompt, "--prompt"
    if options.prompt_file is not None:
        text, source = read_text(options.prompt_file), f"'{options.prompt_file}'"
    ids = encode(text, source, tokenizer, options.model)
    return chat_ids(options.model, text) if options.chat else ids


def _request(options: argparse.Namespace) -> dict[str, int]:
    return {
        "max_new_tokens": options.max_new_tokens,
        "chunk": options.prefill_chunk,
        "page": options.page,
    }


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"--top-k is {options.top_k}: give at least 1, or leave it out")
    sampling = make_sampling(1, options.temperature, options.top_k or 0, options.top_p, options.seed)
    return {"sampling": sampling, "stop_token_ids": () if options.ignore_eos else None}


def _decode(job: Job, model: Transformer, reporter: Reporter, *, quiet: bool) -> Run:
    """Decodes; unless `quiet`, text goes to stdout as it comes."""
    text = None if quiet or job.tokenizer is None else Detokenizer(job.tokenizer)
    tokens: list[int] = []
    compile_s, prefill_s, decode_s = 0.0, 0.0, 0.0
    events = stream(model, [job.prompt], job.setup.plan, **job.options)
    job.setup.report_devices(reporter)  # once all input is known to be good
    with reporter.counting() as bar:
        task = bar.add_task("prefill", total=len(job.prompt))
        for event in events:
            if isinstance(event, Compiled):
                compile_s = event.seconds
            elif isinstance(event, Prefilled):
                prefill_s += event.seconds
                bar.update(task, completed=event.done)
            elif isinstance(event, Decoded) and event.tokens[0] is not None:
                bar.stop()
                decode_s += event.seconds
                tokens.append(event.tokens[0])
                _write(text.append(event.tokens[0]) if text else "")
    if text:
        _write(text.flush() + "\n")
    elif not quiet:  # no tokenizer: the ids are all that there is to show
        _write(json.dumps(tokens) + "\n")
    return Run(tokens, compile_s, prefill_s, decode_s / (len(tokens) - 1) if len(tokens) > 1 else None)


def _write(piece: str) -> None:
    if piece:
        sys.stdout.write(piece)
        sys.stdout.flush()


def _difference(job: Job, tokens: list[int], mesh: Mesh, reporter: Reporter) -> str | None:
    """Decodes again with nothing sharded; says where the tokens part, if they do."""
    mesh = make_mesh(1, 1, devices=[device for device in mesh.devices.flat if device.process_index == process_index()])
    plan = Plan(mesh, job.setup.plan.block)
    events = stream(job.setup.load(reporter, plan), [job.prompt], plan, **job.options)
    said = (event for event in events if isinstance(event, Decoded))
    for index, (ours, event) in enumerate(zip_longest(tokens, said)):
        theirs = event.tokens[0] if event else None
        if ours != theirs:
            best = np.sort(np.asarray(event.logits_BV[0]))[-2:] if event else (np.nan, np.nan)
            return (
                f"not verified: new token {index} is {ours}, but {theirs} on one device; "
                f"its two best logits lie {best[1] - best[0]:.3g} apart"
            )
    return None


def _report(job: Job, done: Run, verified: bool | None) -> dict[str, Any]:
    mesh = job.setup.plan.mesh
    return {
        "text": None if job.tokenizer is None else job.tokenizer.decode(done.tokens),
        "tokens": done.tokens,
        "prompt_tokens": len(job.prompt),
        "ranks": [{"rank": rank, "tokens": count} for rank, count in enumerate(_held(job, done))],
        "mesh": {"tp": mesh.shape[TP], "cp": mesh.shape[CP]},
        "platform": job.setup.platform,
        "kernel": job.setup.kernel,
        "compile_s": done.compile_s,
        "prefill_s": done.prefill_s,
        "decode_s_per_token": done.decode_s_per_token,
        "verified": verified,
    }


def _table(job: Job, done: Run) -> Table:
    plan = job.setup.plan
    tp, cp = plan.mesh.shape[TP], plan.mesh.shape[CP]
    title = f"tp {tp} x cp {cp}, {plan.layout.placement}, block {plan.layout.block}, kernel {job.setup.kernel}"
    prompt = tokens_per_rank(plan, len(job.prompt), len(job.prompt))
    speed = "-" if done.decode_s_per_token is None else f"{done.decode_s_per_token:.4f}"
    caption = f"{speed} s per token, prefill {done.prefill_s:.2f} s, compilation {done.compile_s:.1f} s"
    table = Table("rank", "prompt", "decoded", "tokens", title=title, caption=caption)
    for rank, (before, after) in enumerate(zip(prompt, _held(job, done), strict=True)):
        table.add_row(str(rank), str(before), f"+{after - before}", str(after))
    return table


def _held(job: Job, done: Run) -> list[int]:
    """Tokens in the cache of each rank; the last token was said, not cached."""
    return tokens_per_rank(job.setup.plan, len(job.prompt) + len(done.tokens) - 1, len(job.prompt))
