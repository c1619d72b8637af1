"""Merges the parts of each job and head into one partial, in one small kernel with a block of threads per query."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.mosaic_gpu.work import Schedule, Work, find_parts

_THREADS = 128
_NUMBERS = 512  # numbers per block: 16 bytes per thread (4 bytes if there are few queries)
_FEW_QUERIES = 512
_IN_FLIGHT = 64  # numbers that one thread loads at once


def merge_parts(work: Work, o_XQH: Array, lse_XQ: Array, schedule: Schedule) -> tuple[Array, Array]:
    """Merge parts into outputs [rows, heads, queries, width] and log-sum-exps [rows, heads, queries]."""
    X, Q, H = o_XQH.shape
    few = work.rows * work.heads * work.queries <= _FEW_QUERIES
    queries = max(1, (_THREADS if few else _NUMBERS) // H)
    blocks = -(-work.queries // queries)
    width = queries * H
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // _THREADS)
    parts_of_segment = 2 + work.streams // (work.jobs * work.heads)  # on average, rounded up
    at_once = min(_IN_FLIGHT * _THREADS // width, parts_of_segment)

    def body(o, lse, starts, jobs, spans, o_out, lse_out) -> None:
        row_head, block = lax.axis_index("row_head"), lax.axis_index("block")
        row, head = row_head // work.heads, lax.rem(row_head, work.heads)
        query = block * queries
        job = row * work.jobs_per_row + query // work.job_queries
        query = lax.rem(query, work.job_queries)
        live = [spans[0, job, query + i] < spans[1, job, query + i] for i in range(queries)]
        first, count = find_parts(work, Schedule(starts, jobs, spans), job, head)

        repeat = partial(_repeat, width, layout)

        def merge_chunk(chunk: Array, carry):
            parts = [chunk * at_once + i for i in range(at_once)]
            where = [first + jnp.minimum(part, count - 1) for part in parts]
            outputs = [o[at, pl.ds(query * H, width)] for at in where]
            logs = [
                [jnp.where(part < count, lse[at, query + i], -jnp.inf) for i in range(queries)]
                for part, at in zip(parts, where, strict=True)
            ]
            return _add_parts(carry, logs, outputs, repeat)

        nothing = [jnp.float32(-jnp.inf)] * queries, [jnp.float32(0)] * queries
        zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        tops, sums, acc = lax.fori_loop(0, pl.cdiv(count, at_once), merge_chunk, (*nothing, zero))
        seen = [on & (total > 0) for on, total in zip(live, sums, strict=True)]
        sums = [jnp.where(on, total, 1.0) for on, total in zip(seen, sums, strict=True)]
        # A selection, because a query that sees nothing may itself be NaN, and 0 times NaN is NaN.
        o_out[row_head, pl.ds(block * width, width)] = jnp.where(repeat(seen), acc / repeat(sums), 0.0)
        for i in range(queries):
            lse_out[row_head, block * queries + i] = jnp.where(seen[i], tops[i] + jnp.log(sums[i]), -jnp.inf)

    o, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((work.rows * work.heads, blocks * width), jnp.float32),
            jax.ShapeDtypeStruct((work.rows * work.heads, blocks * queries), jnp.float32),
        ),
        grid=(work.rows * work.heads, blocks),
        grid_names=("row_head", "block"),
        compiler_params=memory.COMPILER,
    )(o_XQH.reshape(X, Q * H), lse_XQ, *schedule)
    o = o.reshape(work.rows, work.heads, blocks * queries, H)[:, :, : work.queries]
    return o, lse.reshape(work.rows, work.heads, blocks * queries)[:, :, : work.queries]


def _add_parts(carry, logs: list[list[Array]], outputs: list[Array], repeat: Callable[[list[Array]], Array]):
    """Add parts to what has been merged.

    Args:
        carry: The running maximum and sum of weights of each query, and the sum of the weighted outputs.
        logs: The log-sum-exp of each part and query.
        outputs: The outputs of each part.
        repeat: Repeats the number of each query along its share of an output.

    Returns:
        The new carry.
    """
    tops, sums, acc = carry
    new = [reduce(jnp.maximum, column, top) for top, column in zip(tops, zip(*logs, strict=True), strict=True)]
    shift = [jnp.where(top == -jnp.inf, 0.0, top) for top in new]
    alpha = [jnp.exp(top - s) for top, s in zip(tops, shift, strict=True)]
    acc = acc * repeat(alpha)
    sums = [total * a for total, a in zip(sums, alpha, strict=True)]
    for log, output in zip(logs, outputs, strict=True):
        weight = [jnp.exp(x - s) for x, s in zip(log, shift, strict=True)]
        sums = [total + w for total, w in zip(sums, weight, strict=True)]
        acc = acc + output * repeat(weight)
    return new, sums, acc


def _repeat(width: int, layout: Any, values: list[Array]) -> Array:
    """Repeat the number of each query along its share of the width."""
    share, repeated = width // len(values), jnp.full((width,), values[-1])
    if len(values) > 1:
        number = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
        for i in reversed(range(len(values) - 1)):
            repeated = jnp.where(number < (i + 1) * share, jnp.full((width,), values[i]), repeated)
    return repeated
