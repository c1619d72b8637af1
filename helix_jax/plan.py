"""How a mesh decodes: everything about it that is chosen and not the model's, validated before anything runs."""

from dataclasses import dataclass

from jax.sharding import AxisType, Mesh
from jax.typing import DTypeLike

from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.kernels import KERNELS, PageFormat, check_device, chosen
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, DP, EXPERT_WEIGHTS, TP, AnyMesh, Device, flat_size

EXPERTS = tuple(EXPERT_WEIGHTS)
_TPU_LANES = 128


@dataclass(frozen=True)
class Plan:
    """How a mesh decodes: where blocks go, how partials meet, which kernel attends, how experts are spread.

    experts: 'flat', whole experts over all devices; or 'cp', whole experts over cp and the width of each over tp.

    Raises:
        ValueError: a mesh that is not `make_mesh`'s, a layout for another number of ranks than it has, an unknown
            combine, kernel or spread of experts, a kernel that does not run on these devices.
    """

    mesh: AnyMesh
    layout: BlockLayout
    combine: str = "psum"
    kernel: str = "auto"
    experts: str = "flat"

    def __post_init__(self) -> None:
        if self.mesh.axis_names != (DP, TP, CP) or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(f"the mesh has axes {self.mesh.axis_names}: make it with make_mesh, automatic, cp minor")
        if self.layout.ranks != self.mesh.shape[CP]:
            ranks, cp = self.layout.ranks, self.mesh.shape[CP]
            raise ValueError(f"the layout deals to {ranks} ranks, but the mesh has cp {cp}: make them equal")
        choices = {"combine": COMBINES, "kernel": KERNELS, "experts": EXPERTS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} '{value}': choose one of {', '.join(known)}")
        check_device(self.kernel, self._device)

    @property
    def _device(self) -> Device | None:
        """One of the mesh's, which are all of a kind; None if they are abstract."""
        return self.mesh.devices.flat[0] if isinstance(self.mesh, Mesh) else None

    def stored_width(self, width: int) -> int:
        """Of what a page keeps for a token and head of this width: on TPUs a multiple of 128, filled up with zeros.

        There XLA lays an array of another width out with the pages innermost, where nothing is filled up: no kernel can
        read it, and a step copied the whole cache of a layer in and out. In rows it would take up as much as this.
        """
        on_tpu = self._device is not None and self._device.platform == "tpu"
        return -(-width // _TPU_LANES) * _TPU_LANES if on_tpu else width

    def kernel_for(self, pages: PageFormat) -> str:
        """What attends to such pages here: what `auto` comes to. Raises ValueError if the kernel asked for cannot."""
        return chosen(self.kernel, self._device, pages)

    def kernel_for_model(self, config: ModelConfig, page: int, dtype: DTypeLike) -> str:
        """What attends in this model, over pages of `page` tokens. Raises as `kernel_for`."""
        v_width = config.latent.width if config.latent else None
        return self.kernel_for(PageFormat(self.stored_width(config.cache_width), page, dtype, v_width))

    def check_kv_heads(self, kv_heads: int) -> None:
        """Raises ValueError, with the nearest sizes that fit, if tp cannot share these heads evenly."""
        tp = self.mesh.shape[TP]
        if kv_heads % tp:
            raise ValueError(
                f"tp {tp} does not divide the {kv_heads} key/value heads: choose tp {_nearest(tp, kv_heads)}"
            )

    def check_heads(self, heads: int, kv_heads: int | None) -> None:
        """Raises ValueError, with the nearest sizes that fit, if the mesh cannot share these heads evenly.

        kv_heads None: of latent attention, whose one cached vector per token serves all heads.
        """
        tp, flat = self.mesh.shape[TP], flat_size(self.mesh)
        if kv_heads is not None:
            self.check_kv_heads(kv_heads)
        elif heads % tp:
            raise ValueError(f"tp {tp} does not divide the {heads} query heads: choose tp {_nearest(tp, heads)}")
        if heads % flat:
            cp = flat // tp
            raise ValueError(
                f"tp {tp} x cp {cp} = {flat} does not divide the {heads} query heads: "
                f"choose cp {_nearest(cp, heads // tp)}"
            )

    def check_model(self, config: ModelConfig) -> None:
        """Raises ValueError, with the nearest sizes that fit, if the mesh cannot share this model's heads evenly."""
        self.check_heads(config.heads, None if config.latent else config.kv_heads)


def _nearest(wanted: int, whole: int) -> str:
    """The divisors of `whole` next to `wanted`, below and above."""
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))
