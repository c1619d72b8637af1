"""The static shape of the kernel for grouped heads, and the shared memory that it needs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array

from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.mosaic_gpu.work import ROWS, Work
from helix_jax.kernels.page_format import PageFormat
from helix_jax.quantisation import FLOAT8

STAGED_COLUMNS = 64  # columns of a result that are staged in shared memory at once
_LEAST_TILE_BYTES = 16 * 1024
_COLUMNS = 128  # columns of an accumulator
_SCALE_BYTES = 4
_LEAST_STAGES = 3


@dataclass(frozen=True)
class GroupedShape:
    """The static shape of the kernel for grouped heads.

    Args:
        work: The static shape of the work.
        width: The width of a head.
        page: Tokens per page.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
        quantised: Whether the pages are float8 with scales.
    """

    work: Work
    width: int
    page: int
    processors: int
    scale: float
    quantised: bool

    @property
    def streams_per_processor(self) -> int:
        """The streams that one processor runs."""
        return self.work.streams // self.processors

    @property
    def computing_warpgroups(self) -> int:
        """The warpgroups of one processor that compute. The others copy."""
        return self.streams_per_processor * self.work.members

    @property
    def columns(self) -> int:
        """The columns of one accumulator."""
        return min(self.width, _COLUMNS)

    @property
    def q_stages(self) -> int:
        """The segments whose queries are in shared memory at once: two, or one if there is too little memory."""
        return 2 if not self.quantised and self._copied_tiles(q_stages=2) >= _LEAST_STAGES else 1

    @property
    def stages(self) -> int:
        """The tiles of a stream that are ready to be multiplied at once. Keys and values alternate."""
        return 2 if self.quantised else self.copied_tiles

    @property
    def copied_tiles(self) -> int:
        """The tiles that are copied from the pages of a stream at once. An even number, if they are quantised."""
        return self._copied_tiles(self.q_stages)

    @property
    def scale_stages(self) -> int:
        """The tiles whose scales are in shared memory: those that are copied, and those of two pairs in use."""
        return self.copied_tiles + 4

    def _copied_tiles(self, q_stages: int) -> int:
        """Return how many tiles fit into the memory beside everything else."""
        staged = ROWS * (2 * self.width * q_stages + 4 * STAGED_COLUMNS) * self.computing_warpgroups
        left = memory.BYTES - staged - 4 * memory.ALIGNMENT  # for spans, log-sum-exps and barriers
        left, tile = left // self.streams_per_processor, self.work.tile
        if not self.quantised:
            return left // (2 * tile * self.width)
        left -= 2 * tile * 2 * self.width + 4 * tile * _SCALE_BYTES  # converted tiles, and scales in use
        return left // (2 * tile * (self.width + _SCALE_BYTES)) * 2


def choose_shape(rows: int, queries: int, heads: int, pages: PageFormat, processors: int, scale: float) -> GroupedShape:
    """Choose the shape of the kernel.

    Args:
        rows: Sequences.
        queries: Queries of a row and key/value head: new tokens times heads in a group.
        heads: Key/value heads.
        pages: The format of the pages.
        processors: Multiprocessors of the GPU.
        scale: The factor on the logits.
    """
    members = 1 if queries <= ROWS else 2
    streams = 2 if members == 1 and pages.width <= _COLUMNS else 1
    tile = max(ROWS, _LEAST_TILE_BYTES // (2 * pages.width))
    work = Work(rows, heads, queries, members, tile, streams * processors)
    return GroupedShape(work, pages.width, pages.page, processors, scale, pages.dtype == FLOAT8)


class Quantised(NamedTuple):
    """The shared memory and the barriers of streams whose pages are quantised.

    Attributes:
        ring: The quantised tiles of each stream. Keys and values alternate.
        scales: The scales of the tiles.
        filled: The copies of a tile and of its scales arrive here.
        keys: A tile of keys of each stream, converted to float16, which represents float8 exactly.
        values: A tile of values of each stream, converted to bfloat16.
    """

    ring: Any
    scales: Any
    filled: Any
    keys: Any
    values: Any


class Shared(NamedTuple):
    """The shared memory and the barriers of the streams of one processor.

    Attributes:
        ring: The tiles of each stream. Keys and values alternate. None: they are in `quantised`.
        q: The queries of each computing warpgroup.
        o: The outputs of each computing warpgroup, until they are copied to global memory.
        spans: The slots that each query sees.
        lse: The log-sum-exps of each computing warpgroup, until they are copied to global memory.
        q_filled: The copies of queries and spans arrive here.
        q_freed: Computing warpgroups arrive here when they no longer need the queries of a segment.
        filled: The copies of a tile arrive here, or its conversion.
        freed: Computing warpgroups arrive here when they no longer need a tile.
        cleared: Computing warpgroups arrive here when they have set their share of unseen values to 0.
        quantised: What quantised pages need. None: they are not quantised.
    """

    ring: Any
    q: Any
    o: Any
    spans: Any
    lse: Any
    q_filled: Any
    q_freed: Any
    filled: Any
    freed: Any
    cleared: Any
    quantised: Quantised | None

    def tile(self, stream: int, stage: Array | int, part: int) -> Any:
        """Return a tile of keys (0) or values (1) that is ready to be multiplied."""
        if self.quantised:
            return (self.quantised.keys, self.quantised.values)[part].at[stream]
        return self.ring.at[stream, stage]


def describe_shared(shape: GroupedShape) -> Shared:
    """Describe the shared memory of a processor."""
    work, streams = shape.work, shape.streams_per_processor
    per_stage, per_q_stage = (streams, shape.stages), (shape.computing_warpgroups, shape.q_stages)
    copies, tile = memory.copies_per_tile(work.tile, shape.page), (work.tile, shape.width)
    of_queries = jnp.float16 if shape.quantised else jnp.bfloat16
    return Shared(
        ring=None if shape.quantised else memory.allocate_tiled((*per_stage, *tile), jnp.bfloat16),
        q=memory.allocate_tiled((*per_q_stage, ROWS, shape.width), of_queries),
        o=memory.allocate_tiled((shape.computing_warpgroups, ROWS, STAGED_COLUMNS), jnp.float32),
        spans=plgpu.SMEM((*per_q_stage, 2, ROWS), jnp.int32),
        lse=plgpu.SMEM((shape.computing_warpgroups, ROWS), jnp.float32),
        q_filled=plgpu.Barrier(num_arrivals=2, num_barriers=per_q_stage),
        q_freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=(streams, shape.q_stages)),
        filled=plgpu.Barrier(num_arrivals=1 if shape.quantised else copies, num_barriers=per_stage),
        freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=per_stage),
        cleared=plgpu.Barrier(num_arrivals=work.members, num_barriers=streams),
        quantised=_describe_quantised(shape, copies) if shape.quantised else None,
    )


def _describe_quantised(shape: GroupedShape, copies: int) -> Quantised:
    streams, tile = shape.streams_per_processor, (shape.work.tile, shape.width)
    return Quantised(
        ring=memory.allocate_tiled((streams, shape.copied_tiles, *tile), FLOAT8),
        scales=plgpu.SMEM((streams, shape.scale_stages, shape.work.tile), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=(streams, shape.copied_tiles)),
        keys=memory.allocate_tiled((streams, *tile), jnp.float16),
        values=memory.allocate_tiled((streams, *tile), jnp.bfloat16),
    )
