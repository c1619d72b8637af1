"""Hides passkeys in text, at every depth of contexts of every length, and asks a model for them.

Each passkey is asked for twice: directly after its context, and again after tokens that the model has decoded. The
decoded tokens are stored on the ranks round-robin, so the second answer reads a cache in its decoding layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from helix_jax.evaluation.phrases import Phrases
from helix_jax.evaluation.placements import ONE_DEVICE, LoadModel, OnProgress, ignore_progress
from helix_jax.evaluation.scoring import score_span
from helix_jax.evaluation.session import CacheSession
from helix_jax.evaluation.texts import TokenText
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.text import Tokenizer
from helix_jax.training import BITS_PER_NAT
from helix_jax.training.passkeys import NAMES, new_key
from helix_jax.validation import check_int


@dataclass(frozen=True)
class NeedleOptions:
    """The contexts to make, and how to read them.

    Args:
        lengths: Tokens of the contexts. Empty, the default, means four lengths up to what the model has positions for.
        depths: The number of depths, evenly spaced from the first token to the last.
        trials: Contexts per length and depth, each with other text and another passkey.
        decoded: Tokens that are decoded before each passkey is asked for again. 0 asks once.
        seed: The seed of text and passkeys.
        rows: Contexts that are read at once.
        chunk: Tokens per step while contexts are read. None: as `Engine`.
        zero_rank: A cp rank whose cache is zeroed before the first question, except on one device.
        question_tokens: Tokens of the longest question and its answer, which `for_model` sets.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its minimum.
    """

    lengths: tuple[int, ...] = ()
    depths: int = 9
    trials: int = 1
    decoded: int = 500
    seed: int = 0
    rows: int = 16
    chunk: int | None = None
    zero_rank: int | None = None
    question_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("depths", "trials", "rows", *([] if self.chunk is None else ["chunk"])):
            check_int(name, getattr(self, name), least=1)
        for name in ("decoded", "seed") if self.zero_rank is None else ("decoded", "seed", "zero_rank"):
            check_int(name, getattr(self, name), least=0)
        for length in self.lengths:
            check_int("a context length", length, least=1)

    @property
    def max_len(self) -> int:
        """The positions that a row needs: the longest context, the decoded tokens, a question and its answer."""
        return max(self.lengths) + self.decoded + self.question_tokens

    def for_model(self, max_positions: int, tokenizer: Tokenizer) -> "NeedleOptions":
        """Return these options with the lengths filled in for a model.

        Args:
            max_positions: The positions of the model.
            tokenizer: Its tokenizer, on which the length of the questions depends.

        Raises:
            ValueError: A context does not fit the model with the decoded tokens and the question.
        """
        asked = Phrases(tokenizer).question_tokens
        longest = max_positions - self.decoded - asked
        lengths = self.lengths or tuple(max(1, longest * n // 4) for n in range(1, 5))
        options = replace(self, lengths=lengths, question_tokens=asked)
        if max(options.lengths) > longest:
            raise ValueError(
                f"a context of {max(options.lengths)} tokens, {self.decoded} decoded tokens and a question of "
                f"{asked} tokens exceed the model's {max_positions} positions: give shorter contexts, or fewer "
                f"decoded tokens"
            )
        return options


@dataclass(frozen=True)
class Needle:
    """A passkey in a context.

    Args:
        length: Tokens of the context and the question.
        depth: Where the passkey is in the context, from 0 (first) to 1 (last).
        name: The name that the passkey is asked for by.
        key: The passkey.
        key_position: The position of its first token.
        context: The text of the context. Bytes are decoded as Latin-1, which represents every byte.
        context_ids: The tokens of the context.
    """

    length: int
    depth: float
    name: str
    key: str
    key_position: int
    context: str
    context_ids: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class NeedleAnswers:
    """The answers of a model under one plan.

    Args:
        answers: For each needle its answers: directly after the context, and again after the decoded tokens.
        owners: For each needle the rank that stores the first token of its passkey.
        bits_per_byte: Of held-out text that follows the longest context. None if a rank was zeroed.
    """

    answers: list[list[str]]
    owners: list[int]
    bits_per_byte: float | None


@dataclass
class NeedleResults:
    """The needles, and the answers of a model under each plan."""

    options: NeedleOptions
    needles: list[Needle]
    plans: dict[str, NeedleAnswers] = field(default_factory=dict)

    @property
    def questions(self) -> int:
        """How often each passkey is asked for."""
        return 2 if self.options.decoded else 1

    def correct(self, plan: str, index: int) -> np.ndarray:
        """Return for each needle whether the answer to its first (0) or second (1) question is its passkey."""
        pairs = zip(self.plans[plan].answers, self.needles, strict=True)
        return np.asarray([answers[index] == needle.key for answers, needle in pairs])

    def count_different(self) -> dict[str, int]:
        """Return, by plan, how many needles are answered differently than on one device, if there are any."""
        expected = self.plans[ONE_DEVICE].answers
        counts = {
            name: sum(a != b for a, b in zip(found.answers, expected, strict=True))
            for name, found in self.plans.items()
        }
        return {name: count for name, count in counts.items() if count}

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can represent: everything but the tokens of the contexts, whose text it contains."""
        results = asdict(self)
        for needle in results["needles"]:
            del needle["context_ids"]
        return results


def make_needles(text: TokenText, options: NeedleOptions) -> list[Needle]:
    """Hide a passkey in pieces of `text`, for every length, depth and trial.

    Args:
        text: At least as long as the longest context.
        options: The options for a model, as `NeedleOptions.for_model` returns them.

    Raises:
        ValueError: A context is too short for a passkey and its question, or the text is too short.
    """
    random, needles, phrases = np.random.default_rng(options.seed), [], Phrases(text.tokenizer)
    for length in options.lengths:
        for depth in np.linspace(0, 1, options.depths) if options.depths > 1 else [0.5]:
            for _ in range(options.trials):
                name, key = str(random.choice(NAMES)), new_key(random)
                start = int(random.integers(0, max(1, len(text.tokens_X) - length)))
                hay_X = text.tokens_X[start : start + length]
                needles.append(_hide(phrases, hay_X, length, float(depth), (name, key)))
    return needles


def _hide(phrases: Phrases, hay_X: np.ndarray, length: int, depth: float, passkey: tuple[str, str]) -> Needle:
    """Hide a passkey, a name and a key, in a text, so that text, fact and question have `length` tokens."""
    name, key = passkey
    beginning, fact = phrases.beginning, phrases.fact(name, key)
    count = length - len(beginning) - len(fact) - len(phrases.question(name))
    if count < 0:
        raise ValueError(
            f"a context of {length} tokens is too short for fact and question: give {length - count} or more"
        )
    if len(hay_X) < count:
        raise ValueError(f"the text has {len(hay_X)} tokens, and a context of {length} needs {count}: give more text")
    hay, at = hay_X.tolist(), round(depth * count)
    ids = (*beginning, *hay[:at], *fact, *hay[at:count])
    position = len(beginning) + at + phrases.key_offset(name, key)
    return Needle(length, depth, name, key, position, phrases.text(list(ids)), ids)


def run_needles(
    load: LoadModel,
    plans: Mapping[str, Plan],
    text: TokenText,
    options: NeedleOptions,
    *,
    on_progress: OnProgress = ignore_progress,
    on_result: Callable[[NeedleResults], None] = lambda results: None,
) -> NeedleResults:
    """Ask a model for passkeys under each plan.

    Args:
        load: Loads the model for a plan. One model is in memory at a time.
        plans: The plans by name, as `make_plans` returns them.
        text: Held-out text, at least `options.max_len` tokens.
        options: The options for the model, as `NeedleOptions.for_model` returns them.
        on_progress: Called as the needles of a plan are asked for.
        on_result: Called before the first plan and after each, with the results so far.

    Raises:
        ValueError: A context or the text is too short, or `zero_rank` is not a rank of a plan.
    """
    results = NeedleResults(options, make_needles(text, options))
    _check_zero_rank(plans, options)
    on_result(results)
    for name, plan in plans.items():
        model = load(plan)

        def report(done: int, total: int, name: str = name) -> None:
            on_progress(name, done, total)

        zeroed = replace(options, zero_rank=None) if name == ONE_DEVICE else options
        answers = ask_needles(model, plan, results.needles, zeroed, text.tokenizer, on_progress=report)
        owners = [int(plan.layout.owner(needle.key_position, len(needle.context_ids))) for needle in results.needles]
        bits = None if options.zero_rank is not None else _bits_after(model, plan, text, results)
        del model
        results.plans[name] = NeedleAnswers(answers, owners, bits)
        on_result(results)
    return results


def ask_needles(
    model: Transformer,
    plan: Plan,
    needles: Sequence[Needle],
    options: NeedleOptions,
    tokenizer: Tokenizer,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[str]]:
    """Return the answers of a model for each needle: after its context, and again after decoded tokens.

    Args:
        model: A model that is sharded as `plan` decodes with it.
        plan: The mesh and the placement.
        needles: What `make_needles` returns.
        options: The options that the needles were made with.
        tokenizer: The tokenizer of the model.
        on_progress: Called with the number of needles that were asked for, and their total.

    Raises:
        ValueError: `options.zero_rank` is not a rank of the plan.
    """
    answers: list[list[str]] = []
    phrases = Phrases(tokenizer)
    rows = min(options.rows, len(needles))
    for first in range(0, len(needles), rows):
        on_progress(first, len(needles))
        part = needles[first : first + rows]
        # The last batch is filled up by repetition, so that all batches share compiled programs.
        asked = _ask(model, plan, [part[n % len(part)] for n in range(rows)], options, phrases)
        answers += asked[: len(part)]
    on_progress(len(needles), len(needles))
    return answers


def _ask(
    model: Transformer, plan: Plan, needles: Sequence[Needle], options: NeedleOptions, phrases: Phrases
) -> list[list[str]]:
    contexts = [needle.context_ids for needle in needles]
    session = CacheSession(model, plan, contexts, options.max_len, options.chunk)
    if options.zero_rank is not None:
        session.zero_rank(options.zero_rank)
    questions, count = [phrases.question(needle.name) for needle in needles], phrases.answer_tokens
    answers = [session.answer(questions, count)]
    if options.decoded:
        session.decode(options.decoded)
        answers.append(session.answer(questions, count))
    return [[phrases.answer(answer.tolist()) for answer in row] for row in zip(*answers, strict=True)]


def _bits_after(model: Transformer, plan: Plan, text: TokenText, results: NeedleResults) -> float:
    """Return bits per byte of text that follows the longest context, with the programs that the needles compiled."""
    options = results.options
    windows_BS = text.windows(options.max_len, min(options.rows, len(results.needles)))
    span = options.max_len - max(options.lengths)
    nats_BS = score_span(model, plan, windows_BS, span, max_len=options.max_len, chunk=options.chunk)
    return float(nats_BS.sum()) * BITS_PER_NAT / text.count_bytes(windows_BS, span)


def _check_zero_rank(plans: Mapping[str, Plan], options: NeedleOptions) -> None:
    for name, plan in plans.items():
        ranks = plan.layout.ranks
        if name != ONE_DEVICE and options.zero_rank is not None and options.zero_rank >= ranks:
            raise ValueError(
                f"zero_rank is {options.zero_rank}, but there are {ranks} cp ranks: choose one from 0 to {ranks - 1}"
            )
