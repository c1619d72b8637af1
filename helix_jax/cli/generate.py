"""Continue a prompt. The text is streamed; then follow the tokens on each rank and the time per token."""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from helix_jax.cache import tokens_per_rank
from helix_jax.chat import user_message
from helix_jax.cli.app import FAILED, OK
from helix_jax.cli.console import Reporter
from helix_jax.cli.options import DecodeSetup, add_decode_arguments, make_setup, open_devices, report_drafts
from helix_jax.cli.prompts import read_ids, read_text
from helix_jax.engine import Engine, FinishedEvent, RequestOutput, SamplingParams
from helix_jax.engine.requests import check_prompt
from helix_jax.folder import ModelFolder
from helix_jax.generation import make_engine
from helix_jax.mesh import CP, TP, make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.processes import process_index
from helix_jax.validation import check_int

EXAMPLE = """helix-jax generate --prompt "In the beginning" --cp 4
  helix-jax generate --model DIR --chat --prompt "Hello" --max-new-tokens 50"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `helix-jax generate` to its parser."""
    group = parser.add_argument_group("prompt")
    prompt = group.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the prompt")
    prompt.add_argument("--prompt-ids", type=Path, metavar="FILE.json", help="a JSON list of token ids")
    text = "the prompt is a message to the model, which answers it (needs the chat template of the model folder)"
    group.add_argument("--chat", action="store_true", help=text)
    _add_sampling_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--verify", action="store_true", help="decode again on one device; exit 1 if a token differs")
    add("--json", action="store_true", help="print JSON")
    add_decode_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens (default: 128)")
    text = "randomness: 0 always takes the most probable token, 1 samples from the model's probabilities (default: 0)"
    add("--temperature", type=float, default=0.0, metavar="X", help=text)
    add("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (default: all)")
    text = "nucleus sampling: smallest set of tokens with total probability at least P (default: 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, metavar="S", help="seed of the sampler (default: a new one, which is reported)")
    add("--ignore-eos", action="store_true", help="continue past end-of-sequence tokens")


@dataclass(frozen=True)
class GenerateJob:
    """A prompt and how to continue it.

    Attributes:
        setup: The model, and how it is sharded.
        prompt: The token ids.
        params: How it continues.
    """

    setup: DecodeSetup
    prompt: list[int]
    params: SamplingParams

    def make_engine(self, model: Transformer, plan: Plan, **drafts: Any) -> Engine:
        """Create an engine for this prompt alone, with the options of `DecodeSetup.load_drafts` if it drafts tokens."""
        options = {
            **drafts,
            "page": self.setup.page,
            "chunk": self.setup.chunk,
            "tokenizer": self.setup.folder.tokenizer,
        }
        return make_engine(model, [self.prompt], plan, self.params, **options)


def run(options: argparse.Namespace) -> int:
    """Run `helix-jax generate` and return its exit code: 1 if --verify found a difference."""
    reporter = Reporter()
    job = _make_job(options)
    output, compile_s = _decode(job, job.setup.load(reporter), reporter, quiet=options.json)
    difference = _find_difference(job, output, reporter) if options.verify else None
    if options.json:
        print(json.dumps(_report(job, output, compile_s, None if not options.verify else difference is None)))
    else:
        reporter.console.print(_table(job, output, compile_s))
    if difference is not None:
        reporter.info(difference)
        return FAILED
    if options.verify:
        reporter.info(f"verified: the {len(output.tokens)} tokens equal those of one device")
    return OK


def _make_job(options: argparse.Namespace) -> GenerateJob:
    """Check all options, then open the devices."""
    folder = ModelFolder.open(options.model)
    prompt = _read_prompt(options, folder)
    if options.top_k is not None:
        check_int("--top-k", options.top_k, least=1)
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k or 0,
        top_p=options.top_p,
        seed=options.seed,
        ignore_eos=options.ignore_eos,
    )
    limits = {"vocab": folder.config.vocab, "max_len": folder.config.max_positions}
    check_prompt("the prompt", prompt, params.max_new_tokens, **limits)
    setup = make_setup(options, folder, open_devices(options), len(prompt) + params.max_new_tokens)
    return GenerateJob(setup, prompt, params)


def _read_prompt(options: argparse.Namespace, folder: ModelFolder) -> list[int]:
    if options.prompt_ids is not None:
        if options.chat:
            raise ValueError("--chat needs text, not --prompt-ids: give --prompt or --prompt-file")
        return read_ids(options.prompt_ids)
    text, source = options.prompt, "--prompt"
    if options.prompt_file is not None:
        text, source = read_text(options.prompt_file), f"'{options.prompt_file}'"
    return folder.encode(source, user_message(text) if options.chat and text else text)


def _decode(job: GenerateJob, model: Transformer, reporter: Reporter, *, quiet: bool) -> tuple[RequestOutput, float]:
    """Decode, and unless `quiet`, write the text to stdout as it arrives. Return the output and the compile time."""
    engine = job.make_engine(model, job.setup.plan, **job.setup.load_drafts(reporter))
    job.setup.report_devices(reporter)  # not before all input is known to be valid
    reporter.info(f"the cache stores {engine.stats().capacity:,} tokens as {job.setup.cache_dtype}")
    with reporter.compiling():
        compile_s = engine.warm_up(greedy=job.params.is_greedy, sampling=not job.params.is_greedy)
    seed = engine.requests[engine.submit(job.prompt, job.params)].params.seed
    if seed is not None:
        reporter.info(f"seed {seed}: --seed {seed} repeats this output")
    with reporter.counting() as bar:
        task = bar.add_task("prefill", total=len(job.prompt))
        while True:
            for event in engine.step():
                bar.stop()
                if isinstance(event, FinishedEvent):
                    # Without a tokenizer there are only ids to show.
                    _write(
                        "" if quiet else "\n" if job.setup.folder.tokenizer else f"{json.dumps(event.result.tokens)}\n"
                    )
                    report_drafts(engine, reporter)
                    return event.result, compile_s
                _write("" if quiet else event.text or "")
            bar.update(task, completed=engine.stats().prefilled_tokens)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _find_difference(job: GenerateJob, output: RequestOutput, reporter: Reporter) -> str | None:
    """Decode again on one device, and return a message about the first token that differs, if any does."""
    devices = [device for device in job.setup.mesh.devices.flat if device.process_index == process_index()]
    chosen = job.setup.plan
    plan = Plan(make_mesh(1, 1, devices=devices), chosen.block, cache_dtype=chosen.cache_dtype)
    engine = job.make_engine(job.setup.load(reporter, plan), plan)
    [alone] = engine.generate([job.prompt], replace(job.params, seed=output.seed, logprobs=2))
    assert alone.logprobs is not None
    for index, (token, expected) in enumerate(zip_longest(output.tokens, alone.tokens)):
        if token != expected:
            best = alone.logprobs[index][1] if expected is not None else ((0, np.nan),) * 2
            return (
                f"not verified: new token {index} is {token}, but {expected} on one device, "
                f"where its two best logits are {best[0][1] - best[1][1]:.3g} apart"
            )
    return None


def _report(job: GenerateJob, output: RequestOutput, compile_s: float, verified: bool | None) -> dict[str, Any]:
    mesh = job.setup.plan.mesh
    return {
        "text": output.text,
        "tokens": output.tokens,
        "prompt_tokens": len(job.prompt),
        "ranks": [{"rank": rank, "tokens": count} for rank, count in enumerate(_cached_tokens(job, output))],
        "mesh": {"tp": mesh.shape[TP], "cp": mesh.shape[CP]},
        "platform": job.setup.platform,
        "kernel": job.setup.kernel,
        "seed": output.seed,
        "compile_s": compile_s,
        "prefill_s": output.ttft_s,
        "decode_s_per_token": output.s_per_token,
        "verified": verified,
    }


def _table(job: GenerateJob, output: RequestOutput, compile_s: float) -> Table:
    plan = job.setup.plan
    tp, cp = plan.mesh.shape[TP], plan.mesh.shape[CP]
    title = f"tp {tp} x cp {cp}, {plan.layout.placement}, block {plan.layout.block}, kernel {job.setup.kernel}"
    prompt = tokens_per_rank(plan, len(job.prompt), len(job.prompt))
    speed = "-" if output.s_per_token is None else f"{output.s_per_token:.4f}"
    caption = f"{speed} s per token, prefill {output.ttft_s:.2f} s, compilation {compile_s:.1f} s"
    table = Table("rank", "prompt", "decoded", "tokens", title=title, caption=caption)
    for rank, (before, after) in enumerate(zip(prompt, _cached_tokens(job, output), strict=True)):
        table.add_row(str(rank), str(before), f"+{after - before}", str(after))
    return table


def _cached_tokens(job: GenerateJob, output: RequestOutput) -> list[int]:
    """Return the tokens in the cache of each rank. The last new token is not cached."""
    return tokens_per_rank(job.setup.plan, len(job.prompt) + len(output.tokens) - 1, len(job.prompt))
