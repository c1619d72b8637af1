"""The attention kernels: scheduling, which kernel is chosen, lowering without the device, and results on it."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.typing import DTypeLike

from helix_jax.attention import PageTable, Partial
from helix_jax.cache import CacheSpec, KVCache, Rows
from helix_jax.combine import COMBINES
from helix_jax.helix import helix_attention
from helix_jax.kernels import (
    KERNELS,
    PageFormat,
    backend_attend,
    check_arrays,
    check_device,
    check_pages,
    choose_backend,
    tpu,
)
from helix_jax.kernels.mosaic_gpu.grouped_shape import choose_shape
from helix_jax.kernels.mosaic_gpu.work import Work, align_streams, find_parts, make_schedule, walk_segments
from helix_jax.mesh import NEW_KEYS_BTKH, POOL_XKWH, QUERIES_BTNH, ROWS_B, TABLE_RBM, sharding
from helix_jax.plan import Plan
from helix_jax.quantisation import FLOAT8, QuantisedPages, dequantise, quantise
from tests import interpreter
from tests.reference import relative_error, softmax_attention

on_hopper = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not jax.devices()[0].compute_capability.startswith("9."),
    reason="needs a Hopper GPU",
)

on_tpu = pytest.mark.skipif(jax.default_backend() != "tpu", reason="needs a TPU")

interpretable = pytest.mark.skipif(
    not interpreter.AVAILABLE, reason="JAX's interpreter of GPU kernels is complete enough from 0.12 on"
)

HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
BLACKWELL = SimpleNamespace(platform="gpu", device_kind="NVIDIA B200", compute_capability="10.0")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
GROUPED = PageFormat(width=128, page=64, dtype=jnp.bfloat16)
DEVICE_KERNELS = KERNELS[2:]


# Scheduling


def simulate_streams(work: Work, lo_BT, hi_BT):
    """Return the segments of each stream in order, and for each job and head the parts that the merge reads."""
    plan = make_schedule(work, jnp.asarray(lo_BT, jnp.int32), jnp.asarray(hi_BT, jnp.int32))
    streams = [[] for _ in range(work.streams)]
    with jax.disable_jit():
        for stream, segments in enumerate(streams):
            walk_segments(work, plan, jnp.int32(stream), lambda s, seen, to=segments: to.append(s) or seen + 1)
        taken = {
            (job, head): [int(x) for x in find_parts(work, plan, jnp.int32(job), jnp.int32(head))]
            for job in range(work.jobs)
            for head in range(work.heads)
        }
    return [[type(s)(*map(int, s)) for s in segments] for segments in streams], taken


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_every_tile_is_visited_once_by_streams_of_equal_length(data):
    """The merge reads exactly the parts that were written, and tiles that skip the mask are visible completely."""
    B, T = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    group, heads, members = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    work = Work(B, heads, T * group, members, tile=8, streams=data.draw(st.integers(1, 9)))
    bounds = st.lists(st.integers(0, 90), min_size=B * T, max_size=B * T)
    lo_BT, hi_BT = np.sort([data.draw(bounds), data.draw(bounds)], axis=0).reshape(2, B, T)
    idle_B = np.array(data.draw(st.lists(st.booleans(), min_size=B, max_size=B)))
    hi_BT = np.where(idle_B[:, None], 0, hi_BT)
    streams, taken = simulate_streams(work, lo_BT, hi_BT)

    expected, by_query = {}, []  # job, head -> tiles
    for job in range(work.jobs):
        row, nth = divmod(job, work.jobs_per_row)
        queries = range(nth * work.job_queries, min((nth + 1) * work.job_queries, work.queries))
        seen = [(lo_BT[row, q // group], hi_BT[row, q // group]) for q in queries]
        live = [(lo, hi) for lo, hi in seen if lo < hi]
        by_query.append(live)
        hull = range(min(lo for lo, _ in live) // 8, -(-max(hi for _, hi in live) // 8)) if live else range(0)
        expected |= {(job, head): set(hull) for head in range(heads)}

    found = {key: [] for key in expected}
    parts = {key: [] for key in expected}
    for segments in streams:
        for s in segments:
            found[s.job, s.head] += range(s.begin, s.end)
            parts[s.job, s.head].append(s.part)
            for tile in range(s.whole_begin, s.whole_end):
                assert all(lo <= tile * 8 and tile * 8 + 8 <= hi for lo, hi in by_query[s.job])
    assert {key: sorted(tiles) for key, tiles in found.items()} == {k: sorted(v) for k, v in expected.items()}
    assert {key: [min(x, default=taken[key][0]), len(x)] for key, x in parts.items()} == taken
    numbers = [part for x in parts.values() for part in x]
    assert len(set(numbers)) == len(numbers)
    assert max(numbers, default=0) < work.parts
    lengths = [sum(s.end - s.begin for s in segments) for segments in streams]
    assert max(lengths) == -(-sum(map(len, expected.values())) // work.streams)  # an equal share


@pytest.mark.parametrize(
    ("rows", "heads", "streams", "per_processor", "aligned"),
    [(32, 1, 132, 1, 128), (1, 1, 132, 1, 132), (64, 8, 528, 4, 512), (9, 1, 132, 1, 126), (48, 1, 132, 1, None)],
)
def test_slightly_fewer_processors_are_used_if_that_aligns_streams(rows, heads, streams, per_processor, aligned):
    """48 rows would leave a quarter of the processors unused, so all of them are used."""
    work = Work(rows, heads, queries=4, members=1, tile=8, streams=streams)
    assert align_streams(work, per_processor) == replace(work, streams=aligned or streams)


def test_aligned_streams_have_one_segment_if_lengths_are_equal():
    work = align_streams(Work(rows=3, heads=2, queries=4, members=1, tile=8, streams=44), per_processor=2)
    streams, _ = simulate_streams(work, np.zeros((3, 1)), np.full((3, 1), 8 * 14))
    assert [[s.end - s.begin for s in segments] for segments in streams] == [[2]] * 42


@pytest.mark.parametrize("rows", [1, 9, 80, 600])
def test_a_stream_finds_its_first_job_among_many(rows: int):
    """Some jobs are empty, and the largest count exceeds one segment of the prefix sum."""
    random = np.random.default_rng(rows)
    hi_B1 = random.integers(0, 5, (rows, 1)) * 8 * random.integers(0, 2, (rows, 1))
    work = Work(rows, heads=3, queries=4, members=1, tile=8, streams=7)
    plan = make_schedule(work, jnp.zeros((rows, 1), jnp.int32), jnp.asarray(hi_B1, jnp.int32))
    ends = 3 * np.cumsum(hi_B1 // 8)
    starts = np.minimum(np.arange(8) * -(-ends[-1] // 7), ends[-1])
    found = np.searchsorted(ends, starts, side="right")
    np.testing.assert_array_equal(plan.starts_SX[:, :2], np.stack([starts, np.minimum(found, rows - 1)], 1))
    np.testing.assert_array_equal(plan.starts_SX[:, 2:], plan.jobs_P8[plan.starts_SX[:, 1]])


# Which kernel is chosen


def test_auto_selects_the_kernel_of_the_device_if_it_supports_the_pages():
    recent = jax.__version_info__ >= (0, 11)
    assert choose_backend("auto", HOPPER, GROUPED) == ("mosaic_gpu" if recent else "xla")
    assert choose_backend("auto", HOPPER, PageFormat(576, 64, jnp.bfloat16, 512)) == ("mosaic_gpu" if recent else "xla")
    for device in (CPU, BLACKWELL, None):
        assert choose_backend("auto", device, GROUPED) == "xla"
    for pages in (GROUPED._replace(dtype=jnp.float32), GROUPED._replace(page=48), GROUPED._replace(width=96)):
        assert choose_backend("auto", HOPPER, pages) == choose_backend("xla", HOPPER, pages) == "xla"
    for pages in (GROUPED, GROUPED._replace(dtype=jnp.float32, page=8), PageFormat(640, 64, jnp.bfloat16, 512)):
        assert choose_backend("auto", TPU, pages) == choose_backend("tpu", None, pages) == "tpu"
    for pages in (GROUPED._replace(page=12), GROUPED._replace(width=64), GROUPED._replace(width=32)):
        assert choose_backend("auto", TPU, pages) == "xla"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (CPU, "kernel mosaic_gpu runs on Hopper GPUs, and this is a CPU: choose a GPU, or kernel auto or xla"),
        (BLACKWELL, r"this is NVIDIA B200 \(10.0\): choose a Hopper GPU, or kernel auto or xla"),
    ],
)
def test_a_kernel_on_the_wrong_device_is_rejected(device, message: str, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    with pytest.raises(ValueError, match=message):
        check_device("mosaic_gpu", device)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ValueError, match="needs JAX 0.11 or later"):
        check_device("mosaic_gpu", HOPPER)
    with pytest.raises(ValueError, match="kernel tpu runs on TPUs, and this is a GPU: choose a TPU, or kernel auto or"):
        check_device("tpu", HOPPER)
    check_device("tpu", TPU)


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("mosaic_gpu", {"dtype": jnp.float32}, "reads bfloat16 and fp8, and the cache is float32: choose one of these"),
        ("tpu", {"dtype": FLOAT8}, "reads bfloat16 and float32, and the cache is float8_e4m3fn: choose one of these"),
        ("mosaic_gpu", {"page": 100}, "or a multiple of 128 tokens, not 100: choose 64, or kernel auto or xla"),
        ("mosaic_gpu", {"width": 96}, "supports heads of width 64, 128 and 256, not 96"),
        ("tpu", {"dtype": jnp.float16}, "kernel tpu reads bfloat16 and float32, and the cache is float16: choose one"),
        (
            "tpu",
            {"page": 2048},
            "64 or a multiple of 128 up to 1024 tokens, not 2048: choose 64, or kernel auto or xla",
        ),
        ("tpu", {"width": 64}, "supports heads of width 128 and 256, not 64: choose another model"),
        (
            "mosaic_gpu",
            {"width": 320, "v_width": 256},
            "supports latents of 576 numbers, 512 of them values, not 320 and",
        ),
        ("tpu", {"width": 384, "v_width": 256}, "supports latents of 640 numbers, 512 of them values, not 384 and 256"),
    ],
)
def test_unsupported_page_formats_are_rejected(kernel: str, change, message: str):
    with pytest.raises(ValueError, match=message):
        check_pages(kernel, GROUPED._replace(**change))


def test_backend_attend_requires_a_resolved_kernel_name():
    with pytest.raises(ValueError, match="kernel is 'auto': choose one of xla, mosaic_gpu, tpu"):
        backend_attend("auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"v": (5, 2, 64, 64)},
            r"keys are bfloat16\[5, 2, 64, 128\], but values bfloat16\[5, 2, 64, 64\]: give both",
        ),
        ({"q": (2, 1, 5, 128)}, "5 query heads of width 128 do not fit 2 key/value heads of width 128"),
        ({"q": (2, 1, 4, 64)}, "4 query heads of width 64 do not fit 2 key/value heads of width 128"),
        ({"k": (5, 2, 64, 576), "q": (2, 1, 4, 576), "v": None}, "numbers, 512 of them values, not 576 and 576"),
        ({"k": (5, 2, 48, 128), "v": (5, 2, 48, 128)}, "not 48: choose 64"),
    ],
)
def test_inconsistent_arrays_are_rejected(change, message: str):
    shapes = {"q": (2, 1, 4, 128), "k": (5, 2, 64, 128), "v": (5, 2, 64, 128)} | change
    q, k, v = (None if shapes[x] is None else jax.ShapeDtypeStruct(shapes[x], jnp.bfloat16) for x in "qkv")
    for check_shapes in (partial(check_arrays, "tpu"), partial(check_arrays, "mosaic_gpu")):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(partial(check_shapes, v_width=None), q, k, v)


@pytest.mark.parametrize(
    ("width", "scales", "exact", "message"),
    [
        (128, 2, 0, r"kernel mosaic_gpu reads fp8 pages with \(scales, exact numbers\) of \(1, 0\) per vector, not"),
        (576, 2, 64, r"of \(4, 64\) per vector, not \(2, 64\): quantise them so"),
        (576, 4, 0, r"not \(4, 0\): quantise them so, or kernel auto or xla"),
    ],
)
def test_pages_quantised_otherwise_are_rejected(width: int, scales: int, exact: int, message: str):
    """The kernel would read other scales, or other memory, than those of the numbers."""

    def check(q, k):
        pages = quantise(k, scales, exact)
        check_arrays("mosaic_gpu", q, pages, pages if width == 128 else None, None if width == 128 else 512)

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 1, 4, width), (5, 1, 64, width)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(check, q, k)


@pytest.mark.parametrize("kernel", DEVICE_KERNELS)
def test_differentiating_a_kernel_is_rejected(kernel: str):
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    table, ints = jax.ShapeDtypeStruct((2, 2), jnp.int32), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    pool = shape((5, 2, 64, 128))

    def loss(q, k, v, table, lo, hi):
        return backend_attend(kernel)(q, k, v, table, lo, hi, scale=1.0).o_BTNH.sum()

    with pytest.raises(ValueError, match=f"kernel {kernel} has no derivative: choose kernel xla"):
        jax.eval_shape(jax.grad(loss), shape((2, 1, 4, 128)), pool, pool, table, ints, ints)


# Lowering for a device that is absent


def in_tiers(cases: dict, *slow: str) -> list:
    """Return the names of cases, of which some are marked slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in cases]


LOWERED = {  # name: B, T, N, K, H, W, M
    "one query per head": (2, 1, 2, 2, 128, 64, 6),
    "groups of 16": (2, 1, 16, 1, 128, 64, 6),
    "a few new tokens": (2, 3, 10, 2, 128, 64, 6),
    "more than 64 queries": (2, 8, 32, 2, 128, 64, 6),
    "a chunk of a prompt": (1, 100, 8, 2, 128, 64, 6),
    "narrow heads": (2, 1, 8, 2, 64, 64, 6),
    "wide heads": (2, 1, 8, 2, 256, 64, 6),
    "short pages": (2, 1, 8, 2, 128, 16, 24),
    "long pages": (2, 1, 8, 2, 64, 256, 3),
    "latent": (2, 1, 16, 1, 576, 64, 6),
    "latent, all heads of DeepSeek": (2, 1, 128, 1, 576, 64, 6),
    "latent, a few new tokens": (1, 3, 24, 1, 576, 16, 24),
    "fp8": (2, 1, 16, 2, 128, 64, 6),
    "fp8, drafts": (2, 8, 8, 2, 128, 64, 6),
    "fp8, more than 64 queries, narrow heads": (2, 8, 32, 2, 64, 32, 12),
    "fp8, latent": (2, 1, 16, 1, 576, 64, 6),
    "fp8, latent, drafts": (2, 2, 16, 1, 576, 64, 6),
}


@pytest.mark.parametrize(
    "name",
    in_tiers(
        LOWERED,
        *("groups of 16", "short pages", "long pages", "one query per head", "wide heads", "narrow heads"),
        *("more than 64 queries", "latent, a few new tokens", "a few new tokens"),
        "fp8, more than 64 queries, narrow heads",
    ),
)
def test_the_gpu_kernel_lowers_and_reads_the_cache_in_place(name: str):
    B, T, N, K, H, W, M = LOWERED[name]
    A, latent = B * M + 41, H == 576
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    pool, ints = shape((A, K, W, H)), partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    if "fp8" in name:
        exact, scales = (64, 4) if latent else (0, 1)
        parts = ((H - exact, FLOAT8), (scales, jnp.float32), (exact, jnp.bfloat16))
        arrays = (jax.ShapeDtypeStruct((A, K, W, width), dtype) if width else None for width, dtype in parts)
        pool = QuantisedPages(*arrays)
    run = partial(backend_attend("mosaic_gpu"), scale=0.1, v_width=512 if latent else None)
    arguments = shape((B, T, N, H)), pool, None if latent else pool, ints((B, M)), ints((B, T)), ints((B, T))
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @mosaic_gpu\w*\(", text)
    assert len(calls) == 2  # the parts, the merge
    # The pool may be reshaped on its way to the kernel, but no operation may copy it.
    pool_sized = [
        line
        for line in text.splitlines()
        if re.search(rf"-> tensor<({A}x{K}x{W}x\d+|{A * K * W}x\d+|{A * K * W})x(bf16|f8E4M3FN|f32)>", line)
    ]
    assert len(pool_sized) == len(jax.tree.leaves(pool)) * (1 if latent else 2)
    assert all("stablehlo.reshape" in line for line in pool_sized)


@pytest.mark.parametrize(
    ("kernel", "platform", "how"),
    [
        *(("tpu", "tpu", how) for how in COMBINES),
        ("mosaic_gpu", "cuda", COMBINES[0]),
        *(pytest.param("mosaic_gpu", "cuda", how, marks=pytest.mark.slow) for how in COMBINES[1:]),
    ],
)
def test_helix_attention_lowers_with_the_kernel_for_every_combine(kernel: str, platform: str, how: str, monkeypatch):
    monkeypatch.setattr(
        jax, "__version_info__", (0, 11, 0)
    )  # it lowers with earlier ones too; it has not been run there
    mesh = AbstractMesh((1, 2, 2), ("dp", "tp", "cp"), axis_types=(AxisType.Auto,) * 3)
    plan = Plan(mesh, 16, combine=how, kernel=kernel)

    def abstract(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, spec))

    pool, new = abstract((32, 4, 64, 128), POOL_XKWH), abstract((2, 1, 4, 128), NEW_KEYS_BTKH)
    ints_B = abstract((2,), ROWS_B, jnp.int32)
    rows = Rows((abstract((2, 2, 8), TABLE_RBM, jnp.int32),), ints_B, ints_B)
    cache = KVCache(pool, CacheSpec(2, 4, 128, jnp.bfloat16))
    arguments = cache, abstract((2, 1, 16, 128), QUERIES_BTNH), new, new, rows, ints_B
    traced = jax.jit(partial(helix_attention, plan, layer=1, scale=0.1)).trace(*arguments)
    assert {"mosaic_gpu": "mosaic_gpu", "tpu": "tpu_custom_call"}[kernel] in traced.lower(
        lowering_platforms=(platform,)
    ).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, FLOAT8])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_any_number_of_queries_leaves_memory_for_a_pair_of_tiles(width: int, dtype):
    """25 to 32 queries left none for fp8: a step of eight drafts with groups of four heads did not compile."""
    for queries in range(1, 130):
        assert choose_shape(8, queries, 8, PageFormat(width, 64, dtype), 132, 0.1).copied_tiles >= 2


# Results, in an interpreter on the CPU and on the device


def case(
    T: int,
    N: int,
    K: int,
    H: int,
    W: int,
    lengths: list[int],
    window: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
):
    """Return arguments, options and expected results for rows of these lengths. Slots that no query sees are NaN.

    Keys and values are in one pool behind other pages, as in the cache. Those of type float8 are quantised, also in the
    expected results.
    """
    random = np.random.default_rng(0)
    B, M = len(lengths), -(-max(lengths) // W) + 1
    A, latent = B * M + 3, H in (576, 640)
    table_BM = random.permutation(A)[: B * M].reshape(B, M).astype(np.int32)
    hi_BT = np.maximum(np.array(lengths)[:, None] - T + 1 + np.arange(T), 0) * (np.array(lengths)[:, None] > 0)
    lo_BT = np.maximum(hi_BT - window, 0) if window else np.zeros_like(hi_BT)
    keys_BSKH, values_BSKH = random.normal(size=(2, B, M * W, K, H))
    keys_BSKH[..., 0] += np.linspace(-3, 3, M * W)[:, None]  # so that results depend on the visible slots
    slot = np.arange(M * W)
    seen_BTS = (lo_BT[..., None] <= slot) & (slot < hi_BT[..., None])
    pools = np.full((2, A, K, W, H), np.nan)
    for pool, x_BSKH in zip(pools, (keys_BSKH, values_BSKH), strict=True):
        x_BSKH = np.where(seen_BTS.any(1)[..., None, None], x_BSKH, np.nan)
        pool[table_BM] = x_BSKH.reshape(B, M, W, K, H).swapaxes(2, 3)
    table_BM[:, -1] = 10**6  # no query sees the last page
    q_BTNH = random.normal(size=(B, T, N, H))
    q_BTNH = jnp.asarray(q_BTNH, jnp.bfloat16 if dtype == FLOAT8 else dtype)
    keys_BSKH, values_BSKH, *pools = (store(x, dtype) for x in (keys_BSKH, values_BSKH, *pools))
    if dtype == FLOAT8:
        keys_BSKH, values_BSKH = (dequantise(x, jnp.float32) for x in (keys_BSKH, values_BSKH))
    rows = [
        softmax_attention(q, k, k[..., :512] if latent else v, seen, H**-0.5)
        for q, k, v, seen in zip(q_BTNH, keys_BSKH, values_BSKH, seen_BTS, strict=True)
    ]
    expected = [np.stack(parts) for parts in zip(*rows, strict=True)]
    options = {"scale": H**-0.5, "v_width": 512 if latent else None}
    table_BM, lo_BT, hi_BT = (jnp.asarray(x, jnp.int32) for x in (table_BM, lo_BT, hi_BT))
    if latent:
        return [q_BTNH, pools[0], None, table_BM, lo_BT, hi_BT], options, expected
    pool = jax.tree.map(lambda k, v: jnp.concatenate([jnp.full_like(k, jnp.nan), k, v]), *pools)
    table = PageTable(table_BM, jnp.asarray([A, 2 * A]))
    return [q_BTNH, pool, pool, table, lo_BT, hi_BT], options, expected


def store(x: np.ndarray, dtype: DTypeLike):
    """Return vectors as pages of a type store them."""
    if dtype != FLOAT8:
        return jnp.asarray(x, dtype)
    latent = {"scales": 4, "exact": 64} if x.shape[-1] == 576 else {"scales": 1}
    return quantise(jnp.asarray(x, jnp.float32), **latent)


INTERPRETED = {  # name: arguments of `case`, for a GPU of three processors
    "grouped": (1, 6, 2, 128, 64, [200, 0, 77]),
    "many tiles": (1, 4, 1, 64, 64, [1500, 130]),
    "many rows": (1, 4, 1, 64, 64, [*range(60, 77), 0, 5]),
    "more than 64 queries": (5, 40, 2, 64, 64, [300, 7]),
    "a chunk of a prompt, short pages": (40, 8, 2, 128, 16, [300, 57]),
    "wide heads and a window": (2, 4, 2, 256, 64, [300, 57], 70),
    "latent": (2, 10, 1, 576, 64, [400, 0, 77]),
    "latent, more than 64 queries": (1, 80, 1, 576, 32, [300, 77]),
    "fp8": (1, 6, 2, 128, 64, [200, 0, 77], None, FLOAT8),
    "fp8, more than 64 queries, narrow heads and short pages": (5, 40, 2, 64, 32, [300, 7], None, FLOAT8),
    "fp8, a window and short pages": (2, 8, 2, 128, 32, [300, 57], 70, FLOAT8),
    "fp8, wide heads and a window": (2, 4, 2, 256, 64, [300, 57], 70, FLOAT8),
    "fp8, drafts": (8, 8, 2, 128, 64, [200, 7], None, FLOAT8),
    "fp8, latent, few queries and short pages": (1, 16, 1, 576, 32, [400, 0, 77], None, FLOAT8),
    "fp8, latent": (2, 10, 1, 576, 64, [400, 0, 77], None, FLOAT8),
    "fp8, latent, drafts in two tiles": (4, 4, 1, 576, 64, [130, 66], None, FLOAT8),
}


@interpretable
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_interpreted_gpu_kernel_equals_float64_softmax_without_a_race(name: str, monkeypatch):
    arguments, options, expected = case(*INTERPRETED[name])
    with interpreter.interpreted(monkeypatch, processors=3):
        check(backend_attend("mosaic_gpu")(*arguments, **options), *expected)


@interpretable
@pytest.mark.parametrize("name", ["grouped", "latent", "fp8"])
def test_idle_rows_give_empty_partials(name: str, monkeypatch):
    (q, k, v, table_BM, _, hi_BT), options, _ = case(*INTERPRETED[name])
    with interpreter.interpreted(monkeypatch, processors=2):
        found = backend_attend("mosaic_gpu")(q, k, v, table_BM, hi_BT, jnp.zeros_like(hi_BT), **options)
    assert (np.asarray(found.o_BTNH) == 0).all()
    assert np.isneginf(found.lse_BTN).all()


@interpretable
def test_the_query_of_an_idle_token_may_be_nan(monkeypatch):
    """Its partial is empty, and that of the other token in the row does not change."""
    (q, *arguments, hi_BT), options, (o_BTNH, lse_BTN) = case(2, 4, 2, 128, 64, [200, 77])
    q, hi_BT = q.at[0, 1].set(jnp.nan), hi_BT.at[0, 1].set(0)
    o_BTNH[0, 1], lse_BTN[0, 1] = 0, -np.inf
    with interpreter.interpreted(monkeypatch, processors=3):
        check(backend_attend("mosaic_gpu")(q, *arguments, hi_BT, **options), o_BTNH, lse_BTN)


ON_TPU = {  # name: number of cores, then the arguments of `case`
    "grouped": (2, 1, 6, 2, 128, 64, [200, 0, 77]),
    "groups of 16, short pages": (1, 1, 16, 1, 128, 16, [300, 5]),
    "one query per head, many blocks": (1, 1, 4, 4, 128, 64, [700, 0, 0, 130]),
    "a chunk of a prompt": (2, 40, 4, 2, 128, 32, [300, 57]),
    "wide heads and a window": (1, 2, 4, 2, 256, 64, [600, 57], 70),
    "shortest pages": (1, 1, 2, 2, 128, 8, [140]),
    "long pages": (1, 3, 2, 1, 128, 256, [300, 1]),
    "float32": (1, 1, 4, 2, 128, 64, [300, 9], None, jnp.float32),
    "latent": (1, 2, 10, 1, 640, 64, [400, 0, 77]),
    "latent, more queries than a tile holds": (1, 1, 80, 1, 640, 32, [200, 77]),
    "latent, a window": (1, 1, 16, 1, 640, 128, [700, 3], 150),
}


@pytest.mark.parametrize("name", in_tiers(ON_TPU, *list(ON_TPU)[1::3]))
def test_the_interpreted_tpu_kernel_equals_float64_softmax_without_a_race(name: str, monkeypatch):
    cores, *shape = ON_TPU[name]
    arguments, options, expected = case(*shape)
    with interpreter.interpreted_on_tpu(monkeypatch, cores):
        found = backend_attend("tpu")(*arguments, **options)
        check(found, *expected)
    if name == "float32":
        assert relative_error(found.o_BTNH, expected[0]) <= 1e-6


def test_on_a_tpu_idle_rows_give_empty_partials_and_may_be_nan(monkeypatch):
    """Table entries of idle rows may be invalid, and an idle token does not change the other tokens of its row."""
    (q, *pools, table, lo_BT, hi_BT), options, (o_BTNH, lse_BTN) = case(2, 4, 2, 128, 64, [200, 77])
    idle_BT = np.array([[False, True], [True, True]])
    q, hi_BT = jnp.where(idle_BT[..., None, None], jnp.nan, q), jnp.where(idle_BT, 0, hi_BT)
    table = table._replace(entries_BM=table.entries_BM.at[1].set(-(10**6)))
    o_BTNH[idle_BT], lse_BTN[idle_BT] = 0, -np.inf
    with interpreter.interpreted_on_tpu(monkeypatch, cores=1):
        check(backend_attend("tpu")(q, *pools, table, lo_BT, hi_BT, **options), o_BTNH, lse_BTN)


def test_on_a_tpu_nan_in_a_visible_slot_reaches_the_output(monkeypatch):
    """Negative control of the tests above."""
    (q, k, *arguments), options, _ = case(1, 2, 1, 128, 64, [140])
    table = arguments[1]
    k = k.at[table.first_C[0] + table.entries_BM[0, 1], :, 7].set(jnp.nan)
    with interpreter.interpreted_on_tpu(monkeypatch, cores=1):
        assert np.isnan(backend_attend("tpu")(q, k, *arguments, **options).o_BTNH).all()


def test_a_page_table_larger_than_scalar_memory_is_processed_in_parts(monkeypatch):
    arguments, options, expected = case(1, 2, 1, 128, 64, [100, 7, 0])
    monkeypatch.setattr(tpu, "_TABLE", 4)
    with interpreter.interpreted_on_tpu(monkeypatch, cores=1):
        check(backend_attend("tpu")(*arguments, **options), *expected)


CASES = {  # name: arguments of `case`
    "one query per head": (1, 2, 2, 128, 64, [1000, 77]),
    "groups of 3": (1, 6, 2, 128, 64, [2500, 1, 130]),
    "groups of 16": (1, 16, 1, 128, 64, [2500, 130]),
    "idle rows": (1, 8, 8, 128, 64, [0, 640, 0, 5]),
    "few slots": (1, 8, 2, 128, 64, [1, 2]),
    "many rows": (1, 8, 2, 128, 64, list(range(0, 1300, 20))),
    "narrow heads": (1, 8, 2, 64, 64, [1900, 65]),
    "wide heads": (1, 8, 2, 256, 64, [1900, 65]),
    "short pages": (1, 8, 2, 128, 16, [1600, 65]),
    "shortest pages": (2, 8, 2, 64, 8, [700, 65]),
    "long pages": (1, 8, 2, 128, 256, [2500, 65]),
    "a few new tokens": (3, 10, 2, 64, 64, [1900, 165, 7]),
    "more than 64 queries": (8, 32, 2, 128, 64, [1900, 65, 3]),
    "a chunk of a prompt": (100, 8, 2, 128, 64, [1900, 165, 60]),
    "a window": (1, 16, 2, 128, 64, [2500, 1, 130], 100),
    "a window and a few new tokens": (5, 8, 2, 128, 64, [2500, 1, 130], 70),
    "latent": (1, 16, 1, 576, 64, [1900, 0, 165]),
    "latent, all heads of DeepSeek": (1, 128, 1, 576, 64, [1900, 0, 165]),
    "latent, a few new tokens": (3, 40, 1, 576, 16, [1500, 2]),
    "latent, a window": (1, 16, 1, 576, 128, [1900, 3], 150),
    "fp8": (1, 16, 2, 128, 64, [2500, 1, 130], None, FLOAT8),
    "fp8, many rows": (1, 8, 2, 128, 64, list(range(0, 1300, 20)), None, FLOAT8),
    "fp8, a window and short pages": (2, 8, 2, 128, 32, [1900, 1, 65], 70, FLOAT8),
    "fp8, narrow heads and short pages": (2, 8, 2, 64, 32, [700, 65], None, FLOAT8),
    "fp8, wide heads and a window": (5, 8, 2, 256, 64, [2500, 1, 130], 70, FLOAT8),
    "fp8, drafts": (8, 8, 2, 128, 64, [1900, 65, 3], None, FLOAT8),
    "fp8, latent": (1, 16, 1, 576, 64, [1900, 0, 165], None, FLOAT8),
    "fp8, latent, eight heads": (1, 8, 1, 576, 64, [1900, 3], None, FLOAT8),
    "fp8, latent, all heads of DeepSeek and short pages": (1, 128, 1, 576, 32, [1900, 0, 165], None, FLOAT8),
    "fp8, latent, many rows and a window": (2, 10, 1, 576, 128, list(range(0, 900, 20)), 150, FLOAT8),
    "fp8, more than 64 queries": (8, 32, 2, 128, 64, [1900, 65, 3], None, FLOAT8),
    "fp8, a chunk of a prompt": (100, 8, 2, 128, 256, [1900, 165, 60], None, FLOAT8),
}


def check(found: Partial, o_BTNH, lse_BTN):
    """Assert that results are within bfloat16 rounding of float64, and that empty queries are exactly empty."""
    empty = np.isneginf(lse_BTN)
    np.testing.assert_array_equal(np.isneginf(found.lse_BTN), empty)
    assert (np.asarray(found.o_BTNH)[empty] == 0).all()
    assert relative_error(found.o_BTNH, o_BTNH) <= 4e-3
    np.testing.assert_allclose(np.asarray(found.lse_BTN)[~empty], lse_BTN[~empty], rtol=0, atol=1e-5)


def on_device(names: list[str]) -> list:
    """Return each device kernel with the cases that it supports, marked to run on its device."""
    marks = {"mosaic_gpu": (pytest.mark.gpu, on_hopper), "tpu": on_tpu}
    narrow = [name for name in names if CASES[name][3] == 64]
    return [
        pytest.param(kernel, name, marks=marks[kernel])
        for kernel in DEVICE_KERNELS
        for name in names
        if kernel != "tpu" or not (name in narrow or "fp8" in name)
    ]


@pytest.mark.parametrize(("kernel", "name"), on_device(list(CASES)))
def test_the_kernel_equals_float64_softmax(kernel: str, name: str):
    """A second run returns the same bits. Slots that no query sees are NaN."""
    arguments, options, expected = case(*CASES[name])
    run = jax.jit(partial(backend_attend(kernel), **options))
    found, again = run(*arguments), run(*arguments)
    check(found, *expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    reference = jax.jit(partial(backend_attend("xla"), **options))(*arguments)
    assert relative_error(found.o_BTNH, reference.o_BTNH) <= 4e-3


@pytest.mark.parametrize(("kernel", "name"), on_device(["groups of 3", "latent", "fp8"]))
def test_nan_in_a_visible_slot_reaches_the_output(kernel: str, name: str):
    """Negative control of the test above."""
    (q, k, v, table, lo_BT, hi_BT), options, _ = case(*CASES[name])
    (entries_BM, first_C), _ = PageTable.of(table, hi_BT, k.shape[2])
    k = jax.tree.map(lambda x: x.at[first_C[0] + entries_BM[0, 5], :, 7].set(jnp.nan), k)
    assert np.isnan(backend_attend(kernel)(q, k, v, table, lo_BT, hi_BT, **options).o_BTNH).any()
