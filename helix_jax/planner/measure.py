"""Measures the devices of this machine."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from helix_jax.mesh import REPLICATED, ROWS_B, make_mesh, sharding
from helix_jax.planner.hardware import HARDWARE, Hardware

_SHORT, _LONG = 8, 40  # operations in a chain; a difference of two times excludes the call itself


def measure_hardware(devices: Sequence[Any]) -> Hardware:
    """Measure the kind of device of which these are, and their links.

    Args:
        devices: Devices of one kind. With only one, the links are not measured: those of the same kind in the table are
            assumed, or those of an H200.

    Returns:
        The hardware. Its source lists what was assumed.
    """
    device, on_cpu = devices[0], devices[0].platform == "cpu"
    known = known_hardware(device)
    collective_s, link_bandwidth = HARDWARE[known].collective_s, HARDWARE[known].link_bandwidth
    source = f"measured on {len(devices)} x {device.device_kind}"
    if len(devices) > 1:
        collective_s, link_bandwidth = measure_links(devices)
    else:
        source += f"; the links of {known} are assumed"
    return Hardware(
        bandwidth=measure_bandwidth(device),
        memory_bytes=_memory_bytes(device) / (len(devices) if on_cpu else 1),
        flops=measure_flops(device),
        link_bandwidth=link_bandwidth,
        collective_s=collective_s,
        kernel_s=measure_kernel(device),
        routing_s=HARDWARE[known].routing_s,
        speedups={"float32": 1.0} if on_cpu else HARDWARE[known].speedups,
        source=f"{source}; the time of routing to experts is that of {known}",
    )


def known_hardware(device: Any) -> str:
    """Return the name of a device in the table `HARDWARE`, or "h200" if it is not there."""
    return recognise(device) or "h200"


def recognise(device: Any) -> str | None:
    """Return the name of a device in the table `HARDWARE`. None: it is not there."""
    kind = device.device_kind.lower().replace(" ", "")
    return max((name for name in HARDWARE if name in kind), key=len, default=None)  # a GB200 is no B200


def measure_bandwidth(device: Any, calls: int = 10, repeats: int = 5) -> float:
    """Measure the bytes per second that a device reads, with the maximum of a large array.

    Args:
        device: The device.
        calls: How many calls are queued before waiting for all of them.
        repeats: How often this is timed. The fastest counts.
    """
    size = 2**27 if device.platform == "cpu" else 2**32
    x_X = jnp.zeros(size // 2, jnp.bfloat16, device=device)
    compute_max = jax.jit(jnp.max)
    jax.block_until_ready(compute_max(x_X))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([compute_max(x_X) for _ in range(calls)])
        seconds.append(time.perf_counter() - start)
    return calls * size / min(seconds)


def measure_flops(device: Any) -> float:
    """Measure the operations per second of a large product, in bfloat16, or on a CPU in float32."""
    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    x_XY = jnp.ones((size, size), dtype, device=device)
    return 2 * size**3 / _fastest_s(jax.jit(lambda x: x @ x), x_XY)


def measure_kernel(device: Any) -> float:
    """Measure the seconds of a kernel that does little, in a chain of products of small matrices."""
    x_XY = jnp.eye(16, device=device)

    def chain(length: int) -> Callable[[jax.Array], jax.Array]:
        def multiply(x: jax.Array) -> jax.Array:
            result = x
            for _ in range(length):
                result = jnp.dot(result, x)
            return result

        return jax.jit(multiply)

    return _difference_s(chain, x_XY, repeats=200)


def measure_links(devices: Sequence[Any]) -> tuple[float, float]:
    """Measure the seconds of a small sum over all devices, and the bytes per second that each sends in a large one."""
    mesh = make_mesh(dp=len(devices), cp=1, devices=devices)
    everywhere = sharding(mesh, REPLICATED)

    def chain(length: int) -> Callable[[jax.Array], jax.Array]:
        def add(x: jax.Array) -> jax.Array:
            total = x.sum(0)
            for _ in range(length - 1):
                total = jax.lax.with_sharding_constraint((x + total / x.shape[0]).sum(0), everywhere)
            return total

        return jax.jit(add, out_shardings=everywhere)

    def measure(numbers: int) -> float:
        return _difference_s(chain, jax.device_put(jnp.ones((len(devices), numbers)), sharding(mesh, ROWS_B)))

    numbers = 2**18 if devices[0].platform == "cpu" else 2**22
    small_s, large_s = measure(64), measure(numbers)
    sent_bytes = 2 * (len(devices) - 1) / len(devices) * 4 * numbers
    return small_s, sent_bytes / (large_s - small_s if large_s > small_s else large_s)


def _difference_s(chain: Callable[[int], Callable[[jax.Array], jax.Array]], x: jax.Array, repeats: int = 5) -> float:
    """Return the seconds of an operation, from a long and a short chain of it.

    On a busy machine the long chain may seem no longer. Its average is then the best bound that there is.
    """
    long_s, short_s = (_fastest_s(chain(length), x, repeats) for length in (_LONG, _SHORT))
    return (long_s - short_s) / (_LONG - _SHORT) if long_s > short_s else long_s / _LONG


def _fastest_s(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int = 5) -> float:
    """Return the fewest seconds of several calls, after one that compiles."""
    jax.block_until_ready(function(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _memory_bytes(device: Any) -> float:
    stats = device.memory_stats() or {}
    return float(stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
