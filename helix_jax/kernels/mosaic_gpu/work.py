"""Distributes the tiles of the cache evenly over the processors, whatever the lengths of the rows.

A *job* is a tile of queries of one row, and the run of key tiles that they see. For a key/value head a job's tiles are
walked once: a *segment*. Segments, end to end, are a line of tiles, cut into equal *streams*. A stream begins and ends
anywhere; each segment that it touches gives a *part*, a partial over the tiles of that segment which are its own. Along
the line either the segment or the stream rises by one from part to part, so that segment + stream numbers the parts.

Heads lie side by side in a page. So that they are also read side by side, which memory likes, as many of them as the
streams allow have lines of their own, *lanes*, all cut alike: a stream has a neighbour in every lane that walks the
same tiles at the same time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

ROWS = 64  # of a warpgroup's matrix product
_JOB, _END, _TILES = 8, 0, 2  # numbers of a job in Schedule.jobs_P8, and columns
_FEW = 512  # jobs
_FAR = 2**30


@dataclass(frozen=True)
class Work:
    """The static shape of the work.

    Args:
        rows: Sequences.
        heads: Key/value heads.
        queries: Queries of one row and key/value head: new tokens times heads in a group.
        members: Warpgroups, or blocks, that share the keys of a job, with 64 queries each.
        tile: Slots per tile.
        streams: Streams over all processors and lanes.
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
    def lanes(self) -> int:
        return math.gcd(self.heads, self.streams)

    @property
    def heads_in_lane(self) -> int:
        return self.heads // self.lanes

    @property
    def streams_in_lane(self) -> int:
        return self.streams // self.lanes

    @property
    def parts_in_lane(self) -> int:
        return self.jobs * self.heads_in_lane + self.streams_in_lane

    @property
    def parts(self) -> int:
        return self.parts_in_lane * self.lanes

    @property
    def part_queries(self) -> int:
        """The queries of a job; if there are fewer than a warpgroup takes, rounded up to whole tiles of memory."""
        return -(-self.queries // 8) * 8 if self.queries < ROWS else self.job_queries


class Schedule(NamedTuple):
    """The traced part of the work. S counts the streams of a lane plus one, P jobs, Q the queries of a job.

    Attributes:
        starts_SX: The first tile of each stream in its line, its job, and the entry of that job in `jobs_P8`.
        jobs_P8: Eight numbers per job, which are one sector of memory: where its tiles end in the line of one head, the
            first of them in its row, how many there are, the tiles [first, last) that every query sees completely, the
            slots [lo, hi) that any query sees, and the next job that has tiles.
        spans_2PQ: lo and hi of each query.
    """

    starts_SX: Any
    jobs_P8: Any
    spans_2PQ: Any


class Segment(NamedTuple):
    """The tiles [begin, end) of one job and head that a stream computes; [whole_begin, whole_end) need no mask.

    `nth` is the index among the segments of the stream.
    """

    nth: Array
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
    """Compute the schedule from the slots that each query sees. It is equal in all layers, so XLA computes it once."""
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
    end_P = _sums(tiles_P)
    total = end_P[-1] * work.heads_in_lane
    per_stream = -(-total // work.streams_in_lane)
    start_S = jnp.minimum(jnp.arange(work.streams_in_lane + 1) * per_stream, total)

    def job_at(tile_X: Array) -> Array:
        job_X = jnp.searchsorted(end_P * work.heads_in_lane, tile_X, side="right", method="compare_all")
        return jnp.minimum(job_X, P - 1)

    following_P = job_at(end_P * work.heads_in_lane)
    jobs_P8 = jnp.stack([end_P, first_P, tiles_P, whole_first_P, whole_last_P, lo_P, hi_P, following_P], 1)
    job_S = job_at(start_S)
    starts_SX = jnp.concat([start_S[:, None], job_S[:, None], jobs_P8[job_S]], axis=1)
    return Schedule(*(x.astype(jnp.int32) for x in (starts_SX, jobs_P8, spans_2PQ)))


def _sums(x_P: Array) -> Array:
    """Return the cumulative sum: for few numbers in one small kernel, where XLA's takes two slow ones."""
    P = len(x_P)
    return jnp.cumsum(x_P) if P > _FEW else jnp.where(jnp.tri(P, dtype=bool), x_P, 0).sum(1)


def each_segment(work: Work, plan: Schedule, stream: Array, body: Callable[[Segment, Array], Array]) -> None:
    """Call `walked = body(segment, walked)` in a kernel for the segments of a stream in order, starting with 0."""
    stream, lane = stream // work.lanes, lax.rem(stream, work.lanes)
    # A loop carry needs one type. What is read varies over the mesh axes, what is computed does not.
    start, job, *known = (plan.starts_SX[stream, i] + 0 for i in range(2 + _JOB))
    stop = plan.starts_SX[stream + 1, 0]

    def one(carry: tuple[Array, Array, Array, list[Array], Array]) -> tuple[Array, Array, Array, list[Array], Array]:
        nth, at, job, known, walked = carry
        end, first, tiles, whole_first, whole_last, lo, hi, following = known
        ahead = [plan.jobs_P8[following, i] for i in range(_JOB)]  # under way while this job is walked
        into = at - (end - tiles) * work.heads_in_lane
        head = into // tiles
        begin = into - head * tiles
        length = jnp.minimum(tiles - begin, stop - at)
        begin = begin + first
        whole_begin = jnp.clip(whole_first, begin, begin + length)
        whole_end = jnp.clip(whole_last, whole_begin, begin + length)
        part = lane * work.parts_in_lane + job * work.heads_in_lane + head + stream
        head = head * work.lanes + lane
        walked = body(Segment(nth, part, job, head, begin, begin + length, whole_begin, whole_end, lo, hi), walked)
        same = at + length < end * work.heads_in_lane
        known = [jnp.where(same, now, later) for now, later in zip(known, ahead, strict=True)]
        return nth + 1, at + length, jnp.where(same, job, following), known, walked

    lax.while_loop(lambda carry: carry[1] < stop, one, (jnp.int32(0), start, job, known, jnp.int32(0)))


def each_tile(segment: Segment, body: Callable[[bool, Array, Any], Any], carry: Any) -> Any:
    """Call `carry = body(masked, tile, carry)` in a kernel for the tiles of a segment in order."""
    bounds = (segment.begin, segment.whole_begin, segment.whole_end, segment.end)
    for masked, (begin, end) in zip((True, False, True), pairwise(bounds), strict=True):
        carry = lax.fori_loop(begin, end, partial(body, masked), carry)
    return carry


def parts_of(work: Work, plan: Schedule, job: Array, head: Array) -> tuple[Array, Array]:
    """Return in a kernel the first part of a segment, and the number of its consecutive parts."""
    head, lane = head // work.lanes, lax.rem(head, work.lanes)
    per_stream = jnp.maximum(plan.starts_SX[1, 0], 1)
    end, tiles = plan.jobs_P8[job, _END], plan.jobs_P8[job, _TILES]
    start = (end - tiles) * work.heads_in_lane + head * tiles
    first, last = start // per_stream, (start + tiles - 1) // per_stream
    part = lane * work.parts_in_lane + job * work.heads_in_lane + head + first
    return part, jnp.where(tiles > 0, last - first + 1, 0)
