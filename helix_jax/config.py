"""What is fixed and validated before anything runs: the shape of a model, and the plan by which a mesh decodes it."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from jax.sharding import Mesh

from helix_jax.combine import COMBINES
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, TP, flat_size

KERNELS = ("auto", "xla")

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Raises:
        ValueError: a size below 1, or query heads that the key/value heads do not divide.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    vocab: int
    max_positions: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    stop_ids: tuple[int, ...] = ()
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "width",
            "heads",
            "kv_heads",
            "head_width",
            "ff_width",
            "vocab",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: mend the config")
        if self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}: rotary positions need an even one")

    def dims(self, devices: int = 1) -> dict[str, int]:
        """The size of each letter of the shape key; F and V rounded up to what `devices` can share evenly."""
        return {
            "D": self.width,
            "N": self.heads,
            "K": self.kv_heads,
            "H": self.head_width,
            "F": _round_up(self.ff_width, devices),
            "V": _round_up(self.vocab, devices),
        }


@dataclass(frozen=True)
class Plan:
    """How a mesh decodes: where blocks go, how partials meet, which kernel attends.

    Raises:
        ValueError: a layout for another number of ranks than the mesh has, an unknown combine or kernel.
    """

    mesh: Mesh
    layout: BlockLayout
    combine: str = "psum"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.layout.ranks != self.mesh.shape[CP]:
            ranks, cp = self.layout.ranks, self.mesh.shape[CP]
            raise ValueError(f"the layout deals to {ranks} ranks, but the mesh has cp {cp}: make them equal")
        for name, value, known in (("combine", self.combine, COMBINES), ("kernel", self.kernel, KERNELS)):
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}")

    @property
    def chosen_kernel(self) -> str:
        """What `auto` comes to on this mesh."""
        return "xla"

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Raises ValueError, with the nearest sizes that fit, if the mesh cannot share these heads evenly."""
        tp, flat = self.mesh.shape[TP], flat_size(self.mesh)
        if kv_heads % tp:
            raise ValueError(
                f"tp {tp} does not divide the {kv_heads} key/value heads: choose tp {_nearest(tp, kv_heads)}"
            )
        if heads % flat:
            cp = flat // tp
            raise ValueError(
                f"tp {tp} x cp {cp} = {flat} does not divide the {heads} query heads: "
                f"choose cp {_nearest(cp, heads // tp)}"
            )


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """Makes the dataclass `kind` of `values`, as a file gave them.

    Raises:
        ValueError: a key that `kind` does not have, one that it needs and is not there, a value of another type.
    """
    known = {f.name: f for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    needed = [name for name, f in known.items() if f.default is MISSING]
    for key in sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown key '{key}': known are {', '.join(sorted(known))}")
    for key in sorted(set(needed) - set(values)):
        raise ValueError(f"{where}: '{key}' is missing: add it")
    for key, value in values.items():
        accepted = _ACCEPTED.get(known[key].type, (type(value),))
        if type(value) not in accepted:
            raise ValueError(f"{where}: {key} is {value!r}: give a value of type {accepted[-1].__name__}")
    return kind(**values)


_ACCEPTED: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}


def _nearest(wanted: int, whole: int) -> str:
    """The divisors of `whole` next to `wanted`, below and above."""
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
