"""Every collective that this library calls by hand: the partials of the cp ranks meet.

Each rank comes with a partial of all the heads of its tp group, over its own slots, and leaves with the whole result
for 1 / cp of these heads, the ones whose rows of the output projection it holds. Three ways, equal to rounding:

    psum            a maximum, then a sum of the re-weighted partials; each rank keeps its heads of it
    psum_scatter    a maximum, then the same sum, delivered in parts: a fraction 1 / cp of the bytes
    all_to_all      heads are traded for ranks, outputs and log-sum-exps in one packed message, then merged at home
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from helix_jax.attention import Partial, finite_or_zero, merge, normalise

COMBINES = ("psum", "psum_scatter", "all_to_all")


def combine(partial: Partial, how: str = "psum", axis: str = "cp") -> Partial:
    """Merges the partials of the ranks on `axis`, inside `shard_map`.

    Takes all N heads of this device's group (o_BTNH, lse_BTN), returns this rank's N / cp of them (o_BTnH, lse_BTn).

    Raises:
        ValueError: an unknown `how`, or heads that the ranks do not divide.
    """
    ranks = lax.axis_size(axis)
    heads = partial.lse_BTN.shape[-1]
    if heads % ranks:
        raise ValueError(
            f"{heads} heads cannot be shared among {ranks} ranks of '{axis}': choose a {axis} that divides them"
        )
    if how == "psum":
        return _by_psum(partial, axis, ranks)
    if how == "psum_scatter":
        return _by_psum_scatter(partial, axis, ranks)
    if how == "all_to_all":
        return _by_all_to_all(partial, axis, ranks)
    raise ValueError(f"unknown combine '{how}': choose one of {', '.join(COMBINES)}")


def sum_over_devices(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over the devices of `axes`, inside `shard_map`: what each expert's device has computed, put together."""
    return lax.psum(x, axes)


def ring_shift(x: Any, axis: str) -> Any:
    """What each rank of `axis` has, arrays in any nest, to the next one, the last one's to the first."""
    ranks = lax.axis_size(axis)
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, axis, ring), x) if ranks > 1 else x


def mark_varying(x: Array, axis: str) -> Array:
    """The same numbers, each device's own from here on: their gradients are summed over `axis`."""
    return lax.pcast(x, axis, to="mark_varying")


def _by_psum(partial: Partial, axis: str, ranks: int) -> Partial:
    packed_BTNX, top_BTN = _reweighted(partial, axis)
    # Inside the island, not after it: were the sum to leave replicated over cp, XLA would gather the weights of the
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
    """This rank's terms of the sum, numerator and denominator packed, and the maximum that scales them."""
    top_BTN = finite_or_zero(lax.pmax(partial.lse_BTN, axis))
    weight_BTN1 = jnp.exp(partial.lse_BTN - top_BTN)[..., None]
    return jnp.concatenate([partial.o_BTNH * weight_BTN1, weight_BTN1], -1), top_BTN


def _unpack(packed_BTnX: Array, top_BTn: Array) -> Partial:
    return normalise(packed_BTnX[..., :-1], packed_BTnX[..., -1], top_BTn)


def _own_heads(x_BTN: Array, axis: str, ranks: int) -> Array:
    heads = x_BTN.shape[2] // ranks
    return lax.dynamic_slice_in_dim(x_BTN, lax.axis_index(axis) * heads, heads, axis=2)
