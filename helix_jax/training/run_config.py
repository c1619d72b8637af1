"""The config file of a training run: its data, its model and its settings, checked before anything is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_jax import checkpoint
from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass, read_toml
from helix_jax.text import Tokenizer, open_tokenizer
from helix_jax.training.plan import TrainConfig
from helix_jax.validation import check_keys


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on. The table [data] of a config file.

    Args:
        files: Files of text, or of tokens (.npy), relative to the config file.
        separator: The text that ends a document within a text file.
        end_id: The token that ends a document within a token file.
        passkeys: The fraction of the sequences into which recall tasks are inserted (byte models only).
        passkeys_only: Whether these sequences have little but passkeys, and only what can be recalled of them counts in
            the loss. A small model then learns to copy in minutes, but not to predict text.
    """

    files: tuple[str, ...]
    separator: str | None = None
    end_id: int | None = None
    passkeys: float = 0.0
    passkeys_only: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A config file, checked, together with the folder of initial weights."""

    file: Path
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    init: Path | None
    tokenizer: Tokenizer | None

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that the tokenizer was read from."""
        return self.init or self.file.parent


def read_run_config(file: Path, init: Path | None = None) -> RunConfig:
    """Read a config file.

    Args:
        file: A TOML file with the tables [data], [train] and, without `init`, [model].
        init: A Hugging Face folder to start from.

    Raises:
        ValueError: A table or key is missing or unknown, a value is out of range, or the model needs a tokenizer.
        OSError: A file cannot be read.
    """
    tables = _read_tables(file, required={"data", "train"} | (set() if init else {"model"}))
    if init and "model" in tables:
        raise ValueError(f"{file} has a table [model], and --init has a model of its own: leave out one of them")
    data = parse_dataclass(DataConfig, tables["data"], f"{file} [data]")
    train = parse_dataclass(TrainConfig, tables["train"], f"{file} [train]")
    model = checkpoint.read_config(init) if init else parse_dataclass(ModelConfig, tables["model"], f"{file} [model]")
    checkpoint.describe_config(model, "bfloat16")  # a model that cannot be saved at the end is refused now
    tokenizer = open_tokenizer(init or file.parent, model)
    _check_data(file, data, model, tokenizer)
    return RunConfig(file, data, model, train, init, tokenizer)


def _read_tables(file: Path, required: set[str]) -> dict[str, Any]:
    tables = read_toml(file)
    check_keys(str(file), tables, known={"data", "model", "train"}, required=sorted(required))
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{file}: {key} is {table!r}: give a table, [{key}]")
    return tables


def _check_data(file: Path, data: DataConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    has_tokens = any(name.endswith(".npy") for name in data.files)
    if tokenizer is None and any(not name.endswith(".npy") for name in data.files):
        raise ValueError(
            f"{file}: the model has no tokenizer: set tokenizer = 'bytes' in [model], or give token files (.npy)"
        )
    if not 0 <= data.passkeys <= 1:
        raise ValueError(f"{file}: passkeys is {data.passkeys}: give a fraction from 0 to 1")
    if data.passkeys and (model.tokenizer != "bytes" or has_tokens):
        raise ValueError(f"{file}: passkeys is {data.passkeys}, and the tokens are not bytes: give 0")
    if data.passkeys_only and not data.passkeys:
        raise ValueError(
            f"{file}: passkeys_only is true, but passkeys is 0: give the fraction of sequences with passkeys"
        )
