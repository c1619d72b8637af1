"""Read Hugging Face folders into sharded models, shard models that are in memory, and write folders."""

from helix_jax.checkpoint.hub import resolve_folder
from helix_jax.checkpoint.placing import shard
from helix_jax.checkpoint.reading import DEMO_MODEL, load, load_for_training, read_config
from helix_jax.checkpoint.writing import describe_config, save

__all__ = [
    "DEMO_MODEL",
    "describe_config",
    "load",
    "load_for_training",
    "read_config",
    "resolve_folder",
    "save",
    "shard",
]
