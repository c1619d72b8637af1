#!/usr/bin/env python3
"""Make the golden values of tests/golden/: the float32 results of Hugging Face transformers for folders of models.

    make_golden.py [--seed 0] [--out tests/golden] [NAME ...]    make these golden values, default all
    make_golden.py --check FOLDER GOLDEN.npz    exit 1 unless transformers computes the golden logits from FOLDER,
                                                which this library wrote

Each NAME in FAMILIES is a folder with a small random model that uses all features of its family: config.json and
model.safetensors, in the published layout, and golden.npz with 48 random tokens and 64 tokens of greedy decoding
(tokens, prompt_len, greedy), and the logits of all positions. `demo` is the file demo.npz, from the demo model of this
library.

This script needs torch and transformers, which the tests do not need. Run it by hand, and commit the files.
"""

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from golden_models import FAMILIES, Family
from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # pyright: ignore[reportMissingImports]
from transformers.utils import logging  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
STRIDE = 7
PROMPT, STEPS = 48, 64

Tensors = dict[str, torch.Tensor]


# The folders


def randomize(model: Any, rng: torch.Generator) -> None:
    """Set all weights to random values, including the initial zeros and ones, and round them to bfloat16."""
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
        elif "embed_tokens" in name and tied:  # with larger values each token is followed by itself
            noise *= 0.6 * model.config.hidden_size**-0.5
        elif value.ndim > 1 and "embed_tokens" not in name:
            transposed = model.config.model_type == "gpt_oss" and ".experts." in name
            noise *= 1.5 * value.shape[-2 if transposed else -1] ** -0.5
        value.copy_(noise.bfloat16())


def add_prediction_layer(tensors: Tensors, config: Any, rng: torch.Generator) -> None:
    """Add some tensors of the multi-token prediction layer, which follows the last layer and is not used."""
    prefix, width = f"model.layers.{config.num_hidden_layers}.", config.hidden_size
    shapes = {
        "enorm.weight": (width,),
        "hnorm.weight": (width,),
        "eh_proj.weight": (width, 2 * width),
        "self_attn.o_proj.weight": (width, config.num_attention_heads * getattr(config, "v_head_dim", width)),
        "shared_head.norm.weight": (width,),
    }
    tensors |= {prefix + name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}


def expand_scale(scale: torch.Tensor, shape: torch.Size, block: list[int]) -> torch.Tensor:
    """Return the scale of every number from the scales of its blocks."""
    return scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def quantize_fp8(tensors: Tensors, config: dict[str, Any], rng: torch.Generator) -> Tensors:
    """Quantize the projections in blocks, of which the last ones are partial.

    The stored scales are multiplied by random factors, so that a block with the scale of another one is noticed.
    """
    out, block = {}, config["weight_block_size"]
    for name, value in tensors.items():
        out[name] = value
        if (name.endswith("_proj.weight") and "eh_proj" not in name) or name.endswith("_proj_with_mqa.weight"):
            grid = [-(-size // b) for size, b in zip(value.shape, block, strict=True)]
            pad = [0, grid[1] * block[1] - value.shape[1], 0, grid[0] * block[0] - value.shape[0]]
            padded = torch.nn.functional.pad(value.float(), pad)
            scale = padded.view(grid[0], block[0], grid[1], block[1]).abs().amax((1, 3)) / 448
            out[name] = (value.float() / expand_scale(scale, value.shape, block)).to(torch.float8_e4m3fn)
            out[name + "_scale_inv"] = scale * torch.exp(0.4 * torch.randn(scale.shape, generator=rng))
    return out


def quantize_mxfp4(tensors: Tensors, config: dict[str, Any], rng: torch.Generator) -> Tensors:
    """Replace the weights of experts by random blocks. Only their shapes remain."""
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
            scale = expand_scale(tensors[name + "_scale_inv"], value.shape, config["weight_block_size"])
            out[name] = value.float() * scale
        elif name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            out[name] = convert_moe_packed_tensors(value, tensors[name + "_scales"], dtype=torch.float32)
        elif not name.endswith(("_scale_inv", "_scales")):
            out[name] = value
    return out


QUANTIZE = {"fp8": quantize_fp8, "mxfp4": quantize_mxfp4}


def write_folder(family: Family, folder: Path, rng: torch.Generator) -> None:
    """Write a random model in the layout of its publisher."""
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


def load(folder: Path) -> Any:
    """Load the model of a folder in float32, dequantized."""
    config = AutoConfig.from_pretrained(folder)
    settings = getattr(config, "quantization_config", None)
    with tempfile.TemporaryDirectory() as scratch:
        if settings:
            tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
            save_file(dequantize(tensors, settings), Path(scratch) / "model.safetensors", {"format": "pt"})
            delattr(config, "quantization_config")
            config.save_pretrained(scratch)
            folder = Path(scratch)
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


# The results of transformers


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
    """Return the relative error of `x`."""
    return float(np.linalg.norm(x.astype(np.float64) - ref) / np.linalg.norm(ref.astype(np.float64)))


def make(name: str, out: Path, seed: int) -> None:
    """Write the folder of a family, and its golden values."""
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
            f"{name}: {len(greedy)} tokens; with a cache other tokens follow at {np.flatnonzero(wrong)}: {gap[wrong]}"
        )
    if distinct <= 8:
        sys.exit(f"{name}: only {distinct} distinct tokens in {STEPS}: choose another offset of the seed")
    np.savez_compressed(folder / "golden.npz", tokens=tokens, prompt_len=PROMPT, logits=logits, greedy=greedy)
    sizes = ", ".join(f"{p.name} {p.stat().st_size}" for p in sorted(folder.iterdir()))
    print(f"{name}: smallest gap {gap.min():.4f}, {distinct} distinct tokens, {noise:.0e} by rounding; {sizes}")


def make_demo(out: Path) -> None:
    """Write demo.npz."""
    text = (ROOT / "scripts" / "data" / "passage.txt").read_bytes()[:600]
    model = AutoModelForCausalLM.from_pretrained(ROOT / "helix_jax" / "demo", dtype=torch.float32)
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits = model(tokens).logits[0, ::STRIDE].numpy()
        greedy = model.generate(tokens, max_new_tokens=64, do_sample=False)[0, tokens.shape[1] :].numpy()
    file = out / "demo.npz"
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, tokens=tokens[0].numpy(), stride=STRIDE, logits=logits, greedy=greedy)
    print(f"wrote {file}: {logits.shape} logits; continues with {bytes(greedy.tolist())!r}")


def check(folder: Path, golden: Path) -> int:
    """Compare a folder with golden logits. Return the exit code."""
    expected = np.load(golden)
    error = distance(logits_of(load(folder), expected["tokens"]), expected["logits"])
    print(f"{folder}: relative error {error:.2e} from {golden}")
    return int(not error <= 1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(['demo', *FAMILIES])}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random models (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden", help="folder to write to")
    parser.add_argument("--check", type=Path, nargs=2, metavar=("FOLDER", "GOLDEN.npz"), help="compare a folder")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.check:
        return check(*args.check)
    if unknown := set(args.names) - {"demo", *FAMILIES}:
        parser.error(f"NAME is {sorted(unknown)[0]!r}: choose one of demo, {', '.join(FAMILIES)}")
    for name in args.names or ["demo", *FAMILIES]:
        if name == "demo":
            make_demo(args.out)
        else:
            make(name, args.out, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
