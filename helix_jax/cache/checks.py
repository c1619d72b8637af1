"""Checks the arguments of attention over the cache, before anything is compiled or written."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Bool, Int

from helix_jax.cache.pages import KVCache, Rows
from helix_jax.mesh import CP, DP, TP
from helix_jax.plan import Plan
from helix_jax.validation import check_array, check_int, check_positive, check_type

NewTokens = tuple[Any, Any, Any]  # queries, keys, and values or None


class AttentionOptions(NamedTuple):
    """The static arguments of `helix_attention`."""

    plan: Plan
    scale: float
    group: int
    window: int | None
    v_width: int | None


def check_attention(
    options: AttentionOptions, cache: Any, new: NewTokens, rows: Any, count_B: Any, layer: Any, sink_N: Any
) -> None:
    """Check the arguments of `helix_attention`: types and shapes, and the values of those that are not traced.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes do not fit each other, the plan or the cache; a number is out of range; or a row does not
            have the pages that its tokens need.
    """
    for name, value, kind in (("plan", options.plan, Plan), ("cache", cache, KVCache), ("rows", rows, Rows)):
        check_type(name, value, kind, f"a helix_jax.{kind.__name__}")
    _check_tokens(cache, *new[:2])
    _check_heads(options.plan, cache, *new[:2], sink_N)
    _check_new_values(cache, *new[1:])
    _check_options(options, cache, is_latent=new[2] is None)
    _check_layer(layer, cache.spec.layers)
    _check_rows(options, cache, rows, count_B, new[0].shape[0])
    _check_values(options, cache, rows, count_B, new[0].shape[1])


def are_valid(cache: KVCache, rows: Rows, count_B: Array, layer: Array, tokens: int) -> Bool[Array, "B"]:
    """Return which rows have numbers that are possible. This is what `check_attention` cannot check if they are traced.

    Args:
        cache: The cache.
        rows: The rows.
        count_B: How many of the new tokens each row appends.
        layer: The layer.
        tokens: The new tokens per row.
    """
    has_layer = (layer >= 0) & (layer < cache.spec.layers)
    return has_layer & (count_B >= 0) & (count_B <= tokens) & (rows.length_B >= 0) & (rows.prompt_len_B >= 0)


def lack_pages(cache: KVCache, table_BM: Any, first_B: Any, end_B: Any) -> Any:
    """Return which rows have no pages on a rank for some of the slots that they see there.

    NumPy and JAX arrays use the same code.

    Args:
        cache: The cache. Only its page size and whether it keeps a window are used.
        table_BM: The page table of the rank.
        first_B: The first slot that a row sees. With a window, the slots before it may be overwritten.
        end_B: The end of the slots that it sees. 0: it sees none.
    """
    xp: Any = np if isinstance(table_BM, np.ndarray) else jnp
    entries, page = table_BM.shape[1], cache.pool_XKWH.shape[2]
    last_B = xp.maximum(end_B - 1, 0) // page
    if cache.spec.window is None:
        too_many_B, last_B = last_B >= entries, xp.minimum(last_B, entries - 1)
    else:  # the table is a ring
        too_many_B, last_B = end_B - first_B > entries * page, last_B % entries
    page_B = xp.take_along_axis(table_BM, last_B[:, None], axis=1)[:, 0]
    return (end_B > 0) & (too_many_B | (page_B < 0))


def _check_tokens(cache: KVCache, q_BTNH: Any, k_BTKH: Any) -> None:
    """Check the types, rows, tokens and widths of queries and keys."""
    check_array("q_BTNH", q_BTNH, jnp.floating)
    check_array("k_BTKH", k_BTKH, jnp.floating)
    B, T, _, H = q_BTNH.shape
    if not B or not T:
        raise ValueError(f"q_BTNH has shape {[*q_BTNH.shape]}: give at least one row and one new token")
    if k_BTKH.shape[:2] != (B, T):
        raise ValueError(
            f"q_BTNH has {B} rows of {T} new tokens, but k_BTKH has {k_BTKH.shape[0]} of {k_BTKH.shape[1]}: "
            f"give the keys of the same tokens"
        )
    stored = cache.spec.head_width
    for name, width in (("q_BTNH", H), ("k_BTKH", k_BTKH.shape[3])):
        if width != stored:
            raise ValueError(f"{name} has heads of width {width}, but the cache stores {stored}: give {stored}")


def _check_new_values(cache: KVCache, k_BTKH: Any, v_BTKH: Any) -> None:
    if (v_BTKH is None) != cache.spec.latent:
        needed = "latents, which have no values: give None" if cache.spec.latent else "keys and values: give both"
        raise ValueError(f"v_BTKH is {'None' if v_BTKH is None else 'an array'}, but the cache stores {needed}")
    if v_BTKH is not None:
        check_array("v_BTKH", v_BTKH, jnp.floating)
        if v_BTKH.shape != k_BTKH.shape:
            raise ValueError(
                f"v_BTKH has shape {[*v_BTKH.shape]}, but k_BTKH has {[*k_BTKH.shape]}: give both the same shape"
            )


def _check_heads(plan: Plan, cache: KVCache, q_BTNH: Any, k_BTKH: Any, sink_N: Any) -> None:
    tp, cp, heads, kv_heads = plan.mesh.shape[TP], plan.mesh.shape[CP], q_BTNH.shape[2], k_BTKH.shape[2]
    stored = cache.pool_XKWH.shape[1]
    if kv_heads != stored:
        raise ValueError(
            f"there are {kv_heads} key/value heads, but with tp {tp} the cache stores {stored}: give {stored}"
        )
    if not heads or heads % tp:
        raise ValueError(f"tp {tp} does not divide the {heads} query heads: choose a tp that does")
    if not cache.spec.latent and kv_heads % tp:
        raise ValueError(f"tp {tp} does not divide the {kv_heads} key/value heads: create the cache with this plan")
    if heads % kv_heads:
        raise ValueError(
            f"there are {heads} query heads for {kv_heads} key/value heads: give a multiple of {kv_heads} query heads"
        )
    if sink_N is not None:
        check_array("sink_N", sink_N, jnp.floating)
        heads_out = tp * cp * -(-heads // (tp * cp))
        if sink_N.shape != (heads_out,):
            raise ValueError(f"sink_N has shape {[*sink_N.shape]}: give [{heads_out}], one for each head of the output")


def _check_options(options: AttentionOptions, cache: KVCache, *, is_latent: bool) -> None:
    check_positive("scale", options.scale)
    window, kept, v_width = options.window, cache.spec.window, options.v_width
    if window is not None:
        check_int("window", window, least=1)
    if kept is not None and not (window and window <= kept):
        raise ValueError(f"the window is {window}, but the cache keeps {kept} positions: give at most {kept}")
    if v_width is None:
        return
    check_int("v_width", v_width, least=1)
    if not is_latent:
        raise ValueError(f"v_width is {v_width}, but v_BTKH has the values: leave v_width out")
    if v_width > cache.spec.head_width:
        raise ValueError(f"v_width is {v_width}: give at most {cache.spec.head_width}, the width of the keys")


def _check_layer(layer: Any, layers: int) -> None:
    if not hasattr(layer, "dtype"):
        check_int("layer", layer)
    elif not jnp.issubdtype(layer.dtype, jnp.integer):
        raise TypeError(f"layer has type {layer.dtype}: give an integer, such as int32")
    if np.shape(layer) != ():
        raise ValueError(f"layer has shape {[*np.shape(layer)]}: give one number")
    value = _value(layer)
    if value is not None and not 0 <= value < layers:
        raise ValueError(f"layer is {value}: give 0 to {layers - 1}, as the cache has {layers}")


def _check_rows(options: AttentionOptions, cache: KVCache, rows: Rows, count_B: Any, B: int) -> None:
    """Check the shapes and types of what each row has, and that the cache is on the mesh of the plan."""
    mesh, group, tables = options.plan.mesh, options.group, rows.tables_RBM
    placed = getattr(jax.tree.leaves(cache.pool_XKWH)[0], "sharding", None)
    if isinstance(placed, NamedSharding) and placed.mesh.shape != mesh.shape and not placed.mesh.empty:
        raise ValueError(
            f"the cache is on a mesh of {_sizes(placed.mesh)}, but the plan's has {_sizes(mesh)}: "
            f"create the cache with this plan"
        )
    if B % mesh.shape[DP]:
        raise ValueError(f"dp {mesh.shape[DP]} does not divide the {B} rows: give a multiple of it")
    for name, x in (("count_B", count_B), ("length_B", rows.length_B), ("prompt_len_B", rows.prompt_len_B)):
        check_array(name, x, jnp.signedinteger)
        if x.shape != (B,):
            raise ValueError(f"{name} has shape {[*x.shape]}: give [{B}], one for each row of q_BTNH")
    check_int("group", group, least=0)
    if group >= len(tables):
        raise ValueError(f"group is {group}, but rows have page tables for {len(tables)}: give 0 to {len(tables) - 1}")
    check_array("table_RBM", tables[group], jnp.signedinteger)
    R, table_rows, M = tables[group].shape
    if (R, table_rows) != (mesh.shape[CP], B) or not M:
        raise ValueError(
            f"the page tables of group {group} have shape {[R, table_rows, M]}: "
            f"give [{mesh.shape[CP]}, {B}, M] for cp {mesh.shape[CP]} and {B} rows"
        )


def _sizes(mesh: Any) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _check_values(options: AttentionOptions, cache: KVCache, rows: Rows, count_B: Any, tokens: int) -> None:
    """Check counts, lengths and pages, if they are not traced."""
    count_B, length_B, prompt_len_B = (_value(x) for x in (count_B, rows.length_B, rows.prompt_len_B))
    for name, values_B in (("length_B", length_B), ("prompt_len_B", prompt_len_B), ("count_B", count_B)):
        if values_B is not None and (values_B < 0).any():
            row = int(np.argmax(values_B < 0))
            raise ValueError(f"{name} of row {row} is {values_B[row]}: give 0 or more")
    if count_B is not None and (count_B > tokens).any():
        row = int(np.argmax(count_B > tokens))
        raise ValueError(
            f"count_B of row {row} is {count_B[row]}, but there are {tokens} new tokens: give at most that"
        )
    if count_B is not None and length_B is not None and prompt_len_B is not None:
        _check_pages(options, cache, rows, (count_B, length_B, prompt_len_B))


def _check_pages(
    options: AttentionOptions, cache: KVCache, rows: Rows, numbers: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """Check that each rank has pages for what the rows see there after their new tokens."""
    count_B, length_B, prompt_len_B = numbers
    layout, table = options.plan.layout, rows.tables_RBM[options.group]
    table_RBM = _value(table)
    if table_RBM is None:
        table_RBM = np.zeros(table.shape, np.int32)  # only its size is known
    for rank in range(layout.ranks):
        first_B = layout.filled(length_B + 1 - options.window, prompt_len_B, rank) if options.window else 0 * length_B
        end_B = np.where(count_B > 0, layout.filled(length_B + count_B, prompt_len_B, rank), 0)
        lack_B = lack_pages(cache, table_RBM[rank], first_B, end_B)
        if lack_B.any():
            row = int(np.argmax(lack_B))
            slots = int((table_RBM[rank, row] >= 0).sum()) * cache.pool_XKWH.shape[2]
            needed = end_B[row] - first_B[row] if cache.spec.window else end_B[row]
            raise ValueError(
                f"row {row}: length {length_B[row]} with {count_B[row]} new tokens needs {needed} slots on rank {rank} "
                f"of cp, but its pages there have {slots}: append fewer tokens, or give make_cache larger max_lens"
            )


def _value(x: Int[Array, "*B"] | int) -> Any:
    """Return integers as a NumPy array, or None if they are traced or on the devices of another process."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x, np.int64)
