"""Folders are read as they were written, and what is wrong with one is said."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from helix_jax.checkpoint import load, read_config, save, shard
from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass
from helix_jax.mesh import make_mesh
from tests.reference import TINY, plan_of, tiny_model


def parameters(model) -> dict:
    return {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_model(), tmp_path, jnp.float32)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_as_it_was_saved_padded_and_sharded(tmp_path: Path, tied: bool):
    config = ModelConfig(**{**vars(TINY), "tied_head": tied, "eos_token_ids": (3, 4), "tokenizer": "bytes"})
    model = tiny_model(config)
    save(shard(model, plan_of(2, 4)), tmp_path, jnp.float32)
    assert read_config(tmp_path) == config
    again, before = parameters(load(tmp_path, plan_of(1, 8), jnp.float32)), parameters(model)
    assert again.keys() == before.keys()
    for path, value in again.items():
        own = tuple(map(slice, before[path].shape))
        np.testing.assert_array_equal(value[own], before[path])
        assert value.sum(dtype=np.float64) == value[own].sum(dtype=np.float64)  # the padding is zeros
    assert again["embed_VD",].shape == (64, 32)
    assert again["layers", 1, "ff", "down_FD"].shape == (56, 32)


def test_the_index_decides_which_files_are_read(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").write_bytes(b"not to be read")
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for path, value in parameters(load(folder, plan_of(), jnp.float32)).items():
        np.testing.assert_array_equal(value, parameters(tiny_model())[path])
    (folder / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"b.safetensors' is not a whole safetensors file"):
        load(folder, plan_of())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 'b.safetensors', which its index names"):
        load(folder, plan_of())


def test_options_that_change_nothing_are_taken(folder: Path):
    before = read_config(folder)
    change_config(attention_bias=None, rope_scaling={"rope_type": "default"}, quantization_config=None)(folder)
    change_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4))(folder)
    assert load(folder, plan_of()).config == read_config(folder) == before


def test_another_models_index_is_not_left_to_go_before_what_is_saved(folder: Path):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load(folder, plan_of())
    with pytest.raises(ValueError, match="holds another model's model.safetensors.index.json"):
        save(tiny_model(), folder)


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("helix_jax.checkpoint.writing.save_file", full)
    with pytest.raises(OSError, match=r"model.safetensors' cannot be written \(No space left .*\): make room"):
        save(tiny_model(), tmp_path)


def test_stop_ids_of_the_generation_config_come_first(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert read_config(folder).eos_token_ids == (7, 9)


def change_tensors(**changes):
    def change(folder: Path):
        tensors = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        save_file(tensors, folder / "model.safetensors")

    return change


def change_config(**changes):
    def change(folder: Path):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_tensors(model__norm__weight=None), "lacks the tensor 'model.norm.weight'"),
        (
            change_tensors(model__layers__2__mlp__up_proj__weight=np.zeros(1)),
            "a 2-layer model has no use for: 'model.layers.2.mlp.up_proj.weight'",
        ),
        (
            change_tensors(model__norm__weight=np.ones(31)),
            r"'model.norm.weight' has shape \[31\], but config.json makes it \[32\]",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: it needs model.safetensors, or"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "is not a whole safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json' does not exist: give a Hugging Face folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' is not a JSON object"),
        (change_config(model_type="mamba"), "unknown model_type 'mamba': known are llama"),
        (change_config(hidden_size="absent"), "config.json: 'hidden_size' is missing"),
        (change_config(rope_scaling={"type": "yarn"}), "rope_scaling of type 'yarn' has no factor: complete the file"),
        (change_config(rope_parameters={"rope_type": "dynamic"}), "rope_parameters of type 'dynamic' is not supported"),
        (change_config(rope_parameters=[1]), r"rope_parameters is \[1\]: give a table"),
        (change_config(rope_theta=0, rope_parameters=None), "rope theta is 0.0: give a positive number"),
        (change_config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5': give a number"),
        (change_config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported, only 1.0"),
        (change_config(quantization_config={"bits": 4}), "quantization_config .* is not supported"),
        (change_config(num_attention_heads="8", head_dim=None), "num_attention_heads is '8': give a whole number"),
        (change_config(num_attention_heads=0, head_dim=None), "num_attention_heads is 0: give a whole number"),
        (change_config(eos_token_id=61), "token id 61 is outside the vocabulary of 61"),
        (change_config(eos_token_id="</s>"), "eos_token_id is '</s>': give a token id"),
        (change_config(model_type=["llama"]), "unknown model_type"),
        (change_tensors(model__norm__weight=np.ones(32, np.int8)), "'model.norm.weight' is of type I8: quantised"),
        (change_config(mlp_bias=True), "mlp_bias True is not supported, only False"),
        (change_config(hidden_act="gelu"), "hidden_act 'gelu' is not supported, only 'silu'"),
        (change_config(num_key_value_heads=5), "heads 16 is not a multiple of kv_heads 5"),
        (change_config(num_hidden_layers=0), "num_hidden_layers is 0: give a whole number of at least 1"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(folder: Path, change, message: str):
    change(folder)
    with pytest.raises(ValueError, match=message):
        load(folder, plan_of())


def test_a_folder_that_is_not_there_is_said(folder: Path):
    with pytest.raises(ValueError, match="model folder '/nowhere' does not exist"):
        load("/nowhere", plan_of())
    with pytest.raises(ValueError, match="config.json' is not a folder"):
        load(folder / "config.json", plan_of())


def test_a_tied_head_that_is_written_out_must_be_the_embedding(tmp_path: Path):
    save(tiny_model(ModelConfig(**{**vars(TINY), "tied_head": True})), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, plan_of())
    tensors["lm_head.weight"][60, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' is not 'model.embed_tokens.weight', but config.json has"):
        load(tmp_path, plan_of())


def test_reading_weights_back_leaves_none_of_them_on_the_host(tmp_path: Path):
    """A jax array that was looked at keeps what was seen."""
    model = shard(tiny_model(), plan_of(2, 4))
    save(model, tmp_path)
    shard(model, plan_of(1, 8))
    held = [param[...]._npy_value for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert all(value is None for value in held)


def test_a_type_that_numpy_has_not_is_named_where_it_is_needed(folder: Path):
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F8_E8M0"
    changed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
    with pytest.raises(ValueError, match="'model.norm.weight' is of type F8_E8M0: quantised weights need"):
        load(folder, plan_of())
    nested = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(folder, plan_of())


def test_a_config_says_which_key_is_unknown_missing_or_of_another_type():
    with pytest.raises(ValueError, match="run.toml: unknown key 'depth': choose one of activation, embed_scale"):
        parse_dataclass(ModelConfig, {"depth": 3}, "run.toml")
    with pytest.raises(ValueError, match="run.toml: 'ff_width' is missing: add it"):
        parse_dataclass(ModelConfig, {"layers": 3}, "run.toml")
    with pytest.raises(ValueError, match="run.toml: layers is '3': give a value of type int"):
        parse_dataclass(ModelConfig, {**vars(TINY), "layers": "3"}, "run.toml")
