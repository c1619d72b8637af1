"""Published tensors merge axes and interleave parts: ours within theirs, as a view, for reading and for writing.

The letters of a published tensor's axes, as families give them: `NH D` has two axes, the first of heads by width;
`N(I+U) Z` has for each head two parts, one after the other; `E D F(*+1)` has pairs, of which ours is the first.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

# A part of size one that is ours, or is another's.
_OURS, _ANOTHERS = "*", "1"


def published_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(_size(factor, sizes) for factor in _factors(axis)) for axis in axes.split())


def our_part(published: np.ndarray, axes: str, letters: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Our part of the published tensor, its axes those of `letters`, in that order: a view, if that is contiguous."""
    factors = [factor for axis in axes.split() for factor in _factors(axis)]
    view = published.reshape([_size(factor, sizes) for factor in factors])
    found, index = "", []
    for factor in factors:
        ours, span = _own(factor, letters, sizes)
        found += ours
        index.append(span)
    return view[tuple(index)].transpose([found.index(letter) for letter in letters])


def _factors(axis: str) -> list[list[str]]:
    """`N(I+U)` -> [["N"], ["I", "U"]]."""
    return [factor.strip("()").split("+") for factor in re.findall(r"\([^)]*\)|.", axis)]


def _size(factor: list[str], sizes: Mapping[str, int]) -> int:
    return sum(1 if part in (_OURS, _ANOTHERS) else sizes[part] for part in factor)


def _own(factor: list[str], letters: str, sizes: Mapping[str, int]) -> tuple[str, slice | int]:
    """Which of the parts is ours, and where it lies; a part of one has no letter and no axis."""
    first = 0
    for part in factor:
        if part == _OURS:
            return "", first
        size = 1 if part == _ANOTHERS else sizes[part]
        if part in letters:
            return part, slice(first, first + size)
        first += size
    raise ValueError(f"no part of {'+'.join(factor)} is in {letters}")
