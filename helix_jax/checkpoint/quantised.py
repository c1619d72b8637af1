"""Dequantise published weights: MXFP4 (gpt-oss) and fp8 in blocks (DeepSeek)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from helix_jax.checkpoint.tensors import StoredTensor

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"

# The 16 values of a 4-bit float with one bit of sign, two of exponent and one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Tensors = dict[str, StoredTensor]


def choose_dequantiser(published: Mapping[str, Any]) -> Callable[[Tensors], Tensors]:
    """Return a function that makes the tensors of a folder those of an unquantised one, dequantised when they are read.

    Args:
        published: The config.json of the folder.

    Raises:
        ValueError: The weights are quantised, but neither in MXFP4 nor in fp8 blocks.
    """
    settings = published.get("quantization_config")
    if settings is None:
        return lambda tensors: tensors
    if not isinstance(settings, Mapping):
        raise ValueError(f"config.json: quantization_config is {settings!r}: give a table")
    method = settings.get("quant_method")
    if method == "mxfp4":
        return _from_mxfp4
    block: Any = settings.get("weight_block_size")
    if method == "fp8" and settings.get("fmt", "e4m3") == "e4m3" and _is_block(block):
        return partial(_from_fp8, tuple(block))
    form = f"{method!r} of format {settings.get('fmt')!r}, blocks {block}" if method == "fp8" else repr(method)
    raise ValueError(f"config.json: quantization_config is {form}: only 'mxfp4' and 'fp8' in e4m3 blocks are supported")


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def _from_fp8(block: tuple[int, int], tensors: Tensors) -> Tensors:
    """Multiply each `X` of type e4m3 by `X_scale_inv`, which has one number per block.

    Source: arXiv 2412.19437, section 3.3.
    """
    plain = {name: stored for name, stored in tensors.items() if not name.endswith(SCALE_INV)}
    for name, stored in plain.items():
        scale = tensors.get(name + SCALE_INV)
        if scale is None:
            continue
        expected = tuple(-(-size // side) for size, side in zip(stored.shape, block, strict=False))
        if len(stored.shape) != 2 or scale.shape != expected:
            raise ValueError(
                f"tensor '{name}{SCALE_INV}' has shape {list(scale.shape)}, expected {list(expected)} for blocks of "
                f"{list(block)}: correct weight_block_size in config.json, or download the folder again"
            )

        def read(lead: slice, stored: StoredTensor = stored, scale: StoredTensor = scale) -> np.ndarray:
            rows, columns = stored.shape
            scale_RC = scale.read(slice(None)).astype(np.float32)
            scale_RC = scale_RC.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]
            return stored.read(lead).astype(np.float32) * scale_RC[lead]

        plain[name] = stored._replace(dtype=np.dtype(np.float32), bytes=stored.bytes + scale.bytes, read=read)
    return plain


def _from_mxfp4(tensors: Tensors) -> Tensors:
    """Compute each X [E, 32 G, rows] from `X_blocks` and `X_scales`, which are stored transposed.

    `X_blocks` [E, rows, G, 16] has two 4-bit floats per byte, the lower bits first. `X_scales` [E, rows, G] has the
    exponents of powers of two.

    Source: the OCP Microscaling Formats (MX) specification 1.0.
    """
    plain = {name: stored for name, stored in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        base = name.removesuffix(BLOCKS)
        scales = tensors.get(base + SCALES)
        if scales is None or len(blocks.shape) != 4 or scales.shape != blocks.shape[:3]:
            raise ValueError(
                f"tensor '{name}' has shape {list(blocks.shape)}, but there is no '{base}{SCALES}' for it: "
                f"download the folder again"
            )
        experts, rows, groups, width = blocks.shape

        def read(lead: slice, blocks: StoredTensor = blocks, scales: StoredTensor = scales) -> np.ndarray:
            packed = blocks.read(lead)
            values = np.stack([_FP4[packed & 15], _FP4[packed >> 4]], -1).reshape(*packed.shape[:3], -1)
            values = np.ldexp(values, scales.read(lead).astype(np.int32)[..., None] - 127).astype(jnp.bfloat16)
            return values.reshape(*packed.shape[:2], -1).swapaxes(1, 2)

        shape = (experts, groups * width * 2, rows)
        # bfloat16 represents a 4-bit float times a power of two exactly.
        plain[base] = StoredTensor(shape, "MXFP4", np.dtype(jnp.bfloat16), blocks.bytes + scales.bytes, read)
    return plain


def is_unquantised(stored: StoredTensor) -> bool:
    """Return whether a tensor can be used as it is. Floats of fewer than 16 bits are quantised and need a scale."""
    return stored.dtype is not None and jnp.issubdtype(stored.dtype, jnp.floating) and stored.dtype.itemsize >= 2
