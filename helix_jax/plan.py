"""Describes how a mesh decodes: everything that is not a property of the model, validated before anything runs."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
from jax.sharding import AxisType
from jax.typing import DTypeLike

from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.heads import HeadLayout
from helix_jax.kernels import KERNELS, check_device, choose_backend
from helix_jax.kernels.page_format import PageFormat, stored_width
from helix_jax.layout import BlockLayout
from helix_jax.mesh import CP, DP, EXPERT_WEIGHTS, TP, AnyMesh, first_device
from helix_jax.quantisation import FLOAT8
from helix_jax.validation import check_choice, check_type

EXPERTS = tuple(EXPERT_WEIGHTS)
_CACHE_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "fp8": FLOAT8}
CACHE_DTYPES = ("auto", *_CACHE_DTYPES)


@dataclass(frozen=True)
class Plan:
    """How a mesh decodes: the mesh, where tokens are stored, and how attention and experts run.

    Args:
        mesh: A mesh from `make_mesh`.
        block: Positions per decode block.
        placement: Which rank stores which block: "helix", "striped" or "last_rank", see `BlockLayout`.
        combine: How the partial results of the cp ranks are combined: "psum", "psum_scatter" or "all_to_all".
        kernel: The attention kernel: "auto", "xla", "mosaic_gpu" or "tpu".
        experts: How experts are sharded: "flat", whole experts over all devices; or "cp", whole experts over cp and
            the width of each over tp.
        cache_dtype: The type of the cache: "auto", that of the model; "bfloat16", "float32" or "fp8", see
            `helix_jax.quantisation`.

    Raises:
        TypeError: `mesh` is not a mesh, or `block` not an int.
        ValueError: The mesh does not come from `make_mesh`, a choice is unknown, `block` is out of range, or the kernel
            does not run on these devices.
    """

    mesh: AnyMesh
    block: int = 16
    placement: str = "helix"
    combine: str = "psum"
    kernel: str = "auto"
    experts: str = "flat"
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_type("mesh", self.mesh, AnyMesh, "a mesh of helix_jax.make_mesh(tp=..., cp=...)")
        axes = (DP, TP, CP)
        if self.mesh.axis_names != axes or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise ValueError(
                f"mesh axes are {self.mesh.axis_names}, expected automatic {axes}: "
                f"create the mesh with helix_jax.make_mesh(tp=..., cp=...)"
            )
        check_choice("combine", self.combine, COMBINES)
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("experts", self.experts, EXPERTS)
        check_choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        check_device(self.kernel, first_device(self.mesh))
        _ = self.layout  # validates block and placement

    @cached_property
    def layout(self) -> BlockLayout:
        """The assignment of positions to the cp ranks."""
        return BlockLayout(self.mesh.shape[CP], self.block, self.placement)

    def cache_dtype_for(self, dtype: DTypeLike) -> DTypeLike:
        """Return the type of the cache of a model of type `dtype`."""
        return _CACHE_DTYPES.get(self.cache_dtype, dtype)

    def kernel_for(self, pages: PageFormat) -> str:
        """Return the name of the attention kernel for pages of a format. It is never "auto".

        Raises:
            ValueError: The kernel of the plan cannot read them.
        """
        return choose_backend(self.kernel, first_device(self.mesh), pages)

    def kernel_for_model(self, config: ModelConfig, page: int, dtype: DTypeLike) -> str:
        """Return the name of the attention kernel for a model.

        Args:
            config: The model.
            page: Tokens per page.
            dtype: The type of the model.

        Raises:
            ValueError: The kernel of the plan cannot read such pages.
        """
        width = stored_width(config.cache_width, first_device(self.mesh))
        dtype = self.cache_dtype_for(dtype)
        return self.kernel_for(PageFormat(width, page, dtype, config.latent.width if config.latent else None))

    def check_model(self, config: ModelConfig) -> None:
        """Check that the mesh can share the heads of a model.

        Raises:
            ValueError: It cannot. The message lists the meshes of as many devices that can.
        """
        HeadLayout.of(config, self.mesh)
