"""Counts what a device does in a decode step: bytes read and sent, operations, kernels and collectives.

Array arguments are numbers of rows, so that one call evaluates many of them.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from helix_jax.cache import cache_specs
from helix_jax.config import Experts, ModelConfig
from helix_jax.planner.hardware import DTYPE_BYTES
from helix_jax.planner.parallelism import Parallelism
from helix_jax.quantisation import FLOAT8
from helix_jax.validation import check_choice, check_int

Kind = tuple[int | None, Experts | None]  # of a layer: its window, and its experts
Numbers = Any  # a float, or an array of one per number of rows

COLLECTIVES_OF_COMBINE = {"all_to_all": 1, "psum_scatter": 2, "psum": 2}
PARTIAL_BYTES = 4.0  # partial results are float32

# Kernels besides those of matrix products, counted in a profile of Llama-3.1-8B on an H200: norms, rotary embedding,
# appends, the gate and residual sums; attention and its merge, which take as long as four if the cache is short.
# A step has six more, and an iteration of the loop over steps, even an empty one, takes 28 us, as long as 14.
OTHER_KERNELS, ATTENTION_KERNELS, KERNELS_PER_STEP = 9, 4, 6 + 14
# What attention reaches of the bandwidth of a plain read: four shapes on an H200 reached 0.977, 0.973, 0.976 and 0.954.
ATTENTION_EFFICIENCY = 0.97


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is decoded, and how.

    Args:
        context: The tokens in the cache of every row.
        dtype: The type of the weights, a key of DTYPE_BYTES.
        cache_dtype: The type of the cache, likewise. fp8 has the scales of an fp8 cache of helix_jax; fp4 has none.
        combine: The collective that combines partial results.
        hop_b: Whether the combine of a row overlaps with the attention of the next (HOP-B). helix_jax does not do this.
        combine_values: Whether the partial results of latent attention become values of each head before the combine,
            and have the type of activations. If not, they are latents of float32, as in helix_jax.

    Raises:
        TypeError: The context is not an int.
        ValueError: The context is below 1, or a type or the combine is unknown.
    """

    context: int
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    combine: str = "all_to_all"
    hop_b: bool = False
    combine_values: bool = False

    def __post_init__(self) -> None:
        check_int("context", self.context, least=1)
        check_choice("dtype", self.dtype, DTYPE_BYTES)
        check_choice("cache_dtype", self.cache_dtype, DTYPE_BYTES)
        check_choice("combine", self.combine, COLLECTIVES_OF_COMBINE)

    @property
    def number_bytes(self) -> float:
        """The bytes of a weight or an activation."""
        return DTYPE_BYTES[self.dtype]


class Part(NamedTuple):
    """What a device does in one part of a layer or of a step. The communication comes after the rest."""

    weight_bytes: Numbers = 0.0
    cache_bytes: Numbers = 0.0
    flops: Numbers = 0.0
    sent_bytes: Numbers = 0.0
    collectives: int = 0
    kernels: int = 0
    routings: int = 0


class Layer(NamedTuple):
    """The parts of a layer."""

    projections: Part
    attention: Part
    output: Part
    ffn: Part


@cache
def count_layers(config: ModelConfig) -> tuple[tuple[Kind, int], ...]:
    """Return the kinds of layers, and how many there are of each."""
    windowed = set(config.windowed_layers)  # faster than `config.window_of`
    kinds = Counter((layer in windowed, config.experts_of(layer) is None) for layer in range(config.layers))
    return tuple(
        ((config.window if has_window else None, None if dense else config.experts), count)
        for (has_window, dense), count in kinds.items()
    )


class Costs:
    """Counts the work of one parallelism of a model.

    Args:
        config: The model.
        workload: What is decoded.
        parallelism: How devices share the model.
    """

    def __init__(self, config: ModelConfig, workload: Workload, parallelism: Parallelism):
        self._config, self._workload, self._parallelism = config, workload, parallelism
        values_first = workload.combine_values
        self._projections, self._output = count_attention_weights(config, parallelism, values_first)
        self._token_bytes = count_token_bytes(config, workload.cache_dtype)

    def layer(self, kind: Kind, rows: Numbers) -> Layer:
        """Return the work of a layer of a kind, see `count_layers`, for a step of `rows` rows."""
        window, experts = kind
        own_rows = rows / self._parallelism.dp
        products = 4 if self._config.latent is None else 6 if self._config.latent.query_rank else 5
        projections = self._product(self._projections, own_rows, products - 1 + OTHER_KERNELS)
        output = self._product(self._output, own_rows, 1)
        if self._parallelism.dp > 1:  # every device of the feed-forward needs all rows
            output = self._reduced(output, rows, self._parallelism.ffn_devices)
        else:
            output = self._reduced(output, rows, self._parallelism.output_devices)
        return Layer(projections, self._attention(window, own_rows), output, self._ffn(experts, rows))

    def head(self, rows: Numbers) -> Part:
        """Return the work outside of the layers: an embedding and its sum, and the logits and their gather."""
        config, devices = self._config, self._parallelism.ffn_devices
        part = self._product(config.width * config.vocab / devices, rows, KERNELS_PER_STEP)
        logits = config.vocab * PARTIAL_BYTES * rows * (devices - 1) / devices
        return part._replace(collectives=2 * (devices > 1), sent_bytes=logits + self._sum_bytes(rows, devices))

    def handovers(self, rows: Numbers) -> Part:
        """Return the work of sending the residual stream from each pipeline stage to the next."""
        stages = self._parallelism.pp
        if stages == 1:
            return Part()
        sent = stages * rows * self._config.width * max(self._workload.number_bytes, 1)
        return Part(sent_bytes=sent, collectives=stages)

    def weight_bytes(self) -> float:
        """Return the bytes of the weights that a device stores. Norms and biases are neglected."""
        config, parallelism = self._config, self._parallelism
        numbers = 0.0
        for (_, experts), layers in count_layers(config):
            numbers += layers * (self._projections + self._output)
            numbers += layers * sum(count_ffn_weights(config, experts, parallelism))
        embeddings = (1 if config.tied_head else 2) * config.width * config.vocab / parallelism.ffn_devices
        return (numbers / parallelism.pp + embeddings) * self._workload.number_bytes

    def cache_bytes_per_row(self) -> float:
        """Return the bytes that a device stores for each row of a replica."""
        layers = count_layers(self._config)
        slots = sum(count * self._slots(window) for (window, _), count in layers)
        groups = self._parallelism.pp * self._parallelism.dp
        return slots * self._stored_heads() * self._token_bytes / groups

    def _attention(self, window: int | None, rows: Numbers) -> Part:
        config, parallelism = self._config, self._parallelism
        slots, heads = self._slots(window), config.heads / parallelism.tp
        latent = config.latent
        keys_and_values = config.cache_width + (latent.width if latent else config.head_width)
        ranks = parallelism.cp
        sent = rows * heads * self._partial_bytes() * (ranks - 1) / ranks
        return Part(
            cache_bytes=rows * slots * self._stored_heads() * self._token_bytes / ATTENTION_EFFICIENCY,
            flops=rows * slots * heads * 2 * keys_and_values,
            sent_bytes=sent,
            collectives=COLLECTIVES_OF_COMBINE[self._workload.combine] * (ranks > 1),
            kernels=ATTENTION_KERNELS,
        )

    def _ffn(self, experts: Experts | None, rows: Numbers) -> Part:
        config, parallelism = self._config, self._parallelism
        dense, of_experts = count_ffn_weights(config, experts, parallelism)
        part = self._product(dense, rows, 3)
        if experts:
            share = experts.top_k / experts.num_experts  # routing is balanced, and rows are routed independently
            read = of_experts * (1 - (1 - share) ** rows)
            pairs = Part(weight_bytes=read * self._workload.number_bytes, flops=2 * of_experts * share * rows)
            part = part._replace(
                weight_bytes=part.weight_bytes + pairs.weight_bytes,
                flops=part.flops + pairs.flops,
                routings=1,
            )
        return self._reduced(part, rows, parallelism.ffn_devices)

    def _product(self, weights: float, rows: Numbers, kernels: int) -> Part:
        return Part(weight_bytes=weights * self._workload.number_bytes, flops=2 * weights * rows, kernels=kernels)

    def _reduced(self, part: Part, rows: Numbers, devices: int) -> Part:
        """Return a part after which the residual stream is summed over devices."""
        return part._replace(collectives=int(devices > 1), sent_bytes=self._sum_bytes(rows, devices))

    def _sum_bytes(self, rows: Numbers, devices: int) -> Numbers:
        # Sums have at least 16 bits, whatever the type of the weights.
        return 2 * (devices - 1) / devices * rows * self._config.width * max(self._workload.number_bytes, 2)

    def _partial_bytes(self) -> float:
        """Return the bytes of the partial result of a row and head."""
        latent = self._config.latent
        if latent and self._workload.combine_values:
            return latent.value_width * max(self._workload.number_bytes, 2) + PARTIAL_BYTES
        return ((latent.width if latent else self._config.head_width) + 1) * PARTIAL_BYTES

    def _slots(self, window: int | None) -> int:
        context = self._workload.context
        return math.ceil((min(context, window) if window else context) / self._parallelism.cp)

    def _stored_heads(self) -> int:
        return math.ceil(self._config.kv_heads / self._parallelism.tp)


def count_attention_weights(
    config: ModelConfig, parallelism: Parallelism, values_first: bool = False
) -> tuple[float, float]:
    """Return the weights of attention on a device, per layer: those before the combine, and those after it.

    Args:
        config: The model.
        parallelism: How devices share the model.
        values_first: Whether latents become values before the combine.
    """
    heads, after = config.heads / parallelism.tp, config.heads / parallelism.output_devices
    latent, width = config.latent, config.width
    if latent is None:
        stored = math.ceil(config.kv_heads / parallelism.tp)
        return width * config.head_width * (heads + 2 * stored), after * config.head_width * width
    queries = heads * config.head_width * (latent.query_rank or width) + width * (latent.query_rank or 0)
    keys = width * config.cache_width + heads * latent.nope_width * latent.width
    values, output = latent.width * latent.value_width, after * latent.value_width * width
    return (queries + keys + heads * values, output) if values_first else (queries + keys, after * values + output)


def count_ffn_weights(config: ModelConfig, experts: Experts | None, parallelism: Parallelism) -> tuple[float, float]:
    """Return the feed-forward weights on a device, per layer: those that every token uses, and those of its experts."""
    devices = parallelism.ffn_devices
    if experts is None:
        return 3 * config.width * config.ff_width / devices, 0.0
    every = 3 * config.width * experts.shared_width / devices + config.width * experts.num_experts
    on_device = math.ceil(experts.num_experts / parallelism.ep) * parallelism.ep / devices
    return every, on_device * 3 * config.width * experts.width


@cache
def count_token_bytes(config: ModelConfig, dtype: str) -> float:
    """Return the bytes that a layer caches per token and stored key/value head: a key and a value, or a latent."""
    if dtype == "fp4":
        return count_token_bytes(config, "bfloat16") / 4
    [spec, *_] = cache_specs(config, FLOAT8 if dtype == "fp8" else jnp.dtype(dtype))
    return spec.bytes_per_token / spec.layers / spec.kv_heads


def as_rows(rows: Any) -> np.ndarray:
    """Return numbers of rows as an array of floats."""
    return np.asarray(rows, np.float64)
