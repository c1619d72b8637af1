"""The key/value cache: pages, sharded along the sequence over cp; and the integers per row that say what is in them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Int

from helix_jax.layout import Integer, slots_needed
from helix_jax.mesh import CP, DP, PAGES_AKWH, PAGES_LATENT_AKWH, ROWS_B, TABLE_RBM, put, sharding
from helix_jax.plan import Plan


class Pages(NamedTuple):
    """The pages of one layer. Globally A counts the pages of all ranks; inside `shard_map`, those of this one.

    v_AKWH None: of latent attention, where one vector per token stands for the keys and values of all heads.
    """

    k_AKWH: Float[Array, "A K W H"]
    v_AKWH: Float[Array, "A K W H"] | None


class KVCache(NamedTuple):
    """The sharded pages of each layer. A step takes it over (donated) and gives it back, written in place."""

    layers: tuple[Pages, ...]


class Rows(NamedTuple):
    """What is known of each sequence of the batch. `prompt_len` and `length` decide every slot on every rank.

    table_RBM: for every rank its own table of pages; entry m holds the page of slots [m W, (m + 1) W).
    length_B: positions written so far. prompt_len_B: the whole prompt's length, known before it is written.
    """

    table_RBM: Int[Array, "R B M"]
    length_B: Int[Array, "B"]
    prompt_len_B: Int[Array, "B"]


def make_cache(
    plan: Plan,
    prompt_lens: Sequence[int],
    max_lens: Sequence[int],
    *,
    page: int,
    layers: int,
    kv_heads: int,
    head_width: int,
    dtype: DTypeLike,
    latent: bool = False,
) -> tuple[KVCache, Rows]:
    """An empty cache with room for `max_lens` positions in each row, and the rows: every one has pages of its own.

    page: tokens per page. The pools are sharded over (dp, cp) and tp from the start; all ranks have as many pages as
    the fullest one can need. latent: one array a layer, of kv_heads 1, that every device of tp holds whole.

    Raises:
        ValueError: a page below 1, a batch that dp does not divide, a prompt longer than its room, kv_heads that tp
            does not divide.
    """
    rows = _start_rows(plan, prompt_lens, max_lens, page)
    if not latent:
        plan.check_kv_heads(kv_heads)
    _, B, M = rows.table_RBM.shape
    how: dict[str, Any] = {"kv_heads": kv_heads, "head_width": head_width, "dtype": dtype, "latent": latent}
    return make_pools(plan, plan.mesh.shape[CP] * B * M, page=page, layers=layers, **how), rows


def make_pools(
    plan: Plan,
    pages: int,
    *,
    page: int,
    layers: int,
    kv_heads: int,
    head_width: int,
    dtype: DTypeLike,
    latent: bool = False,
) -> KVCache:
    """Empty pages, so many over all ranks, sharded from the start, as wide as the plan stores them.

    The rest is as in `make_cache`.
    """
    spec = sharding(plan.mesh, PAGES_LATENT_AKWH if latent else PAGES_AKWH)

    def pool() -> Array:
        return jnp.zeros((pages, kv_heads, page, plan.stored_width(head_width)), dtype, device=spec)

    return KVCache(tuple(Pages(pool(), None if latent else pool()) for _ in range(layers)))


def _start_rows(plan: Plan, prompt_lens: Sequence[int], max_lens: Sequence[int], page: int) -> Rows:
    if page < 1:
        raise ValueError(f"page is {page}: give at least 1 token per page")
    dp, rows = plan.mesh.shape[DP], len(prompt_lens)
    if rows == 0 or rows % dp:
        raise ValueError(f"{rows} rows cannot be shared among dp {dp}: give a positive multiple of it")
    if len(max_lens) != rows:
        raise ValueError(f"{rows} prompt_lens, but {len(max_lens)} max_lens: give one of each per row")
    for row, (prompt, most) in enumerate(zip(prompt_lens, max_lens, strict=True)):
        if not 0 <= prompt <= most:
            raise ValueError(f"row {row}: a prompt of {prompt} tokens does not fit its room of {most}: give more room")

    slots_B = slots_needed(plan.layout, np.asarray(max_lens), np.asarray(prompt_lens))
    pages_per_row = max(1, -(-int(slots_B.max()) // page))
    table_BM = (np.arange(rows) % (rows // dp))[:, None] * pages_per_row + np.arange(pages_per_row)
    table_RBM = np.broadcast_to(table_BM.astype(np.int32), (plan.layout.ranks, *table_BM.shape))
    return Rows(
        put(table_RBM, plan.mesh, TABLE_RBM),
        per_row(plan, np.zeros(rows)),
        per_row(plan, prompt_lens),
    )


def per_row(plan: Plan, values: ArrayLike | Sequence[Any]) -> Array:
    """Integers, one or more per row, placed as a step wants them."""
    return put(np.asarray(values, np.int32), plan.mesh, ROWS_B)


def append(
    pages: Pages,
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"] | None,
    table_BM: Int[Array, "B M"],
    slot_BT: Int[Array, "B T"],
    owned_BT: Bool[Array, "B T"],
) -> Pages:
    """Writes the tokens that this rank owns at their slots; the others fall out of bounds and are dropped.

    In place when `pages` is donated. A slot past the table is dropped too, and so is one whose entry in the table is
    negative: neither is ever clamped or wrapped onto another's page. Tokens narrower than the pages are filled up.
    """
    A, K, W, _ = pages.k_AKWH.shape
    page_BT = jnp.take_along_axis(table_BM, slot_BT // W, axis=1, mode="fill", fill_value=A)
    page_BT = jnp.where(owned_BT & (page_BT >= 0), page_BT, A)

    # All indexed axes lead: a scatter over (page, word) with the heads between makes XLA transpose the whole pool.
    at = (page_BT[..., None], jnp.arange(K), (slot_BT % W)[..., None])

    def write(pool_AKWH: Array, new_BTKH: Any) -> Array:
        return pool_AKWH.at[at].set(widened(new_BTKH, pool_AKWH).astype(pool_AKWH.dtype), mode="drop")

    k_AKWH = write(pages.k_AKWH, k_BTKH)
    return Pages(k_AKWH, None if pages.v_AKWH is None else write(pages.v_AKWH, v_BTKH))


def widened(x_BTNH: Array, pool_AKWH: Array) -> Array:
    """With zeros at the end of each vector, as far as the pages keep more."""
    rest = pool_AKWH.shape[-1] - x_BTNH.shape[-1]
    return jnp.pad(x_BTNH, ((0, 0),) * 3 + ((0, rest),)) if rest else x_BTNH


def tokens_per_rank(plan: Plan, length: Integer, prompt_len: Integer) -> list[int]:
    """How many positions each rank holds, summed over the rows."""
    return [int(np.sum(plan.layout.filled(length, prompt_len, rank))) for rank in range(plan.layout.ranks)]
