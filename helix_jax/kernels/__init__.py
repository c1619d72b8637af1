"""Chooses the implementation of `attend`: the reference in XLA, or a kernel for one kind of device.

A kernel takes the arguments of `attend` and returns the same partials. It is imported when it is used first.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from helix_jax.attention import Partial, attend
from helix_jax.kernels.page_format import PageFormat
from helix_jax.mesh import Device
from helix_jax.quantisation import FLOAT8, QuantisedPages
from helix_jax.validation import check_choice

_SHORT_PAGES = (8, 16, 32, 64)
_SHORT = ", ".join(map(str, _SHORT_PAGES))
_HOPPER = "9"  # major number of the compute capability
_MOSAIC_GPU_SINCE = (0, 11)
_SCALES, _LATENT_SCALES = (1, 0), (4, 64)  # the scales of a vector of float8, and its numbers that are not quantised


class Backend(NamedTuple):
    """The limits of a kernel. A reason is `<what is wrong, with the value>: <what to do>`, or None if it is supported.

    Attributes:
        device_unsupported_reason: Returns why the kernel does not run on a device. None is an abstract device.
        pages_unsupported_reason: Returns why the kernel cannot read pages of a format.
    """

    device_unsupported_reason: Callable[[Device | None], str | None]
    pages_unsupported_reason: Callable[[PageFormat], str | None]


def choose_backend(kernel: str, device: Device | None, pages: PageFormat) -> str:
    """Return the name of the backend that attends to pages on a device.

    Args:
        kernel: "auto" for the fastest that supports both, or the name of a backend.
        device: The device. None is an abstract device, for which "auto" means "xla".
        pages: The format of the pages.

    Raises:
        ValueError: A kernel that was chosen by name does not support them.
    """
    if kernel == "auto":
        supporting = [name for name, backend in _BACKENDS.items() if device and _supports(backend, device, pages)]
        return supporting[0] if supporting else "xla"
    check_device(kernel, device)
    check_pages(kernel, pages)
    return kernel


def check_device(kernel: str, device: Device | None) -> None:
    """Check that a kernel that was chosen by name runs on a device. None is an abstract device.

    Raises:
        ValueError: It does not.
    """
    if kernel in _BACKENDS:
        _raise_for(kernel, _BACKENDS[kernel].device_unsupported_reason(device))


def check_pages(kernel: str, pages: PageFormat) -> None:
    """Check that a kernel can read pages of a format.

    Raises:
        ValueError: It cannot.
    """
    if kernel in _BACKENDS:
        _raise_for(kernel, _BACKENDS[kernel].pages_unsupported_reason(pages))


def check_arrays(
    kernel: str,
    q_BTNH: Array,
    k_AKWH: Array | QuantisedPages,
    v_AKWH: Array | QuantisedPages | None,
    v_width: int | None,
) -> None:
    """Check that queries, keys and values fit each other, and that the kernel can read them.

    Raises:
        ValueError: They do not, or it cannot.
    """
    (*_, N, H), (_, K, W, width) = q_BTNH.shape, k_AKWH.shape
    v_width = (v_width or H) if v_AKWH is None else None
    check_pages(kernel, PageFormat(width, W, k_AKWH.dtype, v_width))
    for pages in (k_AKWH, v_AKWH):
        if isinstance(pages, QuantisedPages):
            _check_scales(kernel, pages, _LATENT_SCALES if v_AKWH is None else _SCALES)
    if v_AKWH is None and K != 1:
        raise ValueError(f"pages of latents have {K} heads: give 1 head, which serves all queries")
    if v_AKWH is not None and (v_AKWH.shape, v_AKWH.dtype) != (k_AKWH.shape, k_AKWH.dtype):
        raise ValueError(
            f"keys are {k_AKWH.dtype}{list(k_AKWH.shape)}, but values {v_AKWH.dtype}{list(v_AKWH.shape)}: "
            f"give both the same type and shape"
        )
    if width != H or N % K:
        raise ValueError(
            f"{N} query heads of width {H} do not fit {K} key/value heads of width {width}: "
            f"give heads of the same width, and a multiple of the key/value heads"
        )


def backend_attend(kernel: str) -> Callable[..., Partial]:
    """Return the `attend` function of a backend.

    Raises:
        ValueError: There is no such backend.
    """
    check_choice("kernel", kernel, KERNELS[1:])
    return attend if kernel == "xla" else importlib.import_module(f"{__name__}.{kernel}").attend


def _supports(backend: Backend, device: Device, pages: PageFormat) -> bool:
    return not (backend.device_unsupported_reason(device) or backend.pages_unsupported_reason(pages))


def _check_scales(kernel: str, pages: QuantisedPages, readable: tuple[int, int]) -> None:
    actual = pages.scales_AKWX.shape[-1], pages.exact_width
    if actual != readable:
        reason = (
            f"reads fp8 pages with (scales, exact numbers) of {readable} per vector, not {actual}: quantise them so"
        )
        _raise_for(kernel, reason)


def _raise_for(kernel: str, reason: str | None) -> None:
    if reason:
        raise ValueError(f"kernel {kernel} {reason}, or kernel auto or xla")


def _not_hopper(device: Device | None) -> str | None:
    if jax.__version_info__ < _MOSAIC_GPU_SINCE:
        since = ".".join(map(str, _MOSAIC_GPU_SINCE))
        return f"needs JAX {since} or later, and this is {jax.__version__}: choose a later version"
    if device is None:  # abstract: the caller chose the devices that it compiles for
        return None
    if device.platform != "gpu":
        return f"runs on Hopper GPUs, and this is a {device.platform.upper()}: choose a GPU"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] != _HOPPER:
        return (
            f"runs on Hopper GPUs (compute capability {_HOPPER}), and this is {device.device_kind} ({capability}): "
            f"choose a Hopper GPU"
        )
    return None


def _not_tpu(device: Device | None) -> str | None:
    if device is None or device.platform == "tpu":
        return None
    return f"runs on TPUs, and this is a {device.platform.upper()}: choose a TPU"


def _not_readable_on_hopper(pages: PageFormat) -> str | None:
    dtype = jnp.dtype(pages.dtype)
    if dtype not in (jnp.bfloat16, FLOAT8):
        return f"reads bfloat16 and fp8, and the cache is {dtype}: choose one of these"
    short_pages = _SHORT_PAGES
    if dtype == FLOAT8:  # copies of 4-byte scales begin at multiples of 128 bytes
        short_pages = (32, 64)
    if pages.page not in short_pages and (pages.page < 1 or pages.page % 128):
        short = ", ".join(map(str, short_pages))
        return f"reads pages of {short} or a multiple of 128 tokens, not {pages.page}: choose 64"
    return _unsupported_width(pages, (64, 128, 256), latent=576)


def _not_readable_on_tpu(pages: PageFormat) -> str | None:
    if jnp.dtype(pages.dtype) not in (jnp.bfloat16, jnp.float32):
        return f"reads bfloat16 and float32, and the cache is {jnp.dtype(pages.dtype)}: choose one of these"
    if pages.page not in _SHORT_PAGES and pages.page not in range(128, 1025, 128):
        return f"reads pages of {_SHORT} or a multiple of 128 up to 1024 tokens, not {pages.page}: choose 64"
    return _unsupported_width(pages, (128, 256), latent=640)  # the `stored_width` of 64 and of 576


def _unsupported_width(pages: PageFormat, widths: tuple[int, ...], latent: int) -> str | None:
    if pages.v_width is None and pages.width not in widths:
        supported = f"{', '.join(map(str, widths[:-1]))} and {widths[-1]}"
        return f"supports heads of width {supported}, not {pages.width}: choose another model"
    if pages.v_width is not None and (pages.v_width, pages.width) != (512, latent):
        actual = f"{pages.width} and {pages.v_width}"
        return f"supports latents of {latent} numbers, 512 of them values, not {actual}: choose another model"
    return None


_BACKENDS = {
    "mosaic_gpu": Backend(_not_hopper, _not_readable_on_hopper),
    "tpu": Backend(_not_tpu, _not_readable_on_tpu),
}
KERNELS = ("auto", "xla", *_BACKENDS)
