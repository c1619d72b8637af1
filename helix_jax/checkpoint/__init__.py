"""Weights: from a Hugging Face folder, or from a model in memory, straight to their shards; and back to a folder."""

from helix_jax.checkpoint.placing import shard
from helix_jax.checkpoint.reading import DEMO_MODEL, load, load_for_training, read_config
from helix_jax.checkpoint.writing import describe_config, save

__all__ = ["DEMO_MODEL", "describe_config", "load", "load_for_training", "read_config", "save", "shard"]
