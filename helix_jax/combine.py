"""Contains every collective that this library calls by hand, above all the combine of partial attention results.

Each cp rank has a partial of all heads of its tp group, over its own slots. The combine returns the result over all
slots for 1 / cp of these heads, those whose rows of the output projection the rank stores. There are three methods,
equal up to rounding:

    psum            a maximum, then a sum of the re-weighted partials, of which each rank keeps its heads
    psum_scatter    a maximum, then the same sum, reduced and scattered: a fraction 1 / cp of the bytes
    all_to_all      each rank receives its heads from all ranks, outputs and log-sum-exps in one packed message, and
                    merges them
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import Partial, finite_or_zero, merge, normalise
from helix_jax.validation import check_choice

COMBINES = ("psum", "psum_scatter", "all_to_all")


def combine(partial: Partial, how: str = "psum", axis: str = "cp") -> Partial:
    """Merge the partials of the ranks on a mesh axis. Call it inside `shard_map`.

    Args:
        partial: All N heads of this device's group, over the slots of this rank.
        how: The method: "psum", "psum_scatter" or "all_to_all".
        axis: The mesh axis.

    Returns:
        The partial over the slots of all ranks, for this rank's N / ranks heads (o_BTnH, lse_BTn). If the ranks do not
        divide the heads, empty partials (0, -inf) take the place of the missing heads of the last ranks.

    Raises:
        ValueError: The method is unknown.
    """
    check_choice("combine", how, COMBINES)
    ranks = lax.axis_size(axis)
    if ranks == 1:  # XLA does not remove collectives among single devices on every platform
        return partial
    methods = {"psum": _by_psum, "psum_scatter": _by_psum_scatter, "all_to_all": _by_all_to_all}
    return methods[how](_pad_heads(partial, -partial.lse_BTN.shape[-1] % ranks), axis, ranks)


def _pad_heads(partial: Partial, missing: int) -> Partial:
    if not missing:
        return partial
    o_BTNH = jnp.pad(partial.o_BTNH, ((0, 0),) * 2 + ((0, missing), (0, 0)))
    return Partial(o_BTNH, jnp.pad(partial.lse_BTN, ((0, 0),) * 2 + ((0, missing),), constant_values=-jnp.inf))


def sum_over_devices(x: Array, axes: tuple[str, ...]) -> Array:
    """Return the sum of `x` over the devices of some mesh axes. Call it inside `shard_map`."""
    return lax.psum(x, axes)


def ring_shift(x: Any, axis: str) -> Any:
    """Send a pytree of arrays from each rank of `axis` to the next, and from the last to the first."""
    ranks = lax.axis_size(axis)
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, axis, ring), x) if ranks > 1 else x


def mark_varying(x: Array, axis: str) -> Array:
    """Mark a replicated array as different on each device of `axis`, so that its gradients are summed over `axis`."""
    return lax.pcast(x, axis, to="varying")


def _by_psum(partial: Partial, axis: str, ranks: int) -> Partial:
    packed_BTNX, top_BTN = _reweighted(partial, axis)
    # Select the heads inside the shard_map: if the sum left it replicated over cp, XLA would gather the weights of the
    # output projection to match.
    return _unpack(_own_heads(lax.psum(packed_BTNX, axis), axis, ranks), _own_heads(top_BTN, axis, ranks))


def _by_psum_scatter(partial: Partial, axis: str, ranks: int) -> Partial:
    packed_BTNX, top_BTN = _reweighted(partial, axis)
    packed_BTnX = lax.psum_scatter(packed_BTNX, axis, scatter_dimension=2, tiled=True)
    return _unpack(packed_BTnX, _own_heads(top_BTN, axis, ranks))


def _by_all_to_all(partial: Partial, axis: str, ranks: int) -> Partial:
    packed_BTNX = jnp.concatenate([partial.o_BTNH, partial.lse_BTN[..., None]], -1)
    B, T, N, X = packed_BTNX.shape
    packed_BTRnX = packed_BTNX.reshape(B, T, ranks, N // ranks, X)
    packed_RBTnX = lax.all_to_all(packed_BTRnX, axis, split_axis=2, concat_axis=0)
    return merge(Partial(packed_RBTnX[..., :-1], packed_RBTnX[..., -1]))


def _reweighted(partial: Partial, axis: str) -> tuple[Array, Array]:
    """Return this rank's terms of the sum, numerator and denominator packed, and the maximum that scales them."""
    top_BTN = finite_or_zero(lax.pmax(partial.lse_BTN, axis))
    weight_BTN1 = jnp.exp(partial.lse_BTN - top_BTN)[..., None]
    return jnp.concatenate([partial.o_BTNH * weight_BTN1, weight_BTN1], -1), top_BTN


def _unpack(packed_BTnX: Array, top_BTn: Array) -> Partial:
    return normalise(packed_BTnX[..., :-1], packed_BTnX[..., -1], top_BTn)


def _own_heads(x_BTN: Array, axis: str, ranks: int) -> Array:
    heads = x_BTN.shape[2] // ranks
    return lax.dynamic_slice_in_dim(x_BTN, lax.axis_index(axis) * heads, heads, axis=2)
