"""A request goes on in another engine: on another mesh, under another placement, in pages of another length."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from helix_jax.cache import KVCache, split_slot
from helix_jax.engine.engine import Engine
from helix_jax.engine.page_allocator import RowPages
from helix_jax.mesh import REPLICATED, sharding

_PIECE = 256  # positions that are moved at once: what both meshes hold beside their caches


def transfer(id: str, source: Engine, target: Engine) -> None:
    """Moves a request, with what is cached of it, to an engine of the same model; it says there what it would here.

    On the devices: a piece at a time is gathered on the one mesh and scattered on the other. What `source` had under
    way is read first, and told by its next step.

    Raises:
        ValueError: a request that is not in `source` (any more), an id that `target` has, another model, no row or too
            few pages free there. Nothing has changed then.
    """
    if (source.config, source.runner.spec) != (target.config, target.runner.spec):
        raise ValueError("the engines have different models: make both from the same config and dtype")
    if id in target.requests:
        raise ValueError(f"the other engine has a request '{id}' already: cancel it, or wait until it has ended")
    source.drain()
    request = source.requests.get(id)
    if request is None:
        raise ValueError(f"no request '{id}' is waiting or running: it has ended, or was never submitted")
    target.check_room(request)
    begun = request.row is not None
    moved = replace(request, row=None)
    if begun and not target.scheduler.admit_transferred(moved):
        raise ValueError("the other engine has no free row, or too few free pages: let it step until some come back")
    if begun:
        before, after = source.scheduler.held[id], target.scheduler.held[id]
        for first in range(0, request.written, _PIECE):
            position_X = np.arange(first, min(first + _PIECE, request.written))
            _move(source, before, target, after, position_X, len(request.prompt))
    source.let_go(request)
    target.adopt(moved)


def _move(source: Engine, before: RowPages, target: Engine, after: RowPages, position_X: np.ndarray, prompt_len: int) -> None:
    here, there = source.runner, target.runner
    taken = here.call(_read, here.state.cache, *here.put(_places(source, before, position_X, prompt_len)))
    # Waited for: then no program of the other mesh, be it of the same devices, runs beside this one.
    taken = jax.device_put(jax.block_until_ready(taken), sharding(target.plan.mesh, REPLICATED))
    places = there.put(_places(target, after, position_X, prompt_len))
    there.state = there.state._replace(cache=there.call(_write, there.state.cache, taken, *places))
    jax.block_until_ready(there.state.cache)


def _places(engine: Engine, held: RowPages, position_X: np.ndarray, prompt_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Page, among those of all ranks, and word of each position, in a piece of full length: the rest is nowhere."""
    layout, memory = engine.plan.layout, engine.scheduler.memory
    owner_X, slot_X = layout.owner(position_X, prompt_len), layout.slot(position_X, prompt_len)
    page_X = np.full(_PIECE, layout.ranks * memory.pages, np.int32)
    word_X = np.zeros(_PIECE, np.int32)
    entry_X, offset_X = split_slot(slot_X, memory.page)
    entries = zip(owner_X, entry_X, strict=True)
    page_X[: len(position_X)] = [rank * memory.pages + held.pages[rank][entry] for rank, entry in entries]
    word_X[: len(position_X)] = offset_X
    return page_X, word_X


@jax.jit
def _read(cache: KVCache, page_X: Int[Array, "X"], word_X: Int[Array, "X"]) -> list[Array]:
    """[X, K, H] of each pool; of what is nowhere, anything."""
    return [pool_AKWH.at[page_X, :, word_X].get(mode="clip") for pool_AKWH in jax.tree.leaves(cache)]


@partial(jax.jit, donate_argnames="cache")
def _write(cache: KVCache, taken: list[Array], page_X: Int[Array, "X"], word_X: Int[Array, "X"]) -> KVCache:
    pools, nest = jax.tree.flatten(cache)
    written = []
    for pool_AKWH, x_XKH in zip(pools, taken, strict=True):
        at = (page_X[:, None], jnp.arange(pool_AKWH.shape[1]), word_X[:, None])
        pool_AKWH = pool_AKWH.at[at].set(x_XKH, mode="drop")
        written.append(pool_AKWH)
    return jax.tree.unflatten(nest, written)
