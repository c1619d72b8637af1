"""What the commands that decode share: the options of model, mesh and cache, and what they come to."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from helix_jax.checkpoint import DEMO_MODEL, load
from helix_jax.cli.devices import add_process_arguments
from helix_jax.cli.console import Reporter
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.generation import DEFAULT_CHUNK, DEFAULT_PAGE
from helix_jax.kernels import KERNELS
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import TP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import EXPERTS, Plan


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=DEMO_MODEL,
        metavar="DIR",
        help="a Hugging Face folder (default: the demo model)",
    )
    add("--tp", type=int, default=1, metavar="N", help="devices that share the heads in attention (default: 1)")
    add("--cp", type=int, metavar="N", help="devices that share the sequence (default: all devices / tp)")
    add("--block", type=int, default=16, metavar="TOKENS", help="length of a decode block (default: 16)")
    add(
        "--page", type=int, default=DEFAULT_PAGE, metavar="TOKENS", help="length of a cache page (default: %(default)s)"
    )
    add("--placement", default="helix", metavar="|".join(PLACEMENTS), help="where blocks go (default: helix)")
    add("--combine", default="psum", metavar="|".join(COMBINES), help="how partials meet (default: psum)")
    add("--experts", default="flat", metavar="|".join(EXPERTS), help="experts over all devices, or cp (default: flat)")
    add("--kernel", default="auto", metavar="|".join(KERNELS), help="what computes attention (default: auto)")
    add(
        "--prefill-chunk",
        type=int,
        default=DEFAULT_CHUNK,
        metavar="TOKENS",
        help="prompt tokens per step (default: %(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of weights and cache (default: bfloat16; float32 on a CPU)")
    add("--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto", help="cpu: tp * cp fake devices")
    add_process_arguments(parser)


@dataclass(frozen=True)
class DecodeSetup:
    """A model folder and how it is decoded, before its weights are read. kernel: what attends."""

    folder: Path
    config: ModelConfig
    plan: Plan
    page: int
    chunk: int
    dtype: str
    platform: str
    kernel: str

    def load(self, reporter: Reporter, plan: Plan | None = None) -> Transformer:
        with reporter.reading() as bar:
            task = bar.add_task("weights", total=None)

            def read(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            return load(self.folder, plan or self.plan, jnp.dtype(self.dtype), on_read=read)

    def report_devices(self, reporter: Reporter) -> None:
        mesh = self.plan.mesh
        if self.platform == "cpu" and mesh.size > 1:
            reporter.info(f"the CPU is split into {mesh.size} fake devices")
        tp = mesh.shape[TP]
        if self.config.latent and tp > 1:
            reporter.info(f"a latent serves all heads: the cache is held {tp} times, once for each of tp {tp}")


def make_setup(options: argparse.Namespace, config: ModelConfig, mesh: Mesh) -> DecodeSetup:
    """What the shared options come to for this model on this mesh.

    Raises:
        ValueError: heads that the mesh does not divide, an unknown choice, a kernel that does not run here.
    """
    plan = Plan(mesh, options.block, options.placement, options.combine, options.kernel, options.experts)
    plan.check_model(config)
    platform = mesh.devices.flat[0].platform
    dtype = options.dtype or ("float32" if platform == "cpu" else "bfloat16")
    return DecodeSetup(
        folder=options.model,
        config=config,
        plan=plan,
        page=options.page,
        chunk=options.prefill_chunk,
        dtype=dtype,
        platform=platform,
        kernel=plan.kernel_for_model(config, options.page, dtype),
    )
