"""Defines the cases of decode attention that bench_attention.py times, their buffers, and the implementations.

Each implementation has a function that takes the inputs and a number of layers and returns a `Contender`, or None if it
does not support the case or is not installed.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from helix_jax.kernels import backend_attend, choose_backend
from helix_jax.kernels.page_format import PageFormat

WIDTH, LATENT, LATENT_VALUES, PAGE = 128, 576, 512, 64
ROTATED_BYTES = 2**27  # at least as many are read before the same bytes again: more than the cache of a GPU stores


@dataclass(frozen=True)
class Case:
    """Rows of some lengths, with one new token each.

    Attributes:
        name: The name in reports.
        kv_heads: Key/value heads. 0 is latent attention, with one latent for all query heads.
        group: Query heads per key/value head, or per latent.
        lengths: The length of each row.
    """

    name: str
    kv_heads: int
    group: int
    lengths: tuple[int, ...]

    @property
    def latent(self) -> bool:
        """Whether attention is latent."""
        return self.kv_heads == 0

    @property
    def heads(self) -> int:
        """Query heads."""
        return max(self.kv_heads, 1) * self.group

    @property
    def width(self) -> int:
        """The width of a key."""
        return LATENT if self.latent else WIDTH

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.width**-0.5

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `attend`."""
        return {"scale": self.scale, "v_width": LATENT_VALUES if self.latent else None}

    @property
    def bytes(self) -> int:
        """The bytes of keys and values that are read."""
        numbers = LATENT if self.latent else 2 * self.kv_heads * WIDTH
        return 2 * numbers * sum(self.lengths)

    @property
    def buffers(self) -> int:
        """The number of sets of pages, which layers use in turn."""
        return max(2, -(-ROTATED_BYTES // self.bytes))

    @property
    def equal(self) -> bool:
        """Whether all rows have the same length in whole pages, and need no mask. Some contenders support no mask."""
        return len(set(self.lengths)) == 1 and self.lengths[0] % PAGE == 0


def zipf(rows: int, longest: int) -> tuple[int, ...]:
    """Return lengths by Zipf's law: the row of rank r, from 1, has longest / r slots."""
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
    """The buffers of a case.

    Attributes:
        case: The case.
        q_BTNH: The queries.
        pools: Pools of keys and of values, one pair per buffer. The pages of a row are scattered over a pool.
        table_BM: The page table, on the host.
        visible: The page table and the ranges of visible slots, as `attend` takes them: table, lo, hi.
    """

    case: Case
    q_BTNH: Array = field(init=False)
    pools: list[tuple[Array, Array | None]] = field(init=False)
    table_BM: np.ndarray = field(init=False)
    visible: tuple[Array, Array, Array] = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        pages_B = [-(-length // PAGE) for length in case.lengths]
        entries = np.random.default_rng(0).permutation(sum(pages_B)).astype(np.int32)
        self.table_BM = np.zeros((len(pages_B), max(pages_B)), np.int32)
        for row, (count, end) in enumerate(zip(pages_B, np.cumsum(pages_B), strict=True)):
            self.table_BM[row, :count] = entries[end - count : end]
        hi_BT = jnp.asarray(case.lengths, jnp.int32)[:, None]
        self.visible = jnp.asarray(self.table_BM), jnp.zeros_like(hi_BT), hi_BT
        shape = (len(entries), max(case.kv_heads, 1), PAGE, case.width)
        self.q_BTNH = jax.random.normal(jax.random.key(0), (len(pages_B), 1, case.heads, case.width), jnp.bfloat16)
        self.pools = [
            (random_bf16(2 * i, shape), None if case.latent else random_bf16(2 * i + 1, shape))
            for i in range(case.buffers)
        ]

    @cached_property
    def contiguous(self) -> list[tuple[Array, Array]]:
        """Keys and values of each buffer as [B, S, K, H], for contenders that support no pages."""

        @jax.jit
        def gather_rows(pool_AKWH: Array, table_BM: Array) -> Array:
            x_BMWKH = jnp.take(pool_AKWH, table_BM, axis=0).swapaxes(2, 3)
            return x_BMWKH.reshape(x_BMWKH.shape[0], -1, *x_BMWKH.shape[3:])

        table_BM = self.visible[0]
        return [(gather_rows(k, table_BM), gather_rows(v, table_BM)) for k, v in self.pools if v is not None]


def import_optional(name: str) -> Any:
    """Import a module. Return None if it is not installed."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@partial(jax.jit, static_argnames="shape")  # all buffers share one compilation
def random_bf16(seed: int, shape: tuple[int, ...]) -> Array:
    """Draw multiples of 1/64 in [-2, 2). They need eight random bits each, so gigabytes are drawn quickly."""
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint8).astype(jnp.int8).astype(jnp.bfloat16) / 64


@dataclass(frozen=True)
class Contender:
    """An implementation, ready to run.

    Attributes:
        run: Starts the calls of all layers, without waiting for them.
        wait: Waits for the results of `run`.
        output: Returns the result of one call as [B, N, H], to be checked. None if there is nothing to check.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    output: Callable[[], np.ndarray] | None = None


def compile_layers(inputs: Inputs, layers: int, attention: Callable[..., Array]) -> Contender:
    """Return a contender whose layers call `attention(q, k, v, table)` in one program, as those of a model do."""
    buffers = [inputs.pools[i % inputs.case.buffers] for i in range(layers)]
    return _compile(inputs, buffers, attention)


def _compile(inputs: Inputs, buffers: list[Any], attention: Callable[..., Array]) -> Contender:
    @jax.jit
    def program(q_BTNH: Array, buffers: list[Any]) -> list[Array]:
        outputs, table_BM = [], inputs.visible[0]
        for i, (k, v) in enumerate(buffers):
            outputs.append(attention(q_BTNH * (1 + i), k, v, table_BM))
            # Each layer waits for the previous one. Otherwise XLA merges the gathers of all layers into one.
            q_BTNH, table_BM, outputs[i] = lax.optimization_barrier((q_BTNH, table_BM, outputs[i]))
        return outputs

    return Contender(
        run=lambda: program(inputs.q_BTNH, buffers),
        wait=jax.block_until_ready,
        output=lambda: np.asarray(program(inputs.q_BTNH, buffers[:1])[0].astype(jnp.float32)[:, 0]),
    )


def make_ceiling(inputs: Inputs, layers: int) -> Contender:
    """Compute the maximum of an array with as many bytes: the upper bound of the bandwidth."""
    count = inputs.case.buffers
    arrays = [random_bf16(10_000 + i, (inputs.case.bytes // 2,)) for i in range(count)]
    buffers = [arrays[i % count] for i in range(layers)]
    program = jax.jit(lambda buffers: [jnp.maximum(x, -i).max() for i, x in enumerate(buffers)])
    return Contender(lambda: program(buffers), jax.block_until_ready)


def make_paged(kernel: str, inputs: Inputs, layers: int) -> Contender | None:
    """Call a backend of helix_jax, if "auto" chooses it here, or it is "xla"."""
    case = inputs.case
    pages = PageFormat(case.width, PAGE, jnp.bfloat16, case.options["v_width"])
    if kernel != "xla" and choose_backend("auto", jax.devices()[0], pages) != kernel:
        return None
    backend, ranges = backend_attend(kernel), inputs.visible[1:]

    def attention(q_BTNH: Array, k_AKWH: Array, v_AKWH: Array | None, table_BM: Array) -> Array:
        return backend(q_BTNH, k_AKWH, v_AKWH, table_BM, *ranges, **case.options).o_BTNH

    return compile_layers(inputs, layers, attention)


def make_gathered(inputs: Inputs, layers: int) -> Contender | None:
    """Gather all pages of a row at once, whatever memory that needs, then einsum, softmax, einsum."""
    if not inputs.case.equal:
        return None
    v_width = inputs.case.options["v_width"]

    def attention(q_BTNH: Array, k_AKWH: Array, v_AKWH: Array | None, table_BM: Array) -> Array:
        k_BMKWH = jnp.take(k_AKWH, table_BM, axis=0)
        v_BMKWH = k_BMKWH[..., :v_width] if v_AKWH is None else jnp.take(v_AKWH, table_BM, axis=0)
        B, _, N, H = q_BTNH.shape
        q_BKGH = q_BTNH.reshape(B, -1, inputs.case.group, H)
        s_BKGMW = jnp.einsum("bkgh,bmkwh->bkgmw", q_BKGH, k_BMKWH, preferred_element_type=jnp.float32)
        p_BKGMW = jax.nn.softmax(s_BKGMW * inputs.case.scale, axis=(-2, -1)).astype(jnp.bfloat16)
        o_BKGH = jnp.einsum("bkgmw,bmkwh->bkgh", p_BKGMW, v_BMKWH, preferred_element_type=jnp.float32)
        return o_BKGH.reshape(B, 1, N, -1)

    return compile_layers(inputs, layers, attention)


def make_cudnn(inputs: Inputs, layers: int) -> Contender | None:
    """Call cuDNN through JAX, with contiguous keys and values."""
    if inputs.case.latent or not inputs.case.equal:
        return None
    buffers = [inputs.contiguous[i % inputs.case.buffers] for i in range(layers)]
    attention = partial(jax.nn.dot_product_attention, scale=inputs.case.scale, implementation="cudnn")
    return _compile(inputs, buffers, lambda q, k, v, _: attention(q, k, v))


def make_sdpa(inputs: Inputs, layers: int) -> Contender | None:
    """Call cuDNN through PyTorch, with contiguous keys and values."""
    torch = import_optional("torch")
    if inputs.case.latent or not inputs.case.equal or torch is None:
        return None
    attention = import_optional("torch.nn.attention")

    q = torch.from_dlpack(inputs.q_BTNH).transpose(1, 2)
    rows = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in kv) for kv in inputs.contiguous]

    def attend_once(k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=inputs.case.scale, enable_gqa=True)

    def run() -> list[Any]:
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return [attend_once(*rows[i % inputs.case.buffers]) for i in range(layers)]

    return _make_torch_contender(run, lambda outputs: outputs[0][:, :, 0])


def make_flashinfer(inputs: Inputs, layers: int) -> Contender | None:
    """Call FlashInfer, with the same pages."""
    torch = import_optional("torch")
    if torch is None or import_optional("flashinfer") is None:
        return None

    q = torch.from_dlpack(inputs.q_BTNH[:, 0])
    pools = [tuple(torch.from_dlpack(x) for x in kv if x is not None) for kv in inputs.pools]
    attend_once = _plan_flashinfer_latent(inputs, q) if inputs.case.latent else _plan_flashinfer_grouped(inputs, q)

    def run() -> list[Any]:
        return [attend_once(*pools[i % inputs.case.buffers]) for i in range(layers)]

    return _make_torch_contender(run, lambda outputs: outputs[0][0])


def _make_torch_contender(run: Callable[[], list[Any]], first_output: Callable[[list[Any]], Any]) -> Contender:
    synchronize = import_optional("torch").cuda.synchronize
    return Contender(run, lambda _: synchronize(), lambda: first_output(run()).float().cpu().numpy())


def _describe_pages(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Return where each row starts in the list of pages, that list, and the tokens in each row's last page."""
    torch = import_optional("torch")
    pages_B = [-(-length // PAGE) for length in inputs.case.lengths]
    page_list = np.concatenate([row[:count] for row, count in zip(inputs.table_BM, pages_B, strict=True)])
    last_B = [length - (count - 1) * PAGE for length, count in zip(inputs.case.lengths, pages_B, strict=True)]
    starts = torch.tensor([0, *np.cumsum(pages_B)], dtype=torch.int32)
    return starts, torch.from_numpy(page_list).cuda(), torch.tensor(last_B, dtype=torch.int32)


def _plan_flashinfer_grouped(inputs: Inputs, q: Any) -> Callable[..., Any]:
    torch, library = import_optional("torch"), import_optional("flashinfer")
    case, workspace = inputs.case, torch.empty(2**28, dtype=torch.uint8, device="cuda")
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "sm_scale": case.scale}
    wrapper.plan(*_describe_pages(inputs), case.heads, case.kv_heads, case.width, PAGE, **types)
    return lambda k, v: wrapper.run(q, (k, v), return_lse=True)


def _plan_flashinfer_latent(inputs: Inputs, q: Any) -> Callable[..., Any]:
    torch, library = import_optional("torch"), import_optional("flashinfer")
    case, workspace = inputs.case, torch.empty(2**28, dtype=torch.uint8, device="cuda")
    wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    starts, pages, _ = _describe_pages(inputs)
    queries = torch.arange(len(case.lengths) + 1, dtype=torch.int32).cuda()
    lengths = torch.tensor(case.lengths, dtype=torch.int32).cuda()
    shape = (case.heads, LATENT_VALUES, LATENT - LATENT_VALUES, PAGE, False, case.scale, torch.bfloat16, torch.bfloat16)
    wrapper.plan(queries, starts.cuda(), pages, lengths, *shape)
    q_latent, q_rope = q[..., :LATENT_VALUES].contiguous(), q[..., LATENT_VALUES:].contiguous()
    return lambda k: wrapper.run(
        q_latent, q_rope, k[:, 0, :, :LATENT_VALUES], k[:, 0, :, LATENT_VALUES:], return_lse=True
    )


CONTENDERS: dict[str, Callable[[Inputs, int], Contender | None]] = {
    "ceiling": make_ceiling,
    "mosaic_gpu": partial(make_paged, "mosaic_gpu"),
    "xla": partial(make_paged, "xla"),
    "gather + einsum": make_gathered,
    "jax cudnn": make_cudnn,
    "torch sdpa": make_sdpa,
    "flashinfer": make_flashinfer,
}
