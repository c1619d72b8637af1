"""Helix parallelism in JAX: decode over a key/value cache that is sharded along the sequence.

Array names end in the letters of their dimensions, `q_BTNH`; lower case is this rank's share of one (`o_BTnH`):

    B rows (sequences)   T new tokens per row in this call   S cached positions   N query heads   K key/value heads
    G = N / K            H width of a head                   D model width        F feed-forward  V vocabulary
    L layers             R ranks on cp                       A pages in the pool  W tokens per page  M pages per row
    E experts            C a few: pages in a pass, experts of a token             X anything else
    Q, Z width of the latents of queries, of keys and values                      Y = Z + the rotary part, cached
    I, U width of a head's key that is not rotated, of its value, in latent attention (H = I + the rotary part)

A position is global and 0-based, a slot is its place on the rank that owns it. A partial is `(o, lse)`.
"""

from helix_jax.attention import Partial, attend, merge
from helix_jax.cache import CacheSpec, KVCache, Pages, Rows, make_cache
from helix_jax.checkpoint import DEMO_MODEL, load, save, shard
from helix_jax.combine import COMBINES, combine
from helix_jax.config import ModelConfig
from helix_jax.engine import FinishedEvent, Engine, EngineStats, RequestOutput, TokenEvent, SamplingParams, transfer
from helix_jax.generation import generate, stream
from helix_jax.helix import helix_attention
from helix_jax.layout import PLACEMENTS, BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.sampling import Sampling, make_sampling
from helix_jax.step import many_steps, step

__version__ = "0.1.0"

__all__ = [
    "COMBINES",
    "DEMO_MODEL",
    "PLACEMENTS",
    "BlockLayout",
    "CacheSpec",
    "FinishedEvent",
    "Engine",
    "EngineStats",
    "KVCache",
    "ModelConfig",
    "Pages",
    "Partial",
    "Plan",
    "RequestOutput",
    "Rows",
    "TokenEvent",
    "Sampling",
    "SamplingParams",
    "Transformer",
    "attend",
    "combine",
    "generate",
    "transfer",
    "helix_attention",
    "load",
    "make_cache",
    "make_mesh",
    "make_sampling",
    "many_steps",
    "merge",
    "save",
    "shard",
    "step",
    "stream",
]
