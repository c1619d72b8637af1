"""Folders are read as they were written, and errors name what is wrong with a folder."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from helix_jax.checkpoint import load, read_config, save, shard, writing
from helix_jax.config import ModelConfig
from helix_jax.parsing import parse_dataclass
from tests.reference import TINY, plan_of, tiny_model


def parameters(model) -> dict:
    return {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_model(), tmp_path, jnp.float32)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_is_loaded_with_the_same_weights_and_other_shards(tmp_path: Path, tied: bool):
    config = ModelConfig(**{**vars(TINY), "tied_head": tied, "eos_token_ids": (3, 4), "tokenizer": "bytes"})
    model = tiny_model(config)
    save(shard(model, plan_of(2, 4)), tmp_path, jnp.float32)
    assert read_config(tmp_path) == config
    loaded, saved = parameters(load(tmp_path, plan_of(1, 8), jnp.float32)), parameters(model)
    assert loaded.keys() == saved.keys()
    for path, value in loaded.items():
        unpadded = tuple(map(slice, saved[path].shape))
        np.testing.assert_array_equal(value[unpadded], saved[path])
        assert value.sum(dtype=np.float64) == value[unpadded].sum(dtype=np.float64)  # the padding is zeros
    assert loaded["embed_VD",].shape == (64, 32)
    assert loaded["layers", 1, "ff", "down_FD"].shape == (56, 32)


def test_the_index_determines_which_files_are_read(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    saved = parameters(tiny_model())
    for path, value in parameters(load(folder, plan_of(), jnp.float32)).items():
        np.testing.assert_array_equal(value, saved[path])
    (folder / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"b.safetensors' is not a complete safetensors file"):
        load(folder, plan_of())
    (folder / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the file 'b.safetensors', which its index names"):
        load(folder, plan_of())


def test_a_single_file_is_read_before_an_index(folder: Path):
    """As in transformers, also if the files of the index are missing."""
    index = dict.fromkeys(load_file(folder / "model.safetensors"), "missing.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_equals_tiny(load(folder, plan_of(), jnp.float32))


def test_an_index_may_name_a_tied_head_that_no_file_contains(tmp_path: Path):
    model = tiny_model(ModelConfig(**{**vars(TINY), "tied_head": True}))
    save(model, tmp_path)
    index = dict.fromkeys([*load_file(tmp_path / "model.safetensors"), "lm_head.weight"], "a.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    saved = parameters(model)
    for path, value in parameters(load(tmp_path, plan_of(), jnp.float32)).items():
        np.testing.assert_array_equal(value, saved[path])
    index["model.norm.weight"] = "b.safetensors"
    save_file({"other": np.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="has the tensor 'other', which a model of 2 layers does not have"):
        load(tmp_path, plan_of())


def test_names_may_lack_the_prefix(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert "lm_head.weight" in bare
    save_file(bare, folder / "model.safetensors")
    assert_equals_tiny(load(folder, plan_of(), jnp.float32))


def assert_equals_tiny(model) -> None:
    saved = parameters(tiny_model())
    for path, value in parameters(model).items():
        np.testing.assert_array_equal(value, saved[path])


@pytest.mark.parametrize(("ids", "kept"), [(-1, ()), ([3, 61, -1], (3,)), ([128009], ())])
def test_end_tokens_that_cannot_occur_are_ignored(folder: Path, ids, kept: tuple[int, ...]):
    change_config(eos_token_id=ids)(folder)
    assert read_config(folder).eos_token_ids == kept


@pytest.mark.parametrize(
    ("beside", "inside", "expected"), [(None, None, 4096), (None, 16, 16), (64, None, 64), (64, 16, 64)]
)
def test_the_original_context_of_yarn_is_that_of_transformers(folder: Path, beside, inside, expected: int):
    """The key beside the table has priority over that inside of it. Without any, the context is meant."""
    table = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": inside}
    change_config(original_max_position_embeddings=beside, rope_scaling=table)(folder)
    assert read_config(folder).rope.original_positions == expected


def test_options_without_an_effect_are_accepted(folder: Path):
    before = read_config(folder)
    change_config(attention_bias=None, rope_scaling={"rope_type": "default"}, quantization_config=None)(folder)
    change_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4))(folder)
    assert load(folder, plan_of()).config == read_config(folder) == before


def test_a_model_is_not_saved_beside_an_index_that_would_override_it(folder: Path):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has a model.safetensors.index.json, which would override this model"):
        save(tiny_model(), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="weight_map"):
        load(folder, plan_of())


def test_a_model_in_several_files_is_not_saved_beside_a_single_file(folder: Path, monkeypatch):
    """Which readers prefer."""
    monkeypatch.setattr(writing, "_MAX_FILE_BYTES", 2_000)
    with pytest.raises(ValueError, match="has a model.safetensors, which would override this model: choose another"):
        save(tiny_model(), folder)


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("helix_jax.checkpoint.writing.save_file", fail)
    with pytest.raises(OSError, match=r"model.safetensors' cannot be written \(No space left .*\): free disk space"):
        save(tiny_model(), tmp_path)


def test_end_tokens_of_the_generation_config_take_precedence(folder: Path):
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
            "'model.layers.2.mlp.up_proj.weight', which a model of 2 layers does not have: correct config.json",
        ),
        (
            change_tensors(model__norm__weight=np.ones(31)),
            r"'model.norm.weight' has shape \[31\], expected \[32\] from config.json: correct config.json",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: add model.safetensors, or"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "is not a complete safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json' does not exist: give a Hugging Face folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' is not a JSON object"),
        (change_config(model_type="mamba"), "model_type is 'mamba': choose one of llama"),
        (change_config(hidden_size="absent"), "config.json: 'hidden_size' is missing: add it"),
        (change_config(rope_scaling={"type": "yarn"}), "rope_scaling: 'factor' is missing: add it"),
        (change_config(rope_parameters={"rope_type": "ntk"}), "rope_type is 'ntk': choose one of default"),
        (change_config(rope_parameters={"rope_type": "dynamic"}), "rope_parameters: 'factor' is missing: add it"),
        (change_config(rope_parameters=[1]), r"rope_parameters is \[1\]: give a table"),
        (change_config(rope_theta=0, rope_parameters=None), "rope theta is 0.0: give a positive number"),
        (change_config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5': give a number"),
        (change_config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5: only 1.0 is supported"),
        (
            change_config(quantization_config={"bits": 4}),
            "quantization_config is None: only 'mxfp4' and 'fp8' in",
        ),
        (change_config(num_attention_heads="8", head_dim=None), "num_attention_heads is '8': give a whole number"),
        (change_config(num_attention_heads=0, head_dim=None), "num_attention_heads is 0: give a whole number"),
        (change_config(eos_token_id="</s>"), "eos_token_id is '</s>': give a token id"),
        (change_config(model_type=["llama"]), r"model_type is \['llama'\]: choose one of"),
        (
            change_tensors(model__norm__weight=np.ones(32, np.int8)),
            "'model.norm.weight' has type I8: add the quantization_config",
        ),
        (change_config(mlp_bias=True), "mlp_bias is True: only False is supported"),
        (change_config(hidden_act="gelu"), "hidden_act is 'gelu': only 'silu' is supported"),
        (change_config(num_key_value_heads=5), "kv_heads 5 does not divide heads 16: correct the config"),
        (change_config(num_hidden_layers=0), "num_hidden_layers is 0: give a whole number of at least 1"),
    ],
)
def test_errors_name_what_is_wrong_with_a_folder(folder: Path, change, message: str):
    change(folder)
    with pytest.raises(ValueError, match=message):
        load(folder, plan_of())


def test_a_folder_that_does_not_exist_is_an_error(folder: Path):
    with pytest.raises(ValueError, match="model folder '/nowhere' does not exist"):
        load("/nowhere", plan_of())
    with pytest.raises(ValueError, match="config.json' is not a folder"):
        load(folder / "config.json", plan_of())


def test_a_tied_head_in_a_folder_must_equal_the_embedding(tmp_path: Path):
    save(tiny_model(ModelConfig(**{**vars(TINY), "tied_head": True})), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, plan_of())
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name][59] = np.nan  # as in padding
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path, plan_of())
    tensors["lm_head.weight"][60, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'lm_head.weight' and .* differ, but tie_word_embeddings is true: set it"):
        load(tmp_path, plan_of())


def test_saving_and_sharding_leave_no_weights_on_the_host(tmp_path: Path):
    """A jax array caches its host copy once it is converted to NumPy."""
    model = shard(tiny_model(), plan_of(2, 4))
    save(model, tmp_path)
    shard(model, plan_of(1, 8))
    cached = [param[...]._npy_value for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert all(value is None for value in cached)


def test_a_type_without_a_numpy_equivalent_is_named(folder: Path):
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F8_E8M0"
    changed = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + size :])
    with pytest.raises(ValueError, match="'model.norm.weight' has type F8_E8M0: add the quantization_config"):
        load(folder, plan_of())
    nested = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load(folder, plan_of())


def test_errors_name_unknown_missing_and_mistyped_keys_of_a_config():
    with pytest.raises(ValueError, match="run.toml: unknown key 'depth': choose one of activation, "):
        parse_dataclass(ModelConfig, {"depth": 3}, "run.toml")
    with pytest.raises(ValueError, match="run.toml: 'width' is missing: add it"):
        parse_dataclass(ModelConfig, {"layers": 3}, "run.toml")
    with pytest.raises(ValueError, match="run.toml: layers is '3': give a value of type int"):
        parse_dataclass(ModelConfig, {**vars(TINY), "layers": "3"}, "run.toml")


def test_the_special_tokens_and_the_generation_config_of_the_initial_folder_are_kept(tmp_path: Path):
    initial, folder = tmp_path / "initial", tmp_path / "trained"
    model = tiny_model(dataclasses.replace(TINY, eos_token_ids=(3, 5)))
    save(model, initial)
    published = json.loads((initial / "config.json").read_text())
    published |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}
    (initial / "config.json").write_text(json.dumps(published))
    generation = {"eos_token_id": [3, 5], "temperature": 0.6, "transformers_version": "5"}
    (initial / "generation_config.json").write_text(json.dumps(generation))
    for _ in range(2):  # a run that is finished may be finished again
        save(model, folder, initial=initial)
        kept = json.loads((folder / "config.json").read_text())
        assert [kept[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 4]
        assert json.loads((folder / "generation_config.json").read_text()) == generation
        assert read_config(folder) == model.config
    with pytest.raises(ValueError, match="has a generation_config.json, which would override this model"):
        save(model, folder)
    with pytest.raises(ValueError, match=r"nowhere.config.json' does not exist"):
        save(model, folder, initial=tmp_path / "nowhere")
