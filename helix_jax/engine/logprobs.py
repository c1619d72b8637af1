"""The log-probabilities of tokens, as a request returns them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Float, Int

from helix_jax.sampling import Logprobs

# The log-probability of a token, and the most probable tokens with theirs.
TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]


@dataclass(frozen=True, eq=False)
class PromptLogprobs(Sequence[TokenLogprobs]):
    """The log-probability of each token of a text but the first, given the tokens before it.

    An entry has the form of those of `RequestOutput.logprobs`: `(logprob, ((token, logprob), ...))`. Entries are made
    when they are read, because those of a million tokens would fill gigabytes; the arrays take a hundredth of that.

    Attributes:
        logprobs_S: The log-probabilities of the tokens.
        top_SC: Those of the most probable tokens, in descending order.
        top_ids_SC: These tokens.
    """

    logprobs_S: Float[np.ndarray, "S"]
    top_SC: Float[np.ndarray, "S C"]
    top_ids_SC: Int[np.ndarray, "S C"]

    @classmethod
    def concatenate(cls, parts: Iterable["PromptLogprobs"], num_top: int) -> "PromptLogprobs":
        """Return the entries of all parts, in order.

        Args:
            parts: The parts.
            num_top: How many of the most probable tokens each entry has.
        """
        nothing = cls(np.zeros(0, np.float32), np.zeros((0, num_top), np.float32), np.zeros((0, num_top), np.int32))
        arrays = [part._arrays for part in parts] or [nothing._arrays]
        return cls(*map(np.concatenate, zip(*arrays, strict=True)))

    @property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.logprobs_S, self.top_SC, self.top_ids_SC

    def __len__(self) -> int:
        return len(self.logprobs_S)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptLogprobs": ...

    def __getitem__(self, index: int | slice) -> "TokenLogprobs | PromptLogprobs":
        if isinstance(index, slice):
            return PromptLogprobs(*(array[index] for array in self._arrays))
        top = zip(self.top_ids_SC[index].tolist(), self.top_SC[index].tolist(), strict=True)
        return float(self.logprobs_S[index]), tuple(top)


def logprobs_of(logprobs: Logprobs | None, index: tuple[int, int], num_top: int | None) -> TokenLogprobs | None:
    """Return those of one token, with `num_top` of the most probable tokens. None if they are not requested."""
    if num_top is None or logprobs is None:
        return None
    chosen_BS, top_BSC, ids_BSC = logprobs
    top = zip(ids_BSC[index].tolist(), top_BSC[index].tolist(), strict=True)
    return float(chosen_BS[index]), tuple(top)[:num_top]


def prompt_logprobs_of(scores: Logprobs, index: int, tokens: slice, num_top: int | None) -> PromptLogprobs:
    """Return those of some tokens of a chunk, copied, so that those of the other chunks of the call are freed."""
    tokens_XT, top_XTC, ids_XTC = scores
    top_SC, ids_SC = (np.array(array[index, tokens, :num_top]) for array in (top_XTC, ids_XTC))
    return PromptLogprobs(np.array(tokens_XT[index, tokens]), top_SC, ids_SC)
