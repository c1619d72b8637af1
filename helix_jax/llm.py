"""A model folder that answers text, token ids and chats: its tokenizer, its chat template and an engine in one object.

llm = helix_jax.LLM("DIR", cp=4)
print(llm.generate([{"role": "user", "content": "What is Helix parallelism?"}]).text)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, cast, overload

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from helix_jax.chat import Message
from helix_jax.checkpoint import load
from helix_jax.devices import choose_dtype, open_mesh
from helix_jax.draft_folder import is_draft_folder, open_draft
from helix_jax.engine import Engine, Event, FinishedEvent, PromptLogprobs, RequestOutput, SamplingParams
from helix_jax.engine.options import DEFAULT_PAGE, check_options
from helix_jax.engine.params import check_no_sampling, params_of_each
from helix_jax.engine.requests import sample_ids
from helix_jax.folder import AnyPrompt, ModelFolder
from helix_jax.generation import Params
from helix_jax.plan import Plan

_CPU_CHUNK = 128  # a prefill call takes as long as its chunk is, and on a CPU, 512 tokens take seconds

_PLAN_OPTIONS = tuple(field.name for field in fields(Plan) if field.name != "mesh")
_ENGINE_OPTIONS = tuple(field.name for field in fields(Engine) if field.name not in ("model", "plan", "tokenizer"))


class LLM:
    """A model that continues prompts, over a key/value cache that is sharded along the sequence.

    A prompt is text, a list of token ids, or a chat: a list of messages like `{"role": "user", "content": "Hello"}`,
    which the chat template of the folder turns into tokens. One prompt gives one result, and a list of prompts gives a
    list. Many prompts share the cache and decode together.

    Programs are compiled when they are first needed, which takes a minute or more for a large model.
    `llm.engine.warm_up()` compiles them before the first prompt, and JAX's `jax_compilation_cache_dir` keeps them on
    disk.

    Args:
        folder: The path of a model folder in Hugging Face format, or an id on the Hugging Face Hub, "owner/name", which
            is taken from the local cache of the hub, or downloaded if the package huggingface_hub is installed.
        tp: Devices that share the attention heads.
        cp: Devices that share the sequence. None: all devices / (dp * tp).
        dp: Groups of tp * cp devices, each with an equal share of the rows.
        platform: "auto", "cpu", "gpu" or "tpu". Without an accelerator, or with "cpu", the CPU is split into
            dp * tp * cp fake devices, if no computation of JAX has started before.
        dtype: The type of the weights, "bfloat16" or "float32". None: float32 on a CPU, bfloat16 elsewhere.
        **options: Arguments of `Plan` (`block`, `placement`, `combine`, `kernel`, `experts`, `cache_dtype`) and of
            `Engine` (`rows`, `max_len`, `pages`, `page`, `chunk`, `budget`, `steps_per_call`, `prefix_caching`,
            `draft_tokens`, and `speculate`, which may also be the folder of a draft model). By default a prompt and its
            output may be as long as the positions of the model allow, and the cache is as large as all rows can fill,
            or as memory allows. On a CPU `chunk` is 128 by default, so that short prompts are fast.

    Attributes:
        folder: The folder, with its config, tokenizer and chat template.
        plan: How the mesh decodes.
        engine: The engine that runs the requests.

    Raises:
        TypeError: An option is unknown, or has the wrong type.
        MissingPackageError: The tokenizer, or the download of a model, needs a package that is not installed.
        ValueError: The folder does not exist or cannot be read, there are too few devices, the mesh cannot share the
            heads, or an option has an invalid value. Options are checked before weights are read.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tp: int = 1,
        cp: int | None = None,
        dp: int = 1,
        platform: str = "auto",
        dtype: DTypeLike | None = None,
        **options: Any,
    ):
        _check_names(options)
        self.folder = ModelFolder.open(folder)
        mesh = open_mesh(platform, tp, cp, dp)
        self.plan = Plan(mesh, **{name: options[name] for name in _PLAN_OPTIONS if name in options})
        engine_options = {name: options[name] for name in _ENGINE_OPTIONS if name in options}
        if mesh.devices.flat[0].platform == "cpu":
            engine_options.setdefault("chunk", _CPU_CHUNK)
        draft = _check_options(self.folder, self.plan, engine_options)
        self.plan.check_model(self.folder.config)
        name = choose_dtype(mesh, dtype)
        self.plan.kernel_for_model(self.folder.config, engine_options.get("page", DEFAULT_PAGE), name)
        model = load(self.folder.path, self.plan, jnp.dtype(name))
        if draft:
            engine_options["speculate"] = load(draft.path, self.plan, jnp.dtype(name))
        self.engine = Engine(model, self.plan, tokenizer=self.folder.tokenizer, **engine_options)

    @overload  # text is also a sequence of texts
    def generate(  # pyright: ignore[reportOverlappingOverload]
        self, prompts: str | Sequence[int] | Sequence[Message], params: Params = None
    ) -> RequestOutput: ...

    @overload
    def generate(self, prompts: Sequence[AnyPrompt] | np.ndarray, params: Params = None) -> list[RequestOutput]: ...

    def generate(self, prompts: AnyPrompt | Sequence[AnyPrompt], params: Params = None) -> Any:
        """Continue a prompt, or many together.

        Args:
            prompts: One prompt, or a list of prompts.
            params: How they continue: one for all, or one each. None: `SamplingParams()`, up to 128 greedy tokens.

        Returns:
            The output of the prompt, with `text`, `tokens` and `finish_reason`, or a list with one entry per prompt. If
            several samples are requested (`params.n`), an entry is the list of their outputs.

        Raises:
            TypeError: A prompt is neither text nor token ids nor messages, or `params` has the wrong type.
            ValueError: There are no prompts; or a prompt is empty or, with its output, longer than `max_len`, a token
                id is not in the vocabulary, or the folder has no tokenizer or no chat template, where one is needed.
        """
        ids, is_single = self._encode(prompts)
        all_params = params_of_each(params, ids)
        outputs = iter(self.engine.generate(ids, all_params))
        entries = [next(outputs) if own.n == 1 else list(islice(outputs, own.n)) for own in all_params]
        return entries[0] if is_single else entries

    def stream(self, prompts: AnyPrompt | Sequence[AnyPrompt], params: Params = None) -> Iterator[Event]:
        """Continue a prompt, or many together, and return what happens as it happens.

            for event in llm.stream("In the beginning"):
                if isinstance(event, helix_jax.TokenEvent):
                    print(event.text, end="", flush=True)

        A call of the device decodes several tokens, which arrive together: `LLM(..., steps_per_call=1)` decodes them
        one by one. If the caller stops early, the requests are cancelled.

        Args:
            prompts: As in `generate`.
            params: As in `generate`.

        Returns:
            A `TokenEvent` per token, and a `FinishedEvent` per output. Their ids are "0", "1" and so on, the index of
            the prompt, or with several samples "0/0", "0/1" and so on.

        Raises:
            TypeError: As `generate`.
            ValueError: As `generate`. That a prompt is too long is found when the first event is requested, because
                nothing is submitted before.
        """
        ids, _ = self._encode(prompts)
        return self._events(ids, params_of_each(params, ids))

    @overload
    def score(  # pyright: ignore[reportOverlappingOverload]
        self, texts: str | Sequence[int] | Sequence[Message], top: int = 0
    ) -> PromptLogprobs: ...

    @overload
    def score(self, texts: Sequence[AnyPrompt] | np.ndarray, top: int = 0) -> list[PromptLogprobs]: ...

    def score(self, texts: AnyPrompt | Sequence[AnyPrompt], top: int = 0) -> Any:
        """Compute the log-probability of each token of a text but the first, given the tokens before it.

        Args:
            texts: One text, or a list of them: text, token ids, or chats, which include their last answer.
            top: How many of the most probable tokens to return with each token, 0 to 20.

        Returns:
            The log-probabilities of the text, or a list with those of each text.

        Raises:
            TypeError: As `generate`, or `top` is not an int.
            ValueError: As `generate`, or `top` is out of range.
        """
        ids, is_single = self._encode(texts, answer=False)
        scores = self.engine.score(ids, top)
        return scores[0] if is_single else scores

    def _encode(self, prompts: AnyPrompt | Sequence[AnyPrompt], *, answer: bool = True) -> tuple[list[list[int]], bool]:
        """Return the token ids of each prompt, and whether it is a single one."""
        encode = partial(self.folder.encode, answer=answer)
        if _is_single(prompts):
            return [encode("the prompt", cast(AnyPrompt, prompts))], True
        several = cast(Sequence[AnyPrompt], prompts)
        return [encode(f"prompt {index}", prompt) for index, prompt in enumerate(several)], False

    def _events(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> Iterator[Event]:
        """Yield the events of requests, which are abandoned if the caller stops early."""
        names: dict[str, str] = {}
        for index, (id, own) in enumerate(zip(self.engine.submit_all(prompts, params), params, strict=True)):
            names |= zip(sample_ids(id, own.n), sample_ids(str(index), own.n), strict=True)
        try:
            for event in self.engine.events(names.keys()):
                id = names[event.id]
                if isinstance(event, FinishedEvent):
                    yield FinishedEvent(id, replace(event.result, id=id))
                else:
                    yield event._replace(id=id)
        finally:
            self.engine.abandon(names.keys())


def _check_names(options: Mapping[str, Any]) -> None:
    """Check the names of options.

    Raises:
        TypeError: One is not an option of a plan or of an engine.
    """
    check_no_sampling(options)
    for name in options:
        if name not in (*_PLAN_OPTIONS, *_ENGINE_OPTIONS):
            known = ", ".join(sorted((*_PLAN_OPTIONS, *_ENGINE_OPTIONS)))
            raise TypeError(f"LLM has no option '{name}': choose one of tp, cp, dp, platform, dtype, {known}")


def _check_options(folder: ModelFolder, plan: Plan, options: Mapping[str, Any]) -> ModelFolder | None:
    """Check the options of an engine. Return the folder of the draft model, if `speculate` is one."""
    speculate = options.get("speculate")
    checked = dict(options) | ({"speculate": "ngram"} if is_draft_folder(speculate) else {})  # an engine takes a model
    check_options(folder.config, plan, checked)
    return open_draft("speculate", speculate, folder, plan, options.get("max_len") or folder.config.max_positions)


def _is_single(prompts: Any) -> bool:
    """Return whether `prompts` is one prompt rather than a list of them.

    Raises:
        TypeError: It is neither.
        ValueError: It is empty.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise TypeError(f"prompts is {shorten(prompts)}: give text, token ids, messages, or a list of these")
    if not len(prompts):
        raise ValueError("there are no prompts: give at least one")
    return isinstance(prompts[0], int | np.integer | Mapping)
