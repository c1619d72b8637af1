#!/usr/bin/env python3
"""Times decode attention over pages on one GPU, beside what the memory can do and what other libraries reach.

python scripts/bench_attention.py --cases grouped latent unequal small --json attention.json

Each contender is checked before it is timed. All of a case are timed in turn, round after round, over buffers larger
than any cache, many calls in a row as the layers of a model make them; the table gives medians. Contenders that are not
installed (FlashInfer, PyTorch) are left out. Errors are relative: to float64, of large cases to float32.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from reporting import Parser, exit_status, new_figure, write_json
from rich.console import Console
from rich.table import Table

from helix_jax.attention import attend
from helix_jax.kernels import PageFormat, attend_by, chosen

WIDTH, LATENT, LATENT_VALUES, PAGE = 128, 576, 512, 64
ROTATED_BYTES = 2**28  # and more lie between two reads of the same: no cache of a GPU holds them
ERROR = 1e-2  # relative, of what may be timed: bfloat16 inputs, and outputs of some
EXACT_BYTES = 2**26  # what a host attends to in float64 in a second or two

Call = Callable[[int], Any]  # the attention of one layer


@dataclass(frozen=True)
class Case:
    """Rows of these lengths, one new token each. kv_heads 0: latent attention, `group` heads over one latent."""

    name: str
    kv_heads: int
    group: int
    lengths: tuple[int, ...]

    @property
    def latent(self) -> bool:
        return self.kv_heads == 0

    @property
    def heads(self) -> int:
        return max(self.kv_heads, 1) * self.group

    @property
    def width(self) -> int:
        return LATENT if self.latent else WIDTH

    @property
    def scale(self) -> float:
        return self.width**-0.5

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "v_width": LATENT_VALUES if self.latent else None}

    @property
    def bytes(self) -> int:
        """Of keys and values that are read."""
        numbers = LATENT if self.latent else 2 * self.kv_heads * WIDTH
        return 2 * numbers * sum(self.lengths)

    @property
    def buffers(self) -> int:
        """Sets of pages, used in turn."""
        return max(2, -(-ROTATED_BYTES // self.bytes))

    @property
    def equal(self) -> bool:
        """Rows of one length in whole pages, which need no mask: for contenders without."""
        return len(set(self.lengths)) == 1 and self.lengths[0] % PAGE == 0


def zipf(rows: int, longest: int) -> tuple[int, ...]:
    """The row of rank r has longest / r slots."""
    return tuple(max(1, longest // (rank + 1)) for rank in range(rows))


CASES = {
    "grouped": [
        Case("B=1 K=8 G=8 S=1M", 8, 8, (2**20,)),
        Case("B=32 K=8 G=8 S=32K", 8, 8, (2**15,) * 32),
        Case("B=8 K=8 G=4 S=128K", 8, 4, (2**17,) * 8),
        Case("B=64 K=8 G=4 S=8K", 8, 4, (2**13,) * 64),
    ],
    "latent": [
        Case("latent N=128 B=1 S=1M", 0, 128, (2**20,)),
        Case("latent N=128 B=32 S=32K", 0, 128, (2**15,) * 32),
        Case("latent N=16 B=32 S=32K", 0, 16, (2**15,) * 32),
    ],
    "unequal": [
        Case("B=64 K=8 G=4 Zipf from 256K", 8, 4, zipf(64, 2**18)),
        Case("B=16 K=8 G=8 Zipf from 128K", 8, 8, zipf(16, 2**17)),
    ],
    "small": [Case("B=1 K=8 G=4 S=4K", 8, 4, (2**12,)), Case("B=8 K=8 G=4 S=1K", 8, 4, (2**10,) * 8)],
    "context": [Case(f"B=1 K=8 G=4 S={2**n}", 8, 4, (2**n,)) for n in range(10, 21)],
    "batch": [Case(f"B={2**n} K=8 G=4 S=4K", 8, 4, (2**12,) * 2**n) for n in range(9)],
}


@dataclass
class Inputs:
    """A case's buffers: queries, pages that lie about in pools, and for some contenders the same rows end to end."""

    case: Case
    q_BTNH: Array = field(init=False)
    pools: list[tuple[Array, Array | None]] = field(init=False)
    table_BM: np.ndarray = field(init=False)
    seen: tuple[Array, Array, Array] = field(init=False)  # table, lo, hi as `attend` takes them

    def __post_init__(self) -> None:
        case = self.case
        pages_B = [-(-length // PAGE) for length in case.lengths]
        entries = np.random.default_rng(0).permutation(sum(pages_B)).astype(np.int32)
        self.table_BM = np.zeros((len(pages_B), max(pages_B)), np.int32)
        for row, (count, end) in enumerate(zip(pages_B, np.cumsum(pages_B), strict=True)):
            self.table_BM[row, :count] = entries[end - count : end]
        hi_BT = jnp.asarray(case.lengths, jnp.int32)[:, None]
        self.seen = jnp.asarray(self.table_BM), jnp.zeros_like(hi_BT), hi_BT
        shape = (len(entries), max(case.kv_heads, 1), PAGE, case.width)
        self.q_BTNH = jax.random.normal(jax.random.key(0), (len(pages_B), 1, case.heads, case.width), jnp.bfloat16)
        self.pools = [
            (random_bf16(2 * i, shape), None if case.latent else random_bf16(2 * i + 1, shape))
            for i in range(case.buffers)
        ]

    @cached_property
    def contiguous(self) -> list[tuple[Array, Array]]:
        """[B, S, K, H], for those who know no pages."""

        @jax.jit
        def rows(pool_AKWH: Array, table_BM: Array) -> Array:
            x_BMWKH = jnp.take(pool_AKWH, table_BM, axis=0).swapaxes(2, 3)
            return x_BMWKH.reshape(x_BMWKH.shape[0], -1, *x_BMWKH.shape[3:])

        return [(rows(k, self.seen[0]), rows(v, self.seen[0])) for k, v in self.pools if v is not None]


def installed(name: str) -> Any:
    """The module, or None."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def random_bf16(seed: int, shape: tuple[int, ...]) -> Array:
    """Multiples of 1/64 in [-2, 2): eight random bits each, so that a cache of gigabytes is made in no time."""

    @jax.jit
    def make() -> Array:
        return jax.random.bits(jax.random.key(seed), shape, jnp.uint8).astype(jnp.int8).astype(jnp.bfloat16) / 64

    return make()


# Each contender takes the inputs and gives a function of nothing that runs `layers` calls and waits for none, and one
# that waits; `output` is what one call gives, as [B, N, H], to be checked.


@dataclass(frozen=True)
class Contender:
    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    output: Callable[[], np.ndarray] | None = None


def in_one_program(inputs: Inputs, layers: int, one: Callable[..., Array]) -> Contender:
    """`one(q, k, v)` as the layers of a model call it."""
    buffers = [inputs.pools[i % inputs.case.buffers] for i in range(layers)]
    return _program(inputs, buffers, one)


def _program(inputs: Inputs, buffers: list[Any], one: Callable[..., Array]) -> Contender:
    @jax.jit
    def program(q_BTNH: Array, buffers: list[Any]) -> list[Array]:
        return [one(q_BTNH * (1 + i), k, v) for i, (k, v) in enumerate(buffers)]

    return Contender(
        run=lambda: program(inputs.q_BTNH, buffers),
        wait=jax.block_until_ready,
        output=lambda: np.asarray(program(inputs.q_BTNH, buffers[:1])[0].astype(jnp.float32)[:, 0]),
    )


def ceiling(inputs: Inputs, layers: int) -> Contender:
    """Reads as many bytes from one array: the largest of its numbers."""
    count = inputs.case.buffers
    arrays = [random_bf16(10_000 + i, (inputs.case.bytes // 2,)) for i in range(count)]
    buffers = [arrays[i % count] for i in range(layers)]
    program = jax.jit(lambda buffers: [jnp.maximum(x, -i).max() for i, x in enumerate(buffers)])
    return Contender(lambda: program(buffers), jax.block_until_ready)


def paged(kernel: str, inputs: Inputs, layers: int) -> Contender | None:
    case = inputs.case
    pages = PageFormat(case.width, PAGE, jnp.bfloat16, case.options["v_width"])
    if kernel != "xla" and chosen("auto", jax.devices()[0], pages) != kernel:
        return None
    twin = attend_by(kernel)
    return in_one_program(inputs, layers, lambda q, k, v: twin(q, k, v, *inputs.seen, **case.options).o_BTNH)


def gathered(inputs: Inputs, layers: int) -> Contender | None:
    """All pages of a row gathered at once, whatever room that takes; einsum, softmax, einsum."""
    if not inputs.case.equal:
        return None
    v_width = inputs.case.options["v_width"]

    def one(q_BTNH: Array, k_AKWH: Array, v_AKWH: Array | None) -> Array:
        k_BMKWH = jnp.take(k_AKWH, inputs.seen[0], axis=0)
        v_BMKWH = k_BMKWH[..., :v_width] if v_AKWH is None else jnp.take(v_AKWH, inputs.seen[0], axis=0)
        B, _, N, H = q_BTNH.shape
        q_BKGH = q_BTNH.reshape(B, -1, inputs.case.group, H)
        s_BKGMW = jnp.einsum("bkgh,bmkwh->bkgmw", q_BKGH, k_BMKWH, preferred_element_type=jnp.float32)
        p_BKGMW = jax.nn.softmax(s_BKGMW * inputs.case.scale, axis=(-2, -1)).astype(jnp.bfloat16)
        o_BKGH = jnp.einsum("bkgmw,bmkwh->bkgh", p_BKGMW, v_BMKWH, preferred_element_type=jnp.float32)
        return o_BKGH.reshape(B, 1, N, -1)

    return in_one_program(inputs, layers, one)


def cudnn(inputs: Inputs, layers: int) -> Contender | None:
    if inputs.case.latent or not inputs.case.equal:
        return None
    buffers = [inputs.contiguous[i % inputs.case.buffers] for i in range(layers)]
    one = partial(jax.nn.dot_product_attention, scale=inputs.case.scale, implementation="cudnn")
    return _program(inputs, buffers, lambda q, k, v: one(q, k, v))


def sdpa(inputs: Inputs, layers: int) -> Contender | None:
    torch = installed("torch")
    if inputs.case.latent or not inputs.case.equal or torch is None:
        return None
    attention = installed("torch.nn.attention")

    q = torch.from_dlpack(inputs.q_BTNH).transpose(1, 2)
    rows = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in kv) for kv in inputs.contiguous]

    def one(k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=inputs.case.scale, enable_gqa=True)

    def run() -> list[Any]:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return [one(*rows[i % inputs.case.buffers]) for i in range(layers)]

    return _torch(run, lambda outputs: outputs[0][:, :, 0])


def flashinfer(inputs: Inputs, layers: int) -> Contender | None:
    torch = installed("torch")
    if torch is None or installed("flashinfer") is None:
        return None

    q = torch.from_dlpack(inputs.q_BTNH[:, 0])
    pools = [tuple(torch.from_dlpack(x) for x in kv if x is not None) for kv in inputs.pools]
    one = _flashinfer_latent(inputs, q) if inputs.case.latent else _flashinfer_grouped(inputs, q)
    return _torch(lambda: [one(*pools[i % inputs.case.buffers]) for i in range(layers)], lambda outputs: outputs[0][0])


def _torch(run: Callable[[], list[Any]], first: Callable[[list[Any]], Any]) -> Contender:
    return Contender(run, lambda _: installed("torch").cuda.synchronize(), lambda: first(run()).float().cpu().numpy())


def _flashinfer_pages(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Where each row's pages begin in the list of pages, that list, and how many tokens the last page holds."""
    torch = installed("torch")
    pages_B = [-(-length // PAGE) for length in inputs.case.lengths]
    list_of = np.concatenate([row[:count] for row, count in zip(inputs.table_BM, pages_B, strict=True)])
    last_B = [length - (count - 1) * PAGE for length, count in zip(inputs.case.lengths, pages_B, strict=True)]
    starts = torch.tensor([0, *np.cumsum(pages_B)], dtype=torch.int32)
    return starts, torch.from_numpy(list_of).cuda(), torch.tensor(last_B, dtype=torch.int32)


def _flashinfer_grouped(inputs: Inputs, q: Any) -> Callable[..., Any]:
    torch, library = installed("torch"), installed("flashinfer")
    case, space = inputs.case, torch.empty(2**28, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "sm_scale": case.scale}
    wrapper.plan(*_flashinfer_pages(inputs), case.heads, case.kv_heads, case.width, PAGE, **types)
    return lambda k, v: wrapper.run(q, (k, v), return_lse=True)


def _flashinfer_latent(inputs: Inputs, q: Any) -> Callable[..., Any]:
    torch, library = installed("torch"), installed("flashinfer")
    case, space = inputs.case, torch.empty(2**28, dtype=torch.uint8, device="cuda")
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(space, backend="fa3")
    starts, pages, _ = _flashinfer_pages(inputs)
    queries = torch.arange(len(case.lengths) + 1, dtype=torch.int32).cuda()
    lengths = torch.tensor(case.lengths, dtype=torch.int32).cuda()
    shape = (case.heads, LATENT_VALUES, LATENT - LATENT_VALUES, PAGE, False, case.scale, torch.bfloat16, torch.bfloat16)
    wrapper.plan(queries, starts.cuda(), pages, lengths, *shape)
    q_latent, q_rope = q[..., :LATENT_VALUES].contiguous(), q[..., LATENT_VALUES:].contiguous()
    return lambda k: wrapper.run(
        q_latent, q_rope, k[:, 0, :, :LATENT_VALUES], k[:, 0, :, LATENT_VALUES:], return_lse=True
    )


CONTENDERS: dict[str, Callable[[Inputs, int], Contender | None]] = {
    "ceiling": ceiling,
    "mosaic_gpu": partial(paged, "mosaic_gpu"),
    "xla": partial(paged, "xla"),
    "gather + einsum": gathered,
    "jax cudnn": cudnn,
    "torch sdpa": sdpa,
    "flashinfer": flashinfer,
}


def reference(inputs: Inputs) -> np.ndarray:
    """Attention over the first buffer, a row at a time: in float64 on the host; where that is too much, in float32."""
    one = _row_in_float64 if inputs.case.bytes <= EXACT_BYTES else _row_in_float32
    return np.concatenate([one(inputs, row) for row in range(len(inputs.table_BM))])


def _row_in_float32(inputs: Inputs, row: int) -> np.ndarray:
    mine = slice(row, row + 1)
    table_BM, lo_BT, hi_BT = (x[mine] for x in inputs.seen)
    pages = [None if pool is None else pool[table_BM[0]].astype(jnp.float32) for pool in inputs.pools[0]]
    run = jax.jit(partial(attend, **inputs.case.options))
    arguments = inputs.q_BTNH[mine].astype(jnp.float32), *pages, jnp.arange(table_BM.shape[1])[None]
    return np.asarray(run(*arguments, lo_BT, hi_BT).o_BTNH[:, 0])


def _row_in_float64(inputs: Inputs, row: int) -> np.ndarray:
    case = inputs.case
    k, v = inputs.pools[0]
    pages = [np.asarray(pool[inputs.table_BM[row]], np.float64) for pool in (k, v) if pool is not None]
    k_KSH, *rest = (x.swapaxes(0, 1).reshape(x.shape[1], -1, case.width)[:, : case.lengths[row]] for x in pages)
    v_KSH = rest[0] if rest else k_KSH[..., :LATENT_VALUES]
    q_KGH = np.asarray(inputs.q_BTNH[row, 0], np.float64).reshape(-1, case.group, case.width)
    s_KGS = case.scale * q_KGH @ k_KSH.swapaxes(1, 2)
    p_KGS = np.exp(s_KGS - s_KGS.max(-1, keepdims=True))
    return ((p_KGS @ v_KSH) / p_KGS.sum(-1, keepdims=True)).reshape(1, case.heads, -1)


def checked(inputs: Inputs, contenders: dict[str, Contender]) -> dict[str, float]:
    """The relative error of each; raises if one is wrong, or not the same twice."""
    expected, errors = reference(inputs), {}
    for name, contender in contenders.items():
        if contender.output is None:
            continue
        found = contender.output()
        errors[name] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        if not errors[name] < ERROR:
            raise ValueError(
                f"{inputs.case.name}: {name} is wrong, by {errors[name]:.2g} relative: leave it out of --contenders"
            )
        if name == "mosaic_gpu" and not np.array_equal(found, contender.output()):
            raise ValueError(f"{inputs.case.name}: {name} gives other bits on a second run")
    return errors


def timed(contenders: dict[str, Contender], layers: int, rounds: int) -> dict[str, float]:
    """Seconds per layer, the median of the rounds.

    Of three calls in a row less one: what the host does before the first layer and after the last is none of the GPU's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, contender in [*contenders.items()] * (rounds + 1):  # the first round warms up
        once, thrice = (_elapsed(contender, calls) for calls in (1, 3))
        seconds[name].append((thrice - once) / (2 * layers))
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def _elapsed(contender: Contender, calls: int) -> float:
    start = time.perf_counter()
    results = [contender.run() for _ in range(calls)]
    contender.wait(results)
    return time.perf_counter() - start


def layers_for(case: Case) -> int:
    """So many that a call takes longer on the GPU than on the host, which else would hold it up."""
    return case.buffers * max(1, int(np.clip(4e10 // case.bytes, 8, 64)) // case.buffers)


def measured(case: Case, wanted: list[str], rounds: int) -> dict[str, Any]:
    inputs, layers = Inputs(case), layers_for(case)
    contenders = {name: CONTENDERS[name](inputs, layers) for name in wanted}
    present = {name: contender for name, contender in contenders.items() if contender is not None}
    errors = checked(inputs, present)
    seconds = timed(present, layers, rounds)
    results = {
        name: {
            "us": 1e6 * second,
            "tb_per_s": case.bytes / second / 1e12,
            "to_ceiling": seconds["ceiling"] / second if "ceiling" in seconds else None,
            "error": errors.get(name),
        }
        for name, second in seconds.items()
    }
    return {"case": {**asdict(case), "bytes": case.bytes}, "layers": layers, "results": results}


def table_of(reports: list[dict[str, Any]], wanted: list[str]) -> Table:
    table = Table("TB/s (share of the ceiling)", *wanted, title=jax.devices()[0].device_kind)
    for report in reports:
        cells = []
        for name in wanted:
            result = report["results"].get(name)
            cells.append("-" if result is None else _cell(result))
        table.add_row(report["case"]["name"], *cells)
    return table


def _cell(result: dict[str, Any]) -> str:
    share = "" if result["to_ceiling"] is None else f" ({result['to_ceiling']:.3f})"
    return f"{result['tb_per_s']:.2f}{share}" if result["us"] > 100 else f"{result['us']:.1f} us{share}"


def draw(figure: Any, reports: list[dict[str, Any]], wanted: list[str], file: Path) -> None:
    figure.set_size_inches(3 + len(reports), 5)
    axes = figure.subplots()
    for i, name in enumerate(wanted):
        points = [(x, r["results"][name]["tb_per_s"]) for x, r in enumerate(reports) if name in r["results"]]
        axes.plot(*zip(*points, strict=True), marker="os^vDPX"[i % 7], label=name)
    axes.set_xticks(range(len(reports)), [r["case"]["name"] for r in reports], rotation=30, ha="right")
    axes.set(ylabel="TB/s of keys and values", ylim=(0, None), title=jax.devices()[0].device_kind)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=["grouped", "latent", "unequal", "small"])
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    add("--rounds", type=int, default=7, metavar="N", help="of which the median is told (default: 7)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, after every case")
    add("--plot", type=Path, metavar="FILE.png", help="draw TB/s")
    return parser.parse_args()


def bench(options: argparse.Namespace) -> None:
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}: give at least 1")
    platform = jax.devices()[0].platform
    if platform != "gpu":
        raise ValueError(f"this times a GPU, and JAX sees a {platform.upper()}: run it on one")
    figure = new_figure("--plot", options.plot) if options.plot else None
    reports: list[dict[str, Any]] = []
    write_json(options.json, reports)  # a file that cannot be written is better known now
    for case in [case for group in options.cases for case in CASES[group]]:
        reports.append(measured(case, options.contenders, options.rounds))
        write_json(options.json, reports)
        told = (f"{name} {_cell(result)}" for name, result in reports[-1]["results"].items())
        print(f"{case.name}: {', '.join(told)}", file=sys.stderr, flush=True)
    if figure:
        draw(figure, reports, options.contenders, options.plot)
    Console(width=None if sys.stdout.isatty() else 180).print(table_of(reports, options.contenders))


def main() -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory too
    return exit_status(lambda: bench(parse_arguments()), if_too_large="time fewer --contenders at once")


if __name__ == "__main__":
    sys.exit(main())
