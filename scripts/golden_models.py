"""The small models of tests/golden/: for each family a config.json in which all of its features are used."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A small model.

    Args:
        config: Its config.json.
        quantization: Its `quantization_config`, if its weights are quantised.
        offset: Added to the seed. Chosen so that no greedy step is nearly a tie.
    """

    config: dict[str, Any]
    quantization: dict[str, Any] | None = None
    offset: int = 0


ATTENTION = {
    "vocab_size": 97,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 0.01,  # published values are 1e-5 and less, too small for a wrong one to be noticed
}
DEEPSEEK = ATTENTION | {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 56,
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "rope_theta": 100.0,
}
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2,
    "beta_slow": 1,
}
DEEPSEEK_V2 = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
DEEPSEEK_V3 = DEEPSEEK | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 28,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
    "rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
GPT_OSS = ATTENTION | {
    "model_type": "gpt_oss",
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 10,
    "swiglu_limit": 2.0,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 2.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}

FAMILIES = {
    "llama": Family(
        ATTENTION
        | {
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        offset=9,
    ),
    "llama_linear": Family(
        ATTENTION
        | {
            "model_type": "llama",
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "rms_norm_eps": 0.001,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        offset=8,
    ),
    # As many heads as SmolLM2-135M, which no power of two divides.
    "llama_9_heads": Family(
        ATTENTION
        | {
            "model_type": "llama",
            "hidden_size": 72,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "granite": Family(
        ATTENTION
        | {
            "model_type": "granite",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "embedding_multiplier": 1.7,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.4,
        },
    ),
    "seed_oss": Family(
        ATTENTION
        | {
            "model_type": "seed_oss",
            "hidden_size": 40,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "attention_bias": True,
            "attention_out_bias": True,
        },
    ),
    "smollm3": Family(
        ATTENTION
        | {
            "model_type": "smollm3",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 10,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "phi3": Family(
        ATTENTION
        | {
            "model_type": "phi3",
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "sliding_window": 10,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.2, 3.0, 11.0],
            },
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "olmo2": Family(
        ATTENTION
        | {
            "model_type": "olmo2",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "attention_bias": True,
        },
    ),
    "olmo3": Family(
        ATTENTION
        | {
            "model_type": "olmo3",
            "hidden_size": 64,
            "intermediate_size": 56,
            "num_hidden_layers": 4,
            "sliding_window": 10,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1000.0,
                    "factor": 4.0,
                    "beta_fast": 4.0,
                    "beta_slow": 1.0,
                    "attention_factor": 1.2,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "glm4": Family(
        ATTENTION
        | {
            "model_type": "glm4",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "partial_rotary_factor": 0.5,
            "pad_token_id": 0,
            "eos_token_id": [1, 2],
        },
    ),
    "glm4_moe": Family(
        ATTENTION
        | {
            "model_type": "glm4_moe",
            "hidden_size": 40,
            "intermediate_size": 56,
            "moe_intermediate_size": 12,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "partial_rotary_factor": 0.25,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 16,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    "mistral": Family(
        ATTENTION
        | {
            "model_type": "mistral",
            "hidden_size": 56,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 10,
        },
        offset=6,
    ),
    "qwen2": Family(
        ATTENTION
        | {
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 2,
        },
        offset=7,
    ),
    "qwen3": Family(
        ATTENTION
        | {
            "model_type": "qwen3",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        offset=1,
    ),
    "qwen3_moe": Family(
        ATTENTION
        | {
            "model_type": "qwen3_moe",
            "hidden_size": 40,
            "intermediate_size": 72,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
        offset=4,
    ),
    # The context ends with the last token: up to there, dynamic scaling changes nothing.
    "qwen2_moe": Family(
        ATTENTION
        | {
            "model_type": "qwen2_moe",
            "hidden_size": 48,
            "intermediate_size": 56,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 2,
            "max_position_embeddings": 112,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
        offset=1,
    ),
    "mixtral": Family(
        ATTENTION
        | {
            "model_type": "mixtral",
            "hidden_size": 40,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 10,
        },
        offset=7,
    ),
    "gpt_oss": Family(
        GPT_OSS,
        offset=5,
    ),
    "gpt_oss_mxfp4": Family(
        GPT_OSS | {"hidden_size": 64, "intermediate_size": 64},
        quantization={
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        offset=7,
    ),
    "gemma3_text": Family(
        ATTENTION
        | {
            "model_type": "gemma3_text",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 5,
            "rms_norm_eps": 0.03,
            "sliding_window": 10,
            "sliding_window_pattern": 3,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        offset=4,
    ),
    "deepseek_v2": Family(
        DEEPSEEK_V2
        | {
            "q_lora_rank": 28,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
        offset=9,
    ),
    "deepseek_v2_lite": Family(
        DEEPSEEK_V2
        | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.3},
        offset=6,
    ),
    "deepseek_v3": Family(
        DEEPSEEK_V3,
        offset=3,
    ),
    "deepseek_v3_fp8": Family(
        DEEPSEEK_V3,
        quantization={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [16, 16],
        },
    ),
}
