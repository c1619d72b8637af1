"""The mesh, and the PartitionSpec of every array.

The devices form one mesh with axes (dp, tp, cp), of which cp is the minor one. Attention uses it as tp x cp: heads over
tp, the sequence over cp. Everything else uses the same devices as one flat axis, FLAT = (tp, cp), for ordinary tensor
parallelism. Because cp is minor, the heads that a device holds after attention (N over FLAT) are a slice of the heads
that it attended with (N over tp). The combine therefore communicates within a cp group only, never across tp.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from helix_jax.validation import check_int

Device = Any  # jax.Device, which type checkers do not accept as a type
AnyMesh = Mesh | AbstractMesh  # an abstract mesh has no devices: programs can be traced and sizes computed for it
Spec = P  # for annotations elsewhere: only this module creates specs

DP, TP, CP = "dp", "tp", "cp"
FLAT = (TP, CP)
_LEAST_TO_SPLIT = 2**16  # numbers of a parameter that training splits over dp and cp

REPLICATED = P()

# Activations that go into and come out of attention over the cache.
QUERIES_BTNH = P(DP, None, TP, None)
NEW_KEYS_BTKH = P(DP, None, TP, None)
ATTENTION_OUT_BTNH = P(DP, None, FLAT, None)

# The cache: pages over cp (and over dp, like the rows), heads over tp. There is one page table per rank. A latent
# serves all heads, so every device of tp holds a copy of it.
POOL_XKWH = P((DP, CP), TP, None, None)
POOL_LATENT_XKWH = P((DP, CP), None, None, None)
NEW_LATENT_BTKH = P(DP, None, None, None)
TABLE_RBM = P(CP, DP, None)
COPIES_Z2X = P((DP, CP))  # Z counts the ranks of all dp groups
ROWS_B = P(DP)
SINK_N = P(FLAT)

# Input and output of the experts: every device of the flat axis has all tokens of its rows.
TOKENS_BTD = P(DP, None, None)

# Whole sequences, in training: the positions over cp, the heads over tp.
SEQ_S = P(CP)
SEQ_BS = P(DP, CP)
SEQ_XBS = P(None, DP, CP)
SEQ_BSD = P(DP, CP, None)
SEQ_BSKH = P(DP, CP, TP, None)
SEQ_LATENT_BSKH = P(DP, CP, None, None)
SEQ_SINK_N = P(TP)

# Weights, by parameter name. Query, key and value projections are replicated over cp, because each cp rank needs the
# queries of all heads of its tp group. The rest is tensor parallel over the flat axis.
WEIGHTS = {
    "embed_VD": P(FLAT, None),
    "head_VD": P(FLAT, None),
    "q_DNH": P(None, TP, None),
    "k_DKH": P(None, TP, None),
    "v_DKH": P(None, TP, None),
    "q_bias_NH": P(TP, None),
    "k_bias_KH": P(TP, None),
    "v_bias_KH": P(TP, None),
    "q_norm_NH": P(TP, None),
    "k_norm_KH": P(TP, None),
    "o_NHD": P(FLAT, None, None),
    "sink_N": SINK_N,
    "gate_DF": P(None, FLAT),
    "up_DF": P(None, FLAT),
    "down_FD": P(FLAT, None),
    # Latent attention: the projections to latents are replicated, because one latent serves all heads. The others are
    # sharded by heads: over tp before the combine, over the flat axis after it.
    "q_down_DQ": REPLICATED,
    "q_up_QNH": P(None, TP, None),
    "kv_down_DY": REPLICATED,
    "k_up_NIZ": P(TP, None, None),
    "v_up_NZU": P(FLAT, None, None),
    "o_NUD": P(FLAT, None, None),
    **dict.fromkeys(("norm_D", "attention_norm_D", "attention_post_norm_D", "ff_norm_D", "ff_post_norm_D"), REPLICATED),
    **dict.fromkeys(("q_norm_H", "k_norm_H", "q_norm_Q", "kv_norm_Z", "o_bias_D"), REPLICATED),
    **dict.fromkeys(("router_DE", "router_bias_E", "selection_bias_E", "down_bias_ED", "shared_gate_D"), REPLICATED),
}

# The weights of experts, by how experts are sharded: whole experts over all devices ("flat"), or whole experts over cp
# and the width of each over tp ("cp"), which balances the work when few tokens are routed to few experts.
EXPERT_AXES = {"flat": (FLAT, None), "cp": (CP, TP)}
EXPERT_WEIGHTS = {
    sharded: {
        "gate_EDF": P(experts, None, width),
        "up_EDF": P(experts, None, width),
        "gate_bias_EF": P(experts, width),
        "up_bias_EF": P(experts, width),
        "down_EFD": P(experts, width, None),
    }
    for sharded, (experts, width) in EXPERT_AXES.items()
}


def make_mesh(tp: int = 1, cp: int | None = None, dp: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """Create a mesh with axes ("dp", "tp", "cp"), of which cp is the minor one.

    Args:
        tp: Devices that share the attention heads.
        cp: Devices that share the sequence. None takes all devices that dp and tp leave.
        dp: Devices that share the batch.
        devices: The devices to choose from, default `jax.devices()`. The first dp * tp * cp of them are used.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1, there are too few devices, or the devices are TPUs of several slices.
    """
    devices = jax.devices() if devices is None else devices
    check_int(TP, tp, least=1)
    check_int(DP, dp, least=1)
    cp = max(1, len(devices) // (tp * dp)) if cp is None else cp
    check_int(CP, cp, least=1)
    sizes = {DP: dp, TP: tp, CP: cp}
    used = _first_devices(devices, sizes)
    # Like jax.make_mesh, but also for v5p and v6e, where tp 8 x cp 2 on 4 x 4 chips splits a physical axis.
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), used, allow_split_physical_axes=True)
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _first_devices(devices: Sequence[Device], sizes: dict[str, int]) -> Sequence[Device]:
    """Return as many of `devices` as a mesh of these sizes needs."""
    needed = math.prod(sizes.values())
    if needed > len(devices):
        shape = f"tp {sizes[TP]} x cp {sizes[CP]}" + (f" x dp {sizes[DP]}" if sizes[DP] > 1 else "")
        raise ValueError(
            f"{shape} needs {needed} devices, but there are {len(devices)} of platform '{devices[0].platform}': "
            f"choose a smaller mesh, or use fake devices with --platform cpu (in Python, "
            f"jax.config.update('jax_num_cpu_devices', {needed}) before JAX starts)"
        )
    slices = {getattr(device, "slice_index", 0) for device in devices[:needed] if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(f"the devices belong to {len(slices)} TPU slices: pass the devices of one slice")
    return devices[:needed]


def flat_size(mesh: AnyMesh) -> int:
    """Return the number of devices on the flat axis (tp, cp), which share the weights."""
    return mesh.shape[TP] * mesh.shape[CP]


def first_device(mesh: AnyMesh) -> Device | None:
    """Return a device of the mesh, or None if the mesh is abstract. All devices of a mesh are of one kind."""
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else None


def sharding(mesh: AnyMesh, spec: Spec) -> NamedSharding:
    """Return `spec` on `mesh` in the form that XLA gives to results: no axes of size 1, no trailing None.

    The results of a step then have exactly the shardings of its arguments, and the next step needs no new compilation.
    """
    dims: list[Any] = []
    for dim in spec:
        axes = [axis for axis in (dim if isinstance(dim, tuple) else (dim,)) if axis and mesh.shape[axis] > 1]
        dims.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    while dims and dims[-1] is None:
        dims.pop()
    return NamedSharding(mesh, P(*dims))


def weight_sharding(mesh: AnyMesh, name: str, experts: str = "flat") -> NamedSharding:
    """Return the sharding of a parameter in decoding.

    Args:
        mesh: The mesh.
        name: The name of the parameter, a key of WEIGHTS or EXPERT_WEIGHTS.
        experts: How experts are sharded, a key of EXPERT_WEIGHTS.
    """
    return sharding(mesh, {**WEIGHTS, **EXPERT_WEIGHTS[experts]}[name])


def compute_sharding(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of a parameter while a layer computes in training: over tp only, as cp shards the sequence.

    A dimension that tp does not divide is replicated.
    """
    spec = {**WEIGHTS, **EXPERT_WEIGHTS["cp"]}[name]
    split = [
        TP if dim in (TP, FLAT) and size % mesh.shape[TP] == 0 else None for dim, size in zip(spec, shape, strict=False)
    ]
    return sharding(mesh, P(*split))


def stored_sharding(mesh: AnyMesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding in which training stores a parameter and its optimizer state: also over dp and cp.

    The longest dimension that dp * cp divides is split. If there is none, the devices of dp and cp hold copies. So they
    do of a small parameter, such as that of a norm: copies take little memory, and it is not gathered in every step.
    """
    computed = compute_sharding(mesh, name, shape)
    if math.prod(shape) < _LEAST_TO_SPLIT:
        return computed
    dims: list[Any] = [*computed.spec, *[None] * (len(shape) - len(computed.spec))]
    others = mesh.shape[DP] * mesh.shape[CP]
    sizes = [size // (mesh.shape[TP] if dim else 1) for size, dim in zip(shape, dims, strict=True)]
    for axis in sorted(range(len(shape)), key=lambda axis: -sizes[axis]):
        if sizes[axis] % others == 0:
            dims[axis] = (DP, TP, CP) if dims[axis] else (DP, CP)
            break
    return sharding(mesh, P(*dims))
