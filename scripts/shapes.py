"""The shapes of models as files in configs/ have them, whole or in part."""

import tomllib
from dataclasses import replace
from pathlib import Path

from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass


def read_shape(file: Path) -> ModelConfig:
    try:
        read = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    if not isinstance(read.get("model"), dict):
        raise ValueError(f"{file}: [model] is missing")
    return parse_dataclass(ModelConfig, read["model"], f"{file} [model]")


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    if not 1 <= layers <= config.layers:
        raise ValueError(f"--layers is {layers}: give 1 to {config.layers}")

    def kept(indexes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer for layer in indexes if layer < layers)

    windowed = kept(config.windowed_layers)
    experts = config.experts and replace(config.experts, dense_layers=kept(config.experts.dense_layers))
    window = config.window if windowed else None
    return replace(config, layers=layers, windowed_layers=windowed, window=window, experts=experts)
