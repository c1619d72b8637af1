"""Describes the arguments of a step by shape, type and sharding, to trace and compile it without its devices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from helix_jax.cache import Rows, abstract_pool, cache_specs, pages_needed, ring_pages
from helix_jax.checkpoint.parameters import parameter_dtype
from helix_jax.config import ModelConfig
from helix_jax.heads import HeadLayout
from helix_jax.mesh import (
    CP,
    ROWS_B,
    TABLE_RBM,
    AnyMesh,
    Spec,
    flat_size,
    sharding,
    weight_sharding,
)
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import make_sampling


def abstract_weights(config: ModelConfig, mesh: AnyMesh, dtype: DTypeLike, experts: str = "flat") -> Any:
    """Return the weights of a model that decodes on `mesh`, as a pytree of `jax.ShapeDtypeStruct`.

    Args:
        config: The model.
        mesh: The mesh, which may be abstract.
        dtype: The type of the weights. A few parameters are float32 nevertheless.
        experts: How experts are sharded, as in `Plan`.
    """
    padded = nnx.to_flat_state(nnx.state(Transformer(config, devices=flat_size(mesh), rngs=None), nnx.Param))
    layout = HeadLayout.of(config, mesh)

    def describe(path: Any, shape: tuple[int, ...]) -> Any:
        name = str(path[-1])
        shape, where = layout.padded_shape(name, shape), weight_sharding(mesh, name, experts)
        return jax.ShapeDtypeStruct(shape, parameter_dtype(path, dtype), sharding=where)

    return nnx.to_pure_dict(nnx.from_flat_state([(path, describe(path, x.shape)) for path, x in padded]))


def abstract_arguments(
    config: ModelConfig, plan: Plan, *, rows: int, slots: int, T: int = 1, page: int, dtype: DTypeLike
) -> tuple[Any, ...]:
    """Return all arguments of `step`, with `jax.ShapeDtypeStruct` in place of arrays.

    Args:
        config: The model.
        plan: The mesh, which may be abstract, and how it decodes.
        rows: The number of sequences.
        slots: The cache slots of each sequence on each rank. Layers with a window have as many as they need.
        T: The new tokens of each sequence.
        page: Tokens per page.
        dtype: The type of the weights, and of the cache if the plan does not say otherwise.

    Returns:
        (config, plan, weights, caches, rows, tokens_BT, count_B, sampling).
    """

    def like(shape: tuple[int, ...], dtype: DTypeLike, spec: Spec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(plan.mesh, spec))

    ranks, M = plan.mesh.shape[CP], pages_needed(slots, page)
    caches, tables = [], []
    for spec in cache_specs(config, plan.cache_dtype_for(dtype)):
        pages = min(M, ring_pages(plan.layout, spec.window, T, page)) if spec.window else M
        caches.append(abstract_pool(plan, spec, ranks * rows * pages, page))
        tables.append(like((ranks, rows, pages), jnp.int32, TABLE_RBM))
    int_B = like((rows,), jnp.int32, ROWS_B)
    state = Rows(tuple(tables), int_B, int_B)
    sampling = jax.tree.map(lambda x: like(x.shape, x.dtype, ROWS_B), jax.eval_shape(lambda: make_sampling(rows)))
    weights = abstract_weights(config, plan.mesh, dtype, plan.experts)
    return config, plan, weights, tuple(caches), state, like((rows, T), jnp.int32, ROWS_B), int_B, sampling
