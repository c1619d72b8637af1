#!/usr/bin/env python3
# pyright: reportMissingImports=false
"""Time decode steps and prefill of a Llama-shaped model in PyTorch and FlashInfer: the baseline of bench_decode.py.

python scripts/baseline_torch.py --config configs/llama-3.1-8b.toml --devices 2 --decode 1x8192 32x8192 --prefill 2048

It is the program that a GPU user would write without a serving framework. A decode step uses FlashInfer for attention
over pages, norms, rotary embedding, the append and the activation, cuBLAS for the products, and NCCL for the
all-reduces, and it is recorded as one CUDA graph. Prefill is eager PyTorch with scaled_dot_product_attention. Weights
and cache are random. The model is tensor parallel over the devices, with one process each. This needs torch, and
flashinfer for decoding. It does not need JAX.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PAGE = 64
SCALE = 0.02
WORKSPACE_BYTES = 512 << 20
DTYPE = torch.bfloat16
REPLAYS, REPEATS = 20, 5


@dataclass(frozen=True)
class Shape:
    """The sizes of a model on one of its devices."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    vocab: int
    eps: float


@dataclass
class Layer:
    """The weights of a layer on one device. A matrix is [outputs, inputs]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    ff_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Model:
    """Random weights of one device, and the two ways to run them."""

    def __init__(self, shape: Shape, rank: int, devices: int, vocab: int):
        self.shape, self.devices, self.device = shape, devices, torch.device("cuda", rank)
        self.random = torch.Generator(device=self.device).manual_seed(rank)
        heads = shape.heads + 2 * shape.kv_heads
        self.embed, self.head = self.noise(vocab, shape.width), self.noise(shape.vocab, shape.width)
        self.norm = self.ones(shape.width)
        self.layers = [
            Layer(
                self.ones(shape.width),
                self.noise(heads * shape.head_width, shape.width),
                self.noise(shape.width, shape.heads * shape.head_width),
                self.ones(shape.width),
                self.noise(2 * shape.ff_width, shape.width),
                self.noise(shape.width, shape.ff_width),
            )
            for _ in range(shape.layers)
        ]

    def noise(self, *sizes: int, scale: float = SCALE) -> torch.Tensor:
        return torch.empty(*sizes, dtype=DTYPE, device=self.device).normal_(0, scale, generator=self.random)

    def ones(self, *sizes: int) -> torch.Tensor:
        return torch.ones(*sizes, dtype=DTYPE, device=self.device)

    def sum_over_devices(self, x: torch.Tensor) -> torch.Tensor:
        if self.devices > 1:
            dist.all_reduce(x)
        return x

    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the most probable token of each row, from the logits of all devices."""
        logits = torch.mm(hidden, self.head.t()).float()
        if self.devices > 1:
            parts = torch.empty(self.devices, *logits.shape, device=self.device)
            dist.all_gather_into_tensor(parts, logits)
            logits = parts.permute(1, 0, 2).reshape(len(hidden), -1)
        return logits.argmax(-1)

    @torch.no_grad()
    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        """Run a prompt, given as its embeddings, through all layers."""
        functional, shape, tokens = torch.nn.functional, self.shape, len(x)
        parts = (shape.heads, shape.kv_heads, shape.kv_heads)
        for layer in self.layers:
            normed = functional.rms_norm(x, (shape.width,), layer.attention_norm, shape.eps)
            qkv = torch.mm(normed, layer.qkv.t()).view(1, tokens, sum(parts), shape.head_width).transpose(1, 2)
            out = functional.scaled_dot_product_attention(*qkv.split(parts, dim=1), is_causal=True, enable_gqa=True)
            out = torch.mm(out.transpose(1, 2).reshape(tokens, -1), layer.out.t())
            x = x + self.sum_over_devices(out)
            normed = functional.rms_norm(x, (shape.width,), layer.ff_norm, shape.eps)
            gate, up = torch.mm(normed, layer.gate_up.t()).chunk(2, dim=-1)
            x = x + self.sum_over_devices(torch.mm(functional.silu(gate) * up, layer.down.t()))
        return self.choose(functional.rms_norm(x[-1:], (shape.width,), self.norm, shape.eps))


class DecodeStep:
    """A decode step of some rows over a cache of pages in random order."""

    def __init__(self, model: Model, rows: int, context: int):
        import flashinfer

        self.flashinfer, self.model = flashinfer, model
        shape, device = model.shape, model.device
        pages = context // PAGE + 1
        heads = (shape.kv_heads, shape.head_width)
        self.cache = [model.noise(rows * pages, 2, PAGE, *heads, scale=1) for _ in range(shape.layers)]
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.first_page = torch.arange(rows + 1, **ints) * pages
        self.pages = torch.randperm(rows * pages, device=device, generator=model.random).int()
        self.last_page_len = torch.full((rows,), context % PAGE + 1, **ints)
        self.position, self.row = torch.full((rows,), context, **ints), torch.arange(rows, **ints)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.attention = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=self.first_page.clone(),
            paged_kv_indices_buffer=self.pages.clone(),
            paged_kv_last_page_len_buffer=self.last_page_len.clone(),
        )
        lists = (self.first_page, self.pages, self.last_page_len)
        sizes = (shape.heads, shape.kv_heads, shape.head_width, PAGE)
        self.attention.plan(*lists, *sizes, q_data_type=DTYPE, kv_data_type=DTYPE)

    def run(self) -> torch.Tensor:
        model, eps = self.model, self.model.shape.eps
        residual = model.embed[self.token]
        x = self.flashinfer.norm.rmsnorm(residual, model.layers[0].attention_norm, eps)
        next_norms = [layer.attention_norm for layer in model.layers[1:]] + [model.norm]
        for layer, cache, next_norm in zip(model.layers, self.cache, next_norms, strict=True):
            x = model.sum_over_devices(torch.mm(self.attend(x, layer, cache), layer.out.t()))
            self.flashinfer.norm.fused_add_rmsnorm(x, residual, layer.ff_norm, eps)
            hidden = self.flashinfer.activation.silu_and_mul(torch.mm(x, layer.gate_up.t()))
            x = model.sum_over_devices(torch.mm(hidden, layer.down.t()))
            self.flashinfer.norm.fused_add_rmsnorm(x, residual, next_norm, eps)
        return model.choose(x)

    def attend(self, x: torch.Tensor, layer: Layer, cache: torch.Tensor) -> torch.Tensor:
        shape = self.model.shape
        qkv = torch.mm(x, layer.qkv.t()).view(len(x), -1, shape.head_width)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
        self.flashinfer.rope.apply_llama31_rope_pos_ids_inplace(q, k, self.position)
        lists = (self.pages, self.first_page, self.last_page_len)
        self.flashinfer.page.append_paged_kv_cache(k, v, self.row, self.position, cache, *lists)
        return self.attention.run(q, cache).view(len(x), -1)


def record(step: Callable[[], torch.Tensor]) -> torch.cuda.CUDAGraph:
    """Record a step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def time_calls(call: Callable[[], Any], calls: int) -> float:
    """Return the seconds of one call, the median of several measurements."""
    call()
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return median(seconds)


def measure(rank: int, options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Run everything on one device. The first one prints."""
    devices = options.devices
    torch.cuda.set_device(rank)
    if devices > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.port))
        dist.init_process_group("nccl", rank=rank, world_size=devices, device_id=torch.device("cuda", rank))
    split = {name: config[name] // devices for name in ("heads", "kv_heads", "ff_width", "vocab")}
    layers = options.layers or config["layers"]
    shape = Shape(layers, config["width"], head_width=config["head_width"], eps=config["norm_eps"], **split)
    model = Model(shape, rank, devices, config["vocab"])
    report: dict[str, dict[str, float]] = {"decode_ms": {}, "prefill_tokens_per_s": {}}
    for text in options.decode:
        rows, context = map(int, text.split("x"))
        step = DecodeStep(model, rows, context)
        report["decode_ms"][text] = 1e3 * time_calls(record(step.run).replay, REPLAYS)
        del step
        torch.cuda.empty_cache()
    for tokens in options.prefill:
        prompt = model.noise(tokens, shape.width)
        seconds = time_calls(lambda prompt=prompt: model.prefill(prompt), 1)
        report["prefill_tokens_per_s"][str(tokens)] = tokens / seconds
    if rank == 0:
        print(json.dumps(report), flush=True)
    if devices > 1:
        dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="model config, such as those in configs/")
    parser.add_argument("--devices", type=int, default=1, help="GPUs (default: 1)")
    parser.add_argument("--layers", type=int, help="time only the first layers (default: all)")
    parser.add_argument("--decode", nargs="*", default=[], metavar="ROWSxCONTEXT", help="decode steps, such as 8x32768")
    parser.add_argument("--prefill", nargs="*", type=int, default=[], metavar="TOKENS", help="lengths of prompts")
    parser.add_argument("--port", type=int, default=29513, help="port on which the processes meet")
    options = parser.parse_args()
    config = tomllib.loads(options.config.read_text())["model"]
    if options.devices == 1:
        measure(0, options, config)
    else:
        multiprocessing.spawn(measure, (options, config), nprocs=options.devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
