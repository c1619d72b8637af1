"""Few queries as columns of the matrix products: layouts of registers, and what is transposed through shared memory.

The matrix unit multiplies 64 rows, and as few as eight columns. With slots and numbers of a value as rows, a product
has eight columns instead of 64 rows, and the softmax an eighth of the numbers. It needs the scores of a query within
one warp, and the second product its weights as columns.
"""

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array
from jax.experimental.mosaic.gpu.fragmented_array import Tiling

# 8 queries by 64 slots: a warp has two rows, and a thread four adjacent slots of one.
FEW = plgpu.Layout.TILED(Tiling(((8, 64), (2, 4))), (-4,), (-2, -3), -1)
PRODUCT = plgpu.Layout.WGMMA
_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED  # that of a product that is stored with rows and columns exchanged


def store_transposed(target: Any, x: Array) -> None:
    """Store a product with rows and columns exchanged."""
    target.transpose((1, 0))[...] = plgpu.layout_cast(x, _TRANSPOSED)


def transpose_scores(staged: Any, s: Array) -> Array:
    """Return a product of keys and queries as [queries, slots]."""
    store_transposed(staged, s)
    plgpu.commit_smem()
    return plgpu.layout_cast(staged[...], FEW)


def spread_over_product(staged: Any, per_query: Array) -> Array:
    """Return a number per query, laid out like the columns of a product. Wait for what this warpgroup has stored."""
    staged[...] = per_query
    plgpu.commit_smem()
    return plgpu.layout_cast(staged[...], PRODUCT.reduce(0))
