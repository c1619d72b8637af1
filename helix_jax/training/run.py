"""What a command line of train.py comes to: a run, of which everything that can be refused has been."""

import argparse
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from helix_jax import checkpoint
from helix_jax.cli.devices import open_mesh, processes_of
from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass
from helix_jax.training.data import Corpus, check_corpus, open_corpus
from helix_jax.layout import BlockLayout
from helix_jax.text import Tokenizer, open_tokenizer
from helix_jax.training import TrainConfig, TrainPlan


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """files: of text, or of tokens (.npy), beside the config. separator: of documents in text; end_id: the token that
    ends one. passkeys: in this share of the sequences things to remember are hidden (bytes only).
    """

    files: tuple[str, ...]
    separator: str | None = None
    end_id: int | None = None
    passkeys: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a command line comes to."""

    training: TrainPlan
    data: DataConfig
    corpus: Corpus
    out: Path
    init: Path | None
    tokenizer: Path | None  # the folder that it was read from


def read_run(options: argparse.Namespace) -> Run:
    """Everything that can be refused before a step is compiled."""
    tables = read_tables(options.config, needed={"data", "train"} | (set() if options.init else {"model"}))
    where = str(options.config)
    data = parse_dataclass(DataConfig, tables["data"], f"{where} [data]")
    config = parse_dataclass(TrainConfig, tables["train"], f"{where} [train]")
    if options.init and "model" in tables:
        raise ValueError(f"{where} has a [model], and --init brings its own: leave out one of them")
    if options.init:
        model = checkpoint.read_config(options.init)
    else:
        model = parse_dataclass(ModelConfig, tables["model"], f"{where} [model]")
    checkpoint.describe(model, "bfloat16")  # what cannot be written in the end is better known now
    home = options.init or options.config.parent
    tokenizer = open_tokenizer(home, model)
    if tokenizer is None and any(not file.endswith(".npy") for file in data.files):
        raise ValueError(
            f"{where}: the model has no tokenizer: set tokenizer = 'bytes', or give files of tokens (.npy)"
        )
    of_tokens = any(file.endswith(".npy") for file in data.files)
    if not 0 <= data.passkeys <= 1 or (data.passkeys and (model.tokenizer != "bytes" or of_tokens)):
        raise ValueError(
            f"{where}: passkeys is {data.passkeys}: give a share from 0 to 1, and 0 where tokens are no bytes"
        )
    mesh = open_mesh(options.platform, options.tp, options.cp, options.dp, processes_of(options))
    corpus = open_data(options.config.parent, data, tokenizer, model, config)
    dtype = jnp.dtype(options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    layout = BlockLayout(options.cp, options.block, "striped")
    training = TrainPlan(model, config, mesh, layout, dtype, corpus.documents)
    return Run(training, data, corpus, options.out, options.init, home if model.tokenizer != "bytes" else None)


def read_tables(file: Path, needed: set[str]) -> dict[str, Any]:
    try:
        tables = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from None
    for key in sorted(set(tables) - {"data", "model", "train"}):
        raise ValueError(f"{file}: unknown key '{key}': known are data, model, train")
    for key in sorted(needed - set(tables)):
        raise ValueError(f"{file}: [{key}] is missing: add it")
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{file}: '{key}' is {table!r}: give a table, [{key}]")
    return tables


def open_data(
    folder: Path, data: DataConfig, tokenizer: Tokenizer | None, model: ModelConfig, config: TrainConfig
) -> Corpus:
    files = [folder / file for file in data.files]
    corpus = open_corpus(files, tokenizer, model.vocab, config.held_out, data.separator, data.end_id)
    check_corpus(corpus, config.context)
    return corpus
