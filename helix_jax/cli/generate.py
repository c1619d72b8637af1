"""Continue a prompt. The text is streamed; then follow the tokens on each rank and the time per token."""

import argparse
import json
import secrets
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from helix_jax.cache import tokens_per_rank
from helix_jax.checkpoint import read_config
from helix_jax.cli.app import FAILED, OK
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_decode_arguments, make_setup, open_devices
from helix_jax.cli.prompts import encode, read_ids, read_text
from helix_jax.generation import Compiled, Decoded, Prefilled, check_request, stream
from helix_jax.mesh import CP, TP, make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import on_first_process, process_index
from helix_jax.sampling import check_sampling, check_seed, make_sampling
from helix_jax.text import Detokenizer, Tokenizer, chat_ids, open_tokenizer
from helix_jax.validation import check_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax generate` to its parser."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the prompt")
    prompt.add_argument("--prompt-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids")
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens (default: 128)")
    add_decode_arguments(parser)
    text = "sampling temperature (default: 0, greedy decoding)"
    add("--temperature", type=float, default=0.0, metavar="X", help=text)
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (default: all)")
    text = "nucleus sampling: smallest set of tokens with total probability at least P (default: 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, metavar="S", help="seed of the sampler (default: a new one, which is reported)")
    add("--chat", action="store_true", help="format the prompt as a user message with the model's chat template")
    add("--ignore-eos", action="store_true", help="continue past end-of-sequence tokens")
    add("--verify", action="store_true", help="decode again on one device; exit 1 if a token differs")
    add("--json", action="store_true", help="print JSON")


@dataclass(frozen=True)
class GenerateJob:
    """A prompt and how to continue it.

    Attributes:
        setup: The model, and how it is sharded.
        prompt: The token ids.
        tokenizer: The tokenizer of the model, None if it has none.
        seed: The seed of the sampler, None for greedy decoding.
        options: The keyword arguments of `stream`.
    """

    setup: DecodeSetup
    prompt: list[int]
    tokenizer: Tokenizer | None
    seed: int | None
    options: dict[str, Any]


@dataclass(frozen=True)
class GenerateResult:
    """The new tokens, and the times of compilation, prefill and decoding. The latter two exclude compilation."""

    tokens: list[int]
    compile_s: float
    prefill_s: float
    decode_s_per_token: float | None


def run(options: argparse.Namespace) -> int:
    """Run `helix-jax generate` and return its exit code: 1 if --verify found a difference."""
    reporter = Reporter()
    job = _make_job(options)
    result = _decode(job, job.setup.load(reporter), reporter, quiet=options.json)
    difference = _find_difference(job, result.tokens, reporter) if options.verify else None
    if options.json:
        print(json.dumps(_report(job, result, None if not options.verify else difference is None)))
    else:
        reporter.console.print(_table(job, result))
    if difference is not None:
        reporter.info(difference)
        return FAILED
    if options.verify:
        reporter.info(f"verified: the {len(result.tokens)} tokens equal those of one device")
    return OK


def _make_job(options: argparse.Namespace) -> GenerateJob:
    """Check all options, then open the devices."""
    config = read_config(options.model)
    tokenizer = open_tokenizer(options.model, config)
    prompt = _read_prompt(options, tokenizer)
    request = {"max_new_tokens": options.max_new_tokens, "chunk": options.prefill_chunk, "page": options.page}
    check_request(config, [prompt], **request)
    _check_sampling(options)
    setup = make_setup(options, config, open_devices(options))
    seed = _choose_seed(options)
    sampling = make_sampling(1, options.temperature, options.top_k or 0, options.top_p, seed or 0)
    stop_token_ids = () if options.ignore_eos else None
    return GenerateJob(
        setup, prompt, tokenizer, seed, {**request, "sampling": sampling, "stop_token_ids": stop_token_ids}
    )


def _read_prompt(options: argparse.Namespace, tokenizer: Tokenizer | None) -> list[int]:
    if options.prompt_ids is not None:
        if options.chat:
            raise ValueError("--chat needs text, not --prompt-ids: give --prompt or --prompt-file")
        return read_ids(options.prompt_ids)
    text, source = options.prompt, "--prompt"
    if options.prompt_file is not None:
        text, source = read_text(options.prompt_file), f"'{options.prompt_file}'"
    ids = encode(text, source, tokenizer, options.model)
    return chat_ids(options.model, text) if options.chat else ids


def _check_sampling(options: argparse.Namespace) -> None:
    if options.top_k is not None:
        check_int("--top-k", options.top_k, least=1)
    check_sampling(options.temperature, options.top_k or 0, options.top_p, 0)
    if options.seed is not None:
        check_seed(options.seed)


def _choose_seed(options: argparse.Namespace) -> int | None:
    """Return the seed of the options, or a new one, the same on all processes. None for greedy decoding."""
    if options.temperature == 0:
        return None
    if options.seed is not None:
        return options.seed
    return on_first_process(lambda: secrets.randbits(64))


def _decode(job: GenerateJob, model: Transformer, reporter: Reporter, *, quiet: bool) -> GenerateResult:
    """Decode, and unless `quiet`, write the text to stdout as it arrives."""
    text = None if quiet or job.tokenizer is None else Detokenizer(job.tokenizer)
    tokens: list[int] = []
    compile_s, prefill_s, decode_s = 0.0, 0.0, 0.0
    events = stream(model, [job.prompt], job.setup.plan, **job.options)
    job.setup.report_devices(reporter)  # not before all input is known to be valid
    if job.seed is not None:
        reporter.info(f"seed {job.seed}: --seed {job.seed} repeats this output")
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
    elif not quiet:  # without a tokenizer there are only ids to show
        _write(json.dumps(tokens) + "\n")
    return GenerateResult(tokens, compile_s, prefill_s, decode_s / (len(tokens) - 1) if len(tokens) > 1 else None)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _find_difference(job: GenerateJob, tokens: list[int], reporter: Reporter) -> str | None:
    """Decode again on one device, and return a message about the first token that differs, if any does."""
    devices = [device for device in job.setup.mesh.devices.flat if device.process_index == process_index()]
    plan = Plan(make_mesh(1, 1, devices=devices), job.setup.plan.block)
    events = stream(job.setup.load(reporter, plan), [job.prompt], plan, **job.options)
    decoded = (event for event in events if isinstance(event, Decoded))
    for index, (token, event) in enumerate(zip_longest(tokens, decoded)):
        expected = event.tokens[0] if event else None
        if token != expected:
            best = np.sort(np.asarray(event.logits_BV[0]))[-2:] if event else (np.nan, np.nan)
            return (
                f"not verified: new token {index} is {token}, but {expected} on one device, "
                f"where its two best logits are {best[1] - best[0]:.3g} apart"
            )
    return None


def _report(job: GenerateJob, result: GenerateResult, verified: bool | None) -> dict[str, Any]:
    mesh = job.setup.plan.mesh
    return {
        "text": None if job.tokenizer is None else job.tokenizer.decode(result.tokens),
        "tokens": result.tokens,
        "prompt_tokens": len(job.prompt),
        "ranks": [{"rank": rank, "tokens": count} for rank, count in enumerate(_cached_tokens(job, result))],
        "mesh": {"tp": mesh.shape[TP], "cp": mesh.shape[CP]},
        "platform": job.setup.platform,
        "kernel": job.setup.kernel,
        "seed": job.seed,
        "compile_s": result.compile_s,
        "prefill_s": result.prefill_s,
        "decode_s_per_token": result.decode_s_per_token,
        "verified": verified,
    }


def _table(job: GenerateJob, result: GenerateResult) -> Table:
    plan = job.setup.plan
    tp, cp = plan.mesh.shape[TP], plan.mesh.shape[CP]
    title = f"tp {tp} x cp {cp}, {plan.layout.placement}, block {plan.layout.block}, kernel {job.setup.kernel}"
    prompt = tokens_per_rank(plan, len(job.prompt), len(job.prompt))
    speed = "-" if result.decode_s_per_token is None else f"{result.decode_s_per_token:.4f}"
    caption = f"{speed} s per token, prefill {result.prefill_s:.2f} s, compilation {result.compile_s:.1f} s"
    table = Table("rank", "prompt", "decoded", "tokens", title=title, caption=caption)
    for rank, (before, after) in enumerate(zip(prompt, _cached_tokens(job, result), strict=True)):
        table.add_row(str(rank), str(before), f"+{after - before}", str(after))
    return table


def _cached_tokens(job: GenerateJob, result: GenerateResult) -> list[int]:
    """Return the tokens in the cache of each rank. The last new token is not cached."""
    return tokens_per_rank(job.setup.plan, len(job.prompt) + len(result.tokens) - 1, len(job.prompt))
