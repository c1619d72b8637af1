"""Runs the Mosaic kernels on a CPU in JAX's interpreters, which simulate threads, cores and barriers and find races.

The GPU interpreter lacks some features, which are emulated here: a matrix product whose left operand is in registers,
an accumulator with an initial value, and the functions of `instructions`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter

from helix_jax.kernels import mosaic_gpu, tpu
from helix_jax.kernels.mosaic_gpu import instructions, memory
from helix_jax.kernels.tpu import work

AVAILABLE = jax.__version_info__ >= (0, 12)  # the GPU interpreter of earlier versions is absent or incomplete


class _Sum:
    """Emulates an accumulator with an initial value."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value


def _run_state(body: Callable[..., None]) -> Callable[..., Any]:
    def run(start: Any) -> Any:
        if isinstance(start, list):
            sums = [_Sum(value) for value in start]
            body(sums)
            return [each.value for each in sums]

        def from_zero(accumulator: Any) -> jax.Array:
            body(accumulator)
            return accumulator[...]

        return start + pl.run_scoped(from_zero, _Accumulator(start.shape, jnp.float32))

    return run


def _wgmma(accumulator: Any, a: Any, b: Any) -> None:
    if isinstance(accumulator, _Sum):
        left = a if isinstance(a, jax.Array) else a[...]
        accumulator.value += jnp.dot(left, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # an ordinary read is not ordered after asynchronous copies, as wgmma is
    else:
        _REAL_WGMMA(accumulator, a, b)


class _Accumulator(plgpu.WGMMAAccumulatorRef):
    init = staticmethod(lambda value: value)


def _load_numbers(tile: Any, group: Any, *, transposed: bool, few_registers: bool = False) -> list[jax.Array]:
    plgpu.commit_smem()  # as above
    x = tile[:, _columns(group, instructions.NUMBERS)].astype(jnp.float16)
    if transposed:
        return [x[:, 0::2].T, x[:, 1::2].T]
    pairs = x.reshape(x.shape[0], -1, 2, 2)
    return [pairs[:, :, i].reshape(x.shape[0], -1) for i in range(2)]


def _load_exact(tile: Any, group: Any) -> jax.Array:
    plgpu.commit_smem()  # as above
    return tile[:, _columns(group, instructions.EXACT_NUMBERS)]


def _store_scales(target: Any, scales: jax.Array) -> None:
    target[...] = scales


def _store_weights(target: Any, weights: list[jax.Array], factors_target: Any, factors: jax.Array) -> None:
    for i, each in enumerate(weights):
        target[i] = each
    factors_target[...] = factors


def _clear(tile: Any, group: Any, first: jax.Array, end: jax.Array) -> None:
    columns = _columns(group, instructions.NUMBERS)
    slot, x = jnp.arange(tile.shape[0])[:, None], tile[:, columns]
    tile[:, columns] = jnp.where((first <= slot) & (slot < end), x, jnp.zeros_like(x))


def _columns(group: Any, width: int) -> Any:
    return pl.ds(group * width, width)


_REAL_WGMMA = plgpu.wgmma


@contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch, processors: int) -> Iterator[None]:
    """Run GPU kernels traced in this context in the interpreter, with so many processors. A race raises an error."""
    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "wgmma", _wgmma)
        patch.setattr(pl, "run_state", _run_state)
        patch.setattr(memory, "Accumulator", _Accumulator)
        patch.setattr(instructions, "load_numbers", _load_numbers)
        patch.setattr(instructions, "load_exact", _load_exact)
        patch.setattr(instructions, "load_scales", lambda scales, group: scales[:, group])
        patch.setattr(instructions, "store_scales", _store_scales)
        patch.setattr(instructions, "clear", _clear)
        patch.setattr(instructions, "store_weights", _store_weights)
        patch.setattr(plgpu, "wgmma_wait", lambda _: None)
        patch.setattr(mosaic_gpu, "count_processors", lambda: processors)
        mosaic_gpu.attend.clear_cache()
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        mosaic_gpu.attend.clear_cache()


@contextmanager
def interpreted_on_tpu(monkeypatch: pytest.MonkeyPatch, cores: int) -> Iterator[None]:
    """Run the TPU kernels traced in this context in the interpreter, on `cores` cores, with small tiles and blocks.

    Uninitialised memory is NaN, and a race is an error. Read all results before the context ends.
    """
    shared = {"detect_races": True, "uninitialized_memory": "nan", "random_seed": 0}
    with monkeypatch.context() as patch:
        patch.setattr(work, "_QUERIES", 32)
        patch.setattr(work, "_LEAST_SLOTS", 128)
        patch.setattr(work, "_MOST_SLOTS", 128)
        tpu.attend.clear_cache()
        try:
            with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(num_cores_or_threads=cores, **shared)):
                yield
            assert not tpu_interpreter.races.races_found
        finally:
            tpu.attend.clear_cache()
            pltpu.reset_tpu_interpret_mode_state()
