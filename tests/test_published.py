"""Folders in the layout of their publishers are read and written back, and unsupported ones are rejected."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from helix_jax.checkpoint import load, read_config, save, shard, writing
from helix_jax.checkpoint.tensors import open_tensors
from helix_jax.config import Experts, ModelConfig, Rope
from helix_jax.engine import SamplingParams
from helix_jax.families import FAMILIES
from helix_jax.families.ropes import write_scaling
from helix_jax.generation import generate
from helix_jax.mesh import EXPERT_WEIGHTS
from helix_jax.models.rope import frequencies, magnitude
from tests.conftest import GOLDEN, ROOT
from tests.reference import TINY, plan_of, shape_in, tiny_model
from tests.test_families import each_folder


@each_folder
def test_a_saved_folder_equals_the_published_one(folder: Path, tmp_path: Path, monkeypatch):
    """The tensors are bitwise equal, also from a sharded model in several files, and so is the config."""
    monkeypatch.setattr(writing, "_MAX_FILE_BYTES", 60_000)
    config = read_config(folder)
    tp = 3 if folder.name == "llama_9_heads" else 2
    save(load(folder, plan_of(tp, 2, experts="cp")), tmp_path)
    assert read_config(tmp_path) == config
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, theirs = open_tensors(tmp_path), open_tensors(folder)
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        theirs = dict.fromkeys(ours)  # the published values are quantised, the saved ones bfloat16
    extra = {name for name in set(theirs) - set(ours) if FAMILIES[config.family].is_extra(name, config)}
    assert set(ours) == set(theirs) - extra
    for name, stored in ours.items():
        if theirs[name]:
            assert stored.dtype == theirs[name].dtype
            np.testing.assert_array_equal(stored.read(slice(None)), theirs[name].read(slice(None)))
    assert_equal_weights(flat_weights(load(tmp_path, plan_of())), flat_weights(load(folder, plan_of())))


def test_several_files_with_an_index_may_be_overwritten(tmp_path: Path, monkeypatch):
    """Training does so. Beside a single file, the index would belong to another model."""
    monkeypatch.setattr(writing, "_MAX_FILE_BYTES", 2_000)
    for seed in (0, 1):
        save(tiny_model(seed=seed), tmp_path)
    assert_equal_weights(flat_weights(load(tmp_path, plan_of(), jnp.float32)), flat_weights(tiny_model(seed=1)))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has a model.safetensors.index.json, which would override this model"):
        save(tiny_model(), tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_sharded_quantised_weights_equal_unsharded_ones(name: str):
    """Each device reads only its own experts."""
    unsharded = flat_weights(load(GOLDEN / name, plan_of(), jnp.float32))
    for experts in EXPERT_WEIGHTS:
        sharded = flat_weights(load(GOLDEN / name, plan_of(2, 4, experts=experts), jnp.float32))
        unpadded = {path: weight[tuple(map(slice, unsharded[path].shape))] for path, weight in sharded.items()}
        assert_equal_weights(unpadded, unsharded)


def assert_equal_weights(weights: dict, expected: dict) -> None:
    assert weights.keys() == expected.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(weight, expected[path], err_msg=str(path))


def flat_weights(model) -> dict:
    return {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_scales_of_a_quantised_cache_are_refused_by_name_and_its_scheme_is_ignored(tmp_path: Path):
    """The cache is quantised here with scales of its own, or not at all."""
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v3_fp8", tmp_path / "scheme"))
    published = json.loads((folder / "config.json").read_text())
    published["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (folder / "config.json").write_text(json.dumps(published))
    assert_equal_weights(
        flat_weights(load(folder, plan_of())), flat_weights(load(GOLDEN / "deepseek_v3_fp8", plan_of()))
    )

    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "scales"))
    [file] = folder.glob("*.safetensors")
    name = "model.layers.0.self_attn.k_scale"
    save_file(load_file(file) | {name: np.ones(1, np.float32)}, file)
    with pytest.raises(ValueError, match=f"has the tensor '{name}', which a model of 3 layers does not have"):
        load(folder, plan_of())


def test_skipped_tensors_are_named_and_read_bytes_are_counted(caplog):
    progress = []
    with caplog.at_level("WARNING", "helix_jax"):
        model = load(GOLDEN / "deepseek_v3", plan_of(), on_read=lambda *bytes: progress.append(bytes))
    assert caplog.messages == [
        "skipped 5 tensors that decoding does not need: "
        "model.layers.3.eh_proj.weight to model.layers.3.shared_head.norm.weight"
    ]
    done, totals = zip(*progress, strict=True)
    assert list(done) == sorted(done)
    tensors = open_tensors(GOLDEN / "deepseek_v3")
    needed = [stored.bytes for name, stored in tensors.items() if not name.startswith("model.layers.3.")]
    assert done[-1] == totals[0] == sum(needed)
    assert model.layers[1].ff.selection_bias_E.dtype == jnp.float32  # the rest is bfloat16
    assert model.layers[1].ff.router_DE.dtype == jnp.bfloat16


# The keys of published config.json files that affect the results. configs/ has the same shapes.
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


LONGROPE = {"type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 2, 3]}


def folder_of(tmp_path: Path, published: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(published))
    return tmp_path


def test_longrope_has_the_factors_of_the_longest_context_and_the_magnitude_of_its_extension(tmp_path: Path, caplog):
    """In a file without an extension, the short factors. Older names mean the same."""
    published = json.loads((GOLDEN / "phi3" / "config.json").read_text())
    rope = read_config(GOLDEN / "phi3").rope
    np.testing.assert_allclose(
        frequencies(6, rope), 1 / np.array([1.2, 3 * 10 ** (4 / 3), 11 * 10 ** (8 / 3)]), rtol=1e-6
    )
    assert magnitude(rope) == pytest.approx(np.sqrt(1 + np.log(128) / np.log(32)))
    published["rope_parameters"] |= {"rope_type": "su"}
    assert read_config(folder_of(tmp_path, published)).rope == rope
    rope = read_config(folder_of(tmp_path, published | {"original_max_position_embeddings": 4096})).rope
    np.testing.assert_allclose(
        frequencies(6, rope), 1 / np.array([1, 1.1 * 10 ** (4 / 3), 1.3 * 10 ** (8 / 3)]), rtol=1e-6
    )
    assert magnitude(rope) == 1
    with caplog.at_level("WARNING", "helix_jax"):
        load(GOLDEN / "phi3", plan_of())
    assert caplog.messages == [
        "longrope: long_factor is used at all lengths, transformers uses short_factor up to 32 positions"
    ]


def test_only_the_full_layers_of_olmo_3_are_scaled_in_published_files(tmp_path: Path):
    published = json.loads((GOLDEN / "olmo3" / "config.json").read_text())
    table = published.pop("rope_parameters")["full_attention"]
    del table["rope_theta"], published["layer_types"]
    config = read_config(folder_of(tmp_path, published | {"rope_theta": 5e5, "rope_scaling": table}))
    assert config.windowed_layers == (0, 1, 2)
    assert config.rope_of(3) == replace(read_config(GOLDEN / "olmo3").rope, theta=5e5)
    assert config.rope_of(0) == Rope(theta=5e5)


@pytest.mark.parametrize("older", [{"partial_rotary_factor": 0.5}, {"rope_theta": 10_000.0}])
def test_the_rotated_share_of_a_head_is_beside_the_table_in_older_files(older: dict, tmp_path: Path):
    published = json.loads((GOLDEN / "glm4" / "config.json").read_text())
    del published["rope_parameters"]
    assert read_config(folder_of(tmp_path, published | older)) == read_config(GOLDEN / "glm4")


def test_dynamic_scaling_changes_nothing_up_to_the_context_and_longer_texts_are_rejected(tmp_path: Path):
    published = json.loads((GOLDEN / "llama" / "config.json").read_text())
    del published["rope_parameters"]
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    rope = read_config(folder_of(tmp_path, published | {"rope_scaling": scaling})).rope
    np.testing.assert_array_equal(frequencies(16, rope), frequencies(16, Rope()))
    assert (magnitude(rope), write_scaling(rope)) == (1, scaling)
    plan, model = plan_of(), tiny_model(replace(TINY, max_positions=16, rope=rope))
    with pytest.raises(ValueError, match="9 tokens and 8 new ones exceed the maximum of 16 positions: shorten"):
        generate(shard(model, plan), [[1] * 9], plan, SamplingParams(max_new_tokens=8))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_shapes_in_configs(name: str, tmp_path: Path):
    assert read_config(folder_of(tmp_path, PUBLISHED[name])) == shape_in(ROOT / "configs" / f"{name}.toml")


def test_gemma_is_read_from_published_files_and_from_those_of_transformers_5(tmp_path: Path):
    """The keys of rotary embeddings and of the window pattern differ."""
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
            "rope_parameters: 'short_factor' is missing: add it",
        ),
        ("llama", {"rope_parameters": {"rope_type": "mrope"}}, "rope_type is 'mrope': choose one of default"),
        ("olmo2", {"rope_parameters": {"full_attention": {}}}, "rope_parameters: unknown key 'full_attention'"),
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn"}}, "give a table of full_attention and sliding_attention"),
        ("olmo3", {"rope_parameters": None, "rope_theta": 1e4}, "rope_theta is 10000.0, but versions of transformers"),
        ("olmo3", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("olmo3", {"layer_types": ["full_attention"]}, "]: give 4 of full_attention and sliding_attention"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0: give a whole"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0: give a whole number of at least 1"),
        ("qwen2_moe", {"num_experts": None}, "'num_experts' is missing: add it"),
        ("qwen2_moe", {"qkv_bias": 1}, "qkv_bias is 1: give a value of type bool"),
        ("glm4", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half': give a number"),
        ("glm4", {"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        ("glm4_moe", {"n_group": None}, "'n_group' is missing: add it"),
        ("glm4_moe", {"use_qk_norm": 1}, "use_qk_norm is 1: give a value of type bool"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1.0"),
        ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: only 1.0"),
        (
            "phi3",
            {"rope_scaling": {"rope_type": "linear", "factor": 2}},
            "rope_type is 'linear': choose one of default",
        ),
        ("phi3", {"original_max_position_embeddings": None}, "'original_max_position_embeddings' is missing: add it"),
        ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings above 1, it is 1"),
        ("phi3", {"head_dim": 16}, "rope short_factor has 3 numbers: give 6, one per rotated pair"),
        ("phi3", {"rope_scaling": LONGROPE | {"long_factor": [1, 2, "3"]}}, "long_factor is [1, 2, '3']: give a value"),
        ("phi3", {"rope_scaling": LONGROPE | {"long_factor": [1, 2, 0]}}, "rope long_factor is 0.0: give a positive"),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 1.5}},
            "rope partial_rotary_factor is 1.5: give at most",
        ),
        (
            "phi3",
            {"rope_parameters": {"partial_rotary_factor": 0.1}},
            "head_width is 8, of which 0 are rotated: give",
        ),
        (
            "llama",
            {"rope_parameters": {"mrope_section": [1]}},
            "rope_parameters: unknown key 'mrope_section': choose one of",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: only 1.0"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope: factor is '4': give a value"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 3},
            "'full_attention']: remove it, this model_type",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: give a whole number of at least 1"),
        ("mistral", {"sliding_window": "8"}, "sliding_window is '8': give a whole number of at least 1"),
        ("gpt_oss", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
        ("gpt_oss", {"rope_parameters": None}, "'rope_scaling' is missing: add it"),
        ("llama", {"rope_parameters": {"rope_type": []}}, "rope_type is []: choose one of default"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "attn_factor": 0.9}},
            "attn_factor is ambiguous, transformers ignores it and others use it: remove it",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": None}},
            "rope_parameters: 'factor' is missing: add it",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: 'factor' is missing: add it"),
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
            "dual_chunk_attention_config is {'chunk_size': 4}: only None is supported",
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
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "]: give 4 of full_attention and sliding_attention"),
        ("qwen2", {"layer_types": ["full_attention"]}, "]: give 4 of full_attention and sliding_attention"),
        ("qwen3_moe", {"num_local_experts": None}, "config.json: 'num_experts' is missing: add it"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes': give a value of type bool"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k 9 exceeds the"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0: only None is supported"),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True: only False is supported",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "yarn"}},
            "give a table of full_attention and sliding_attention",
        ),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "topk_method is 'noaux_tc': choose one of greedy, group_limited_greedy",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True: only False is supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax': only 'sigmoid' is supported"),
        ("deepseek_v3", {"n_group": 5}, "5 groups do not divide the 16 experts"),
        ("deepseek_v3", {"first_k_dense_replace": 9}, "layer 3 is not one of the 3"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config is 'gptq': only 'mxfp4' and 'fp8'",
        ),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is 'fp8' of format None, blocks None: only",
        ),
    ],
)
def test_unsupported_options_are_rejected_by_name(name: str, changes: dict, message: str, tmp_path: Path):
    published = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(folder_of(tmp_path, published))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt_oss_mxfp4", {"quantization_config": None}, "lacks the tensor 'model.layers.0.mlp.experts"),
        ("deepseek_v3_fp8", {"quantization_config": None}, "has type F8_E4M3: add the quantization_config"),
        (
            "deepseek_v3_fp8",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 16]}},
            r"weight_scale_inv' has shape \[3, 4\], expected \[5, 4\] for blocks of \[8, 16\]: correct ",
        ),
    ],
)
def test_quantised_weights_without_their_scale_are_rejected(name: str, changes: dict, message: str, tmp_path: Path):
    published = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    (folder_of(tmp_path, published) / "model.safetensors").symlink_to(GOLDEN / name / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, plan_of())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm is True: a 'llama' config.json can only have False, choose another family"),
        ({"qk_norm": True, "qk_norm_all_heads": True}, "qk_norm is True: a 'llama' config.json can only have False"),
        ({"pre_norms": False, "post_norms": True}, "pre_norms is False: a 'llama' config.json can only have True"),
        ({"window": 8, "windowed_layers": (0,)}, "window is 8: a 'llama' config.json can only have None"),
        (
            {"experts": Experts(num_experts=4, top_k=1, width=8)},
            "experts is Experts.*: a 'llama' config.json",
        ),
        (
            {"family": "mixtral", "experts": Experts(num_experts=4, top_k=1, width=8)},
            "a 'mixtral' config.json can",
        ),
        ({"family": "qwen2"}, "qkv_bias is False: a 'qwen2' config.json can only have True"),
        ({"family": "deepseek_v3"}, "latent is None: a 'deepseek_v3' config.json needs it, choose another family"),
        ({"rope": Rope(interleaved=True)}, "rope.interleaved is True: a 'llama' config.json can only have False"),
    ],
)
def test_a_model_that_its_family_cannot_describe_is_not_written(changes: dict, message: str, tmp_path: Path):
    model = tiny_model(ModelConfig(**{**vars(TINY), **changes}))
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())
