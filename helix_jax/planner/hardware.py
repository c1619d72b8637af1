"""Describes devices: a table of known ones, and units."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from helix_jax.validation import check_choice, check_positive

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "fp4": 0.5}

DATA_SHEET = "data sheet; overheads as measured on H200s"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of device, and the links between several of them.

    Args:
        bandwidth: Bytes per second that a device reads from its memory.
        memory_bytes: The memory of a device.
        flops: Floating-point operations per second of large bfloat16 products.
        link_bandwidth: Bytes per second that a device sends to the others.
        collective_s: Seconds that a collective takes however little it sends, with its launch.
        kernel_s: Seconds that a kernel takes however little it does, with its launch.
        routing_s: Seconds that a layer with experts takes longer than it reads weights: to route and to sort tokens.
        speedups: How many times as fast as bfloat16 products of other types are. Missing ones: 0.5 for float32, 1 for
            the others.
        source: Where the numbers come from.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is not positive, or a time is negative.
    """

    bandwidth: float
    memory_bytes: float
    flops: float
    link_bandwidth: float
    collective_s: float
    kernel_s: float
    routing_s: float
    speedups: Mapping[str, float] = field(default_factory=dict)
    source: str = DATA_SHEET

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type is float and (not each.name.endswith("_s") or value != 0):
                check_positive(f"hardware {each.name}", value)

    def flops_of(self, dtype: str) -> float:
        """Return the floating-point operations per second of products of a type."""
        return self.flops * self.speedups.get(dtype, 0.5 if dtype == "float32" else 1.0)


# bandwidth: the time of a maximum over a large array. flops: the attention kernel over latents. kernel_s, collective_s:
# `comparison.fit_overheads` of the points of the newest version in measured.json that are marked for it. routing_s: a
# layer of 128 experts on two H200s took 212 us (64 tokens) and 313 us (8) longer than its reads.
H200 = Hardware(
    bandwidth=4.54e12,
    memory_bytes=141e9,
    flops=550e12,
    link_bandwidth=450e9,
    collective_s=11.95e-6,
    kernel_s=2.05e-6,
    routing_s=262e-6,
    speedups={"fp8": 2.0},
    source="measured, but for memory and links",
)
_OTHER = replace(H200, source=DATA_SHEET)
_BLACKWELL = replace(_OTHER, bandwidth=8.0e12, link_bandwidth=900e9, speedups={"fp8": 2.0, "fp4": 4.0})
_TPU = replace(_OTHER, speedups={})

HARDWARE = {
    "h100": replace(H200, bandwidth=2.95e12, memory_bytes=80e9, source="bandwidth measured; the rest as of H200s"),
    "h200": H200,
    "b200": replace(_BLACKWELL, memory_bytes=180e9, flops=2.25e15),
    "gb200": replace(_BLACKWELL, memory_bytes=186e9, flops=2.5e15),
    "v5e": replace(_TPU, bandwidth=0.82e12, memory_bytes=17.2e9, flops=197e12, link_bandwidth=100e9),
    "v5p": replace(_TPU, bandwidth=2.77e12, memory_bytes=102e9, flops=459e12, link_bandwidth=300e9),
    "v6e": replace(_TPU, bandwidth=1.64e12, memory_bytes=34.4e9, flops=918e12, link_bandwidth=224e9),
}


def find_hardware(name: str) -> Hardware:
    """Return an entry of the table.

    Raises:
        ValueError: There is none of this name.
    """
    check_choice("hardware", name, HARDWARE)
    return HARDWARE[name]
