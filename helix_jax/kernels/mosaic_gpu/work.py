"""How the cache's tiles are dealt to the processors: evenly, whatever the lengths of the rows.

A *job* is a tile of queries of one row, and the run of key tiles that they see. For each key/value head in turn a job's
tiles are walked once: a *segment*. All segments, end to end, are one line of tiles, cut into equal *streams*. A stream
begins and ends anywhere; each segment that it touches gives a *part*, a partial over the tiles of that segment which
are its own. Along the line either the segment or the stream rises by one from part to part, so that segment + stream
numbers the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

ROWS = 64  # of a warpgroup's matrix product
_TILES = 1  # the column of Schedule.jobs_P8
_SEARCH = 8  # loads in flight
_FEW = 512  # jobs
_FAR = 2**30


@dataclass(frozen=True)
class Work:
    """The static shape of the work.

    queries: of one row and key/value head: new tokens times heads in a group. members: warpgroups, or blocks, that
    share the keys of a job, 64 queries each. tile: slots. streams: over all processors.
    """

    rows: int
    heads: int
    queries: int
    members: int
    tile: int
    streams: int

    @property
    def job_queries(self) -> int:
        return ROWS * self.members

    @property
    def jobs_per_row(self) -> int:
        return -(-self.queries // self.job_queries)

    @property
    def jobs(self) -> int:
        return self.rows * self.jobs_per_row

    @property
    def parts(self) -> int:
        return self.jobs * self.heads + self.streams

    @property
    def part_queries(self) -> int:
        """Queries of a job, or where one has fewer than a warpgroup takes, these in whole tiles of memory."""
        return -(-self.queries // 8) * 8 if self.queries < ROWS else self.job_queries


class Schedule(NamedTuple):
    """The traced part of the work. P counts jobs, Q the queries of a job.

    ends_P: tiles of the jobs up to and with this one, for one head. jobs_P8: the first tile, how many, which of them
    every query sees whole [first, last), the slots that any query sees [lo, hi). spans_2PQ: lo and hi of each query.
    """

    ends_P: Any
    jobs_P8: Any
    spans_2PQ: Any


class Segment(NamedTuple):
    """What a stream walks of one job and head: tiles [begin, end), those in [whole_begin, whole_end) without a mask."""

    part: Array
    job: Array
    head: Array
    begin: Array
    end: Array
    whole_begin: Array
    whole_end: Array
    lo: Array
    hi: Array


def schedule(work: Work, lo_BT: Array, hi_BT: Array) -> Schedule:
    """Deals with what each query sees. It is the same in every layer, so that XLA computes it once in a step."""
    P, Q = work.jobs, work.job_queries
    group = work.queries // lo_BT.shape[1]

    def per_query(x_BT: Array) -> Array:
        x_BX = jnp.repeat(x_BT, group, axis=1)
        return jnp.pad(x_BX, ((0, 0), (0, work.jobs_per_row * Q - work.queries)), mode="edge").reshape(P, Q)

    spans_2PQ = jnp.stack([per_query(lo_BT), per_query(hi_BT)])
    # One job per row needs no view by query: with one new token nothing is left to reduce.
    lo_PX, hi_PX = (lo_BT, hi_BT) if work.jobs_per_row == 1 else spans_2PQ
    live_PX = hi_PX > lo_PX
    lo_P = jnp.where(live_PX, lo_PX, _FAR).min(1)
    hi_P = jnp.where(live_PX, hi_PX, 0).max(1)
    first_P = lo_P // work.tile
    tiles_P = jnp.maximum(-(-hi_P // work.tile) - first_P, 0)
    whole_first_P = -(-jnp.where(live_PX, lo_PX, 0).max(1) // work.tile)
    whole_last_P = jnp.where(live_PX, hi_PX, _FAR).min(1) // work.tile
    unused_P = jnp.zeros_like(lo_P)  # so that a job lies in one sector of memory
    jobs_P8 = jnp.stack([first_P, tiles_P, whole_first_P, whole_last_P, lo_P, hi_P, unused_P, unused_P], 1)
    return Schedule(*(x.astype(jnp.int32) for x in (_sums(tiles_P), jobs_P8, spans_2PQ)))


def _sums(x_P: Array) -> Array:
    """Cumulative. Of few, each by itself: one small kernel, where XLA's cumulative sum is two slow ones."""
    P = len(x_P)
    return jnp.cumsum(x_P) if P > _FEW else jnp.where(jnp.tri(P, dtype=bool), x_P, 0).sum(1)


def _tiles_per_stream(work: Work, ends_P: Any) -> tuple[Array, Array]:
    total = ends_P[work.jobs - 1] * work.heads
    return total, jnp.maximum((total + work.streams - 1) // work.streams, 1)


def each_segment(work: Work, plan: Schedule, stream: Array, body: Callable[[Segment, Array], Array]) -> None:
    """In a kernel: `walked = body(segment, walked)` for the segments of a stream in order, from 0 on."""
    total, per_stream = _tiles_per_stream(work, plan.ends_P)
    stop = jnp.minimum((stream + 1) * per_stream, total)

    def one(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at, job, walked = carry
        job = lax.while_loop(lambda job: plan.ends_P[job] * work.heads <= at, lambda job: job + 1, job)
        end = plan.ends_P[job]
        first, tiles, whole_first, whole_last, lo, hi = (plan.jobs_P8[job, i] for i in range(6))
        into = at - (end - tiles) * work.heads
        head = into // tiles
        begin = into - head * tiles
        length = jnp.minimum(tiles - begin, stop - at)
        begin = begin + first
        whole_begin = jnp.clip(whole_first, begin, begin + length)
        whole_end = jnp.clip(whole_last, whole_begin, begin + length)
        part = job * work.heads + head + stream
        segment = Segment(part, job, head, begin, begin + length, whole_begin, whole_end, lo, hi)
        return at + length, job, body(segment, walked)

    start = stream * per_stream
    lax.while_loop(lambda carry: carry[0] < stop, one, (start, jobs_before(work, plan.ends_P, start), jnp.int32(0)))


def jobs_before(work: Work, ends_P: Any, tile: Array) -> Array:
    """How many jobs end before a tile of the line, by a search that loads many ends at once: each load takes long."""
    found, left = jnp.int32(0), work.jobs
    while left:
        step = -(-(left + 1) // (_SEARCH + 1))
        pivots = [found + (i + 1) * step - 1 for i in range(_SEARCH)]
        ends = [ends_P[jnp.minimum(pivot, work.jobs - 1)] for pivot in pivots]
        for pivot, end in zip(pivots, ends, strict=True):
            before = (pivot < work.jobs) & (end * work.heads <= tile)
            found = found + jnp.where(before, step, 0)
        left = step - 1
    return found


def each_tile(segment: Segment, body: Callable[[bool, Array, Any], Any], carry: Any) -> Any:
    """In a kernel: `carry = body(masked, tile, carry)` for the tiles of a segment in order."""
    bounds = (segment.begin, segment.whole_begin, segment.whole_end, segment.end)
    for masked, (begin, end) in zip((True, False, True), pairwise(bounds), strict=True):
        carry = lax.fori_loop(begin, end, partial(body, masked), carry)
    return carry


def parts_of(work: Work, plan: Schedule, job: Array, head: Array) -> tuple[Array, Array]:
    """In a kernel: the first part of a segment, and how many follow each other from there."""
    _, per_stream = _tiles_per_stream(work, plan.ends_P)
    tiles = plan.jobs_P8[job, _TILES]
    start = (plan.ends_P[job] - tiles) * work.heads + head * tiles
    first, last = start // per_stream, (start + tiles - 1) // per_stream
    return job * work.heads + head + first, jnp.where(tiles > 0, last - first + 1, 0)
