"""Which code attends: the reference in XLA, or its twin for one kind of machine, imported once it is choose_backend.

A twin takes the arrays of `attend`, `scale` and `v_width`, and gives the same partials.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from helix_jax.attention import Partial, attend
from helix_jax.kernels.page_format import PageFormat
from helix_jax.mesh import Device

_SHORT_PAGES = (8, 16, 32, 64)
_SHORT = ", ".join(map(str, _SHORT_PAGES))
_HOPPER = "9"  # major number of the compute capability
_MOSAIC_GPU_SINCE = (0, 11)


class Backend(NamedTuple):
    """What a kernel has against a device or pages: what it wants, what it found, and the cure; None if nothing."""

    device_unsupported_reason: Callable[[Device | None], str | None]
    pages_unsupported_reason: Callable[[PageFormat], str | None]


def choose_backend(kernel: str, device: Device | None, pages: PageFormat) -> str:
    """What attends to such pages on such a device; `auto` takes the fastest that can. device None: an abstract one.

    Raises:
        ValueError: a kernel asked for by name that cannot.
    """
    if kernel == "auto":
        fitting = [name for name, twin in _BACKENDS.items() if device and not _objection(twin, device, pages)]
        return fitting[0] if fitting else "xla"
    check_device(kernel, device)
    check_pages(kernel, pages)
    return kernel


def check_device(kernel: str, device: Device | None) -> None:
    """Raises ValueError if a kernel asked for by name does not run there."""
    if kernel in _BACKENDS:
        _refuse(kernel, _BACKENDS[kernel].device_unsupported_reason(device))


def check_pages(kernel: str, pages: PageFormat) -> None:
    """Raises ValueError if the kernel cannot read them."""
    if kernel in _BACKENDS:
        _refuse(kernel, _BACKENDS[kernel].pages_unsupported_reason(pages))


def check_arrays(kernel: str, q_BTNH: Array, k_AKWH: Array, v_AKWH: Array | None, v_width: int | None) -> None:
    """Raises ValueError if they do not go together, or the kernel cannot read them."""
    (*_, N, H), (_, K, W, width) = q_BTNH.shape, k_AKWH.shape
    v_width = (v_width or H) if v_AKWH is None else None
    check_pages(kernel, PageFormat(width, W, k_AKWH.dtype, v_width))
    if v_AKWH is None and K != 1:
        raise ValueError(f"latents of {K} heads: give pages of 1, which serves all")
    if v_AKWH is not None and (v_AKWH.shape, v_AKWH.dtype) != (k_AKWH.shape, k_AKWH.dtype):
        raise ValueError(
            f"keys are {k_AKWH.dtype}{list(k_AKWH.shape)}, values {v_AKWH.dtype}{list(v_AKWH.shape)}: make them alike"
        )
    if width != H or N % K:
        raise ValueError(
            f"{N} queries of width {H} do not go with {K} heads of width {width}: give groups of that width"
        )


def backend_attend(kernel: str) -> Callable[..., Partial]:
    """`attend`, or the twin that was `choose_backend`. Raises ValueError for any other name."""
    if kernel == "xla":
        return attend
    if kernel == "mosaic_gpu":
        from helix_jax.kernels import mosaic_gpu

        return mosaic_gpu.attend
    if kernel == "tpu":
        from helix_jax.kernels import tpu

        return tpu.attend
    raise ValueError(f"'{kernel}' attends to nothing: choose xla or {' or '.join(_BACKENDS)}")


def _objection(twin: Backend, device: Device, pages: PageFormat) -> str | None:
    return twin.device_unsupported_reason(device) or twin.pages_unsupported_reason(pages)


def _refuse(kernel: str, objection: str | None) -> None:
    if objection:
        raise ValueError(f"kernel {kernel} {objection}, or kernel auto or xla")


def _not_a_hopper(device: Device | None) -> str | None:
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


def _not_a_tpu(device: Device | None) -> str | None:
    if device is None or device.platform == "tpu":
        return None
    return f"runs on TPUs, and this is a {device.platform.upper()}: choose a TPU"


def _not_for_hopper(pages: PageFormat) -> str | None:
    if jnp.dtype(pages.dtype) != jnp.bfloat16:
        return f"reads bfloat16, and the cache is {jnp.dtype(pages.dtype)}: choose bfloat16"
    if pages.page not in _SHORT_PAGES and (pages.page < 1 or pages.page % 128):
        return f"reads pages of {_SHORT} or a multiple of 128 tokens, not {pages.page}: choose 64"
    return _of_another_width(pages, (64, 128, 256), latent=576)


def _not_for_a_tpu(pages: PageFormat) -> str | None:
    if jnp.dtype(pages.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"reads bfloat16 and float32, and the cache is {jnp.dtype(pages.dtype)}: choose one of these"
    if pages.page not in _SHORT_PAGES and pages.page not in range(128, 1025, 128):
        return f"reads pages of {_SHORT} or a multiple of 128 up to 1024 tokens, not {pages.page}: choose 64"
    return _of_another_width(pages, (128, 256), latent=640)  # what Plan.stored_width makes of 64 and of 576


def _of_another_width(pages: PageFormat, widths: tuple[int, ...], latent: int) -> str | None:
    if pages.v_width is None and pages.width not in widths:
        known = f"{', '.join(map(str, widths[:-1]))} and {widths[-1]}"
        return f"knows heads of width {known}, not {pages.width}: choose another model"
    if pages.v_width is not None and (pages.v_width, pages.width) != (512, latent):
        found = f"{pages.width} and {pages.v_width}"
        return f"knows latents of {latent} numbers, 512 of them values, not {found}: choose another model"
    return None


_BACKENDS = {"mosaic_gpu": Backend(_not_a_hopper, _not_for_hopper), "tpu": Backend(_not_a_tpu, _not_for_a_tpu)}
KERNELS = ("auto", "xla", *_BACKENDS)
