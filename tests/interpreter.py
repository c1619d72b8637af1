"""Runs Mosaic's kernels on a CPU: JAX's interpreters have threads or cores, barriers and memories, and find races.

Two things that the one for GPUs does not know are put in its words here: a matrix product whose left side lies in
registers, and an accumulator that starts from a value.
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
from helix_jax.kernels.mosaic_gpu import memory
from helix_jax.kernels.tpu import work

AVAILABLE = jax.__version_info__ >= (0, 12)  # for GPUs: before it, there is none, or one that knows too little


class _Sum:
    """Stands for accumulators that start from a value."""

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
        accumulator.value += jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the matrix unit reads as the copies write; an ordinary read does not
    else:
        _REAL_WGMMA(accumulator, a, b)


class _Accumulator(plgpu.WGMMAAccumulatorRef):
    init = staticmethod(lambda value: value)


_REAL_WGMMA = plgpu.wgmma


@contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch, processors: int) -> Iterator[None]:
    """Kernels that are traced in here run on the CPU, as on a GPU of so many processors; a race raises."""
    with monkeypatch.context() as patch:
        patch.setattr(plgpu, "wgmma", _wgmma)
        patch.setattr(pl, "run_state", _run_state)
        patch.setattr(memory, "Accumulator", _Accumulator)
        patch.setattr(mosaic_gpu, "count_processors", lambda: processors)
        mosaic_gpu.attend.clear_cache()
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        mosaic_gpu.attend.clear_cache()


@contextmanager
def interpreted_on_tpu(monkeypatch: pytest.MonkeyPatch, cores: int) -> Iterator[None]:
    """Kernels that are traced in here run on the CPU, as on a TPU of so many cores, in tiles and blocks that are small.

    What was not written is NaN, and a race an error. All results must be looked at in here.
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
