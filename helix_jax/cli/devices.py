"""Which devices a command runs on. Called before any JAX backend starts, as the number of fake devices must be."""

import argparse
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from helix_jax.mesh import Device, make_mesh
from helix_jax.processes import Processes, process_count, is_first, barrier, initialize

_FAKE_DEVICES_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group("several processes", "each gets the same command line; see scripts/HOSTS.md")
    add = several.add_argument
    add("--distributed", action="store_true", help="JAX finds the others: of Slurm, Kubernetes, Open MPI, Cloud TPU")
    add("--coordinator", metavar="HOST:PORT", help="or: where the first process is")
    add("--processes", type=int, metavar="N", help="how many they are")
    add("--process", type=int, metavar="I", help="which of them this is, from 0")


def processes_of(options: argparse.Namespace) -> Processes | None:
    """What the options say; None if this process is alone."""
    found = Processes(options.coordinator, options.processes, options.process)
    return found if options.distributed or found != Processes() else None


def open_mesh(platform: str, tp: int, cp: int | None, dp: int = 1, processes: Processes | None = None) -> Mesh:
    """The mesh of dp x tp x cp devices of `platform`; `cp` left out takes all devices there are, of all processes.

    Without an accelerator, or for platform 'cpu', the CPU is split into fake devices: as many as are asked for, or,
    when cp is left out, as many as XLA_FLAGS or JAX_NUM_CPU_DEVICES say; of several processes each makes its share.

    Raises:
        ValueError: no device of that platform, or fewer than dp * tp * cp; processes that do not find each other, or
            more devices than that in them.
    """
    for name, size in (("tp", tp), ("cp", cp), ("dp", dp)):
        if size is not None and size < 1:
            raise ValueError(f"--{name} is {size}: give at least 1")
    if processes:
        initialize(processes)
        _let_the_first_alone_speak()
    fake = dp * tp * cp if cp else max(dp * tp, _fake_devices_wanted() * process_count())
    jax.config.update("jax_num_cpu_devices", -(-fake // process_count()))
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    devices = _devices(platform)
    barrier()
    if cp is None and len(devices) < dp * tp:
        raise ValueError(f"--tp {tp} needs {dp * tp} devices, but there are {len(devices)}: try --platform cpu")
    cp = cp or len(devices) // (dp * tp)
    if process_count() > 1 and dp * tp * cp < len(devices):
        sizes = f"tp {tp} x cp {cp}" + (f" x dp {dp}" if dp > 1 else "")
        raise ValueError(
            f"{sizes} takes {dp * tp * cp} of the {len(devices)} devices of {process_count()} processes: take all of them, or "
            f"start fewer processes"
        )
    return make_mesh(tp, cp, dp, devices=devices)


def _let_the_first_alone_speak() -> None:
    """What they say is the same; of an error, which need not be, `sys.__stderr__` still tells.

    Gloo, which connects processes on CPUs, tells so on stdout, from C++: nobody hears it.
    """
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(ours, "w", errors="replace")
    if not is_first():
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the rest of the process


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
