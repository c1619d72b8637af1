#!/usr/bin/env python3
"""Check and time decoding on the GPUs of this machine, on every mesh, beside what the planner predicted.

python scripts/bench_gpus.py --json gpus.json
python scripts/bench_gpus.py --json gpus.json --only one_kv_head --only combine

The parts are `checks`, the tests in tests/test_gpu_meshes.py; `baseline`, PyTorch and FlashInfer on the shape of llama
(baseline_torch.py); and five sets of decode steps, over caches of random numbers. All steps are predicted before the
first is timed. The file is written after every step. If it exists it is continued: steps that it has, timed with the
same settings, are not timed again. `plan_figures.py --measured FILE` compares and draws its steps beside those of
measured.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import jax
from bench_decode import (
    Case,
    Job,
    check_packages,
    divide,
    format_number,
    measure_decoding,
    parse_sizes,
    read_config,
    run_baseline,
)
from jax.sharding import Mesh
from random_weights import make_random_weights
from rich.console import Console
from rich.table import Table

import helix_jax
from helix_jax.cli.app import FAILED, OK, Parser, run_command
from helix_jax.cli.options import add_choice
from helix_jax.cli.output import write_json
from helix_jax.combine import COMBINES
from helix_jax.config import ModelConfig
from helix_jax.decoding import DEFAULT_STEPS
from helix_jax.devices import default_dtype, open_mesh
from helix_jax.engine.options import DEFAULT_PAGE
from helix_jax.mesh import make_mesh
from helix_jax.models.transformer import assemble
from helix_jax.plan import Plan
from helix_jax.planner import HARDWARE, read_shape
from helix_jax.planner.comparison import Measured, predict_point
from helix_jax.planner.measure import known_hardware, measure_bandwidth, recognise
from helix_jax.planner.parallelism import divisors
from helix_jax.validation import check_int

PROGRAM = "bench_gpus.py"
ROOT = Path(__file__).parents[1]
PLATFORMS = ("gpu", "cpu")
CASES = ("1x131072", "8x131072", "32x8192", "1x1048576")
Step = dict[str, Any]  # a point as measured.json has it, with `details`
NOT_SETTINGS = ("version", "hardware", "ms", "fit")  # fields of `Measured` that do not say what is timed


class Machine(NamedTuple):
    """The version and the hardware of `Measured`."""

    version: str
    hardware: str


class Part(NamedTuple):
    """Steps of one shape. `alone`: on a single device too."""

    model: str
    cases: tuple[str, ...] = CASES
    layers: int | None = None
    kv_heads: int | None = None
    combines: tuple[str, ...] = ("all_to_all",)
    cache_dtype: str = "bfloat16"
    alone: bool = False


PARTS = {
    "llama": Part("llama-3.1-8b"),
    # Few layers, as in the earlier measurements: tp copies this cache, and 8 rows of 1M tokens must fit on one device.
    "one_kv_head": Part("llama-3.1-8b", (*CASES, "8x1048576"), layers=8, kv_heads=1, alone=True),
    "deepseek": Part("deepseek-v2-lite", layers=6),
    "combine": Part("llama-3.1-8b", ("8x131072",), combines=COMBINES),
    "fp8": Part("llama-3.1-8b", ("8x131072",), cache_dtype="fp8"),
}
CHOICES = ("checks", "baseline", *PARTS)


def main() -> int:
    # The tests and the baseline use the same devices in processes of their own.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return run_command(lambda: bench(check_options(parse_arguments())), PROGRAM)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(PROGRAM, __doc__)
    parser.set_defaults(decoded=0, page=DEFAULT_PAGE, time=("decode",))  # as bench_decode.py has them
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="FILE", help="write all results to FILE, or continue it")
    add_choice(parser, "--only", CHOICES, "part to run; may be repeated (default: all)", several=True)
    add_choice(parser, "--skip", CHOICES, "part to leave out; may be repeated (default: none)", several=True)
    add("--devices", type=int, metavar="N", help="use N devices (default: all)")
    text = "with cpu, fake devices take the place of GPUs, to try this command; the predictions are those of H200s"
    add_choice(parser, "--platform", PLATFORMS, text, default="gpu")
    add("--config", type=Path, metavar="FILE.toml", help="model, with all of its layers (default: that of each part)")
    text = "sequences and the length of each; may be repeated (default: those of each part)"
    add("--case", action="append", metavar="ROWSxTOKENS", help=text)
    add("--steps-per-call", type=int, default=DEFAULT_STEPS, metavar="N", help="decode steps (default: %(default)s)")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> argparse.Namespace:
    """Check options and replace some by what they name: `parts`, and a report that may be continued."""
    check_int("--steps-per-call", options.steps_per_call, least=1)
    if options.devices is not None:
        check_int("--devices", options.devices, least=1)
    options.parts = [name for name in options.only or CHOICES if name not in (options.skip or [])]
    if not options.parts:
        raise ValueError("--skip leaves out all of the parts: name fewer, or others with --only")
    for part, packages in (("checks", ["pytest"]), ("baseline", ["torch", "flashinfer"])):
        if part in options.parts:
            check_packages(f"the part {part}", *packages, instead=f"use --skip {part}")
    for case in options.case or ():
        parse_sizes("--case", case, "rows x tokens")
    options.report = read_report(options.json)
    options.environment = dict(os.environ)  # of other processes, without what `open_mesh` sets for this one
    return options


def read_report(file: Path) -> dict[str, Any]:
    """Return the report in a file, or an empty one if there is no file.

    Raises:
        ValueError: The file contains something else.
    """
    if not file.exists():
        return {"checks": None, "groups": []}
    try:
        report = json.loads(file.read_text())
        _ = report["checks"], [(group["version"], group["details"]) for group in report["groups"]]
        _ = [step["details"]["predicted_ms"] for group in report["groups"] for step in group["points"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--json '{file}' exists and is no report of {PROGRAM}: give another name") from None
    return report


def bench(options: argparse.Namespace) -> int:
    """Predict all steps, run the parts, and print a table. Return 1 if something failed."""
    mesh = open_mesh(options.platform, 1, options.devices)
    devices = list(mesh.devices.flat)
    options.dtype = default_dtype(mesh)
    if "checks" in options.parts and len(devices) < 2:
        raise ValueError("the part checks compares devices, and there is 1: use --skip checks")
    version = f"helix_jax {helix_jax.__version__}, jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}"
    machine = Machine(version, known_hardware(devices[0]))
    points = list_points(options, len(devices), machine)
    plans = {point: make_plan(point, devices, options) for point in points}  # this reports most mistakes
    group, steps = add_steps(options, points, machine)
    save = partial(write_json, options.json, options.report)
    save()
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    if options.platform == "gpu" and recognise(devices[0]) is None:
        progress.print(f"the planner does not know this GPU: the predictions are those of an {machine.hardware}")
    if "checks" in options.parts:
        options.report["checks"] = run_checks(options)
        save()
    if "baseline" in options.parts:
        time_baseline(options, len(devices), group["details"])
        save()
    waiting = {point: plan for point, plan in plans.items() if "ms" not in steps[point]}
    if waiting:
        # Once for a group, because the rooflines of all of its steps follow from it.
        if "bandwidth_bytes_per_s" not in group["details"]:
            group["details"]["bandwidth_bytes_per_s"] = measure_bandwidth(devices[0])
        for point, ms, details in time_steps(options, group["details"]["bandwidth_bytes_per_s"], waiting):
            record(steps[point], ms, details)
            save()
            progress.print(json.dumps(steps[point]))
    if group["points"]:
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(make_table(group))
    failures = list(find_failures(options, group, steps))
    for failure in failures:
        progress.print(f"{PROGRAM}: {failure}")
    return FAILED if failures else OK


def list_points(options: argparse.Namespace, devices: int, machine: Machine) -> list[Measured]:
    """Return the steps of all parts, each once. Those that share weights follow one another."""
    points = []
    for part in (PARTS[name] for name in options.parts if name in PARTS):
        model, layers = (options.config.stem, None) if options.config else (part.model, part.layers)
        meshes = [(devices // cp, cp) for cp in divisors(devices)]
        for tp, cp in dict.fromkeys([(1, 1), *meshes] if part.alone else meshes):
            combines = part.combines if cp > 1 else (Measured.combine,)  # there is nothing to combine
            for how, case in product(combines, options.case or part.cases):
                rows, context = parse_sizes("--case", case, "rows x tokens")
                point = Measured(
                    version=machine.version,
                    hardware=machine.hardware,
                    model=model,
                    layers=layers,
                    kv_heads=part.kv_heads,
                    cache_dtype=part.cache_dtype,
                    combine=how,
                    tp=tp,
                    cp=cp,
                    rows=rows,
                    context=context,
                    ms=0.0,  # not measured yet
                )
                points.append(point)
    groups = list(dict.fromkeys((shape_of(point), point.tp, point.cp) for point in points))
    return sorted(dict.fromkeys(points), key=lambda point: groups.index((shape_of(point), point.tp, point.cp)))


def shape_of(point: Measured) -> tuple[Any, ...]:
    return point.model, point.layers, point.kv_heads


def config_file(options: argparse.Namespace, model: str) -> Path:
    return options.config or ROOT / "configs" / f"{model}.toml"


def config_of(point: Measured, options: argparse.Namespace) -> ModelConfig:
    return read_config(config_file(options, point.model), point.layers, point.kv_heads)


def make_plan(point: Measured, devices: list[Any], options: argparse.Namespace) -> Plan:
    """Return the plan of a step, checked against its model."""
    cache_dtype = point.cache_dtype if point.cache_dtype == "fp8" else "auto"
    mesh = make_mesh(point.tp, point.cp, devices=devices)
    plan = Plan(mesh, combine=point.combine, cache_dtype=cache_dtype)
    config = config_of(point, options)
    try:
        plan.check_model(config)
    except ValueError as error:
        reason, _, _ = str(error).partition(":")
        raise ValueError(f"{reason}, and all meshes of {mesh.size} devices are timed: give another --devices") from None
    plan.kernel_for_model(config, options.page, options.dtype)
    return plan


def add_steps(
    options: argparse.Namespace, points: list[Measured], machine: Machine
) -> tuple[dict[str, Any], dict[Measured, Step]]:
    """Add the group of this machine and these settings to the report, and its steps with their predictions.

    What is there already is kept.
    """
    groups = options.report["groups"]
    config = options.config and options.config.read_text()
    settings = {"steps_per_call": options.steps_per_call, "dtype": options.dtype, "config": config}
    group = next((one for one in groups if one["version"] == machine.version and has(one["details"], settings)), None)
    if group is None:
        source = f"scripts/{PROGRAM}: the program decode over caches of random numbers, calls awaited"
        group = {**machine._asdict(), "source": source, "details": settings, "points": []}
        groups.append(group)
    steps = {}
    for point in points:
        described = describe_point(point)
        step = next((step for step in group["points"] if has(step, described)), None)
        if step is None:
            config = read_shape(config_file(options, point.model))
            predicted_ms = predict_point(point, config, HARDWARE[point.hardware])
            step = described | {"details": {"predicted_ms": predicted_ms}}
            group["points"].append(step)
        steps[point] = step
    return group, steps


def has(mapping: dict[str, Any], items: dict[str, Any]) -> bool:
    return all(key in mapping and mapping[key] == value for key, value in items.items())


def describe_point(point: Measured) -> Step:
    """Return what is timed, as measured.json has it."""
    return {each.name: getattr(point, each.name) for each in fields(point) if each.name not in NOT_SETTINGS}


def run_checks(options: argparse.Namespace) -> dict[str, float]:
    """Run the tests of the meshes, on the first `--devices` GPUs. Return how many passed, failed and were skipped.

    Raises:
        ValueError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_gpu_meshes.py", "--all", f"--junitxml={file}"]
        environment = options.environment | {"JAX_PLATFORMS": "cuda" if options.platform == "gpu" else options.platform}
        if options.devices:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(options.devices)))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: options.devices])
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False).returncode
        if status not in (0, 1) or not file.exists():  # 1: tests failed
            raise ValueError(f"pytest exited with {status}: see its message above, or use --skip checks")
        [suite] = ElementTree.parse(file).getroot()
    tests, *failed, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    counts = {"passed": tests - sum(failed) - skipped, "failed": sum(failed), "skipped": skipped}
    return counts | {"seconds": float(suite.attrib["time"])}


def time_baseline(options: argparse.Namespace, devices: int, details: dict[str, Any]) -> None:
    """Time the baseline, tensor parallel over all devices, and add the times to the details of a group.

    Its failure does not end the other parts.
    """
    part, model = PARTS["llama"], config_file(options, PARTS["llama"].model)
    try:
        report = run_baseline(model, devices, ["--decode", *(options.case or part.cases)], options.environment)
    except ValueError as error:
        details["baseline_error"] = str(error)  # an earlier measurement remains
        return
    details["baseline_ms"] = details.get("baseline_ms", {}) | report["decode_ms"]
    details["baseline_error"] = None


def time_steps(
    options: argparse.Namespace, bandwidth: float, plans: dict[Measured, Plan]
) -> Iterator[tuple[Measured, float | None, dict[str, Any]]]:
    """Time steps. Those that follow one another and share a shape and a mesh share weights.

    Yields:
        Each step, its milliseconds per token, None if it failed, and what else is known of it.
    """
    for _, group in groupby(plans.items(), key=lambda item: (shape_of(item[0]), item[1].mesh)):
        own = list(group)
        config, mesh = config_of(own[0][0], options), own[0][1].mesh
        assert isinstance(mesh, Mesh)
        job, model = Job(options, config, bandwidth), None
        for point, plan in own:
            try:
                model = model or assemble(config, make_random_weights(config, mesh, options.dtype))
                run = measure_decoding(job, plan, model, Case(point.rows, point.context), {})
            except jax.errors.JaxRuntimeError as error:  # such as out of memory: the next step may need less
                yield point, None, {"error": (str(error) or repr(error)).splitlines()[0]}
                continue
            yield point, run.pop("decode_ms"), {name: value for name, value in run.items() if value is not None}
        del model  # before the weights of the next mesh are created


def record(step: Step, ms: float | None, details: dict[str, Any]) -> None:
    """Add the result of a step, and its ratios to the prediction and to the roofline. `ms` None: it failed."""
    details = {key: value for key, value in step["details"].items() if key != "error"} | details
    if ms is not None:
        step["ms"] = ms
        details |= {f"ms_per_{name}": ms / details[f"{name}_ms"] for name in ("predicted", "roofline")}
    step["details"] = details


def make_table(group: dict[str, Any]) -> Table:
    """Return all steps of a group with their ratios to the prediction, to the roofline and to the baseline."""
    settings = ("model", "layers", "kv heads", "tp x cp", "combine", "cache", "rows x tokens")
    numbers = ("ms", "predicted\nms", "ms /\npredicted", "ms /\nroofline", "baseline\nms", "ms /\nbaseline")
    table = Table(*settings, *numbers, title=group["version"], title_justify="left")
    for step in group["points"]:
        details, ms = step["details"], step.get("ms")
        case = f"{step['rows']}x{step['context']}"
        baseline = group["details"].get("baseline_ms", {}).get(case) if is_shape_of_baseline(step) else None
        words = [step["model"], step["layers"] or "all", step["kv_heads"] or "all", f"{step['tp']}x{step['cp']}"]
        words += [step["combine"] if step["cp"] > 1 else "-", step["cache_dtype"], case]
        ratios = [details.get("ms_per_predicted"), details.get("ms_per_roofline"), baseline, divide(ms, baseline)]
        table.add_row(*map(str, words), *map(format_number, [ms, details["predicted_ms"], *ratios]))
    return table


def is_shape_of_baseline(step: Step) -> bool:
    return step["layers"] is None and step["kv_heads"] is None and step["cache_dtype"] == Measured.cache_dtype


def find_failures(options: argparse.Namespace, group: dict[str, Any], steps: dict[Measured, Step]) -> Iterator[str]:
    """Yield a line for each part or step of this run that failed."""
    checks = options.report["checks"]
    if "checks" in options.parts and checks["failed"]:
        yield f"{checks['failed']} checks failed: see the messages of pytest above"
    if "baseline" in options.parts and (error := group["details"]["baseline_error"]):
        yield error
    for step in steps.values():
        if error := step["details"].get("error"):
            sizes = f"{step['rows']}x{step['context']} on {step['tp']}x{step['cp']}"
            yield f"{step['model']}, {sizes} was not timed ({error}): give fewer rows or tokens with --case"


if __name__ == "__main__":
    sys.exit(main())
