"""Chooses the devices of a command or an evaluation.

This happens before a backend of JAX starts, because from then on the number of fake devices is fixed.
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.mesh import CP, DP, TP, Device, make_mesh
from helix_jax.processes import Processes, barrier, initialize, is_first, process_count
from helix_jax.validation import check_choice, check_int

PLATFORMS = ("auto", "cpu", "gpu", "tpu")
DTYPES = ("float32", "bfloat16")  # of weights
_TRY_CPU = "try --platform cpu (in Python, platform='cpu')"
# A fake device waits in one thread for each collective that runs beside others.
_THREADS_PER_FAKE_DEVICE = 4
_FAKE_DEVICES_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def open_mesh(platform: str, tp: int, cp: int | None, dp: int = 1, processes: Processes | None = None) -> Mesh:
    """Create a mesh of dp x tp x cp devices.

    Without an accelerator, or for the platform "cpu", the CPU is split into fake devices: dp * tp * cp of them, or, if
    `cp` is None, as many as XLA_FLAGS or JAX_NUM_CPU_DEVICES request. Each of several processes makes its share. If a
    backend has started already, its devices are used as they are.

    Args:
        platform: "auto", "cpu", "gpu" or "tpu".
        tp: Devices that share the attention heads.
        cp: Devices that share the sequence. None takes all devices of all processes.
        dp: Devices that share the batch.
        processes: The processes to connect to, None for a single process.

    Raises:
        TypeError: A size is not an int.
        ValueError: The platform is unknown, or there is no device of it, a size is below 1, there are fewer than
            dp * tp * cp devices, or more than that in several processes, or the processes do not connect.
    """
    check_choice("platform", platform, PLATFORMS)
    for name, size in ((TP, tp), (CP, cp), (DP, dp)):
        if size is not None:
            check_int(name, size, least=1)
    if processes:
        initialize(processes)
        _silence_all_but_first()
    fake = dp * tp * cp if cp else max(dp * tp, _requested_fake_devices() * process_count())
    _configure("jax_num_cpu_devices", -(-fake // process_count()))
    _reserve_threads(-(-fake // process_count()))
    if platform == "cpu":
        _configure("jax_platforms", "cpu")
    devices = _devices(platform)
    _leave_order_of_collectives_to_xla(devices)
    barrier()
    if cp is None and len(devices) < dp * tp:
        raise ValueError(f"tp {tp} needs {dp * tp} devices, but there are {len(devices)}: {_TRY_CPU}")
    cp = cp or len(devices) // (dp * tp)
    if process_count() > 1 and dp * tp * cp < len(devices):
        sizes = f"tp {tp} x cp {cp}" + (f" x dp {dp}" if dp > 1 else "")
        raise ValueError(
            f"{sizes} uses {dp * tp * cp} of the {len(devices)} devices of {process_count()} processes: use all of "
            f"them, or start fewer processes"
        )
    return make_mesh(tp, cp, dp, devices=devices)


def choose_dtype(mesh: Mesh, dtype: DTypeLike | None) -> str:
    """Return the name of the type of the weights: the one that is given, or the default of the mesh.

    Raises:
        ValueError: It is not one of `DTYPES`.
    """
    if dtype is None:
        return default_dtype(mesh)
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    check_choice("dtype", name, DTYPES)
    return name


def default_dtype(mesh: Mesh) -> str:
    """Return float32 on a CPU, where bfloat16 is slow and copies the cache, and bfloat16 elsewhere."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def _reserve_threads(fake_devices: int) -> None:
    """Let XLA have enough threads for fake devices. By default it has one per device or core.

    Collectives that do not depend on each other start in any order, and each blocks a thread. With a thread per device,
    a train step on 4 devices whose loss sums the mask deadlocked in 8 of 11 runs, because some devices waited in this
    sum and the others in the ring of attention. With 16 threads it ended in all of 3 runs.
    """
    if fake_devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, _THREADS_PER_FAKE_DEVICE * fake_devices)))


def _leave_order_of_collectives_to_xla(devices: list[Device]) -> None:
    """Let NCCL add no events of its own that order the collectives of CUDA graphs and of other programs on a GPU.

    XLA starts all programs of a GPU in one order, and the events took 5 to 7 us per layer of a decode step. Several
    processes keep them, because transports between hosts rely on them. NCCL reads the variable when the first
    collective of a process starts.

    Source: NCCL's documentation of NCCL_GRAPH_MIXING_SUPPORT, and its src/enqueue.cc, version 2.30.
    """
    if devices[0].platform == "gpu" and process_count() == 1:
        os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")


def _configure(name: str, value: object) -> None:
    try:
        jax.config.update(name, value)
    except RuntimeError:  # a backend has started: the devices are what they are
        return


def _silence_all_but_first() -> None:
    """Close stdout and stderr of all processes but the first, which would print the same.

    Errors, which may differ, still go to `sys.__stderr__`. Gloo, which connects processes on CPUs, prints to file
    descriptor 1 from C++, so that points to /dev/null.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(stdout, "w", errors="replace")
    if not is_first():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the rest of the process


def _requested_fake_devices() -> int:
    """Return how many the environment requests. Removes the XLA flag, which JAX refuses beside its own setting."""
    flags = os.environ.get("XLA_FLAGS", "")
    flag = _FAKE_DEVICES_FLAG.search(flags)
    if flag:
        os.environ["XLA_FLAGS"] = _FAKE_DEVICES_FLAG.sub("", flags)
        return int(flag[1])
    return max(1, jax.config.jax_num_cpu_devices)  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def libtpu_silenced(devices: list[Device]) -> Iterator[None]:
    """Discard what libtpu prints to file descriptor 2, from C++, while it searches for a TPU.

    Args:
        devices: The caller appends the devices to it. If they are TPUs, the output is printed after all.
    """
    if importlib.util.find_spec("libtpu") is None:
        yield
        return
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            output.seek(0)
            if devices and devices[0].platform == "tpu":
                sys.stderr.write(output.read().decode(errors="replace"))


def _devices(platform: str) -> list[Device]:
    devices: list[Device] = []
    try:
        with libtpu_silenced(devices):
            devices += jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that the platforms in JAX_PLATFORMS exist
        reason = str(error) or "JAX_PLATFORMS names a platform that does not exist"
        raise ValueError(f"JAX found no device ({reason}): {_TRY_CPU}") from None
    if platform not in ("auto", devices[0].platform):
        raise ValueError(
            f"platform is {platform}, but JAX found only {len(devices)} x {devices[0].platform}: {_TRY_CPU}"
        )
    return devices
