"""Predicts the time of a decode step, to choose a mesh and to compare strategies. README.md describes the model."""

from helix_jax.planner.costs import Workload
from helix_jax.planner.hardware import HARDWARE, Hardware, find_hardware
from helix_jax.planner.parallelism import BASELINES, OWN, STRATEGIES, Parallelism
from helix_jax.planner.search import Candidate, best_throughput, fastest, pareto_frontier, sweep
from helix_jax.planner.shapes import read_shape, take_first_layers
from helix_jax.planner.step import StepTime, most_rows, predict_step

__all__ = [
    "BASELINES",
    "HARDWARE",
    "OWN",
    "STRATEGIES",
    "Candidate",
    "Hardware",
    "Parallelism",
    "StepTime",
    "Workload",
    "best_throughput",
    "fastest",
    "find_hardware",
    "most_rows",
    "pareto_frontier",
    "predict_step",
    "read_shape",
    "sweep",
    "take_first_layers",
]
