"""The island: append -> attend -> combine, on every device by itself, under `shard_map`.

This is all of the manual parallelism of attention; experts have an island of their own (models/moe.py). Outside, the
model is ordinary JAX over sharded arrays.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from helix_jax.attention import merge_sink
from helix_jax.cache import Pages, Rows, append, pad_width
from helix_jax.combine import combine
from helix_jax.kernels import backend_attend
from helix_jax.kernels.page_format import PageFormat
from helix_jax.mesh import (
    CP,
    NEW_KEYS_BTKH,
    NEW_LATENT_BTKH,
    PAGES_AKWH,
    PAGES_LATENT_AKWH,
    QUERIES_BTNH,
    ROWS_B,
    SINK_N,
    TABLE_RBM,
    ATTENTION_OUT_BTNH,
)
from helix_jax.plan import Plan


# Compiled once when it is called by itself (an eager shard_map compiles anew in every call); inlined under another jit.
@partial(jax.jit, static_argnames=("plan", "scale", "window", "v_width"), inline=True)
def helix_attention(
    plan: Plan,
    pages: Pages,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"] | None,
    rows: Rows,
    count_B: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    sink_N: Float[Array, "N"] | None = None,
    v_width: int | None = None,
) -> tuple[Float[Array, "B T N Hv"], Pages]:
    """Appends the first `count_B` of T new tokens to each row, and attends from them to all that the row then holds.

    Causal, exact, and equal for every mesh, placement and combine. Writes `pages` in place if the caller donates them.
    Tokens past `count_B` write nothing; their output is 0. The caller adds `count_B` to `rows.length_B` once all layers
    are done, and keeps within the room that the rows were made with: lengths are traced, and a token that finds no page
    is lost. On a CPU split into devices, wait for a result before the next call: steps that pile up can deadlock.

    window: a query sees this many positions, its own included. sink_N: a logit per head that takes part in the softmax
    and has no value. v_BTKH None: of latent attention; K is 1, the values are the first `v_width` numbers of the keys,
    and the pages were made with `latent=True`.

    Returns the attention output in the type of `q_BTNH`, its heads sharded over the flat axis (tp, cp), and the pages.

    Raises:
        ValueError: heads that the mesh does not divide, a window below 1.

    Source: arXiv 2507.07120, section 2; sinks: arXiv 2309.17453; latents: arXiv 2405.04434.
    """
    latent = v_BTKH is None
    plan.check_heads(q_BTNH.shape[2], None if latent else k_BTKH.shape[2])
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: give at least 1 position, or None")
    pools, new_keys = (PAGES_LATENT_AKWH, NEW_LATENT_BTKH) if latent else (PAGES_AKWH, NEW_KEYS_BTKH)
    rows_specs = Rows._make((TABLE_RBM, ROWS_B, ROWS_B))
    sharded = jax.shard_map(
        partial(_attention_shard, plan, scale, window, v_width),
        mesh=plan.mesh,
        in_specs=(pools, QUERIES_BTNH, new_keys, new_keys, rows_specs, ROWS_B, SINK_N),
        out_specs=(ATTENTION_OUT_BTNH, pools),
    )
    return sharded(pages, q_BTNH, k_BTKH, v_BTKH, rows, count_B, sink_N)


def _attention_shard(
    plan: Plan,
    scale: float,
    window: int | None,
    v_width: int | None,
    pages: Pages,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array | None,
    rows: Rows,
    count_B: Array,
    sink_n: Array | None,
) -> tuple[Array, Pages]:
    attend = backend_attend(plan.kernel_for(_format(pages, v_width)))
    table_BM = rows.table_RBM[0]  # this rank's
    step_T = jnp.arange(q_BTNH.shape[1])
    position_BT = rows.length_B[:, None] + step_T
    live_BT = step_T < count_B[:, None]

    def filled(length_BT: Array) -> Array:
        return plan.layout.filled(length_BT, rows.prompt_len_B[:, None], lax.axis_index(CP))

    slot_BT, hi_BT = filled(position_BT), filled(position_BT + 1)
    owned_BT = live_BT & (hi_BT > slot_BT)
    pages = append(pages, k_BTKH, v_BTKH, table_BM, slot_BT, owned_BT)

    lo_BT = filled(position_BT + 1 - window) if window else jnp.zeros_like(hi_BT)
    hi_BT = jnp.where(live_BT, hi_BT, 0)
    q_wide, narrow = pad_width(q_BTNH, pages.k_AKWH), v_width or q_BTNH.shape[-1]
    part = attend(q_wide, *pages, table_BM, lo_BT, hi_BT, scale=scale, v_width=v_width)
    whole = combine(part._replace(o_BTNH=part.o_BTNH[..., :narrow]), plan.combine)
    if sink_n is not None:
        whole = merge_sink(whole, sink_n)
    return whole.o_BTNH.astype(q_BTNH.dtype), pages


def _format(pages: Pages, v_width: int | None) -> PageFormat:
    _, _, page, width = pages.k_AKWH.shape
    return PageFormat(width, page, pages.k_AKWH.dtype, v_width)
