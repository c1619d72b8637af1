"""The format of a cache page, as kernels see it."""

from typing import NamedTuple

from jax.typing import DTypeLike

from helix_jax.mesh import Device

_TPU_LANES = 128


class PageFormat(NamedTuple):
    """What a kernel needs to support. Widths are those in memory. v_width is None if pages of values exist."""

    width: int
    page: int
    dtype: DTypeLike
    v_width: int | None = None


def stored_width(width: int, device: Device | None) -> int:
    """Return the width at which a page stores heads of `width` numbers: on TPUs a multiple of 128, padded with zeros.

    XLA lays out a TPU array of another width with the pages innermost. It takes as much memory without the padding, but
    no kernel can read it, and a step copied the whole cache of a layer in and out.
    """
    on_tpu = device is not None and device.platform == "tpu"
    return -(-width // _TPU_LANES) * _TPU_LANES if on_tpu else width
