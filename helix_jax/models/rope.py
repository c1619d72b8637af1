"""Rotary position embeddings: queries and keys are rotated by the position of their token in its row."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from helix_jax.config import Rope


def rotate(x_BTNH: Float[Array, "B T N H"], position_BT: Int[Array, "B T"], rope: Rope) -> Array:
    """Rotate the pairs (i, i + H / 2) of each head by the angle `position * frequency[i]`, in float32.

    If the rope is interleaved, the pairs are (2 i, 2 i + 1). The result then contains the first numbers of all pairs,
    followed by the second ones. If the rope is partial, this applies to the first dimensions, and the others are kept.

    Source: arXiv 2104.09864, in the half-split order of Hugging Face's Llama.
    """
    width = rope.rotated_width(x_BTNH.shape[-1])
    angle_BT1h = (position_BT[..., None] * frequencies(width, rope))[:, :, None]
    size = np.float32(magnitude(rope))
    cos, sin = size * jnp.cos(angle_BT1h), size * jnp.sin(angle_BT1h)
    x = x_BTNH[..., :width].astype(jnp.float32)
    a, b = (x[..., ::2], x[..., 1::2]) if rope.interleaved else jnp.split(x, 2, axis=-1)
    rotated = [(a * cos - b * sin).astype(x_BTNH.dtype), (b * cos + a * sin).astype(x_BTNH.dtype)]
    return jnp.concatenate([*rotated, x_BTNH[..., width:]], -1)


def frequencies(width: int, rope: Rope) -> np.ndarray:
    """Return the radians per position of each pair, with the float32 operations in the order of the published code.

    Another order differs by an ulp, which at theta 1e6 is 0.06 radian at position one million.
    """
    period_h = np.float32(rope.theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    if rope.kind == "yarn":
        return _yarn(period_h, width, rope)
    if rope.kind == "longrope":  # arXiv 2402.13753
        return 1 / (np.asarray(rope.long_factor if rope.factor > 1 else rope.short_factor, np.float32) * period_h)
    frequency_h = 1 / period_h
    if rope.kind == "linear":
        return frequency_h / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(frequency_h, rope)
    return frequency_h


def _llama3(frequency_h: np.ndarray, rope: Rope) -> np.ndarray:
    """Divide low frequencies by the factor, keep high ones, and interpolate between `low_` and `high_freq_factor`."""
    original = rope.original_positions
    wavelength_h = np.float32(2 * math.pi) / frequency_h
    slow_h = frequency_h / np.float32(rope.factor)
    share_h = (original / wavelength_h - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between_h = (1 - share_h) * slow_h + share_h * frequency_h
    frequency_h = np.where(wavelength_h < original / rope.high_freq_factor, frequency_h, between_h)
    return np.where(wavelength_h > original / rope.low_freq_factor, slow_h, frequency_h).astype(np.float32)


def _yarn(period_h: np.ndarray, width: int, rope: Rope) -> np.ndarray:
    """Interpolate over the pairs, from the original frequencies to those divided by the factor.

    Source: arXiv 2309.00071.
    """

    def pair_of_turns(times: float) -> float:
        """Return the index of the pair that turns this often in the original context."""
        return width * math.log(rope.original_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of_turns(rope.beta_fast), pair_of_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (low == high)
    slowed_h = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequency_h = 1 / (np.float32(rope.factor) * period_h) * slowed_h + 1 / period_h * (1 - slowed_h)
    return frequency_h.astype(np.float32)


def magnitude(rope: Rope) -> float:
    """Return the factor on the length of rotated queries and keys."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor)


def softmax_gain(rope: Rope) -> float:
    """Return the factor on the scale of the softmax. DeepSeek scales the whole head, not only its rotated part."""
    if rope.kind != "yarn" or not rope.mscale_all_dim:
        return 1.0
    return _yarn_scale(rope.factor, rope.mscale_all_dim) ** 2


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
