#!/usr/bin/env python3
"""Makes tests/golden/: what Hugging Face transformers computes, in float32, from folders that this library reads.

    make_golden.py [--seed 0] [--out tests/golden] [NAME ...]    makes the named ones (all, where none is named)
    make_golden.py --ablate [NAME ...]          by how much the logits change when one feature is left out or altered
    make_golden.py --check FOLDER GOLDEN.npz    1 unless FOLDER, which this library wrote, computes the same

A NAME of FAMILIES is a folder: config.json and model.safetensors, as the family's publisher lays them out, of a small
random model in which the features of the family are on, and golden.npz: 48 random tokens and the 64 that greedy
decoding puts after them (tokens, prompt_len, greedy), and the logits of all positions. `demo` is demo.npz, from the
model that this library ships.

Needs torch and transformers, which the tests do not: run it by hand, and commit what it gives.
"""

import argparse
import json
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # pyright: ignore[reportMissingImports]
from transformers.utils import logging  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
STRIDE = 7
PROMPT, STEPS = 48, 64

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    config: dict[str, Any]
    quantization: dict[str, Any] | None = None
    offset: int = 0  # of the seed: chosen so that no greedy step is nearly a draw


ATTENTION = {
    "vocab_size": 97,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 0.01,  # published are 1e-5 and less, which nobody would miss
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


# --- the folders


def randomize(model: Any, rng: torch.Generator) -> None:
    """Every stored value, also what an untrained model has at 0 or 1; what is stored as bfloat16 is rounded to it."""
    centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        noise = torch.randn(value.shape, generator=rng)
        if name.endswith("e_score_correction_bias"):
            value.copy_(0.3 * noise)
            continue
        if "norm" in name:
            noise = centre + 0.2 * noise
        elif name.endswith("bias"):
            noise *= 0.5
        elif "embed_tokens" in name and tied:  # more, and each token follows itself
            noise *= 0.6 * model.config.hidden_size**-0.5
        elif value.ndim > 1 and "embed_tokens" not in name:
            transposed = model.config.model_type == "gpt_oss" and ".experts." in name
            noise *= 1.5 * value.shape[-2 if transposed else -1] ** -0.5
        value.copy_(noise.bfloat16())


def add_prediction_layer(tensors: Tensors, config: Any, rng: torch.Generator) -> None:
    """Some tensors of the layer that predicts the token after the next: published after the last layer, read by none"""
    prefix, width = f"model.layers.{config.num_hidden_layers}.", config.hidden_size
    shapes = {
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width),
        "self_attn.o_proj.weight": (width, config.num_attention_heads * config.v_head_dim),
        "shared_head.norm.weight": (width,),
    }
    tensors |= {prefix + name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}


def spread(scale: torch.Tensor, shape: torch.Size, block: list[int]) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def quantize_fp8(tensors: Tensors, config: dict[str, Any], rng: torch.Generator) -> Tensors:
    """Projections in blocks, the last of a row or column cut off; scales strewn, so that no block can take another's"""
    out, block = {}, config["weight_block_size"]
    for name, value in tensors.items():
        out[name] = value
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or name.endswith("_proj_with_mqa.weight"):
            grid = [-(-size // b) for size, b in zip(value.shape, block, strict=True)]
            pad = [0, grid[1] * block[1] - value.shape[1], 0, grid[0] * block[0] - value.shape[0]]
            padded = torch.nn.functional.pad(value.float(), pad)
            scale = padded.view(grid[0], block[0], grid[1], block[1]).abs().amax((1, 3)) / 448
            out[name] = (value.float() / spread(scale, value.shape, block)).to(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = scale * torch.exp(0.4 * torch.randn(scale.shape, generator=rng))
    return out


def quantize_mxfp4(tensors: Tensors, config: dict[str, Any], rng: torch.Generator) -> Tensors:
    """Experts replaced by random blocks: what they were is lost, and only their shapes count."""
    out = {}
    for name, value in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, inner, rows = value.shape
            grid = (experts, rows, inner // 32)
            out[name + "_blocks"] = torch.randint(256, (*grid, 16), generator=rng, dtype=torch.uint8)
            out[name + "_scales"] = torch.randint(127 - 6, 127 - 2, grid, generator=rng, dtype=torch.uint8)
        else:
            out[name] = value
    return out


def dequantize(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    out = {}
    for name, value in tensors.items():
        if name + "_scale_inv" in tensors:
            scale = spread(tensors[name + "_scale_inv"], value.shape, config["weight_block_size"])
            out[name] = value.float() * scale
        elif name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            out[name] = convert_moe_packed_tensors(value, tensors[name + "_scales"], dtype=torch.float32)
        elif not name.endswith(("_scale_inv", "_scales")):
            out[name] = value
    return out


QUANTIZE = {"fp8": quantize_fp8, "mxfp4": quantize_mxfp4}


def write_folder(family: Family, folder: Path, rng: torch.Generator) -> None:
    config = AutoConfig.for_model(**family.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, rng)
    biases = {name: value.clone() for name, value in model.state_dict().items() if "e_score_correction" in name}
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors") | biases
    if getattr(config, "num_nextn_predict_layers", 0):
        add_prediction_layer(tensors, config, rng)
    if family.quantization:
        tensors = QUANTIZE[family.quantization["quant_method"]](tensors, family.quantization, rng)
        settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": family.quantization}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, change: dict[str, Any] | None = None, edit: Callable[[Tensors], Tensors] | None = None) -> Any:
    """The model of a folder, in float32; dequantized, with settings changed and tensors edited where that is asked."""
    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    with tempfile.TemporaryDirectory() as scratch:
        if settings or edit:
            tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
            tensors = edit(tensors) if edit else tensors
            save_file(dequantize(tensors, settings or {}), Path(scratch) / "model.safetensors", {"format": "pt"})
            if settings:
                del config.quantization_config
            config.save_pretrained(scratch)
            folder = Path(scratch)
        for key, value in (change or {}).items():
            setattr(config, key, value)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    extra = [
        name for name in info["unexpected_keys"] if not name.startswith(f"model.layers.{config.num_hidden_layers}.")
    ]
    if info["missing_keys"] or info["mismatched_keys"] or extra:
        sys.exit(f"{folder}: missing {info['missing_keys']}, mismatched {info['mismatched_keys']}, unexpected {extra}")
    return model.eval()


# --- what transformers computes from them


@torch.no_grad()
def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    return model(torch.tensor(tokens.astype(np.int64))[None], use_cache=False).logits[0].numpy()


@torch.no_grad()
def greedy_of(model: Any, prompt: np.ndarray, steps: int = STEPS) -> np.ndarray:
    model.generation_config.eos_token_id = None
    tokens = torch.tensor(prompt.astype(np.int64))[None]
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=steps, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].numpy()


def distance(x: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64) - ref) / np.linalg.norm(ref.astype(np.float64)))


def make(name: str, out: Path, seed: int) -> None:
    family, folder = FAMILIES[name], out / name
    rng = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed + family.offset}".encode()))
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(family, folder, rng)
    model = load(folder)
    prompt = torch.randint(family.config["vocab_size"], (PROMPT,), generator=rng).numpy()
    greedy = greedy_of(model, prompt)
    tokens = np.concatenate([prompt, greedy]).astype(np.int32)
    logits = logits_of(model, tokens)
    noise = distance(logits_of(model.double(), tokens), logits)
    two = np.sort(logits[PROMPT - 1 : -1])[:, -2:]
    gap, distinct, wrong = (
        two[:, 1] - two[:, 0],
        len(set(greedy.tolist())),
        logits[PROMPT - 1 : -1].argmax(-1) != greedy,
    )
    if len(greedy) != STEPS or wrong.any():
        sys.exit(
            f"{name}: {len(greedy)} tokens; with a cache it goes another way at {np.flatnonzero(wrong)}: {gap[wrong]}"
        )
    if distinct <= 8:
        sys.exit(f"{name}: only {distinct} tokens in {STEPS}: take another offset of the seed")
    np.savez_compressed(folder / "golden.npz", tokens=tokens, prompt_len=PROMPT, logits=logits, greedy=greedy)
    sizes = ", ".join(f"{p.name} {p.stat().st_size}" for p in sorted(folder.iterdir()))
    print(f"{name}: smallest gap {gap.min():.4f}, {distinct} distinct tokens, {noise:.0e} by rounding; {sizes}")


def make_demo(out: Path) -> None:
    text = (ROOT / "scripts" / "data" / "passage.txt").read_bytes()[:600]
    model = AutoModelForCausalLM.from_pretrained(ROOT / "helix_jax" / "demo", dtype=torch.float32)
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits = model(tokens).logits[0, ::STRIDE].numpy()
        greedy = model.generate(tokens, max_new_tokens=64, do_sample=False)[0, tokens.shape[1] :].numpy()
    file = out / "demo.npz"
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, tokens=tokens[0].numpy(), stride=STRIDE, logits=logits, greedy=greedy)
    print(f"wrote {file}: {logits.shape} logits; goes on with {bytes(greedy.tolist())!r}")


# --- by how much each feature counts


@dataclass(frozen=True)
class Ablation:
    label: str
    change: dict[str, Any] = field(default_factory=dict)  # of the settings
    act: Callable[[Any], None] | None = None  # on the model
    edit: Callable[[Tensors], Tensors] | None = None  # of the stored tensors


def fill(pattern: str, value: float) -> Callable[[Any], None]:
    """Sets the tensors whose names match."""

    def act(model: Any) -> None:
        for name, tensor in model.state_dict().items():
            if re.search(pattern, name):
                tensor.fill_(value)

    return act


def skip(kind: str) -> Callable[[Any], None]:
    """Takes the modules of this name out."""

    def act(model: Any) -> None:
        for name, module in list(model.named_modules()):
            if hasattr(module, kind) and "layers." in name:
                setattr(module, kind, torch.nn.Identity())

    return act


def halve(model: Any) -> None:
    """Reorders rows so that the rotation, which is of neighbours, turns the halves instead."""
    for module in model.modules():
        if hasattr(module, "kv_a_proj_with_mqa"):
            width = module.qk_rope_head_dim
            order = torch.arange(width).view(2, -1).T.flatten()
            query = module.q_proj if module.q_lora_rank is None else module.q_b_proj
            heads = query.weight.view(module.num_heads, module.qk_head_dim, -1)
            for weight in (heads, module.kv_a_proj_with_mqa.weight):
                weight[..., -width:, :] = weight[..., -width:, :][..., order, :]


def of_rope(rope: dict[str, Any]) -> Iterator[Ablation]:
    def changed(label: str, **values: Any) -> Ablation:
        return Ablation(f"rope: {label}", {"rope_parameters": rope | values})

    if "full_attention" in rope:
        full, local = rope["full_attention"], rope["sliding_attention"]
        yield changed("global factor 1", full_attention=full | {"factor": 1.0})
        yield changed("local factor too", sliding_attention=full | {"rope_theta": local["rope_theta"]})
        yield changed("one base", sliding_attention=local | {"rope_theta": full["rope_theta"]})
        return
    yield changed("base doubled", rope_theta=2 * rope["rope_theta"])
    kind = rope["rope_type"]
    if kind != "default":
        yield changed("no scaling", rope_type="default")
    if kind in ("llama3", "yarn"):
        yield changed("linear instead", rope_type="linear")
    if kind == "llama3":
        yield changed("no blend", high_freq_factor=1.0001)
    if kind == "yarn":
        yield changed("beta_fast 32", beta_fast=32.0)
        yield changed("beta_slow 2", beta_slow=2.0)
        yield changed("truncate the other way", truncate=not rope.get("truncate", True))
        if rope.get("mscale"):
            yield changed("no mscale_all_dim", mscale_all_dim=0.0, attention_factor=1.0)
            yield changed("mscale 2", mscale=2.0)
        else:
            yield changed("no attention factor", attention_factor=1.0)


def of_experts(config: Any) -> Iterator[Ablation]:
    def changed(label: str, **values: Any) -> Ablation:
        return Ablation(label, values)

    if top := getattr(config, "num_experts_per_tok", None):
        yield changed("top-k + 1", num_experts_per_tok=top + 1)
        yield changed("top-k - 1", num_experts_per_tok=top - 1)
    if (getattr(config, "n_group", None) or 1) > 1:
        yield changed("no group limit", topk_group=config.n_group)
        if config.model_type == "deepseek_v3":
            yield changed("topk_group - 1", topk_group=config.topk_group - 1)
    if hasattr(config, "norm_topk_prob") and config.model_type != "deepseek_v2":  # whose code does not look at it
        yield changed("norm_topk_prob the other way", norm_topk_prob=not config.norm_topk_prob)
    if hasattr(config, "routed_scaling_factor"):
        yield changed("routed_scaling_factor 1", routed_scaling_factor=1.0)
    if hasattr(config, "swiglu_limit"):
        yield changed("swiglu not clamped", swiglu_limit=1e9)
        yield changed("swiglu_alpha 1", swiglu_alpha=1.0)


def of_attention(config: Any) -> Iterator[Ablation]:
    def changed(label: str, **values: Any) -> Ablation:
        return Ablation(label, values)

    if window := getattr(config, "sliding_window", None):
        yield changed("window off", sliding_window=1 << 20)
        yield changed("window + 1", sliding_window=window + 1)
        yield changed("window - 1", sliding_window=window - 1)
        kinds = getattr(config, "layer_types", None) or []
        if len(set(kinds)) > 1:
            yield changed("layer kinds turned by one", layer_types=[*kinds[1:], kinds[0]])
            yield changed("window in all layers", layer_types=["sliding_attention"] * len(kinds))
    if hasattr(config, "qk_rope_head_dim"):
        yield Ablation("rope not interleaved", act=halve)
    if hasattr(config, "query_pre_attn_scalar"):
        yield changed("query_pre_attn_scalar = head_dim", query_pre_attn_scalar=config.head_dim)


def of_tensors(names: list[str]) -> Iterator[Ablation]:
    kinds = sorted({re.sub(r"^(model\.)?(layers\.\d+\.)?", "", name) for name in names})
    gemma = any("pre_feedforward" in kind for kind in kinds)
    for kind in kinds:
        ending = rf"(^|\.){re.escape(kind)}$"
        if kind.endswith("sinks"):
            yield Ablation(f"{kind} -inf", act=fill(ending, -torch.inf))
        elif kind.endswith("bias"):
            yield Ablation(f"{kind} 0", act=fill(ending, 0.0))
        elif "norm" in kind:
            yield Ablation(f"{kind} {0 if gemma else 1}", act=fill(ending, 0.0 if gemma else 1.0))
    for kind in ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "post_feedforward_layernorm"):
        if any(f"{kind}." in name for name in kinds):
            yield Ablation(f"no {kind}", act=skip(kind))
    if any("shared_experts" in name for name in kinds):
        yield Ablation("no shared experts", act=fill(r"shared_experts\.down_proj", 0.0))
    if gemma:
        yield Ablation("silu for gelu", {"hidden_activation": "silu"})
        yield Ablation("embeddings not scaled", act=lambda model: model.model.embed_tokens.embed_scale.fill_(1.0))


def of_quantization(method: str) -> Iterator[Ablation]:
    def rolled(ending: str, axis: int) -> Callable[[Tensors], Tensors]:
        return lambda tensors: {k: v.roll(1, axis) if k.endswith(ending) else v for k, v in tensors.items()}

    def swapped(tensors: Tensors) -> Tensors:
        return {k: (v >> 4) | (v << 4) if k.endswith("_blocks") else v for k, v in tensors.items()}

    if method == "fp8":
        yield Ablation("scales of the next block row", edit=rolled("_scale_inv", 0))
        yield Ablation("scales of the next block column", edit=rolled("_scale_inv", 1))
    if method == "mxfp4":
        yield Ablation("scales of the next group", edit=rolled("_scales", -1))
        yield Ablation("scales of the next row", edit=rolled("_scales", -2))
        yield Ablation("high nibble before low", edit=swapped)


@torch.no_grad()
def ablate(name: str, out: Path) -> None:
    folder = out / name
    golden = np.load(folder / "golden.npz")
    config, model = AutoConfig.from_pretrained(folder), load(folder)
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method", "")
    rows = [
        Ablation("nothing"),
        Ablation("rms_norm_eps 1e-6", {"rms_norm_eps": 1e-6}),
        *of_rope(config.rope_parameters),
        *of_attention(config),
        *of_experts(config),
        *of_tensors(list(model.state_dict())),
        *of_quantization(method),
    ]
    print(f"{name}: relative change of the logits by")
    for row in rows:
        changed = load(folder, row.change, row.edit)
        if row.act:
            row.act(changed)
        far = distance(logits_of(changed, golden["tokens"]), golden["logits"])
        print(f"    {row.label:40} {far:8.4f}{'' if far > 1e-2 or row.label == 'nothing' else '  TOO LITTLE'}")


def check(folder: Path, golden: Path) -> int:
    held = np.load(golden)
    far = distance(logits_of(load(folder), held["tokens"]), held["logits"])
    print(f"{folder}: {far:.2e} from {golden}")
    return int(not far <= 1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(['demo', *FAMILIES])}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--check", type=Path, nargs=2, metavar=("FOLDER", "GOLDEN.npz"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.check:
        return check(*args.check)
    if unknown := set(args.names) - {"demo", *FAMILIES}:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are demo, {', '.join(FAMILIES)}")
    for name in args.names or ["demo", *FAMILIES]:
        if args.ablate:
            if name != "demo":
                ablate(name, args.out)
        elif name == "demo":
            make_demo(args.out)
        else:
            make(name, args.out, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
