"""Checks that a model has a plan that fits into memory, and finds the nearest that does."""

from dataclasses import replace

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Workload
from helix_jax.planner.hardware import Hardware
from helix_jax.planner.parallelism import OWN, divisors, enumerate_parallelisms
from helix_jax.planner.step import most_rows

MOST_DEVICES = 2**16


def check_fits(name: str, config: ModelConfig, workload: Workload, hardware: Hardware, devices: int) -> None:
    """Check that a row fits into the memory of some mesh of helix_jax.

    Args:
        name: The model, as the error names it.
        config: The model.
        workload: What is decoded.
        hardware: The devices.
        devices: Their number.

    Raises:
        ValueError: No row fits. The message names the next number of devices and the longest context that do.
    """
    if fits(config, workload, hardware, devices):
        return
    count = devices
    while count <= MOST_DEVICES and not fits(config, workload, hardware, count):
        count *= 2
    remedies = [f"use {count} devices"] if count <= MOST_DEVICES else []
    if context := longest_context(config, workload, hardware, devices):
        remedies.append(f"a context of at most {context} tokens")
    raise ValueError(
        f"a row of {workload.context} tokens and the weights of {name} in {workload.dtype} do not fit into {devices} "
        f"devices of {hardware.memory_bytes / 1e9:.0f} GB: {' or '.join([*remedies, 'smaller types'])}"
    )


def fits(config: ModelConfig, workload: Workload, hardware: Hardware, devices: int) -> bool:
    """Return whether a row fits into the memory of a mesh of as many devices, or of a number that divides it."""
    return any(
        most_rows(config, workload, parallelism, hardware)
        for count in reversed(divisors(devices))
        for parallelism in enumerate_parallelisms(config, count, OWN)
    )


def longest_context(config: ModelConfig, workload: Workload, hardware: Hardware, devices: int) -> int:
    """Return the longest context up to that of `workload` of which a row fits, or 0 if not even the weights fit."""
    low, high = 0, workload.context
    while low < high:
        middle = (low + high + 1) // 2
        shorter = replace(workload, context=middle)
        low, high = (middle, high) if fits(config, shorter, hardware, devices) else (low, middle - 1)
    return low
