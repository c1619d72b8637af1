"""Evaluates models with lm-evaluation-harness, as the model `helix` of its registry.

    python -m helix_jax.evaluation.lm_eval run --model helix --model_args pretrained=DIR,cp=8 --tasks hellaswag

This is the command of lm-evaluation-harness, which itself does not find models of other packages. In Python, import
this module before `lm_eval.simple_evaluate(model="helix", ...)`, or give that an instance of `HelixLM`.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from helix_jax.checkpoint import DEMO_MODEL, load
from helix_jax.devices import DTYPES, default_dtype, open_mesh
from helix_jax.engine import Engine, FinishedEvent, RequestOutput, SamplingParams
from helix_jax.engine.options import DEFAULT_PAGE
from helix_jax.folder import ModelFolder
from helix_jax.parsing import parse_dataclass
from helix_jax.plan import Plan
from helix_jax.text import ByteTokenizer, Tokenizer
from helix_jax.validation import (
    MissingPackageError,
    check_choice,
    check_in_vocabulary,
    check_int,
    check_keys,
    require_package,
)

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
    from tqdm import tqdm
except ImportError as error:
    raise MissingPackageError(
        f"helix_jax.evaluation.lm_eval needs the package {error.name}: pip install 'helix_jax[eval]'"
    ) from None

log = logging.getLogger("helix_jax")

_DEFAULT_ROWS = 8
_REQUESTS_PER_ROW = 4  # requests in the engine per row, so that the texts of all others need no memory there
_LEAST_LEN = 512  # positions of an engine, which then serves most tasks
_GENERATION = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}  # keys of SamplingParams

# A context, or None for a window of a text, and a continuation; and the token ids of both.
Pair = tuple[Any, list[int], list[int]]


@dataclass(frozen=True)
class HelixOptions:
    """The options of a model in `--model_args`, beside `pretrained`. They are those of `helix-jax batch`.

    Args:
        tp: Devices that share the heads.
        cp: Devices that share the sequence. None: all devices / tp.
        dp: Devices that share the requests.
        platform: "auto", "cpu", "gpu" or "tpu". A CPU is split into as many devices as the mesh needs.
        block: Positions per block.
        placement: The rule that assigns blocks to ranks. With "striped", requests share the cache of equal contexts.
        combine: The collective that combines the ranks' partial results.
        kernel: The attention kernel.
        experts: The devices that share the experts.
        kv_cache_dtype: The type of the cache.
        dtype: The type of the weights. None: bfloat16, or float32 on a CPU.
        rows: Requests that run at once. None: the batch size of the command if it is above 1, else 8 per dp group.
        page: Tokens per cache page.
        pages: Cache pages per rank. None: as many as all rows can use, or as fit into memory.
        prefill_chunk: Prompt tokens per prefill call. None: as `Engine`.
        max_length: The most positions of a request, below those of the model.
        max_gen_toks: Tokens to generate if a task does not say.
        add_bos_token: Whether the tokenizer adds its special tokens to a text. None: as it is configured.
        prefix_token_id: The token before a text without context. None: the beginning-of-text token of the tokenizer, or
            its end-of-text token.
    """

    tp: int = 1
    cp: int | None = None
    dp: int = 1
    platform: str = "auto"
    block: int = 16
    placement: str = "helix"
    combine: str = "psum"
    kernel: str = "auto"
    experts: str = "flat"
    kv_cache_dtype: str = "auto"
    dtype: str | None = None
    rows: int | None = None
    page: int = DEFAULT_PAGE
    pages: int | None = None
    prefill_chunk: int | None = None
    max_length: int | None = None
    max_gen_toks: int = 256
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None


@register_model("helix")
class HelixLM(TemplateLM):
    """A model of lm-evaluation-harness whose requests an `Engine` answers, many at a time.

    Texts are divided into tokens as by the model `hf`, so the results are the same up to rounding.

    Args:
        pretrained: A model folder in Hugging Face format, or an id on the Hugging Face Hub. Default: the demo model.
        batch_size: Requests that run at once, if `rows` is not given. It changes no result.
        max_batch_size: Not used.
        device: "cpu" is the option `platform=cpu`. Any other is not used, because "cuda:0" is the default of the
            command.
        **options: The fields of `HelixOptions`.

    Raises:
        ValueError: An option is unknown or has an invalid value, the folder has no tokenizer, or as `load` and `Plan`.
    """

    def __init__(
        self,
        pretrained: str | Path = DEMO_MODEL,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.options = own = parse_dataclass(HelixOptions, options, "model_args")
        opened = ModelFolder.open(pretrained)
        self.folder, self.config = opened.path, opened.config
        self.tokenizer, self._engine_tokenizer = _open_tokenizers(opened)
        self._check_options()
        mesh = open_mesh("cpu" if device == "cpu" and own.platform == "auto" else own.platform, own.tp, own.cp, own.dp)
        choices = own.placement, own.combine, own.kernel, own.experts, own.kv_cache_dtype
        self.plan = Plan(mesh, own.block, *choices)
        per_group = batch_size if isinstance(batch_size, int) and batch_size > 1 else _DEFAULT_ROWS
        self._rows = own.rows or per_group * own.dp
        self._model = load(self.folder, self.plan, jnp.dtype(own.dtype or default_dtype(mesh)))
        self._engine: Engine | None = None

    @property
    def max_length(self) -> int:
        """The most positions of a request."""
        return self.options.max_length or self.config.max_positions

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate if a task does not say."""
        return self.options.max_gen_toks

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token, None if the tokenizer has none."""
        return getattr(self.tokenizer, "eos_token_id", None)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context.

        Raises:
            ValueError: The tokenizer has none, and it was not given.
        """
        if self._prefix is None:
            raise ValueError(
                f"the tokenizer of '{self.folder}' has neither a beginning- nor an end-of-text token to begin a text "
                f"with: give prefix_token_id=ID in model_args"
            )
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer, by which requests are cached."""
        return getattr(self.tokenizer, "name_or_path", "bytes").replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text.

        Args:
            chat_history: The messages, each with a role and a content.
            add_generation_prompt: Whether an answer begins at the end. If not, the last message continues.

        Raises:
            ValueError: The tokenizer has no chat template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"'{self.folder}' has no chat template: leave out --apply_chat_template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text. A text that begins with the prefix token gets no special tokens."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.encode(string)
        if add_special_tokens is None:
            add_special_tokens = self.options.add_bos_token
            if self._prefix is not None and string.startswith(self.tokenizer.decode(self._prefix)):
                add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return self.tokenizer.decode(list(tokens))
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows that end where the next begins."""
        strings = [string for (string,) in (request.args for request in requests)]
        windows = [self._windows(string) for string in strings]
        scores = iter(self._loglikelihood_tokens([pair for pairs in windows for pair in pairs], disable_tqdm))
        totals = [sum(score for score, _ in islice(scores, len(pairs))) for pairs in windows]
        for string, total in zip(strings, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop string."""
        prompts, params, lens = [], [], []
        for context, options in (request.args for request in requests):
            params.append(self._generation_params(dict(options)))
            prompts.append(self.tok_encode(context) or [self.prefix_token_id])
            lens.append(len(prompts[-1]))
            prompts[-1] = prompts[-1][-self._longest_context(params[-1].max_new_tokens) :]
        _warn_of_truncation(lens, [len(prompt) for prompt in prompts], self.max_length)
        texts = [""] * len(requests)
        for index, output in self._run(prompts, params, "Running generate_until requests", disable_tqdm):
            texts[index] = self.tok_decode(output.tokens)
            for stop in params[index].stop:
                texts[index] = texts[index].split(stop)[0]
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether all of its tokens are the most probable."""
        texts, params = [], []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: give 1 to {self.max_length}, the maximum length"
                )
            texts.append((context + continuation)[-self.max_length - 1 :])
            start = len(texts[-1]) - len(continuation)
            params.append(SamplingParams(max_new_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start))
        whole = [len(context) + len(continuation) for _, context, continuation in requests]
        _warn_of_truncation(whole, [len(text) for text in texts], self.max_length)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, output in self._run(texts, params, "Running loglikelihood requests", disable_tqdm):
            key, _, continuation = requests[index]
            answers[index] = _answer(output, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return answers

    def _windows(self, string: str) -> list[Pair]:
        """Divide a text into windows, each with one token of context or more, as the model `hf` does."""
        windows = get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, 1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _generation_params(self, options: dict[str, Any]) -> SamplingParams:
        """Return the parameters of the engine for the generation arguments of a task."""
        given = normalize_gen_kwargs(options, self.max_gen_toks)
        until, max_new_tokens, _ = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        check_keys("generation arguments", given, _GENERATION)
        # Special tokens are not part of the text, so they cannot end it as strings.
        special = getattr(self._engine_tokenizer, "special_tokens", {})
        ids = {special[stop] for stop in until if stop in special}
        ids |= set() if self.eot_token_id is None else {self.eot_token_id}
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            stop=[stop for stop in until if stop and stop not in special],
            stop_token_ids=sorted(ids),
            **{name: value for name, value in given.items() if value is not None},
        )

    def _longest_context(self, max_new_tokens: int) -> int:
        """Return how many tokens of context leave room to generate."""
        longest = self.max_length - max_new_tokens
        if longest < 1:
            raise ValueError(
                f"{max_new_tokens} tokens to generate leave no room for a context: generate fewer than the maximum "
                f"length of {self.max_length}"
            )
        return longest

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], description: str, disable_tqdm: bool
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Yield the output of each prompt as it finishes, with its index. Show a progress bar."""
        positions = [len(prompt) + own.max_new_tokens for prompt, own in zip(prompts, params, strict=True)]
        engine, waiting = (
            self._make_engine(max(positions, default=1)),
            iter(enumerate(zip(prompts, params, strict=True))),
        )
        index_of: dict[str, int] = {}
        with tqdm(total=len(prompts), desc=description, disable=disable_tqdm) as bar:
            while True:
                for index, (prompt, own) in islice(waiting, _REQUESTS_PER_ROW * self._rows - len(index_of)):
                    index_of[engine.submit(prompt, own)] = index
                if not index_of:
                    return
                for event in engine.step():
                    if isinstance(event, FinishedEvent):
                        yield index_of.pop(event.id), event.result
                        bar.update()

    def _make_engine(self, positions: int) -> Engine:
        """Return an engine for requests of as many positions: the one that there is, if it suffices."""
        max_len = min(self.max_length, max(_LEAST_LEN, 1 << (positions - 1).bit_length()))
        if self._engine is None or (self._engine.max_len or 0) < max_len:
            self._engine = None  # frees its pages
            self._engine = Engine(
                self._model,
                self.plan,
                rows=self._rows,
                pages=self.options.pages,
                page=self.options.page,
                max_len=max_len,
                chunk=self.options.prefill_chunk,
                tokenizer=self._engine_tokenizer,
            )
        return self._engine

    @property
    def _prefix(self) -> int | None:
        ids = (self.options.prefix_token_id, getattr(self.tokenizer, "bos_token_id", None), self.eot_token_id)
        return next((id for id in ids if id is not None), None)

    def _check_options(self) -> None:
        own, positions = self.options, self.config.max_positions
        for name in ("rows", "max_length", "max_gen_toks"):
            if getattr(own, name) is not None:
                check_int(name, getattr(own, name), least=1)
        if own.dtype is not None:
            check_choice("dtype", own.dtype, DTYPES)
        if own.prefix_token_id is not None:
            check_in_vocabulary("prefix_token_id", [own.prefix_token_id], self.config.vocab)
        if self.max_length > positions:
            raise ValueError(f"max_length is {own.max_length}: give at most the model's {positions} positions")


def _open_tokenizers(opened: ModelFolder) -> tuple[Any, Tokenizer]:
    """Open the tokenizer of a folder, for texts and templates, and for the engine.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    folder, for_engine = opened.path, opened.tokenizer
    if for_engine is None:
        raise ValueError(f"'{folder}' has no tokenizer.json: add it, because tasks are texts")
    if isinstance(for_engine, ByteTokenizer):
        return for_engine, for_engine
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that PyTorch is not installed
    transformers = require_package("transformers", "the model 'helix'", "'helix_jax[eval]'")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), for_engine
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the tokenizer of '{folder}' cannot be read ({error}): download it again") from None


def _answer(output: RequestOutput, continuation: list[int]) -> tuple[float, bool]:
    """Return the log-probability of a continuation, and whether all of its tokens are the most probable."""
    scores = output.prompt_logprobs
    assert scores is not None
    return float(scores.logprobs_S.sum(dtype=np.float64)), bool((scores.top_ids_SC[:, 0] == continuation).all())


def _warn_of_truncation(lens: list[int], kept: list[int], max_length: int) -> None:
    removed = [length - left for length, left in zip(lens, kept, strict=True) if length > left]
    if removed:
        log.warning(
            f"{len(removed)} of {len(lens)} requests exceed the maximum length of {max_length}: up to {max(removed)} "
            f"tokens were removed from the beginning of their contexts"
        )


if __name__ == "__main__":
    require_package("lm_eval.__main__", "this command", "'helix_jax[eval]'").cli_evaluate()
