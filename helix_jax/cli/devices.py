"""Which devices a command runs on. Called before any JAX backend starts, as the number of fake devices must be."""

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from helix_jax.mesh import Device, make_mesh

_FAKE_DEVICES_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def open_mesh(platform: str, tp: int, cp: int | None, dp: int = 1) -> Mesh:
    """The mesh of dp x tp x cp devices of `platform`; `cp` left out takes all devices there are.

    Without an accelerator, or for platform 'cpu', the CPU is split into fake devices: as many as are asked for, or,
    when cp is left out, as many as XLA_FLAGS or JAX_NUM_CPU_DEVICES say.

    Raises:
        ValueError: no device of that platform, or fewer than dp * tp * cp.
    """
    for name, size in (("tp", tp), ("cp", cp), ("dp", dp)):
        if size is not None and size < 1:
            raise ValueError(f"--{name} is {size}: give at least 1")
    fake = dp * tp * cp if cp else max(dp * tp, _fake_devices_wanted())
    jax.config.update("jax_num_cpu_devices", fake)
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    devices = _devices(platform)
    if cp is None and len(devices) < dp * tp:
        raise ValueError(f"--tp {tp} needs {dp * tp} devices, but there are {len(devices)}: try --platform cpu")
    return make_mesh(tp, cp or len(devices) // (dp * tp), dp, devices=devices)


def _fake_devices_wanted() -> int:
    """What the environment asks for. The XLA flag is taken over: JAX refuses it beside its own setting."""
    flags = os.environ.get("XLA_FLAGS", "")
    flag = _FAKE_DEVICES_FLAG.search(flags)
    if flag:
        os.environ["XLA_FLAGS"] = _FAKE_DEVICES_FLAG.sub("", flags)
        return int(flag[1])
    return max(1, jax.config.jax_num_cpu_devices)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def libtpu_silenced(found: list[Device]) -> Iterator[None]:
    """Without a TPU, an installed libtpu fills stderr with its search for one, from C++, past any setting of ours."""
    if importlib.util.find_spec("libtpu") is None:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        os.dup2(chatter.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            chatter.seek(0)
            if found and found[0].platform == "tpu":  # then it is no chatter
                sys.stderr.write(chatter.read().decode(errors="replace"))


def _devices(platform: str) -> list[Device]:
    devices: list[Device] = []
    try:
        with libtpu_silenced(devices):
            devices += jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform that JAX_PLATFORMS names is there
        raise ValueError(
            f"JAX found no device ({str(error) or 'JAX_PLATFORMS names one that is not there'}): try --platform cpu"
        ) from None
    if platform not in ("auto", devices[0].platform):
        raise ValueError(
            f"--platform {platform}: JAX found only {len(devices)} x {devices[0].platform}: try --platform cpu"
        )
    return devices
