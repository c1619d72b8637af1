"""Folders as their publishers write them: read, refused with a reason, and written back."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helix_jax.checkpoint import load, read_config, save, writing
from helix_jax.checkpoint.tensors import open_tensors
from helix_jax.config import Experts, ModelConfig, Rope
from helix_jax.families import FAMILIES
from helix_jax.mesh import EXPERT_WEIGHTS, make_mesh
from tests.conftest import GOLDEN, ROOT
from tests.reference import TINY, plan_of, shape_in, tiny_model
from tests.test_families import each_folder


@each_folder
def test_what_is_saved_is_what_was_published(folder: Path, tmp_path: Path, monkeypatch):
    """Tensor by tensor and bit by bit, sharded or not, in one file or in many; and the same model by its config."""
    monkeypatch.setattr(writing, "_FILE_BYTES", 60_000)
    config = read_config(folder)
    save(load(folder, plan_of(2, 2, experts="cp")), tmp_path)
    assert read_config(tmp_path) == config
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, theirs = open_tensors(tmp_path), open_tensors(folder)
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        theirs = dict.fromkeys(ours)  # the numbers are others: bfloat16
    extra = {name for name in set(theirs) - set(ours) if FAMILIES[config.family].is_extra(name, config)}
    assert set(ours) == set(theirs) - extra
    for name, stored in ours.items():
        if theirs[name]:
            assert stored.dtype == theirs[name].dtype
            np.testing.assert_array_equal(stored.read(slice(None)), theirs[name].read(slice(None)))
    again, before = load(tmp_path, plan_of()), load(folder, plan_of())
    for (path, ours), (_, theirs) in zip(flat(again), flat(before), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


def test_several_files_may_be_written_again(tmp_path: Path, monkeypatch):
    """As training does: the index that is there is then our own. Before a single file it would be another model's."""
    monkeypatch.setattr(writing, "_FILE_BYTES", 2_000)
    for seed in (0, 1):
        save(tiny_model(seed=seed), tmp_path)
    again = flat(load(tmp_path, plan_of(), jnp.float32))
    for (path, ours), (_, theirs) in zip(again, flat(tiny_model(seed=1)), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds another model's model.safetensors.index.json"):
        save(tiny_model(), tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_quantised_weights_are_the_same_sharded_or_not(name: str):
    """A device reads its own experts alone."""
    whole = load(GOLDEN / name, plan_of(), jnp.float32)
    for spread in EXPERT_WEIGHTS:
        parts = load(GOLDEN / name, plan_of(2, 4, experts=spread), jnp.float32)
        for (path, ours), (_, theirs) in zip(flat(parts), flat(whole), strict=True):
            own = tuple(map(slice, theirs.shape))
            np.testing.assert_array_equal(ours[own], theirs, err_msg=str(path))


def flat(model) -> list:
    return [(path, np.asarray(param[...])) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def test_what_is_left_out_is_said_and_what_is_read_is_counted(caplog):
    told = []
    with caplog.at_level("WARNING", "helix_jax"):
        model = load(GOLDEN / "deepseek_v3", plan_of(), on_read=lambda *bytes: told.append(bytes))
    assert caplog.messages == [
        "skipped 5 tensors that decoding has no use for: "
        "model.layers.3.eh_proj.weight to model.layers.3.shared_head.norm.weight"
    ]
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[0] == sum(x.bytes for x in needed(GOLDEN / "deepseek_v3").values())
    assert model.layers[1].ff.selection_bias_E.dtype == jnp.float32  # the rest is bfloat16
    assert model.layers[1].ff.router_DE.dtype == jnp.bfloat16


def needed(folder: Path) -> dict:
    return {name: stored for name, stored in open_tensors(folder).items() if not name.startswith("model.layers.3.")}


# As the publishers have them: the keys that count, beside the shapes in configs/.
PUBLISHED = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "head_dim": 128,
        "rms_norm_eps": 1e-06,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_hidden_layers": 24,
        "hidden_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 2880,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "rms_norm_eps": 1e-05,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "swiglu_limit": 7.0,
        "sliding_window": 128,
        "attention_bias": True,
        "initial_context_length": 4096,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "intermediate_size": 18432,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 1,
        "ep_size": 1,
        "attention_bias": False,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "num_hidden_layers": 27,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 10944,
        "vocab_size": 102400,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
    },
}


def folder_of(tmp_path: Path, published: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(published))
    return tmp_path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_shape_in_configs(name: str, tmp_path: Path):
    assert read_config(folder_of(tmp_path, PUBLISHED[name])) == shape_in(ROOT / "configs" / f"{name}.toml")


def test_gemma_is_read_as_published_and_as_transformers_5_writes_it(tmp_path: Path):
    """Its rotary positions and the pattern of its windows have other keys in each."""
    newer = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    ropes = newer.pop("rope_parameters")
    older = {key: value for key, value in newer.items() if key not in ("layer_types", "_sliding_window_pattern")}
    older |= {
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    older["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    assert read_config(folder_of(tmp_path, older)) == read_config(GOLDEN / "gemma3_text")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope"}},
            "of type 'longrope' is not supported",
        ),
        (
            "llama",
            {"rope_parameters": {"mrope_section": [1]}},
            "'mrope_section' is not supported: it is not known",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope: factor is '4': give a value"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types are not supported for this model_type"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: give a whole number of at least 1"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8': give a whole number of at least 1"),
        ("gpt_oss", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("gpt_oss", {"rope_parameters": None}, "'rope_scaling' is missing: complete the file"),
        ("llama", {"rope_parameters": {"rope_type": []}}, "rope_parameters of type [] is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "attn_factor": 0.9}},
            "transformers ignores it",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": None}}, "of type 'yarn' has no factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "of type 'linear' has no factor: complete the file"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "original_max_position_embeddings": 32,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "rope high_freq_factor 4.0 is not above low_freq_factor 4.0: correct the config",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 1}}, "rope theta is 1.0: give a number above 1"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000000000"),
        ("llama", {"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}: give a token id, or a list of them"),
        ("llama", {"quantization_config": "fp8"}, "quantization_config is 'fp8': give a table"),
        ("qwen2", {"max_window_layers": "x", "layer_types": None}, "max_window_layers is 'x': give a whole number"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no': give a value of type bool"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 4}},
            "dual_chunk_attention_config {'chunk",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0: give a whole number of at least 1"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers is ['1']: give a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3: give a value of type list"),
        ("gemma3_text", {"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4: give a whole number"),
        (
            "gemma3_text",
            {"sliding_window_pattern": 0, "layer_types": None},
            "sliding_window_pattern is 0: give",
        ),
        (
            "deepseek_v3",
            {"first_k_dense_replace": -1},
            "is -1: give a whole number of at least 0",
        ),
        ("deepseek_v3", {"n_shared_experts": "2"}, "n_shared_experts is '2': give a whole number of at least 0"),
        ("deepseek_v3", {"topk_group": 0}, "topk_group is 0: give a whole number of at least 1"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "are not 4 of full_attention and sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "are not 4 of full_attention and sliding_attention"),
        ("qwen3_moe", {"num_local_experts": None}, "config.json: 'num_experts' is missing: complete the file"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes': give a value of type bool"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k 9 exceeds the"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported, only None"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "yarn"}}, "are not of full_ and sliding_attention"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported, only False"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"n_group": 5}, "5 groups do not divide the 16 experts"),
        ("deepseek_v3", {"first_k_dense_replace": 9}, "layer 3 is not one of the 3"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "'gptq' is not supported",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "'fp8' of format None, blocks None is not",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name: str, changes: dict, message: str, tmp_path: Path):
    published = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(folder_of(tmp_path, published))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt_oss_mxfp4", {"quantization_config": None}, "lacks the tensor 'model.layers.0.mlp.experts"),
        ("deepseek_v3_fp8", {"quantization_config": None}, "is of type F8_E4M3: quantised weights need"),
        (
            "deepseek_v3_fp8",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}},
            "weight_scale_inv' has shape",
        ),
    ],
)
def test_numbers_without_their_scale_are_refused(name: str, changes: dict, message: str, tmp_path: Path):
    published = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (folder_of(tmp_path, published) / "model.safetensors").symlink_to(GOLDEN / name / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, plan_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "a 'llama' folder cannot say qk_norm True, only False: not written"),
        ({"window": 8, "windowed_layers": (0,)}, "a 'llama' folder cannot say window 8, only None"),
        ({"experts": Experts(num_experts=4, top_k=1, width=8)}, "a 'llama' folder cannot say experts Experts"),
        ({"family": "mixtral", "experts": Experts(num_experts=4, top_k=1, width=8)}, "cannot say"),
        ({"family": "qwen2"}, "a 'qwen2' folder cannot say qkv_bias False, only True"),
        ({"family": "deepseek_v3"}, "a 'deepseek_v3' folder needs latent, which this model has not: not written"),
        ({"rope": Rope(interleaved=True)}, "cannot say rope"),
    ],
)
def test_what_a_family_cannot_say_is_not_written_as_another_model(changes: dict, message: str, tmp_path: Path):
    model = tiny_model(ModelConfig(**{**vars(TINY), **changes}))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())
