"""Helix parallelism in JAX: decoding over a key/value cache that is sharded along the sequence.

    llm = helix_jax.LLM(helix_jax.DEMO_MODEL, tp=2, cp=4)
    print(llm.generate("In the beginning").text)

or, with the parts of which an LLM consists:

    plan = helix_jax.Plan(helix_jax.make_mesh(tp=2, cp=4))
    [tokens] = helix_jax.generate(helix_jax.load(helix_jax.DEMO_MODEL, plan), [list(b"In the beginning")], plan)

Names of arrays end in `_` and the letters of their dimensions, such as `q_BTNH`. A lower-case letter is this rank's
share of a dimension, such as `o_BTnH` under `shard_map`:

    B  rows (sequences)                       D  model width
    T  new tokens per row in this call        F  feed-forward width
    S  cached positions                       V  vocabulary
    N  query heads                            L  layers
    K  key/value heads                        R  ranks on cp
    G  query heads per key/value head, N / K  A  pages in the pool
    H  head width                             W  tokens per page
    E  experts                                M  pages per row
    Q  width of the query latent              C  a few: pages per pass, experts per token
    Z  width of the key/value latent          X  anything else
    Y  width of a cached latent: Z and the rotary part
    I  width of the part of a head's key that is not rotated, in latent attention (H is I and the rotary part)
    U  width of a head's value, in latent attention

A position is global and 0-based; a slot is its place on the rank that owns it. A partial is `(o, lse)`: softmax
attention over a subset of the slots, and the logarithm of its denominator.
"""

from helix_jax.attention import Partial, attend, merge
from helix_jax.cache import CacheSpec, KVCache, Rows, cache_specs, make_cache, make_caches
from helix_jax.checkpoint import DEMO_MODEL, load, save, shard
from helix_jax.combine import COMBINES, combine
from helix_jax.config import ModelConfig
from helix_jax.decoding import DecodeOutput, DecodeState, decode
from helix_jax.engine import (
    Engine,
    EngineStats,
    FinishedEvent,
    PromptLogprobs,
    RequestOutput,
    SamplingParams,
    TokenEvent,
    transfer,
)
from helix_jax.generation import generate, stream
from helix_jax.helix import helix_attention
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.llm import LLM
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, make_sampling
from helix_jax.step import StepOutput, advance, step
from helix_jax.text import Detokenizer, Tokenizer, open_tokenizer
from helix_jax.validation import MissingPackageError

__version__ = "0.1.0"

__all__ = [
    "COMBINES",
    "DEMO_MODEL",
    "LLM",
    "PLACEMENTS",
    "BlockLayout",
    "CacheSpec",
    "DecodeOutput",
    "DecodeState",
    "Detokenizer",
    "Engine",
    "EngineStats",
    "FinishedEvent",
    "KVCache",
    "MissingPackageError",
    "ModelConfig",
    "Partial",
    "Plan",
    "PromptLogprobs",
    "RequestOutput",
    "Rows",
    "Sampling",
    "SamplingParams",
    "StepOutput",
    "TokenEvent",
    "Tokenizer",
    "Transformer",
    "advance",
    "attend",
    "cache_specs",
    "combine",
    "decode",
    "generate",
    "helix_attention",
    "load",
    "make_cache",
    "make_caches",
    "make_mesh",
    "make_sampling",
    "merge",
    "open_tokenizer",
    "save",
    "shard",
    "step",
    "stream",
    "transfer",
]
