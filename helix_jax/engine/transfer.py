"""Transfers a request to another engine: to another mesh, placement or page size."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from helix_jax.cache import KVCache, split_slot
from helix_jax.engine.engine import Engine
from helix_jax.engine.requests import Request
from helix_jax.mesh import REPLICATED, sharding
from helix_jax.quantisation import QuantisedPages
from helix_jax.validation import check_type

_POSITIONS_PER_CALL = 256  # bounds the memory that both meshes need besides their caches
_NO_PAGE = np.iinfo(np.int32).max

Pages = Array | QuantisedPages


class Places(NamedTuple):
    """The places of X positions in one cache group.

    Attributes:
        page_YX: Their pages in the pool, for each layer and part.
        offset_X: Their offsets in these pages.
    """

    page_YX: Any
    offset_X: Any


def transfer(id: str, source: Engine, target: Engine) -> None:
    """Move a request and its cache to another engine of the same model. Its output does not change.

    The cache is copied on the devices, a few positions at a time: gathered on one mesh and scattered on the other.
    Steps that `source` has dispatched are read first, and the next call of its `step` returns their events.

    Args:
        id: The request.
        source: The engine that has it.
        target: The engine that continues it.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `source` does not have the request (any more), `target` has one of this id, the models or the types
            of their caches differ, or `target` has no free row or too few free pages. Then nothing changed.
    """
    for name, engine in (("source", source), ("target", target)):
        check_type(name, engine, Engine, "a helix_jax.Engine")
    check_type("id", id, str, "the id of a request, a string")
    if (source.config, source.runner.specs) != (target.config, target.runner.specs):
        raise ValueError(
            "the engines have different models or types of cache: create both from the same config, dtype, cache_dtype"
        )
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
    values = reader.call(_read, reader.state.caches, reader.put(_locate(*source, position_X)))
    # Wait, so that no programs of both meshes, which may share devices, run at once.
    values = jax.device_put(jax.block_until_ready(values), sharding(writer.plan.mesh, REPLICATED))
    places = writer.put(_locate(*target, position_X))
    writer.state = writer.state._replace(caches=writer.call(_write, writer.state.caches, values, places))
    jax.block_until_ready(writer.state.caches)


def _locate(engine: Engine, request: Request, position_X: np.ndarray) -> list[Places]:
    """Return the places of positions of a request, in each cache group.

    Padding is out of bounds. So are positions that no later query sees, whose pages may be in use for others.
    """
    runner, layout, scheduler = engine.runner, engine.plan.layout, engine.scheduler
    group, row = scheduler.group_of(request.assigned_row), request.assigned_row
    owner_X = layout.owner(position_X, len(request.prompt))
    entry_X, offset_X = split_slot(layout.slot(position_X, len(request.prompt)), engine.page)
    padding = (0, _POSITIONS_PER_CALL - len(position_X))
    places = []
    for index, (spec, cache) in enumerate(zip(runner.specs, runner.state.caches, strict=True)):
        pages = cache.pages // (len(scheduler.allocators) * layout.ranks)  # of each rank
        table_RM = runner.row_table(index, row, scheduler.row_pages[request.id])
        page_X = table_RM[owner_X, entry_X % table_RM.shape[1]]
        part_Y1 = np.arange(spec.layers * spec.parts)[:, None]
        page_YX = ((group * layout.ranks + owner_X) * len(part_Y1) + part_Y1) * pages + page_X
        if spec.window:
            page_YX = np.where(position_X > request.num_computed - spec.window, page_YX, _NO_PAGE)
        page_YX = np.pad(page_YX, ((0, 0), padding), constant_values=_NO_PAGE)
        places.append(Places(page_YX, np.pad(offset_X, padding)))
    return places


@jax.jit
def _read(caches: tuple[KVCache, ...], places: list[Places]) -> list[Pages]:
    """Return what each cache group has at some places, [Y, X, K, H]. The values of padding are undefined."""

    def read(cache: KVCache, at: Places) -> Pages:
        index = _index(at, jnp.arange(cache.spec.kv_heads) * _copies(cache))
        return jax.tree.map(lambda pool_XKWH: pool_XKWH.at[index].get(mode="clip"), cache.pool_XKWH)

    return [read(*each) for each in zip(caches, places, strict=True)]


@partial(jax.jit, donate_argnames="caches")
def _write(caches: tuple[KVCache, ...], values: list[Pages], places: list[Places]) -> tuple[KVCache, ...]:
    """Write to some places. Padding is dropped."""

    def write(cache: KVCache, values: Pages, at: Places) -> KVCache:
        copies = _copies(cache)
        index = _index(at, jnp.arange(cache.spec.kv_heads * copies))

        def set_values(pool_XKWH: Array, values_YXKH: Array) -> Array:
            return pool_XKWH.at[index].set(jnp.repeat(values_YXKH, copies, axis=2), mode="drop")

        return cache._replace(pool_XKWH=jax.tree.map(set_values, cache.pool_XKWH, values))

    return tuple(write(*each) for each in zip(caches, values, places, strict=True))


def _copies(cache: KVCache) -> int:
    """Return how often each key/value head is stored."""
    return cache.pool_XKWH.shape[1] // cache.spec.kv_heads


def _index(at: Places, heads_K: Array) -> tuple[Array, ...]:
    """Return the index of some heads at the places. As a slice, heads make XLA transpose the pool."""
    return at.page_YX[..., None], heads_K, at.offset_X[:, None]
