"""Options that several commands share (model, mesh, cache, devices), and the objects that they describe."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from helix_jax.cache import cache_specs
from helix_jax.checkpoint import DEMO_MODEL, load
from helix_jax.cli.compilation_cache import LIMIT_BYTES, enable_compilation_cache
from helix_jax.cli.console import Reporter
from helix_jax.combine import COMBINES
from helix_jax.devices import DTYPES, PLATFORMS, default_dtype, open_mesh
from helix_jax.draft_folder import open_draft
from helix_jax.engine.engine import Engine
from helix_jax.engine.options import DEFAULT_PAGE
from helix_jax.folder import ModelFolder
from helix_jax.heads import HeadLayout
from helix_jax.kernels import KERNELS
from helix_jax.layout import PLACEMENTS
from helix_jax.mesh import TP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import CACHE_DTYPES, EXPERTS, Plan
from helix_jax.processes import Processes
from helix_jax.speculation import check_draft_tokens
from helix_jax.validation import check_choice, check_int

# A parser, or a group of options in its help.
Group = argparse._ActionsContainer  # pyright: ignore[reportPrivateUsage]


class _CheckedChoice(argparse.Action):
    """Checks a value with `check_choice`, so that a mistake has the same wording as in the library."""

    def __init__(self, *arguments: Any, const: Sequence[str], several: bool = False, **options: Any) -> None:
        super().__init__(*arguments, metavar="|".join(const), **options)
        self._choices, self._several = const, several

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        try:
            check_choice(str(option), values, self._choices)
        except ValueError as error:
            parser.error(str(error))
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, values] if self._several else values)


def add_choice(
    parser: Group,
    option: str,
    choices: Sequence[str],
    description: str,
    default: str | None = None,
    several: bool = False,
) -> None:
    """Add an option whose value is one of `choices`.

    Args:
        parser: The parser of the command, or a group of it.
        option: The option, such as "--placement".
        choices: The values it may have.
        description: The help text, to which the default is added if there is one.
        default: The default value.
        several: Whether the option may be repeated. Its value is then a list.
    """
    text = f"{description} (default: {default})" if default else description
    parser.add_argument(option, action=_CheckedChoice, const=choices, default=default, several=several, help=text)


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of model, mesh, cache, speed and devices, from which `make_setup` builds a plan."""
    add_model_arguments(parser, dtype=True)
    mesh = add_mesh_arguments(parser)
    add_choice(mesh, "--placement", PLACEMENTS, "rule that assigns blocks to devices", default="helix")
    add_choice(mesh, "--combine", COMBINES, "how the devices combine their partial results", default="psum")
    add_choice(mesh, "--experts", EXPERTS, "devices that share the experts: all (flat) or cp", default="flat")
    cache, speed = add_cache_arguments(parser)
    text = "tokens per cache page (default: %(default)s)"
    cache.add_argument("--page", type=int, default=DEFAULT_PAGE, metavar="TOKENS", help=text)
    text = (
        "draft tokens and verify several at once: ngram looks them up in the request, a smaller model with the same "
        "vocabulary draws them (default: no drafts)"
    )
    speed.add_argument("--speculate", metavar="ngram|MODEL", help=text)
    text = "most draft tokens per step, 1 to 7 (default: 7 with ngram, 5 with a model)"
    speed.add_argument("--draft-tokens", type=int, metavar="N", help=text)
    add_device_arguments(parser)


def add_model_arguments(
    parser: argparse.ArgumentParser, what: str = "a folder in Hugging Face format", *, dtype: bool = False
) -> None:
    """Add the group of the model: --model, and if requested --dtype."""
    group = parser.add_argument_group("model")
    text = f"{what}, or a name on the Hugging Face Hub such as owner/name (default: the demo model, which reads bytes)"
    group.add_argument("--model", type=Path, default=DEMO_MODEL, metavar="DIR", help=text)
    if dtype:
        add_choice(group, "--dtype", DTYPES, "type of the weights (default: bfloat16; float32 on a CPU)")


def add_mesh_arguments(parser: argparse.ArgumentParser, *, training: bool = False) -> Group:
    """Add the group of the mesh: --tp, --cp and --block, and for training --dp. Return the group."""
    group = parser.add_argument_group("mesh", "how tp * cp devices share the model and each sequence")
    add = group.add_argument
    heads = "heads and widths" if training else "the heads in attention"
    add("--tp", type=int, default=1, metavar="N", help=f"devices that share {heads} (default: 1)")
    if training:
        add("--dp", type=int, default=1, metavar="N", help="devices that share the batch (default: 1)")
    cp, text = (1, "1") if training else (None, "all devices / tp")
    add("--cp", type=int, default=cp, metavar="N", help=f"devices that share the sequence (default: {text})")
    text = "length of a block: consecutive tokens on one device (default: 16)"
    add("--block", type=int, default=16, metavar="TOKENS", help=text)
    return group


def add_cache_arguments(parser: argparse.ArgumentParser) -> tuple[Group, Group]:
    """Add the groups of the cache (--kv-cache-dtype) and of speed (--kernel and --prefill-chunk). Return both."""
    cache = parser.add_argument_group("cache")
    text = "type of the key/value cache; auto is that of the weights"
    add_choice(cache, "--kv-cache-dtype", CACHE_DTYPES, text, default="auto")
    speed = parser.add_argument_group("speed")
    add_choice(speed, "--kernel", KERNELS, "attention kernel", default="auto")
    speed.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="TOKENS",
        help="prompt tokens per prefill step (default: 2048 on a GPU, 512 elsewhere)",
    )
    return cache, speed


def add_device_arguments(parser: argparse.ArgumentParser, *, processes: bool = True) -> None:
    """Add the groups of devices and, if requested, of several processes."""
    devices = parser.add_argument_group("devices")
    text = "devices to use; a CPU is split into as many fake devices as the mesh needs"
    add_choice(devices, "--platform", PLATFORMS, text, default="auto")
    text = f"folder for compiled programs, at most {LIMIT_BYTES >> 30} GB, or off (default: the user's cache folder)"
    devices.add_argument("--compilation-cache", default="auto", metavar="DIR", help=text)
    if not processes:
        return
    group = parser.add_argument_group("several processes", "each gets the same command line; see scripts/HOSTS.md")
    add = group.add_argument
    add("--distributed", action="store_true", help="detect the processes (Slurm, Kubernetes, Open MPI, Cloud TPU)")
    add("--coordinator", metavar="HOST:PORT", help="or: address of the first process")
    add("--processes", type=int, metavar="N", help="number of processes")
    add("--process", type=int, metavar="I", help="index of this process, from 0")


def open_devices(options: argparse.Namespace) -> Mesh:
    """Create the mesh that the options of `add_mesh_arguments` and `add_device_arguments` describe.

    Raises:
        ValueError: As `open_mesh`, or the folder for compiled programs cannot be written.
    """
    enable_compilation_cache(options.compilation_cache)
    processes = None
    if hasattr(options, "distributed"):
        given = Processes(options.coordinator, options.processes, options.process)
        processes = given if options.distributed or given != Processes() else None
    return open_mesh(options.platform, options.tp, options.cp, getattr(options, "dp", 1), processes)


@dataclass(frozen=True)
class DecodeSetup:
    """A model folder and how to decode with it, before its weights are read.

    Attributes:
        folder: The model folder.
        plan: How the mesh decodes.
        page: Tokens per cache page.
        chunk: Prompt tokens per prefill step.
        dtype: The dtype of the weights.
        platform: The platform of the devices.
        kernel: The attention kernel.
        speculate: "ngram" if drafts are looked up.
        draft: The folder of the draft model, if there is one.
        draft_tokens: The most tokens to draft per step. None: the default of the engine.
    """

    folder: ModelFolder
    plan: Plan
    page: int
    chunk: int | None
    dtype: str
    platform: str
    kernel: str
    speculate: str | None = None
    draft: ModelFolder | None = None
    draft_tokens: int | None = None

    @property
    def cache_dtype(self) -> str:
        """The type of the cache."""
        return jnp.dtype(self.plan.cache_dtype_for(self.dtype)).name

    @property
    def mesh(self) -> Mesh:
        """The mesh of the plan, which has devices."""
        return cast(Mesh, self.plan.mesh)

    def load(self, reporter: Reporter, plan: Plan | None = None) -> Transformer:
        """Load the model, with a progress bar.

        Args:
            reporter: Shows the bar.
            plan: The plan to load it for, default that of the setup.
        """
        return load_model(self.folder.path, plan or self.plan, self.dtype, reporter)

    def load_drafts(self, reporter: Reporter) -> dict[str, Any]:
        """Return the options of an engine that say how tokens are drafted. Load the draft model, if there is one."""
        draft = load_model(self.draft.path, self.plan, self.dtype, reporter) if self.draft else None
        return {"speculate": draft or self.speculate, "draft_tokens": self.draft_tokens}

    def report_devices(self, reporter: Reporter) -> None:
        """Report fake devices, and copies of the cache."""
        report_fake_devices(self.mesh, reporter)
        tp, config = self.mesh.shape[TP], self.folder.config
        copies = tp if config.latent else HeadLayout.of(config, self.mesh).copies
        if copies > 1:
            specs = cache_specs(config, self.plan.cache_dtype_for(self.dtype))
            copied = (copies - 1) * sum(spec.bytes_per_token for spec in specs)
            heads = "its latent" if config.latent else f"each of its {config.kv_heads} key/value heads"
            reporter.info(
                f"tp {tp} stores {heads} on {copies} devices: the copies take {copied:,} bytes of cache per token"
            )


def make_setup(options: argparse.Namespace, folder: ModelFolder, mesh: Mesh, max_len: int) -> DecodeSetup:
    """Return the setup that the shared options describe for a model on a mesh.

    Args:
        options: The parsed options of `add_decode_arguments`.
        folder: The model folder.
        mesh: A mesh of `open_mesh`.
        max_len: The most positions of a request, which a draft model must have too.

    Raises:
        ValueError: The mesh does not divide the heads, an option has an invalid value, the kernel does not run on these
            devices, or a draft model does not fit the model.
    """
    check_int("--page", options.page, least=1)
    if options.prefill_chunk is not None:
        check_int("--prefill-chunk", options.prefill_chunk, least=1)
    choices = (options.placement, options.combine, options.kernel, options.experts, options.kv_cache_dtype)
    plan = Plan(mesh, options.block, *choices)
    plan.check_model(folder.config)
    check_draft_tokens("--draft-tokens", options.draft_tokens, "--speculate", speculates=options.speculate is not None)
    draft = open_draft("--speculate", options.speculate, folder, plan, max_len)
    platform = mesh.devices.flat[0].platform
    dtype = options.dtype or default_dtype(mesh)
    return DecodeSetup(
        folder=folder,
        plan=plan,
        page=options.page,
        chunk=options.prefill_chunk,
        dtype=dtype,
        platform=platform,
        kernel=plan.kernel_for_model(folder.config, options.page, dtype),
        speculate=None if draft else options.speculate,
        draft=draft,
        draft_tokens=options.draft_tokens,
    )


def load_model(folder: Path, plan: Plan, dtype: DTypeLike, reporter: Reporter) -> Transformer:
    """Load a model with a progress bar.

    Args:
        folder: A model folder in Hugging Face format.
        plan: How the mesh decodes.
        dtype: The dtype of the weights.
        reporter: Shows the bar.
    """
    with reporter.reading() as bar:
        task = bar.add_task("weights", total=None)

        def on_read(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return load(folder, plan, jnp.dtype(dtype), on_read=on_read)


def report_fake_devices(mesh: Mesh, reporter: Reporter) -> None:
    """Report that the CPU is split into fake devices, if the mesh has several."""
    if mesh.devices.flat[0].platform == "cpu" and mesh.size > 1:
        reporter.info(f"the CPU is split into {mesh.size} fake devices")


def report_drafts(engine: Engine, reporter: Reporter) -> None:
    """Report how many draft tokens were right, if there were any."""
    stats = engine.stats()
    if stats.drafted_tokens:
        reporter.info(
            f"{stats.accepted_tokens:,} of {stats.drafted_tokens:,} draft tokens were right: "
            f"{stats.tokens_per_step:.2f} tokens per step"
        )
