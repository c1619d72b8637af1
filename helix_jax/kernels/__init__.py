"""Which code attends: the reference in XLA, or its twin for one kind of machine, imported once it is chosen.

A twin takes the arrays of `attend`, `scale` and `v_width`, and gives the same partials.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from helix_jax.attention import Partial, attend
from helix_jax.mesh import Device

KERNELS = ("auto", "xla", "mosaic_gpu")
_HOPPER = "9"  # major number of the compute capability
_MOSAIC_GPU_SINCE = (0, 11)


class PageFormat(NamedTuple):
    """What a kernel has to cope with. v_width None: values lie beside the keys, not in them."""

    width: int
    page: int
    dtype: DTypeLike
    v_width: int | None = None


def chosen(kernel: str, device: Device | None, pages: PageFormat) -> str:
    """What attends to such pages on such a device; `auto` takes the fastest that can. device None: an abstract one.

    Raises:
        ValueError: a kernel asked for by name that cannot.
    """
    if kernel == "xla":
        return kernel
    if kernel == "auto":
        return "xla" if device is None or _objection_to_device(device) or _objection_to_pages(pages) else "mosaic_gpu"
    check_device(kernel, device)
    check_pages(pages)
    return kernel


def check_device(kernel: str, device: Device | None) -> None:
    """Raises ValueError if a kernel asked for by name does not run there."""
    if kernel == "mosaic_gpu":
        _refuse(_objection_to_device(device))


def check_pages(pages: PageFormat) -> None:
    """Raises ValueError if the kernel mosaic_gpu cannot read them."""
    _refuse(_objection_to_pages(pages))


def _refuse(objection: str | None) -> None:
    if objection:
        raise ValueError(f"kernel mosaic_gpu {objection}, or kernel auto or xla")


def attend_by(kernel: str) -> Callable[..., Partial]:
    """`attend`, or the twin that was `chosen`. Raises ValueError for any other name."""
    if kernel == "xla":
        return attend
    if kernel != "mosaic_gpu":
        raise ValueError(f"'{kernel}' attends to nothing: choose xla or mosaic_gpu")
    from helix_jax.kernels import mosaic_gpu

    return mosaic_gpu.attend


def _objection_to_device(device: Device | None) -> str | None:
    if jax.__version_info__ < _MOSAIC_GPU_SINCE:
        wanted = ".".join(map(str, _MOSAIC_GPU_SINCE))
        return f"needs JAX {wanted} or later, and this is {jax.__version__}: choose a later one"
    if device is None:  # abstract: whoever lowers for it knows
        return None
    if device.platform != "gpu":
        return f"runs on Hopper GPUs, and this is a {device.platform.upper()}: choose a GPU"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] != _HOPPER:
        kind = f"{device.device_kind}, {capability}"
        return f"runs on Hopper GPUs (compute capability {_HOPPER}), and this is another ({kind}): choose one"
    return None


def _objection_to_pages(pages: PageFormat) -> str | None:
    if jnp.dtype(pages.dtype) != jnp.bfloat16:
        return f"reads bfloat16, and the cache is {jnp.dtype(pages.dtype)}: choose bfloat16"
    if pages.page not in (8, 16, 32, 64) and (pages.page < 1 or pages.page % 128):
        return f"reads pages of 8, 16, 32, 64 or a multiple of 128 tokens, not {pages.page}: choose 64"
    if pages.v_width is None and pages.width not in (64, 128, 256):
        return f"knows heads of width 64, 128 and 256, not {pages.width}: choose another model"
    if pages.v_width is not None and (pages.v_width, pages.width) != (512, 576):
        found = f"{pages.width} and {pages.v_width}"
        return f"knows latents of 576 numbers, 512 of them values, not {found}: choose another model"
    return None
