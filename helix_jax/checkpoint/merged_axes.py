"""View a parameter inside a published tensor, which may merge axes or contain several parameters.

Families write the axes of a published tensor in letters: `NH D` has two axes, the first of heads times width. Parts in
parentheses follow each other on an axis, and `*` marks the one that is the parameter: `(NH+KH*+KH) D` has first
queries, then keys, which are meant, then values; `N(I*+U) Z` has two parts for each head; `E D F(*+1)` has pairs, of
which the parameter is the first.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

_OWN, _ONE = "*", "1"  # the mark of the parameter's part, and a part or an axis of size 1


def published_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a published tensor from the letters of its axes and their sizes."""
    return tuple(math.prod(_factor_size(factor, sizes) for factor in _factors(axis)) for axis in axes.split())


def select_part(published: np.ndarray, axes: str, letters: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Return the part of a published tensor that is a parameter, as a view if the tensor is contiguous.

    Args:
        published: The tensor.
        axes: The letters of its axes.
        letters: The letters of the parameter, in the order of its axes.
        sizes: The size of each letter.
    """
    factors = [factor for axis in axes.split() for factor in _factors(axis)]
    view = published.reshape([_factor_size(factor, sizes) for factor in factors])
    located = [_locate(factor, sizes) for factor in factors]
    order = "".join(part for part, _ in located)
    view = view[tuple(span for _, span in located)].reshape([sizes[letter] for letter in order])
    return view.transpose([order.index(letter) for letter in letters])


def _factors(axis: str) -> list[list[str]]:
    """Return [["N"], ["I*", "U"]] for `N(I*+U)`."""
    return [factor.strip("()").split("+") for factor in re.findall(r"\([^)]*\)|.", axis)]


def _factor_size(factor: list[str], sizes: Mapping[str, int]) -> int:
    return sum(_part_size(part, sizes) for part in factor)


def _part_size(part: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[letter] for letter in _letters(part))


def _letters(part: str) -> str:
    return part.strip(_OWN + _ONE)


def _locate(factor: list[str], sizes: Mapping[str, int]) -> tuple[str, slice]:
    """Return the letters of the part that belongs to the parameter, and its span."""
    first = 0
    for part in factor:
        size = _part_size(part, sizes)
        if len(factor) == 1 or _OWN in part:
            return _letters(part), slice(first, first + size)
        first += size
    raise ValueError(f"no part of {'+'.join(factor)} is marked with {_OWN}")
