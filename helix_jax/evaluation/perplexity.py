"""Measures bits per byte of held-out text at several positions, read token by token over a sharded cache.

At each position the context before it is read, and then the tokens of a span one by one, as if they had been decoded.
So the span is stored on the ranks round-robin.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from helix_jax.evaluation.placements import ONE_DEVICE, LoadModel, OnProgress, ignore_progress
from helix_jax.evaluation.scoring import score_span
from helix_jax.evaluation.texts import TokenText
from helix_jax.plan import Plan
from helix_jax.training import BITS_PER_NAT
from helix_jax.validation import check_int

MAX_GAP_NATS = 1e-3


@dataclass(frozen=True)
class PerplexityOptions:
    """The text to score, and how to read it.

    Args:
        positions: Tokens before each span. Empty, the default, means powers of 2 from 64 on.
        span: Tokens that are scored one by one.
        windows: Places in the text.
        chunk: Tokens per step while contexts are read. None: as `Engine`.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is below its minimum.
    """

    positions: tuple[int, ...] = ()
    span: int = 64
    windows: int = 8
    chunk: int | None = None

    def __post_init__(self) -> None:
        for name in ("span", "windows", *([] if self.chunk is None else ["chunk"])):
            check_int(name, getattr(self, name), least=1)
        for position in self.positions:
            check_int("a position", position, least=2)

    @property
    def max_len(self) -> int:
        """The positions that a row needs."""
        return max(self.positions) + self.span

    def for_model(self, max_positions: int) -> "PerplexityOptions":
        """Return these options with the positions filled in for a model of `max_positions` positions.

        Raises:
            ValueError: A span exceeds the model's positions.
        """
        longest = max_positions - self.span
        default = tuple(2**n for n in range(6, 32) if 2**n <= longest) or (max(2, longest),)
        options = replace(self, positions=self.positions or default)
        if max(options.positions) > longest:
            raise ValueError(
                f"position {max(options.positions)} and a span of {self.span} tokens exceed the model's "
                f"{max_positions} positions: give smaller ones"
            )
        return options


@dataclass
class PerplexityResults:
    """Bits per byte under each plan, by position.

    Args:
        options: The options.
        bits_per_byte: By plan, one number per position.
        gap_nats: By plan, the largest difference of a token's loss from one device.
        compared: Whether these gaps are bounded. With an fp8 cache they are not, because rounding to float8 magnifies
            the tiny differences that another mesh, or another chunk size on one device, makes.
    """

    options: PerplexityOptions
    bits_per_byte: dict[str, list[float]] = field(default_factory=dict)
    gap_nats: dict[str, float] = field(default_factory=dict)
    compared: bool = True

    def different(self) -> dict[str, float]:
        """Return, by plan, the gaps that exceed `MAX_GAP_NATS` or, if they are not bounded, are NaN."""
        most = MAX_GAP_NATS if self.compared else math.inf
        return {name: gap for name, gap in self.gap_nats.items() if not gap <= most}

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can represent."""
        return asdict(self)


def run_perplexity(
    load: LoadModel,
    plans: Mapping[str, Plan],
    text: TokenText,
    options: PerplexityOptions,
    *,
    on_progress: OnProgress = ignore_progress,
    on_result: Callable[[PerplexityResults], None] = lambda results: None,
) -> PerplexityResults:
    """Measure bits per byte under each plan.

    Args:
        load: Loads the model for a plan. One model is in memory at a time.
        plans: The plans by name, `ONE_DEVICE` first, as `make_plans` returns them.
        text: Held-out text, at least `options.max_len` tokens.
        options: The options for the model, as `PerplexityOptions.for_model` returns them.
        on_progress: Called as the positions of a plan are scored.
        on_result: Called before the first plan and after each, with the results so far.

    Raises:
        ValueError: The plans do not begin with `ONE_DEVICE`.
    """
    if next(iter(plans), None) != ONE_DEVICE:
        raise ValueError(f"the plans are {list(plans)}: give '{ONE_DEVICE}' first")
    results = PerplexityResults(options, compared=all(plan.cache_dtype != "fp8" for plan in plans.values()))
    on_result(results)
    expected_PBS = np.zeros(0)
    for name, plan in plans.items():
        model, nats_PBS, bytes_P = load(plan), [], []
        for done, position in enumerate(options.positions):
            on_progress(name, done, len(options.positions))
            windows_BS = text.windows(position + options.span, options.windows)
            bytes_P.append(text.count_bytes(windows_BS, options.span))
            nats_PBS.append(
                score_span(model, plan, windows_BS, options.span, max_len=options.max_len, chunk=options.chunk)
            )
        on_progress(name, len(options.positions), len(options.positions))
        del model
        expected_PBS = np.stack(nats_PBS) if name == ONE_DEVICE else expected_PBS
        results.bits_per_byte[name] = (np.sum(nats_PBS, (1, 2)) * BITS_PER_NAT / np.asarray(bytes_P)).tolist()
        results.gap_nats[name] = float(np.abs(np.stack(nats_PBS) - expected_PBS).max())
        on_result(results)
    return results
