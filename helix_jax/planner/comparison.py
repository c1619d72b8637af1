"""Compares predictions with measured steps, and fits the overheads of a version on points that are not judged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helix_jax.config import ModelConfig
from helix_jax.planner.costs import Workload
from helix_jax.planner.hardware import Hardware, find_hardware
from helix_jax.planner.parallelism import Parallelism
from helix_jax.planner.shapes import take_first_layers
from helix_jax.planner.step import predict_step

MEASURED_FILE = Path(__file__).with_name("measured.json")
_NOT_OF_A_STEP = ("points", "source", "details")  # keys of a group or of a point that describe the measurement


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A step that was measured, with weights in bfloat16.

    Args:
        version: The version of the code.
        hardware: A key of `hardware.HARDWARE`.
        model: The name of a file in configs/.
        tp: Devices that share the heads.
        cp: Devices that share the sequence.
        rows: The rows.
        context: The tokens in the cache of each row.
        ms: Milliseconds per token of every row.
        layers: How many of the model's layers there were. None: all.
        kv_heads: How many key/value heads the model had. None: those of its config.
        combine: The combine.
        cache_dtype: The type of the cache, as in `Workload`.
        fit: Whether the overheads of the version are fitted on this point.
    """

    version: str
    hardware: str
    model: str
    tp: int
    cp: int
    rows: int
    context: int
    ms: float
    layers: int | None = None
    kv_heads: int | None = None
    combine: str = "all_to_all"
    cache_dtype: str = "bfloat16"
    fit: bool = False


def read_measured(file: Path = MEASURED_FILE) -> list[Measured]:
    """Read measured steps. A key of a group holds for its points, unless they have it too.

    Args:
        file: `measured.json`, or a file of scripts/bench_gpus.py, which may have points without `ms`: they were
            predicted, but not measured.
    """
    points = []
    for group in json.loads(file.read_text())["groups"]:
        for point in group["points"]:
            keys = {key: value for key, value in {**group, **point}.items() if key not in _NOT_OF_A_STEP}
            points += [Measured(**keys)] if "ms" in keys else []
    return points


def predict_point(point: Measured, config: ModelConfig, hardware: Hardware) -> float:
    """Return the predicted milliseconds of a measured step.

    Args:
        point: The step.
        config: The model, with all of its layers.
        hardware: The device, with the overheads of the version.
    """
    config = take_first_layers(config, point.layers) if point.layers else config
    config = replace(config, kv_heads=point.kv_heads) if point.kv_heads else config
    workload = Workload(context=point.context, combine=point.combine, cache_dtype=point.cache_dtype)
    parallelism = Parallelism(strategy="helix" if point.cp > 1 else "tp", tp=point.tp, cp=point.cp)
    return 1e3 * float(predict_step(config, workload, parallelism, hardware, point.rows).total)


def fit_overheads(points: Sequence[Measured], configs: Mapping[str, ModelConfig], hardware: Hardware) -> Hardware:
    """Return the hardware with the overheads of a kernel and of a collective that fit some points best.

    A step's time is linear in both, so this is least squares of two unknowns. Errors are relative.

    Args:
        points: The points, with different shares of both overheads.
        configs: The models by name.
        hardware: The device.
    """

    def predict(kernel_s: float, collective_s: float) -> np.ndarray:
        each = replace(hardware, kernel_s=kernel_s, collective_s=collective_s)
        return np.asarray([predict_point(point, configs[point.model], each) for point in points])

    measured, fixed = np.asarray([point.ms for point in points]), predict(0.0, 0.0)
    unit = 1e-6
    slopes = np.stack([predict(unit, 0.0) - fixed, predict(0.0, unit) - fixed], -1)
    weights = 1 / measured[:, None]
    overheads = np.linalg.lstsq(slopes * weights, (measured - fixed) * weights[:, 0], rcond=None)[0] * unit
    kernel_s, collective_s = (float(seconds) for seconds in np.maximum(overheads, 0))
    return replace(hardware, kernel_s=kernel_s, collective_s=collective_s)


def compare(points: Sequence[Measured], configs: Mapping[str, ModelConfig]) -> list[tuple[Measured, float]]:
    """Predict every point that is not fitted, with the overheads that are fitted on the others of its version.

    Of a version without such points, the overheads are those of the hardware's table.

    Args:
        points: The points.
        configs: The models by name.

    Returns:
        Each judged point, and its predicted milliseconds.
    """
    pairs: list[tuple[Measured, float]] = []
    for version in dict.fromkeys(point.version for point in points):
        of_version = [point for point in points if point.version == version]
        hardware, fitted = find_hardware(of_version[0].hardware), [point for point in of_version if point.fit]
        hardware = fit_overheads(fitted, configs, hardware) if fitted else hardware
        judged = [point for point in of_version if not point.fit]
        pairs += [(point, predict_point(point, configs[point.model], hardware)) for point in judged]
    return pairs


def summarise(pairs: Sequence[tuple[Measured, float]], tolerance: float = 0.15) -> dict[str, Any]:
    """Return how many points are judged, the share of them within a relative tolerance, and the worst."""
    errors = [predicted / point.ms - 1 for point, predicted in pairs]
    worst = max(range(len(errors)), key=lambda index: abs(errors[index]))
    within = sum(abs(error) <= tolerance for error in errors)
    return {"points": len(errors), "within": within, "worst": pairs[worst][0], "worst_error": errors[worst]}
