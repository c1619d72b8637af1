"""Weights published in fewer bits, as the numbers that they stand for: MXFP4 (gpt-oss) and block-fp8 (DeepSeek)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from helix_jax.checkpoint.tensors import StoredTensor

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"

# The 16 values of a 4-bit float: a sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Tensors = dict[str, StoredTensor]


def dequantiser(published: Mapping[str, Any]) -> Callable[[Tensors], Tensors]:
    """What makes the tensors of a folder with this config.json into those of an unquantised one, as they are read.

    Raises:
        ValueError: a scheme other than MXFP4 and fp8 in blocks, by its name.
    """
    given = published.get("quantization_config")
    if given is None:
        return lambda tensors: tensors
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: quantization_config is {given!r}: give a table")
    method = given.get("quant_method")
    if method == "mxfp4":
        return _from_mxfp4
    block: Any = given.get("weight_block_size")
    if method == "fp8" and given.get("fmt", "e4m3") == "e4m3" and _is_block(block):
        return partial(_from_fp8, tuple(block))
    what = f"{method!r} of format {given.get('fmt')!r}, blocks {block}" if method == "fp8" else repr(method)
    raise ValueError(f"config.json: quantization_config {what} is not supported, only 'mxfp4' and 'fp8' in e4m3 blocks")


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)


def _from_fp8(block: tuple[int, int], tensors: Tensors) -> Tensors:
    """`X` of e4m3 and `X_scale_inv`, one number per block of `block`. Source: arXiv 2412.19437, section 3.3."""
    plain = {name: stored for name, stored in tensors.items() if not name.endswith(SCALE_INV)}
    for name, stored in plain.items():
        scale = tensors.get(name + SCALE_INV)
        if scale is None:
            continue
        wanted = tuple(-(-size // side) for size, side in zip(stored.shape, block, strict=False))
        if len(stored.shape) != 2 or scale.shape != wanted:
            raise ValueError(f"'{name}{SCALE_INV}' has shape {list(scale.shape)}, but blocks make it {list(wanted)}")

        def read(lead: slice, stored: StoredTensor = stored, scale: StoredTensor = scale) -> np.ndarray:
            rows, columns = stored.shape
            scale_RC = scale.read(slice(None)).astype(np.float32)
            scale_RC = scale_RC.repeat(block[0], 0)[:rows].repeat(block[1], 1)[:, :columns]
            return stored.read(lead).astype(np.float32) * scale_RC[lead]

        plain[name] = stored._replace(dtype=np.dtype(np.float32), bytes=stored.bytes + scale.bytes, read=read)
    return plain


def _from_mxfp4(tensors: Tensors) -> Tensors:
    """`X_blocks` [E, rows, G, 16], two 4-bit floats a byte, the lower bits first, and `X_scales` [E, rows, G], powers
    of two. They lie transposed: X is [E, 32 G, rows]. Source: the OCP Microscaling Formats (MX) specification 1.0.
    """
    plain = {name: stored for name, stored in tensors.items() if not name.endswith((BLOCKS, SCALES))}
    for name, blocks in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        whole = name.removesuffix(BLOCKS)
        scales = tensors.get(whole + SCALES)
        if scales is None or len(blocks.shape) != 4 or scales.shape != blocks.shape[:3]:
            raise ValueError(f"'{name}' {list(blocks.shape)} has no '{whole}{SCALES}' of its shape: fetch it again")
        experts, rows, groups, width = blocks.shape

        def read(lead: slice, blocks: StoredTensor = blocks, scales: StoredTensor = scales) -> np.ndarray:
            packed = blocks.read(lead)
            values = np.stack([_FP4[packed & 15], _FP4[packed >> 4]], -1).reshape(*packed.shape[:3], -1)
            values = np.ldexp(values, scales.read(lead).astype(np.int32)[..., None] - 127).astype(jnp.bfloat16)
            return values.reshape(*packed.shape[:2], -1).swapaxes(1, 2)

        shape = (experts, groups * width * 2, rows)
        # Two bits of exponent and one of mantissa, times a power of two: bfloat16 holds it exactly.
        plain[whole] = StoredTensor(shape, "MXFP4", np.dtype(jnp.bfloat16), blocks.bytes + scales.bytes, read)
    return plain


def is_number(stored: StoredTensor) -> bool:
    """Whether a tensor is what it says: a float of fewer than 16 bits is quantised and needs its scale."""
    return stored.dtype is not None and jnp.issubdtype(stored.dtype, jnp.floating) and stored.dtype.itemsize >= 2
