"""The static shape of the kernel for grouped heads, and the shared memory that it needs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.mosaic_gpu.work import ROWS, Work
from helix_jax.kernels.page_format import PageFormat
from helix_jax.quantisation import FLOAT8

STAGED_COLUMNS = 64  # columns of a result that are staged in shared memory at once
_LEAST_TILE_BYTES = 16 * 1024
_COLUMNS = 128  # columns of an accumulator
_SCALE_BYTES = 4
_LEAST_STAGES = 3
_PAIR = 2  # a tile of keys and one of values
_FEW_QUERIES = 32


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
    def few(self) -> bool:
        """Whether the queries are the columns of the matrix products, instead of their 64 rows."""
        return self.work.member_queries < ROWS

    @property
    def product_dtype(self) -> DTypeLike:
        """The type of the operands of the matrix products."""
        return jnp.float16 if self.quantised else jnp.bfloat16

    @property
    def columns(self) -> int:
        """The columns of one accumulator."""
        return min(self.width, _COLUMNS)

    @property
    def q_stages(self) -> int:
        """The segments whose queries are in shared memory at once: two, or one if there is too little memory."""
        return 2 if self._copied_tiles(2, self.converted_tiles) >= _LEAST_STAGES else 1

    @property
    def stages(self) -> int:
        """The tiles of a stream that are ready to be multiplied at once. Keys and values alternate."""
        return self.converted_tiles if self.quantised else self.copied_tiles

    @property
    def converted_tiles(self) -> int:
        """The converted tiles of a stream: two pairs, or one if there is too little memory. 0: it converts none."""
        if not self.quantised:
            return 0
        return 2 * _PAIR if self.few and self._copied_tiles(1, 2 * _PAIR) >= _PAIR else _PAIR

    @property
    def copied_tiles(self) -> int:
        """The tiles that are copied from the pages of a stream at once. An even number, if they are quantised."""
        return self._copied_tiles(self.q_stages, self.converted_tiles)

    @property
    def scale_stages(self) -> int:
        """The tiles whose scales are in shared memory: those that are copied, and those of two pairs in use."""
        return self.copied_tiles + 4

    def _copied_tiles(self, q_stages: int, converted: int) -> int:
        """Return how many tiles fit into the memory beside everything else."""
        of_queries, tile = 2 * self.width * q_stages, self.work.tile
        staged = 4 * STAGED_COLUMNS
        if self.few:
            staged = 4 * self.width + (4 + 2) * tile  # outputs, scores and weights
        staged = self.work.member_queries * (of_queries + staged) * self.computing_warpgroups
        left = memory.BYTES - staged - 4 * memory.ALIGNMENT  # for spans, log-sum-exps and barriers
        left = left // self.streams_per_processor
        if not self.quantised:
            return left // (2 * tile * self.width)
        left -= converted * tile * 2 * self.width + 4 * tile * _SCALE_BYTES  # and the scales of tiles in use
        return left // (_PAIR * tile * (self.width + _SCALE_BYTES)) * _PAIR


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
    member_queries = -(-queries // 8) * 8 if queries <= _FEW_QUERIES else ROWS
    work = Work(rows, heads, queries, members, tile, streams * processors, member_queries)
    return GroupedShape(work, pages.width, pages.page, processors, scale, pages.dtype == FLOAT8)


class Quantised(NamedTuple):
    """The shared memory and the barriers of streams whose pages are quantised.

    Attributes:
        ring: The quantised tiles of each stream. Keys and values alternate.
        scales: The scales of the tiles.
        filled: The copies of a tile and of its scales arrive here.
        converted: A tile of keys and one of values of each stream, as float16, which represents float8 exactly.
    """

    ring: Any
    scales: Any
    filled: Any
    converted: Any


class Few(NamedTuple):
    """The shared memory through which few queries are transposed, of each computing warpgroup.

    Attributes:
        scores: A tile of scores.
        weights: A tile of weights.
        per_query: A factor for each query.
    """

    scores: Any
    weights: Any
    per_query: Any


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
        few: What few queries need. None: there are many.
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
    few: Few | None

    def tile(self, stream: Array, stage: Array | int) -> Any:
        """Return a tile of keys or values that is ready to be multiplied."""
        return (self.quantised.converted if self.quantised else self.ring).at[stream, stage]

    def scales(self, stream: Array, stage: Array, layout: Any) -> Array:
        """Return the scales of the slots of a tile, for scores in a layout."""
        assert self.quantised is not None
        return plgpu.layout_cast(self.quantised.scales[stream, stage], layout.reduce(0))


def describe_shared(shape: GroupedShape) -> Shared:
    """Describe the shared memory of a processor."""
    work, streams, queries = shape.work, shape.streams_per_processor, shape.work.member_queries
    per_stage, per_q_stage = (streams, shape.stages), (shape.computing_warpgroups, shape.q_stages)
    copies, tile = memory.copies_per_tile(work.tile, shape.page), (work.tile, shape.width)
    return Shared(
        ring=None if shape.quantised else memory.allocate_tiled((*per_stage, *tile), jnp.bfloat16),
        q=memory.allocate_tiled((*per_q_stage, queries, shape.width), shape.product_dtype),
        o=_describe_outputs(shape),
        spans=memory.allocate_per_query((*per_q_stage, 2, queries), jnp.int32),
        lse=memory.allocate_per_query((shape.computing_warpgroups, queries), jnp.float32),
        q_filled=plgpu.Barrier(num_arrivals=memory.QUERY_COPIES, num_barriers=per_q_stage),
        q_freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=(streams, shape.q_stages)),
        filled=plgpu.Barrier(num_arrivals=1 if shape.quantised else copies, num_barriers=per_stage),
        freed=plgpu.Barrier(num_arrivals=work.members, num_barriers=per_stage),
        cleared=plgpu.Barrier(num_arrivals=work.members, num_barriers=streams),
        quantised=_describe_quantised(shape, copies) if shape.quantised else None,
        few=_describe_few(shape) if shape.few else None,
    )


def _describe_outputs(shape: GroupedShape) -> Any:
    if shape.few:  # they are stored column by column, and all at once
        return plgpu.SMEM((shape.computing_warpgroups, shape.work.member_queries, shape.width), jnp.float32)
    return memory.allocate_tiled((shape.computing_warpgroups, ROWS, STAGED_COLUMNS), jnp.float32)


def _describe_quantised(shape: GroupedShape, copies: int) -> Quantised:
    streams, tile = shape.streams_per_processor, (shape.work.tile, shape.width)
    return Quantised(
        ring=memory.allocate_tiled((streams, shape.copied_tiles, *tile), FLOAT8),
        scales=plgpu.SMEM((streams, shape.scale_stages, shape.work.tile), jnp.float32),
        filled=plgpu.Barrier(num_arrivals=2 * copies, num_barriers=(streams, shape.copied_tiles)),
        converted=memory.allocate_tiled((streams, shape.stages, *tile), shape.product_dtype),
    )


def _describe_few(shape: GroupedShape) -> Few:
    warpgroups, queries = shape.computing_warpgroups, shape.work.member_queries
    return Few(
        scores=plgpu.SMEM((warpgroups, queries, shape.work.tile), jnp.float32),
        weights=memory.allocate_tiled((warpgroups, queries, shape.work.tile), shape.product_dtype),
        per_query=plgpu.SMEM((warpgroups, queries), jnp.float32),
    )
