"""Checks the planner against hand arithmetic, published sizes, measured steps and the claims of the paper."""

import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helix_jax.cli import main
from helix_jax.cli.plan import parse_context
from helix_jax.config import ModelConfig
from helix_jax.planner import (
    BASELINES,
    HARDWARE,
    OWN,
    STRATEGIES,
    Candidate,
    Hardware,
    Parallelism,
    StepTime,
    Workload,
    best_throughput,
    fastest,
    find_hardware,
    most_rows,
    pareto_frontier,
    predict_step,
    read_shape,
    take_first_layers,
)
from helix_jax.planner.comparison import compare, fit_overheads, read_measured, summarise
from helix_jax.planner.costs import ATTENTION_EFFICIENCY, Costs, count_token_bytes
from helix_jax.planner.crossover import crossover_context, predict_ms
from helix_jax.planner.measure import known_hardware, measure_hardware, recognise
from helix_jax.planner.memory import check_fits, fits
from helix_jax.planner.paper import CLAIMS, FIGURE_1, compute_gains, crossing_context, figure_1, hop_b_losses
from helix_jax.planner.parallelism import enumerate_parallelisms
from helix_jax.planner.search import interactivity_gain, throughput_gain
from helix_jax.planner.step import MEMORY_SHARE, exposed_communication
from tests.conftest import ROOT
from tests.test_configs import MODELS

PLANNER_README = (ROOT / "helix_jax" / "planner" / "README.md").read_text()
MILLION = 2**20


def config_of(name: str) -> ModelConfig:
    return read_shape(ROOT / "configs" / f"{name}.toml")


def tensor_parallel(tp: int = 1, cp: int = 1) -> Parallelism:
    return Parallelism(strategy="helix" if cp > 1 else "tp", tp=tp, cp=cp)


# Appendix A and figure 1


@pytest.mark.parametrize(
    ("tp", "kvp", "ffn_tp", "cache_s", "weights_s"),
    [
        # 8 rows * 2 * 8 heads * 128 * 2**20 tokens * 0.5 bytes / 8e12
        (1, 1, 1, 8589934592 / 8e12, 0.5 * (2 * 16384 * 128 * 128 + 2 * 16384 * 8 * 128 + 3 * 16384 * 65536) / 8e12),
        # one head, and a fourth of the tokens; 16 query heads; the feed-forward on 32 devices
        (8, 4, 32, 268435456 / 8e12, 0.5 * (67108864 + 4194304 + 100663296) / 8e12),
        # beyond the key/value heads: still one head; 2 query heads
        (64, 1, 64, 1073741824 / 8e12, 0.5 * (8388608 + 4194304 + 50331648) / 8e12),
    ],
)
def test_read_times_equal_hand_arithmetic(tp: int, kvp: int, ffn_tp: int, cache_s: float, weights_s: float):
    assert FIGURE_1.cache_read_s(MILLION, tp, kvp) == pytest.approx(cache_s, rel=1e-9)
    assert FIGURE_1.weight_read_s(tp, ffn_tp) == pytest.approx(weights_s, rel=1e-9)


def test_figure_1_has_the_features_of_the_paper():
    by_tp, by_kvp, by_context = figure_1()
    assert by_tp.x[3] == 8
    np.testing.assert_allclose(np.divide(by_tp.cache_us[:3], by_tp.cache_us[1:4]), 2)  # falls up to tp 8
    np.testing.assert_allclose(by_tp.cache_us[3:], 134.217728)  # the plateau
    assert by_tp.weights_us[3] / by_tp.weights_us[6] > 7  # weights go on falling
    slope = np.diff(np.log2(by_kvp.cache_us)) / np.diff(np.log2(by_kvp.x))
    np.testing.assert_allclose(slope, -1)
    longer = np.greater(by_context.cache_us, by_context.weights_us)
    crossing = crossing_context(FIGURE_1, 8)
    assert crossing == pytest.approx(231_424)
    assert np.array_equal(longer, np.greater(by_context.x, crossing))
    assert 0 < longer.sum() < len(longer)


def test_the_planner_counts_as_appendix_a_does():
    """For a layer like that of figure 1, without what the appendix neglects."""
    config = replace(config_of("llama-3.1-405b"), ff_width=65536)
    workload = Workload(context=MILLION, dtype="fp4", cache_dtype="fp4")
    for tp, cp in ((1, 1), (8, 1), (8, 4), (64, 1)):
        layer = Costs(config, workload, tensor_parallel(tp, cp)).layer((None, None), 8.0)
        cache_s = layer.attention.cache_bytes * ATTENTION_EFFICIENCY / 8e12
        assert cache_s == pytest.approx(FIGURE_1.cache_read_s(MILLION, tp, cp), rel=1e-9)
        weights = sum(part.weight_bytes for part in layer) / 8e12
        output_projection = 0.5 * 16384**2 * (1 / tp - 1 / (tp * cp)) / 8e12  # the appendix divides it by tp
        assert weights + output_projection == pytest.approx(FIGURE_1.weight_read_s(tp, tp * cp), rel=1e-9)


# What a device stores and does


@pytest.mark.parametrize("name", MODELS)
def test_one_device_stores_the_published_number_of_parameters(name: str):
    costs = Costs(config_of(name), Workload(context=1), tensor_parallel())
    assert costs.weight_bytes() / 2 == pytest.approx(MODELS[name][0], rel=4e-4)  # without norms and biases


@pytest.mark.parametrize(
    ("name", "mesh", "weights_gb", "cache_gb"),
    [
        ("llama-3.1-70b", (8, 4), 5.7, 85.9),
        ("llama-3.1-405b", (8, 8), 21.0, 67.6),
        ("deepseek-r1", (1, 32), 49.4, 18.4),
    ],
)
def test_memory_is_that_of_compiled_steps(name: str, mesh: tuple[int, int], weights_gb: float, cache_gb: float):
    """The table of kernels/README.md: 8 rows of a million tokens. On TPUs a latent takes 640 / 576 of this cache."""
    config = config_of(name)
    parallelism = Parallelism(strategy="helix", tp=mesh[0], cp=mesh[1], ep=math.prod(mesh) if config.experts else 1)
    costs = Costs(config, Workload(context=MILLION), parallelism)
    assert costs.weight_bytes() / 1e9 == pytest.approx(weights_gb, rel=0.01)
    assert 8 * costs.cache_bytes_per_row() / 1e9 == pytest.approx(cache_gb, rel=0.01)


def test_bytes_of_cached_tokens():
    llama, deepseek = config_of("llama-3.1-8b"), config_of("deepseek-r1")
    assert count_token_bytes(llama, "bfloat16") == 2 * 128 * 2
    assert count_token_bytes(llama, "fp8") == 2 * (128 + 4)
    assert count_token_bytes(llama, "fp4") == 128
    assert count_token_bytes(deepseek, "bfloat16") == 576 * 2
    assert count_token_bytes(deepseek, "fp8") == 512 + 4 * 4 + 64 * 2


def test_a_windowed_layer_reads_its_window():
    config = config_of("gpt-oss-120b")
    costs = Costs(config, Workload(context=MILLION), tensor_parallel(8))
    windowed, full = (costs.layer((window, config.experts), 1.0).attention.cache_bytes for window in (128, None))
    assert full / windowed == MILLION / 128
    assert costs.cache_bytes_per_row() == 18 * (MILLION + 128) * 2 * 64 * 2


def test_strategies_differ_in_what_is_copied():
    config = config_of("llama-3.1-405b")
    workload = Workload(context=MILLION)

    def costs(strategy: str, **sizes: int) -> Costs:
        return Costs(config, workload, Parallelism(strategy=strategy, **sizes))

    helix, kvp = costs("helix", tp=8, cp=4), costs("kvp", tp=8, cp=4)
    assert helix.cache_bytes_per_row() == kvp.cache_bytes_per_row()
    assert kvp.weight_bytes() == costs("tp", tp=8).weight_bytes() > 2 * helix.weight_bytes()
    assert costs("tp", tp=32).cache_bytes_per_row() == costs("tp", tp=8).cache_bytes_per_row()  # copied
    assert costs("dp", tp=8, dp=4).cache_bytes_per_row() == helix.cache_bytes_per_row()
    assert costs("pp", tp=8, pp=2).cache_bytes_per_row() == costs("tp", tp=8).cache_bytes_per_row() / 2


def test_experts_are_read_as_often_as_rows_are_routed_to_them():
    config = config_of("deepseek-r1")
    costs = Costs(config, Workload(context=1), Parallelism(strategy="tp", tp=1))
    every, one, many = (costs.layer((None, config.experts), rows).ffn.weight_bytes for rows in (0.0, 1.0, 1e6))
    expert = 3 * 7168 * 2048 * 2
    assert (one - every) / expert == pytest.approx(8)
    assert (many - every) / expert == pytest.approx(256)


def test_a_step_takes_longer_with_more_rows_tokens_and_bytes():
    config, hardware = config_of("llama-3.1-8b"), HARDWARE["h200"]

    def total(rows: int = 4, context: int = 8192, **options: object) -> float:
        workload = Workload(context=context, **options)
        return float(predict_step(config, workload, tensor_parallel(2, 2), hardware, rows).total)

    assert total() < total(rows=8) < total(rows=8, context=16384)
    assert total(dtype="fp8") < total() < total(dtype="float32")
    assert total(cache_dtype="fp8") < total()
    assert total(hop_b=True) < total() < total(combine="psum")
    times = predict_step(config, Workload(context=8192), tensor_parallel(2, 2), hardware, [4, 8]).total
    np.testing.assert_allclose(times, [total(), total(rows=8)])


def test_hop_b_hides_all_but_one_row_of_the_shorter():
    """Figure 3: 8 requests, 16 units of attention and 9.6 of communication take 25.6, and 17 with HOP-B."""
    assert 16 + exposed_communication(16.0, 9.6, 8, hop_b=False) == pytest.approx(25.6)
    assert 16 + exposed_communication(16.0, 9.6, 8, hop_b=True) == pytest.approx(17, rel=0.02)
    assert 4 + exposed_communication(4.0, 16.0, 8, hop_b=True) == pytest.approx(0.5 + 16)
    assert exposed_communication(16.0, 9.6, 1, hop_b=True) == pytest.approx(9.6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_fit_leave_no_memory_for_another_group(strategy: str):
    config, workload, hardware = config_of("deepseek-v2-lite"), Workload(context=2**17), HARDWARE["h100"]
    [parallelism, *_] = enumerate_parallelisms(config, 8, (strategy,))
    rows, costs = most_rows(config, workload, parallelism, hardware), Costs(config, workload, parallelism)
    group = parallelism.pp * parallelism.dp
    assert rows > 0
    assert rows % group == 0
    imbalance = math.ceil(27 / parallelism.pp) * parallelism.pp / 27

    def used(count: int) -> float:
        return (costs.weight_bytes() + count * costs.cache_bytes_per_row()) * imbalance

    assert used(rows) <= MEMORY_SHARE * hardware.memory_bytes < used(rows + group)


# The search


def test_parallelisms_use_all_devices_in_every_way_once():
    config = config_of("deepseek-v2-lite")  # 16 query heads, 64 experts
    found = list(enumerate_parallelisms(config, 32, tuple(STRATEGIES)))
    assert len(found) == len(set(found))
    assert all(each.devices == 32 and 16 % each.tp == 0 and each.ep <= 64 for each in found)
    helix = {(each.tp, each.cp) for each in found if each.strategy == "helix"}
    assert helix == {(1, 32), (2, 16), (4, 8), (8, 4), (16, 2)}
    assert not [each for each in found if each.strategy == "tp"]  # 16 heads
    assert {each.ep for each in found if (each.strategy, each.tp) == ("helix", 1)} == {1, 2, 4, 8, 16, 32}
    assert {each.ffn_devices for each in found if (each.strategy, each.tp, each.pp) == ("kvp", 2, 1)} == {2}
    experts = {each.ep: each.experts for each in found if (each.strategy, each.tp) == ("helix", 2)}
    assert experts == {32: "flat", 16: "cp", 8: None, 4: None, 2: None, 1: None}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"strategy": "magic", "tp": 1}, "choose one of helix, tp, pp, kvp, dp"),
        ({"strategy": "tp", "tp": 2, "cp": 2}, "cp is 2, but strategy tp has none: give 1"),
        ({"strategy": "tp", "tp": 0}, "tp is 0: give at least 1"),
        ({"strategy": "kvp", "tp": 2, "cp": 4, "ep": 4}, "ep 4 does not divide the 2 devices"),
    ],
)
def test_impossible_parallelisms_are_rejected(sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Parallelism(**sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"dtype": "int8"}, "choose one of float32, bfloat16, fp8, fp4"),
        ({"combine": "ring"}, "choose one of all_to_all"),
    ],
)
def test_impossible_workloads_are_rejected(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Workload(**{"context": 1, **change})


def test_impossible_hardware_is_rejected():
    with pytest.raises(ValueError, match="bandwidth is 0.0: give a positive number"):
        replace(HARDWARE["h200"], bandwidth=0.0)
    with pytest.raises(ValueError, match="kernel_s is -1.0"):
        replace(HARDWARE["h200"], kernel_s=-1.0)
    with pytest.raises(ValueError, match="hardware is 'h300': choose one of h100"):
        find_hardware("h300")
    assert replace(HARDWARE["h200"], kernel_s=0.0).flops_of("float32") == HARDWARE["h200"].flops / 2
    assert HARDWARE["h200"].flops_of("fp8") == 2 * HARDWARE["h200"].flops


def candidate(ttl_s: float, rows: int, tp: int = 1) -> Candidate:
    return Candidate(Parallelism(strategy="tp", tp=tp), rows, rows, StepTime(weights=ttl_s), 0.0)


def test_the_frontier_has_what_nothing_dominates():
    rng = np.random.default_rng(0)
    cases = [candidate(*case) for case in zip(rng.random(60) + 0.1, rng.integers(1, 9, 60).tolist(), strict=True)]
    frontier = pareto_frontier(cases)

    def dominated(one: Candidate) -> bool:
        speed, throughput = one.tokens_per_s_per_user, one.tokens_per_s_per_device
        others = [(each.tokens_per_s_per_user, each.tokens_per_s_per_device) for each in cases if each is not one]
        return any(s >= speed and t >= throughput and (s, t) != (speed, throughput) for s, t in others)

    assert {id(each) for each in frontier} == {id(each) for each in cases if not dominated(each)}
    assert pareto_frontier([]) == []


def test_choices_obey_their_limits():
    cases = [candidate(1.0, 1), candidate(2.0, 6), candidate(4.0, 16), candidate(0.9, 1, tp=4)]
    assert fastest(cases) is cases[3]
    assert fastest(cases, devices=4, rows=4) is cases[0]  # four replicas of a row
    assert fastest(cases, devices=4, rows=65) is None
    assert best_throughput(cases) is cases[2]
    assert best_throughput(cases, 2.0) is cases[1]
    assert best_throughput(cases, 0.5) is None
    assert throughput_gain(cases, [candidate(2.0, 2)]) == (pytest.approx(3.0), 2.0)
    assert interactivity_gain(cases, [candidate(1.8, 1)]) == pytest.approx(2.0)
    assert math.isnan(throughput_gain(cases, [candidate(0.1, 1)])[0])
    assert math.isnan(interactivity_gain(cases, []))


def test_the_bottleneck_is_what_takes_longest_or_memory():
    assert replace(candidate(1.0, 1), most_rows=1).bottleneck == "memory"
    assert replace(candidate(1.0, 1), most_rows=2).bottleneck == "weights"
    assert replace(candidate(1.0, 1), time=StepTime(1.0, 3.0, 0.0, 2.0, 0.0)).bottleneck == "cache"


# The paper's claims


@pytest.mark.parametrize("name", CLAIMS)
def test_the_claims_are_reproduced_within_a_fifth(name: str):
    baselines, interactivity, throughput = CLAIMS[name]
    gains = compute_gains(config_of(name), baselines)
    assert gains.interactivity == pytest.approx(interactivity, rel=0.2)
    assert gains.throughput == pytest.approx(throughput, rel=0.2)
    assert f"| {gains.interactivity:.2f} | {gains.throughput:.2f} |" in PLANNER_README


def test_what_is_not_reproduced_is_documented():
    gains = compute_gains(config_of("deepseek-r1"), ("tp", "pp", "kvp"))
    assert gains.throughput < 0.8 * CLAIMS["deepseek-r1"][2]
    assert f"| {gains.interactivity:.2f} | {gains.throughput:.2f} |" in PLANNER_README
    for name in CLAIMS:
        losses = [loss for _, loss in hop_b_losses(config_of(name))]
        assert max(losses) == 0  # one row has nothing to overlap
        assert f"-{-100 * min(losses):.0f} %" in PLANNER_README


# Predicted and measured


@pytest.fixture(scope="module")
def configs() -> dict[str, ModelConfig]:
    return {point.model: config_of(point.model) for point in read_measured()}


def test_predictions_are_close_to_measurements(configs):
    pairs = compare(read_measured(), configs)
    summary = summarise(pairs)
    assert summary["points"] >= 40
    assert summary["within"] >= 0.8 * summary["points"]
    assert not any(point.fit for point, _ in pairs)
    text = f"{summary['within']} of {summary['points']} points are within 15 %"
    assert text in PLANNER_README
    assert f"{100 * summary['worst_error']:.1f} %" in PLANNER_README


def test_the_table_of_four_gpus_has_what_was_measured_and_predicted(configs):
    pairs = [(point, ms) for point, ms in compare(read_measured(), configs) if point.tp * point.cp == 4]
    shown = re.findall(r"([\d.]+) \(([\d.]+)\) (?=\|)", PLANNER_README.split("Four H200s (")[1])
    [alone, *of_four] = [tuple(map(float, numbers)) for numbers in shown]
    assert alone == (2.44, 2.32)
    assert len(of_four) == len(pairs) == 8
    for point, ms in pairs:
        assert any(numbers == pytest.approx((point.ms, ms), abs=0.0051) for numbers in of_four)


def test_the_comparison_can_fail(configs):
    slower = [replace(point, ms=point.ms * (1 if point.fit else 1.3)) for point in read_measured()]
    summary = summarise(compare(slower, configs))
    assert summary["within"] < 0.8 * summary["points"]


def test_a_version_without_fitted_points_is_predicted_with_the_table(configs):
    """As are points of bench_gpus.py. An fp8 cache is read faster."""
    point = replace(read_measured()[0], version="another", rows=8, context=2**17)
    pairs = compare([point, replace(point, cache_dtype="fp8")], configs)
    expected_ms = predict_ms(configs[point.model], HARDWARE["h200"], point.tp, point.cp, 8, 2**17)
    assert pairs[0][1] == pytest.approx(expected_ms)
    assert 0.5 * expected_ms < pairs[1][1] < 0.9 * expected_ms


@pytest.mark.parametrize(
    ("kind", "name"), [("NVIDIA H200", "h200"), ("NVIDIA GB200", "gb200"), ("NVIDIA B200", "b200"), ("NVIDIA L4", None)]
)
def test_a_device_is_recognised_by_its_kind(kind: str, name: str | None):
    device = SimpleNamespace(device_kind=kind)
    assert recognise(device) == name
    assert known_hardware(device) == (name or "h200")


def test_no_point_is_both_fitted_and_judged():
    def key(point):
        return replace(point, fit=False, ms=0.0)

    for one, other in itertools.combinations(read_measured(), 2):
        assert one.fit == other.fit or key(one) != key(other)


def test_the_table_has_the_fitted_overheads(configs):
    newest = [point for point in read_measured() if point.version.startswith("newest") and point.fit]
    fitted = fit_overheads(newest, configs, HARDWARE["h200"])
    assert HARDWARE["h200"].kernel_s == pytest.approx(fitted.kernel_s, rel=0.01)
    assert HARDWARE["h200"].collective_s == pytest.approx(fitted.collective_s, rel=0.01)


def test_cp_overtakes_tp_beyond_the_crossing():
    """Where there is a single key/value head or latent. With eight heads, tp 2 copies nothing and stays ahead."""
    hardware = HARDWARE["h200"]
    for name in ("gemma-3-1b", "deepseek-v2-lite"):
        config, last = config_of(name), math.inf
        for rows in (1, 8, 32):
            crossing = crossover_context(config, hardware, 2, rows)
            assert crossing is not None
            assert crossing < last
            last = crossing
            ahead = [
                predict_ms(config, hardware, 2, 1, rows, n) - predict_ms(config, hardware, 1, 2, rows, n)
                for n in (int(crossing / 1.05), int(crossing * 1.05))
            ]
            assert ahead[0] < 0 < ahead[1]
            assert f"{crossing:,}" in PLANNER_README
    assert crossover_context(config_of("llama-3.1-8b"), hardware, 2, 8) is None


# The command


def plan(*arguments: object, config: str = "llama-3.1-8b", hardware: str = "h200", context: str = "128K") -> int:
    file = ROOT / "configs" / f"{config}.toml"
    options = ("--config", file, "--hardware", hardware, "--context", context)
    try:
        return main(["plan", *map(str, options), *map(str, arguments)])
    except SystemExit as stop:  # raised by the parser
        return int(stop.code or 0)


def test_the_command_prints_json_within_ten_seconds(capsys):
    start = time.perf_counter()
    arguments = ("--devices", 64, "--dtype", "fp4", "--cache-dtype", "fp8", "--ttl-ms", 25, "--rows", 100, "--json")
    assert plan(*arguments, config="deepseek-r1", hardware="gb200", context="1M") == 0
    assert time.perf_counter() - start < 10
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["devices"], result["context"]) == ("deepseek-r1", 64, MILLION)
    assert {each["strategy"] for each in result["frontier"]} <= set(OWN)
    assert {each["strategy"] for each in result["baseline_frontier"]} <= set(BASELINES)
    speeds = [each["tokens_per_s_per_user"] for each in result["frontier"]]
    assert speeds == sorted(speeds, reverse=True)
    for each in result["frontier"]:
        assert each["replicas"] * each["devices"] == 64
        assert sum(each["ms"].values()) == pytest.approx(each["ms_per_token"])
        assert each["memory_bytes"] < MEMORY_SHARE * HARDWARE["gb200"].memory_bytes
    within, enough = result["choices"][2:]
    assert within["best"]["ms_per_token"] <= 25
    assert enough["best"]["rows"] * enough["best"]["replicas"] >= 100
    assert within["gain"] == pytest.approx(
        within["best"]["tokens_per_s_per_device"] / within["baseline"]["tokens_per_s_per_device"]
    )


def test_the_command_prints_a_report_and_draws(tmp_path: Path, capsys):
    figure = tmp_path / "frontier.png"
    assert plan("--devices", 2, "--ideal", "--plot", figure) == 0
    out = capsys.readouterr().out
    assert "llama-3.1-8b, 2 x h200, 131,072 tokens per row" in out
    assert "fastest:\n  helix-jax tp: tp 2, 1 row," in out
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", 0), "--devices is 0: give at least 1"),
        (("--devices", 10**6), "--devices is 1000000: give at most 4096"),
        (("--devices", 2, "--rows", 0), "--rows is 0: give at least 1"),
        (("--devices", 2, "--ttl-ms", "nan"), "--ttl-ms is nan: give a positive number"),
        (("--devices", 2, "--dtype", "int8"), "--dtype is 'int8': choose one of float32, bfloat16, fp8, fp4"),
        (("--devices", 2, "--plot", "frontier"), "--plot 'frontier' has no suffix"),
        (("--devices", "two"), "argument --devices: invalid int value: 'two'"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple, message: str, capsys):
    assert plan(*arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": "1G"}, "--context is '1G': give a number of tokens such as 131072, 128K or 1M"),
        ({"context": "0"}, "--context is '0': give 1 to"),
        ({"context": "-5"}, "--context"),
        ({"hardware": "h300"}, "--hardware is 'h300': choose one of h100, h200"),
        ({"config": "llama-9"}, "cannot be opened (No such file or directory)"),
    ],
)
def test_impossible_questions_are_one_line(changes: dict, message: str, capsys):
    assert plan("--devices", 2, **changes) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_limit_that_nothing_meets_names_the_nearest(capsys):
    assert plan("--devices", 2, "--ttl-ms", 1) == 2
    [line] = capsys.readouterr().err.splitlines()
    least = re.search(r"give at least ([\d.]+)$", line)
    assert least
    assert plan("--devices", 2, "--ttl-ms", least[1], "--json") == 0
    capsys.readouterr()
    assert plan("--devices", 2, "--rows", 10_000) == 2
    [line] = capsys.readouterr().err.splitlines()
    most = re.search(r"give at most (\d+) rows, or more devices$", line)
    assert most
    assert plan("--devices", 2, "--rows", most[1], "--json") == 0
    assert plan("--devices", 2, "--rows", int(most[1]) + 1, "--json") == 2


def test_a_model_that_does_not_fit_names_what_does(capsys):
    assert plan("--devices", 16, config="llama-3.1-405b", hardware="h100", context="1M") == 2
    [line] = capsys.readouterr().err.splitlines()
    nearest = re.search(r"use (\d+) devices or a context of at most (\d+) tokens or smaller types$", line)
    assert nearest
    devices, context = map(int, nearest.groups())
    config, workload, hardware = config_of("llama-3.1-405b"), Workload(context=context), HARDWARE["h100"]
    assert fits(config, workload, hardware, 16)
    assert not fits(config, replace(workload, context=context + 1), hardware, 16)
    assert fits(config, Workload(context=MILLION), hardware, devices)
    with pytest.raises(ValueError, match="do not fit into 1 devices of 80 GB: use 16 devices or smaller types"):
        check_fits("405b", config, Workload(context=1), hardware, 1)


@pytest.mark.parametrize(("text", "tokens"), [("131072", 2**17), ("128k", 2**17), ("1M", 2**20), ("0.5M", 2**19)])
def test_contexts_have_units(text: str, tokens: int):
    assert parse_context(text) == tokens


def test_shapes_are_read_with_all_or_the_first_layers(tmp_path: Path):
    config = take_first_layers(config_of("gpt-oss-120b"), 3)
    assert (config.layers, config.windowed_layers) == (3, (0, 2))
    with pytest.raises(ValueError, match="--layers is 99: give 1 to 36"):
        take_first_layers(config_of("gpt-oss-120b"), 99)
    file = tmp_path / "empty.toml"
    file.write_text("")
    with pytest.raises(ValueError, match=r"the table \[model\] is missing"):
        read_shape(file)


@pytest.mark.slow
def test_this_machine_is_measured():
    one, several = (measure_hardware(jax.devices()[:count]) for count in (1, 2))
    assert isinstance(one, Hardware)
    assert "the links of h200 are assumed" in one.source
    assert "assumed" not in several.source
    assert 1e8 < one.bandwidth < 1e13
    assert 1e-8 < one.kernel_s < 1e-2
    assert several.collective_s != one.collective_s
    assert several.memory_bytes == pytest.approx(one.memory_bytes / 2)
