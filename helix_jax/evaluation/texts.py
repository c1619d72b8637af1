"""The bytes that the evaluations read: text that the model was not trained on, and windows of it."""

import numpy as np

from helix_jax.config import ModelConfig


def check_byte_model(config: ModelConfig, name: str) -> None:
    """Check that a model reads bytes, because the evaluations give it text as bytes.

    Args:
        config: The model's config.
        name: What the model is called in the message, such as its folder.

    Raises:
        ValueError: It has another tokenizer.
    """
    if config.tokenizer != "bytes":
        raise ValueError(f"'{name}' does not have the tokenizer 'bytes': give a byte model, such as the demo model")


def held_out_text(text: bytes, share: float, min_bytes: int) -> bytes:
    """Return the end of a text, which training holds out.

    Args:
        text: The whole text.
        share: The share of it that is held out, above 0 and at most 1.
        min_bytes: The bytes that the evaluation needs.

    Raises:
        ValueError: The share is out of range, or fewer than `min_bytes` bytes are held out.
    """
    if not 0 < share <= 1:
        raise ValueError(f"the held-out share is {share}: give a number above 0, at most 1")
    held_out = text[len(text) - int(len(text) * share) :]
    if len(held_out) < min_bytes:
        raise ValueError(
            f"the held-out text has {len(held_out)} bytes, but {min_bytes} are needed: "
            f"give more text, a larger held-out share, or shorter contexts"
        )
    return held_out


def spaced_windows(text: bytes, length: int, count: int) -> np.ndarray:
    """Return `count` windows of `length` bytes as token ids, [count, length], evenly spaced over the text."""
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return np.stack([np.frombuffer(text[start : start + length], np.uint8) for start in starts]).astype(np.int32)
