"""Where every array lives: this page is Helix.

The devices form one mesh of axes (dp, tp, cp), cp minor. Attention reads it as tp x cp: heads over tp, the sequence
over cp. Everything else reads the same devices as one flat axis, FLAT = (tp, cp), of ordinary tensor parallelism.
Because cp is the minor one, the heads that a device owns after attention (N over FLAT) are a slice of the heads that it
attended with (N over tp): the ranks of one cp group trade among themselves, and nothing crosses tp.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Device = Any  # jax.Device, which type checkers do not take for a type
AnyMesh = Mesh | AbstractMesh  # of devices that are there, or, to trace and to reckon, of some that are not

DP, TP, CP = "dp", "tp", "cp"
FLAT = (TP, CP)

REPLICATED = P()

# Activations of the island.
QUERIES_BTNH = P(DP, None, TP, None)
NEW_KEYS_BTKH = P(DP, None, TP, None)
TRADED_BTNH = P(DP, None, FLAT, None)

# The cache: pages over cp (and over dp, as the rows are), heads over tp. The page table is one per rank. A latent is
# not copied per head, as it serves them all, but every device of tp holds it.
PAGES_AKWH = P((DP, CP), TP, None, None)
PAGES_LATENT_AKWH = P((DP, CP), None, None, None)
NEW_LATENT_BTKH = P(DP, None, None, None)
TABLE_RBM = P(CP, DP, None)
ROWS_B = P(DP)
SINK_N = P(FLAT)

# What the experts' island takes and gives: every device of the flat axis has all the tokens of its rows.
TOKENS_BTD = P(DP, None, None)

# Whole sequences, in training: dealt over cp, and the heads over tp.
DEALT_S = P(CP)
DEALT_BS = P(DP, CP)
DEALT_XBS = P(None, DP, CP)
DEALT_BSD = P(DP, CP, None)
DEALT_BSKH = P(DP, CP, TP, None)
DEALT_LATENT_BSKH = P(DP, CP, None, None)
DEALT_SINK_N = P(TP)

# Weights, by the name of the parameter. Query, key and value projections are copied over cp: each of its ranks needs
# the queries of all heads of its tp group. The rest is tensor parallel over the flat axis.
WEIGHTS = {
    "embed_VD": P(FLAT, None),
    "head_VD": P(FLAT, None),
    "q_DNH": P(None, TP, None),
    "k_DKH": P(None, TP, None),
    "v_DKH": P(None, TP, None),
    "q_bias_NH": P(TP, None),
    "k_bias_KH": P(TP, None),
    "v_bias_KH": P(TP, None),
    "o_NHD": P(FLAT, None, None),
    "sink_N": SINK_N,
    "gate_DF": P(None, FLAT),
    "up_DF": P(None, FLAT),
    "down_FD": P(FLAT, None),
    # Latent attention: what makes the latents is copied, as it makes one for all heads; then heads over tp before the
    # cp ranks trade, over the flat axis after it.
    "q_down_DQ": REPLICATED,
    "q_up_QNH": P(None, TP, None),
    "kv_down_DY": REPLICATED,
    "k_up_NIZ": P(TP, None, None),
    "v_up_NZU": P(FLAT, None, None),
    "o_NUD": P(FLAT, None, None),
    **dict.fromkeys(("norm_D", "attention_norm_D", "attention_post_norm_D", "ff_norm_D", "ff_post_norm_D"), REPLICATED),
    **dict.fromkeys(("q_norm_H", "k_norm_H", "q_norm_Q", "kv_norm_Z", "o_bias_D"), REPLICATED),
    **dict.fromkeys(("router_DE", "router_bias_E", "choice_bias_E", "down_bias_ED"), REPLICATED),
}

# The experts' own weights, by how they are spread: whole experts over all devices, or whole experts over cp and the
# width of each over tp, which evens out the work where few tokens choose among few experts.
EXPERT_AXES = {"flat": (FLAT, None), "cp": (CP, TP)}
EXPERT_WEIGHTS = {
    spread: {
        "gate_EDF": P(experts, None, width),
        "up_EDF": P(experts, None, width),
        "gate_bias_EF": P(experts, width),
        "up_bias_EF": P(experts, width),
        "down_EFD": P(experts, width, None),
    }
    for spread, (experts, width) in EXPERT_AXES.items()
}


def make_mesh(tp: int = 1, cp: int = 1, dp: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of axes ("dp", "tp", "cp"), cp minor, over the first dp * tp * cp of `devices` (default: all of JAX's).

    Raises:
        ValueError: an axis below 1, more devices wanted than there are, TPUs of several slices.
    """
    sizes = {DP: dp, TP: tp, CP: cp}
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"{axis} is {size}: give at least 1")
    wanted = math.prod(sizes.values())
    devices = jax.devices() if devices is None else devices
    if wanted > len(devices):
        raise ValueError(
            f"tp {tp} x cp {cp}{f' x dp {dp}' if dp > 1 else ''} needs {wanted} devices, but there are {len(devices)} "
            f"of platform '{devices[0].platform}': choose a smaller mesh, or fake devices: --platform cpu (in Python, "
            f"jax.config.update('jax_num_cpu_devices', {wanted}) before JAX starts)"
        )
    slices = {getattr(device, "slice_index", 0) for device in devices[:wanted] if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(f"the devices are of {len(slices)} slices of TPUs: give those of one slice as devices")
    # As jax.make_mesh does, but for v5p and v6e too: there tp 8 x cp 2 of 4 x 4 chips needs a physical axis cut in two.
    placed = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:wanted], allow_split_physical_axes=True)
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def flat_size(mesh: AnyMesh) -> int:
    """How many devices share the weights: the width of the flat axis."""
    return mesh.shape[TP] * mesh.shape[CP]


def sharding(mesh: AnyMesh, spec: P) -> NamedSharding:
    """`spec` on `mesh`, written as XLA writes what it gives back: without axes of size 1, without None at the end.

    A step's results then have the very shardings of its arguments, and the next step is the same compiled program.
    """
    dims: list[Any] = []
    for dim in spec:
        axes = [axis for axis in (dim if isinstance(dim, tuple) else (dim,)) if axis and mesh.shape[axis] > 1]
        dims.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    while dims and dims[-1] is None:
        dims.pop()
    return NamedSharding(mesh, P(*dims))


def put(values: Any, mesh: AnyMesh, spec: P) -> Any:
    """Arrays of the host, or a tree of them, to where they live. Several processes give the same ones."""
    where = sharding(mesh, spec)
    if where.is_fully_addressable:
        return jax.device_put(values, where)

    def dealt(value: Any) -> jax.Array:  # device_put would compare the processes' values, each time
        whole = np.asarray(value)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(dealt, values)


def fetched(x: jax.Array) -> np.ndarray:
    """On the host, in every process: a collective call, where some of it lies on the devices of another."""
    here = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x) if here else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def weight_sharding(mesh: AnyMesh, name: str, experts: str = "flat") -> NamedSharding:
    """Where the parameter `name` lives; `experts`: how experts are spread, a key of EXPERT_WEIGHTS."""
    return sharding(mesh, {**WEIGHTS, **EXPERT_WEIGHTS[experts]}[name])


def gathered_sharding(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter `name` lies while a layer trains: the sequence has cp, so that only tp splits the weights.

    A dimension that tp does not divide is not split.
    """
    spec = {**WEIGHTS, **EXPERT_WEIGHTS["cp"]}[name]
    split = [
        TP if dim in (TP, FLAT) and size % mesh.shape[TP] == 0 else None for dim, size in zip(spec, shape, strict=False)
    ]
    return sharding(mesh, P(*split))


def stored_sharding(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter `name`, and what the optimizer remembers of it, is kept: split over dp and cp as well.

    Along the longest dimension that they divide; if none is, each device of them has a copy.
    """
    spec = gathered_sharding(mesh, name, shape).spec
    dims: list[Any] = [*spec, *[None] * (len(shape) - len(spec))]
    others = mesh.shape[DP] * mesh.shape[CP]
    shares = [size // (mesh.shape[TP] if dim else 1) for size, dim in zip(shape, dims, strict=True)]
    for at in sorted(range(len(shape)), key=lambda at: -shares[at]):
        if shares[at] % others == 0:
            dims[at] = (DP, TP, CP) if dims[at] else (DP, CP)
            break
    return sharding(mesh, P(*dims))
