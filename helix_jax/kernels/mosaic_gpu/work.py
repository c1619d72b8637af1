"""Distributes the tiles of the cache evenly over the processors, whatever the lengths of the rows.

A *job* is a tile of queries of one row with the range of key tiles that they see. A *segment* is a job for one
key/value head. The tiles of all segments, one after the other, form a line, which is cut into *streams* of equal
length. A stream may begin and end inside a segment. The tiles that one stream computes of one segment give a *part*: a
partial over these tiles. From each part of the line to the next, either the segment or the stream increases by one, so
segment + stream numbers the parts.

The heads of a page are adjacent in memory, and reading adjacent data at the same time is faster. So the heads are
distributed over several lines, called *lanes*: as many as divide both the heads and the streams. All lanes are cut
at the same places, so streams of different lanes read the same pages at the same time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

ROWS = 64  # the rows of a warpgroup's matrix product
_JOB_SIZE, _END, _TILES = 8, 0, 2  # the numbers of a job in Schedule.jobs_P8, and the columns of two of them
_FEW_JOBS = 512
_FAR = 2**30  # larger than any slot
_LEAST_USED = 0.95  # the least fraction of the processors that aligned streams use


@dataclass(frozen=True)
class Work:
    """The static shape of the work.

    Args:
        rows: Sequences.
        heads: Key/value heads.
        queries: Queries of one row and key/value head: new tokens times heads in a group.
        members: Warpgroups or blocks that share the keys of a job.
        tile: Slots per tile.
        streams: Streams over all processors and lanes.
        member_queries: The queries of a member, padding included.
    """

    rows: int
    heads: int
    queries: int
    members: int
    tile: int
    streams: int
    member_queries: int = ROWS

    @property
    def job_queries(self) -> int:
        """The queries of a job, padding included."""
        return self.member_queries * self.members

    @property
    def jobs_per_row(self) -> int:
        """The jobs that the queries of a row are divided into."""
        return -(-self.queries // self.job_queries)

    @property
    def jobs(self) -> int:
        """The jobs of all rows."""
        return self.rows * self.jobs_per_row

    @property
    def lanes(self) -> int:
        """The lines of tiles that are cut into streams."""
        return math.gcd(self.heads, self.streams)

    @property
    def heads_in_lane(self) -> int:
        """The key/value heads of one lane."""
        return self.heads // self.lanes

    @property
    def streams_in_lane(self) -> int:
        """The streams of one lane."""
        return self.streams // self.lanes

    @property
    def parts_in_lane(self) -> int:
        """An upper bound on the parts of one lane."""
        return self.jobs * self.heads_in_lane + self.streams_in_lane

    @property
    def parts(self) -> int:
        """An upper bound on the parts of all lanes."""
        return self.parts_in_lane * self.lanes

    @property
    def part_queries(self) -> int:
        """The queries that a part stores: those of a job, or fewer, in eights, if it does not fill a warpgroup."""
        return -(-self.queries // 8) * 8 if self.queries < ROWS else self.job_queries


class Schedule(NamedTuple):
    """The traced part of the work. S is the streams of a lane plus one, P the jobs, Q the queries of a job.

    Attributes:
        starts_SX: The first tile of each stream in its line, its job, and the entry of that job in `jobs_P8`.
        jobs_P8: Eight numbers per job, which fill one sector of memory: the end of its tiles in the line of one head,
            the index of the first tile in its row, the number of tiles, the tiles [first, last) that every query sees
            completely, the slots [lo, hi) that any query sees, and the next job that has tiles.
        spans_2PQ: lo and hi of each query.
    """

    starts_SX: Any
    jobs_P8: Any
    spans_2PQ: Any


class Segment(NamedTuple):
    """The tiles of one job and head that a stream computes.

    Attributes:
        nth: The index among the segments of the stream.
        part: The index of the part that the stream computes.
        job: The job.
        head: The key/value head.
        begin: The first tile.
        end: The tile after the last.
        whole_begin: The first tile that needs no mask.
        whole_end: The tile after the last that needs no mask.
        lo: The first slot that any query sees.
        hi: The slot after the last that any query sees.
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

    def needs_mask(self, tile: Array) -> Array:
        """Return whether a tile has slots that some query does not see."""
        return (tile < self.whole_begin) | (tile >= self.whole_end)


def align_streams(work: Work, per_processor: int = 1) -> Work:
    """Use slightly fewer processors, if that aligns the streams with the segments when all rows have equal lengths.

    Then each segment is divided into whole streams. Otherwise some streams compute the end of one segment and the
    beginning of another, which takes longer, and all others wait for them.

    Args:
        work: The work on all processors.
        per_processor: The streams of a processor.

    Returns:
        The work with the largest number of streams that are aligned, or all streams if too few would be left.
    """
    for streams in range(work.streams, math.ceil(_LEAST_USED * work.streams) - 1, -per_processor):
        aligned = replace(work, streams=streams)
        if aligned.streams_in_lane % (aligned.jobs * aligned.heads_in_lane) == 0:
            return aligned
    return work


def make_schedule(work: Work, lo_BT: Array, hi_BT: Array) -> Schedule:
    """Compute the schedule from the slots that each query sees. All layers share it, so XLA computes it once."""
    P, Q = work.jobs, work.job_queries
    group = work.queries // lo_BT.shape[1]

    def per_query(x_BT: Array) -> Array:
        x_BX = jnp.repeat(x_BT, group, axis=1)
        return jnp.pad(x_BX, ((0, 0), (0, work.jobs_per_row * Q - work.queries)), mode="edge").reshape(P, Q)

    spans_2PQ = jnp.stack([per_query(lo_BT), per_query(hi_BT)])
    # With one job per row, the spans of the tokens suffice. With one new token, the reductions below are trivial.
    lo_PX, hi_PX = (lo_BT, hi_BT) if work.jobs_per_row == 1 else spans_2PQ
    live_PX = hi_PX > lo_PX
    lo_P = jnp.where(live_PX, lo_PX, _FAR).min(1)
    hi_P = jnp.where(live_PX, hi_PX, 0).max(1)
    first_P = lo_P // work.tile
    tiles_P = jnp.maximum(-(-hi_P // work.tile) - first_P, 0)
    whole_first_P = -(-jnp.where(live_PX, lo_PX, 0).max(1) // work.tile)
    whole_last_P = jnp.where(live_PX, hi_PX, _FAR).min(1) // work.tile
    end_P = _cumulative_sum(tiles_P)
    total = end_P[-1] * work.heads_in_lane
    per_stream = -(-total // work.streams_in_lane)
    start_S = jnp.minimum(jnp.arange(work.streams_in_lane + 1) * per_stream, total)

    def job_at(tile_X: Array) -> Array:
        job_X = jnp.searchsorted(end_P * work.heads_in_lane, tile_X, side="right", method="compare_all")
        return jnp.minimum(job_X, P - 1)

    next_job_P = job_at(end_P * work.heads_in_lane)
    jobs_P8 = jnp.stack([end_P, first_P, tiles_P, whole_first_P, whole_last_P, lo_P, hi_P, next_job_P], 1)
    job_S = job_at(start_S)
    starts_SX = jnp.concat([start_S[:, None], job_S[:, None], jobs_P8[job_S]], axis=1)
    return Schedule(*(x.astype(jnp.int32) for x in (starts_SX, jobs_P8, spans_2PQ)))


def _cumulative_sum(x_P: Array) -> Array:
    """Return the cumulative sum. For few numbers this is one small kernel, and XLA's cumsum is two slow ones."""
    P = len(x_P)
    return jnp.cumsum(x_P) if P > _FEW_JOBS else jnp.where(jnp.tri(P, dtype=bool), x_P, 0).sum(1)


def walk_segments(work: Work, schedule: Schedule, stream: Array, body: Callable[[Segment, Array], Array]) -> None:
    """Call `body` in a kernel for each segment of a stream, in order.

    Args:
        work: The static shape of the work.
        schedule: The schedule.
        stream: The index of the stream.
        body: Takes a segment and the number of ring stages used so far, which starts at 0, and returns that number
            after the segment.
    """
    stream, lane = stream // work.lanes, lax.rem(stream, work.lanes)
    # The types of a loop carry must not change, and loaded numbers vary over the mesh axes where computed ones do not.
    # Adding 0 gives both the same type.
    start, job, *current = (schedule.starts_SX[stream, i] + 0 for i in range(2 + _JOB_SIZE))
    stop = schedule.starts_SX[stream + 1, 0]

    def visit(carry: tuple[Array, Array, Array, list[Array], Array]) -> tuple[Array, Array, Array, list[Array], Array]:
        nth, at, job, current, ring_step = carry
        end, first, tiles, whole_first, whole_last, lo, hi, next_job = current
        upcoming = [schedule.jobs_P8[next_job, i] for i in range(_JOB_SIZE)]  # loaded while this job is computed
        offset = at - (end - tiles) * work.heads_in_lane
        head = offset // tiles
        begin = offset - head * tiles
        length = jnp.minimum(tiles - begin, stop - at)
        begin = begin + first
        whole_begin = jnp.clip(whole_first, begin, begin + length)
        whole_end = jnp.clip(whole_last, whole_begin, begin + length)
        part = lane * work.parts_in_lane + job * work.heads_in_lane + head + stream
        head = head * work.lanes + lane
        ring_step = body(
            Segment(nth, part, job, head, begin, begin + length, whole_begin, whole_end, lo, hi), ring_step
        )
        same = at + length < end * work.heads_in_lane
        current = [jnp.where(same, now, later) for now, later in zip(current, upcoming, strict=True)]
        return nth + 1, at + length, jnp.where(same, job, next_job), current, ring_step

    lax.while_loop(lambda carry: carry[1] < stop, visit, (jnp.int32(0), start, job, current, jnp.int32(0)))


def loop_over_tiles(segment: Segment, body: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
    """Run `carry = body(masked, tile, carry)` in a kernel for each tile of a segment in order. Return the carry."""

    def run(tile: Array, carry: Any) -> Any:
        return body(segment.needs_mask(tile), tile, carry)

    return lax.fori_loop(segment.begin, segment.end, run, carry)


def loop_by_mask(segment: Segment, body: Callable[[bool, Array, Any], Any], carry: Any) -> Any:
    """Do the same with three loops, so that `masked` is static.

    That takes longer to compile. Attention to latents runs faster, because it is not limited by memory.
    """
    bounds = (segment.begin, segment.whole_begin, segment.whole_end, segment.end)
    for masked, (begin, end) in zip((True, False, True), pairwise(bounds), strict=True):
        carry = lax.fori_loop(begin, end, partial(body, masked), carry)
    return carry


def find_parts(work: Work, schedule: Schedule, job: Array, head: Array) -> tuple[Array, Array]:
    """Return, in a kernel, the first part of a segment and the number of its parts, which are consecutive."""
    head, lane = head // work.lanes, lax.rem(head, work.lanes)
    per_stream = jnp.maximum(schedule.starts_SX[1, 0], 1)
    end, tiles = schedule.jobs_P8[job, _END], schedule.jobs_P8[job, _TILES]
    start = (end - tiles) * work.heads_in_lane + head * tiles
    first, last = start // per_stream, (start + tiles - 1) // per_stream
    part = lane * work.parts_in_lane + job * work.heads_in_lane + head + first
    return part, jnp.where(tiles > 0, last - first + 1, 0)
