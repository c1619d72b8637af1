"""Divides the chunks of a step into prefill calls of a few fixed shapes of equal work."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from helix_jax.engine.scheduler import Chunk

_CHUNKS_PER_CALL = (1, 4, 16)  # a call prefills one chunk, or several that are shorter by this factor


class PrefillShape(NamedTuple):
    """The shape of a prefill program: chunks per dp group, and tokens per chunk."""

    chunks: int
    width: int


def prefill_shapes(chunk: int, rows: int) -> list[PrefillShape]:
    """Return shapes of equal work for a dp group of `rows` rows."""
    most = 1 << (rows.bit_length() - 1)
    numbers = {min(number, most) for number in _CHUNKS_PER_CALL}
    return [PrefillShape(number, max(1, chunk // number)) for number in sorted(numbers)]


def divide_chunks(
    chunks: Sequence[Chunk], shapes: Sequence[PrefillShape], groups: int
) -> Iterator[tuple[PrefillShape, dict[int, Chunk]]]:
    """Divide the chunks of a step into calls, in order within each dp group. Each has its index in the call."""
    queues = [[chunk for chunk in chunks if chunk.group == group] for group in range(groups)]
    while any(queues):
        # Take the most tokens, and of shapes that take the same, the one with the least padding.
        options = [(shape, [_fitting(queue, shape) for queue in queues]) for shape in shapes]
        shape, taken = max(options, key=lambda option: (_count_tokens(option[1]), -math.prod(option[0])))
        yield (
            shape,
            {
                group * shape.chunks + index: chunk
                for group, part in enumerate(taken)
                for index, chunk in enumerate(part)
            },
        )
        queues = [queue[len(part) :] for queue, part in zip(queues, taken, strict=True)]


def _fitting(queue: Sequence[Chunk], shape: PrefillShape) -> list[Chunk]:
    """Return the first chunks of a queue that one call of a shape can prefill: at most one per request."""
    taken: list[Chunk] = []
    for chunk in queue[: shape.chunks]:
        if chunk.count > shape.width or any(chunk.request is other.request for other in taken):
            break
        taken.append(chunk)
    return taken


def _count_tokens(taken: Sequence[Sequence[Chunk]]) -> int:
    return sum(chunk.count for chunks in taken for chunk in chunks)
