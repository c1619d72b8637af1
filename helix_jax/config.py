"""What is fixed and validated before anything runs: the shape of a model, and the plan by which a mesh decodes it."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from jax.sharding import AxisType, Mesh

from helix_jax.combine import COMBINES
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, DP, TP, flat_size

KERNELS = ("auto", "xla")

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Raises:
        ValueError: a size below 1, a stop id outside of the vocabulary, query heads that the key/value heads do not
            divide.
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
    family: str = "llama"

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and value < 1:
                raise ValueError(f"{f.name} is {value}: give a whole number of at least 1")
            if f.type is float and not 0 < value < math.inf:
                raise ValueError(f"{f.name} is {value}: give a positive number")
        for stop in self.stop_ids:
            if not 0 <= stop < self.vocab:
                raise ValueError(f"stop id {stop} is outside of the vocabulary of {self.vocab}: mend the config")
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
        ValueError: a mesh that is not `make_mesh`'s, a layout for another number of ranks than it has, an unknown
            combine or kernel.
    """

    mesh: Mesh
    layout: BlockLayout
    combine: str = "psum"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.mesh.axis_names != (DP, TP, CP) or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(f"the mesh has axes {self.mesh.axis_names}: make it with make_mesh, automatic, cp minor")
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

    def check_kv_heads(self, kv_heads: int) -> None:
        """Raises ValueError, with the nearest sizes that fit, if tp cannot share these heads evenly."""
        tp = self.mesh.shape[TP]
        if kv_heads % tp:
            raise ValueError(
                f"tp {tp} does not divide the {kv_heads} key/value heads: choose tp {_nearest(tp, kv_heads)}"
            )

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Raises ValueError, with the nearest sizes that fit, if the mesh cannot share these heads evenly."""
        self.check_kv_heads(kv_heads)
        tp, flat = self.mesh.shape[TP], flat_size(self.mesh)
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
    return kind(**{key: _of_type(value, known[key].type, f"{where}: {key}") for key, value in values.items()})


def _of_type(value: Any, wanted: Any, what: str) -> Any:
    """`value` as a field of type `wanted` holds it; what no file can give (a nested config, say) passes as it is."""
    if wanted is float and type(value) is int:
        return float(value)
    if wanted == tuple[int, ...] and isinstance(value, list | tuple) and all(type(item) is int for item in value):
        return tuple(value)
    if (wanted in (int, float, bool, str) and type(value) is not wanted) or wanted == tuple[int, ...]:
        raise ValueError(f"{what} is {value!r}: give a value of type {getattr(wanted, '__name__', wanted)}")
    if wanted == (str | None) and not isinstance(value, str | None):
        raise ValueError(f"{what} is {value!r}: give a value of type str")
    return value


def _nearest(wanted: int, whole: int) -> str:
    """The divisors of `whole` next to `wanted`, below and above."""
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
