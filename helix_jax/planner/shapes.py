"""Reads model configs from the files in configs/, with all their layers or the first few."""

from dataclasses import replace
from pathlib import Path

from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass, read_toml


def read_shape(file: Path) -> ModelConfig:
    """Read the table [model] of a TOML file.

    Raises:
        ValueError: The file is not TOML, has no table [model], or the table does not describe a model.
        OSError: The file cannot be read.
    """
    tables = read_toml(file)
    if not isinstance(tables.get("model"), dict):
        raise ValueError(f"{file}: the table [model] is missing: add it")
    return parse_dataclass(ModelConfig, tables["model"], f"{file} [model]")


def take_first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """Return the config of a model that has only the first layers of another.

    Raises:
        ValueError: `layers` is below 1, or the model has fewer.
    """
    if not 1 <= layers <= config.layers:
        raise ValueError(f"--layers is {layers}: give 1 to {config.layers}")

    def keep(indexes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer for layer in indexes if layer < layers)

    windowed = keep(config.windowed_layers)
    experts = config.experts and replace(config.experts, dense_layers=keep(config.experts.dense_layers))
    window = config.window if windowed else None
    return replace(config, layers=layers, windowed_layers=windowed, window=window, experts=experts)
