"""View a parameter inside a published tensor, which may merge axes or interleave several parameters.

Families write the axes of a published tensor in letters: `NH D` has two axes, the first of heads times width;
`N(I+U) Z` has for each head two consecutive parts; `E D F(*+1)` has pairs, of which the parameter is the first.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

# A part of size 1 that belongs to the parameter, and one that belongs to another parameter.
_OWN, _OTHER = "*", "1"


def published_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a published tensor from the letters of its axes and their sizes."""
    return tuple(math.prod(_size(factor, sizes) for factor in _factors(axis)) for axis in axes.split())


def select_part(published: np.ndarray, axes: str, letters: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Return the part of a published tensor that is a parameter, as a view if the tensor is contiguous.

    Args:
        published: The tensor.
        axes: The letters of its axes.
        letters: The letters of the parameter, in the order of its axes.
        sizes: The size of each letter.
    """
    factors = [factor for axis in axes.split() for factor in _factors(axis)]
    view = published.reshape([_size(factor, sizes) for factor in factors])
    order, index = "", []
    for factor in factors:
        letter, span = _locate(factor, letters, sizes)
        order += letter
        index.append(span)
    return view[tuple(index)].transpose([order.index(letter) for letter in letters])


def _factors(axis: str) -> list[list[str]]:
    """Return [["N"], ["I", "U"]] for `N(I+U)`."""
    return [factor.strip("()").split("+") for factor in re.findall(r"\([^)]*\)|.", axis)]


def _size(factor: list[str], sizes: Mapping[str, int]) -> int:
    return sum(1 if part in (_OWN, _OTHER) else sizes[part] for part in factor)


def _locate(factor: list[str], letters: str, sizes: Mapping[str, int]) -> tuple[str, slice | int]:
    """Return the letter of the part that belongs to the parameter, and its span. A part of size 1 has no letter."""
    first = 0
    for part in factor:
        if part == _OWN:
            return "", first
        size = 1 if part == _OTHER else sizes[part]
        if part in letters:
            return part, slice(first, first + size)
        first += size
    raise ValueError(f"no part of {'+'.join(factor)} is in {letters}")
