"""The plans that an evaluation compares: one device, and a mesh under several placements."""

from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import Mesh

from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan

ONE_DEVICE = "one device"

LoadModel = Callable[[Plan], Transformer]
# Called with the name of a plan, and how much of its work is done, and of how much.
OnProgress = Callable[[str, int, int], None]


def make_plans(mesh: Mesh, placements: Iterable[str], block: int = 16, **options: Any) -> dict[str, Plan]:
    """Return the plans to compare, by name: `ONE_DEVICE` first, then one per placement.

    Args:
        mesh: The mesh of the placements. The first of its devices is the one device.
        placements: Names of placements, see `BlockLayout`.
        block: Positions per decode block.
        **options: Other arguments of every `Plan`, such as `kernel`.

    Raises:
        ValueError: A placement is unknown, or the plan refuses an option.
    """
    alone = make_mesh(1, 1, devices=list(mesh.devices.flat))
    plans = {ONE_DEVICE: Plan(alone, block, **options)}
    return plans | {name: Plan(mesh, block, name, **options) for name in placements}


def ignore_progress(name: str, done: int, total: int) -> None:
    """Do nothing: the default of `on_progress`."""
