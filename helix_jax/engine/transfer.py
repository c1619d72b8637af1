"""Transfers a request to another engine: to another mesh, placement or page size."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from helix_jax.cache import KVCache, split_slot
from helix_jax.engine.engine import Engine
from helix_jax.engine.requests import Request
from helix_jax.mesh import REPLICATED, sharding

_POSITIONS_PER_CALL = 256  # bounds the memory that both meshes need besides their caches
_NO_PAGE = np.iinfo(np.int32).max


def transfer(id: str, source: Engine, target: Engine) -> None:
    """Move a request and its cache to another engine of the same model. Its output does not change.

    The cache is copied on the devices, a few positions at a time: gathered on one mesh and scattered on the other.
    Steps that `source` has dispatched are read first, and the next call of its `step` returns their events.

    Args:
        id: The request.
        source: The engine that has it.
        target: The engine that continues it.

    Raises:
        ValueError: `source` does not have the request (any more), `target` has one of this id, the models differ, or
            `target` has no free row or too few free pages. Then nothing changed.
    """
    if (source.config, source.runner.spec) != (target.config, target.runner.spec):
        raise ValueError("the engines have different models: create both from the same config and dtype")
    if id in target.requests:
        raise ValueError(f"the other engine has a request '{id}' already: cancel it, or wait until it has finished")
    source.drain()
    request = source.find_request(id)
    target.check_fits(request)
    has_row = request.row is not None
    moved = replace(request, row=None)
    if has_row and not target.scheduler.admit_transferred(moved):
        raise ValueError("the other engine has no free row, or too few free pages: let it step until some are free")
    if has_row:
        for first in range(0, request.num_computed, _POSITIONS_PER_CALL):
            position_X = np.arange(first, min(first + _POSITIONS_PER_CALL, request.num_computed))
            _copy((source, request), (target, moved), position_X)
    source.discard(request)
    target.adopt(moved)


def _copy(source: tuple[Engine, Request], target: tuple[Engine, Request], position_X: np.ndarray) -> None:
    """Copy positions of a request from the pages of its row in one engine to those in another."""
    reader, writer = source[0].runner, target[0].runner
    values = reader.call(_read, reader.state.cache, *reader.put(_locate(*source, position_X)))
    # Wait, so that no programs of both meshes, which may share devices, run at once.
    values = jax.device_put(jax.block_until_ready(values), sharding(writer.plan.mesh, REPLICATED))
    places = writer.put(_locate(*target, position_X))
    writer.state = writer.state._replace(cache=writer.call(_write, writer.state.cache, values, *places))
    jax.block_until_ready(writer.state.cache)


def _locate(engine: Engine, request: Request, position_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the page of each position for all layers and parts [Y, X], in the pool, and its offset in them [X].

    Padding is out of bounds.
    """
    layout, scheduler, prompt_len = engine.plan.layout, engine.scheduler, len(request.prompt)
    pages, spec = scheduler.allocators[0].pages, engine.runner.spec
    first_rank = scheduler.group_of(request.assigned_row) * layout.ranks
    owner_X, slot_X = layout.owner(position_X, prompt_len), layout.slot(position_X, prompt_len)
    entry_X, offset_X = split_slot(slot_X, engine.page)
    row_pages = scheduler.row_pages[request.id].pages
    page_X = np.asarray([row_pages[rank][entry] for rank, entry in zip(owner_X, entry_X, strict=True)])
    part_Y1 = np.arange(spec.layers * spec.parts)[:, None]
    page_YX = ((first_rank + owner_X) * len(part_Y1) + part_Y1) * pages + page_X
    padding = (0, _POSITIONS_PER_CALL - len(position_X))
    return np.pad(page_YX, ((0, 0), padding), constant_values=_NO_PAGE), np.pad(offset_X, padding)


@jax.jit
def _read(cache: KVCache, page_YX: Int[Array, "Y X"], offset_X: Int[Array, "X"]) -> Float[Array, "Y X K H"]:
    """Return what is cached at some places. The values of padding are undefined."""
    return cache.pool_XKWH.at[_index(cache, page_YX, offset_X)].get(mode="clip")


@partial(jax.jit, donate_argnames="cache")
def _write(
    cache: KVCache, values: Float[Array, "Y X K H"], page_YX: Int[Array, "Y X"], offset_X: Int[Array, "X"]
) -> KVCache:
    """Write to some places. Padding is dropped."""
    pool_XKWH = cache.pool_XKWH.at[_index(cache, page_YX, offset_X)].set(values, mode="drop")
    return cache._replace(pool_XKWH=pool_XKWH)


def _index(cache: KVCache, page_YX: Array, offset_X: Array) -> tuple[Array, ...]:
    """Return the index of the places. The heads are indexed too: as a slice, they make XLA transpose the pool."""
    return page_YX[..., None], jnp.arange(cache.pool_XKWH.shape[1]), offset_X[:, None]
