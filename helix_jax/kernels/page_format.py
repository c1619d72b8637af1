"""Describes cache pages as kernels see them."""

from typing import NamedTuple

from jax.typing import DTypeLike

from helix_jax.mesh import Device

_TPU_LANES = 128


class PageFormat(NamedTuple):
    """The properties of cache pages on which it depends whether a kernel can read them.

    Attributes:
        width: Numbers per token and head, as stored.
        page: Tokens per page.
        dtype: The type of the numbers.
        v_width: The width of the values if they are the first numbers of the keys. None if they have pages of their
            own.
    """

    width: int
    page: int
    dtype: DTypeLike
    v_width: int | None = None


def stored_width(width: int, device: Device | None) -> int:
    """Return the width at which pages store heads of `width` numbers: on TPUs a multiple of 128, padded with zeros.

    XLA lays out a TPU array of another width with the pages innermost. It takes as much memory as with padding, but no
    kernel can read it, and each step copies the whole cache of a layer in and out.
    """
    on_tpu = device is not None and device.platform == "tpu"
    return -(-width // _TPU_LANES) * _TPU_LANES if on_tpu else width
