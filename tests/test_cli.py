"""The command `helix-jax`, run in this process, and as a user runs it."""

import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from helix_jax import __version__
from helix_jax.cli import _parser, main
from helix_jax.cli.app import checked_interrupts
from helix_jax.cli.layout import line_style
from helix_jax.engine import Engine
from helix_jax.layout import PLACEMENTS
from helix_jax.validation import MissingPackageError
from tests.conftest import COMPILATION_CACHE, FAST_COMPILATION, GOLDEN, ROOT
from tests.test_families import UNQUANTISED

LATENT = GOLDEN / "deepseek_v3"  # a model with latent attention
PASSAGE = ROOT / "scripts" / "data" / "passage.txt"
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "PYTEST"))}
ENVIRONMENT |= {"JAX_PLATFORMS": "cpu"}  # on a machine with GPUs too
ENVIRONMENT |= {
    "JAX_COMPILATION_CACHE_DIR": str(COMPILATION_CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}
ENVIRONMENT |= FAST_COMPILATION
HELIX = [sys.executable, "-m", "helix_jax"]


def helix(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own."""
    command = [*HELIX, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=ENVIRONMENT | environment, check=False, timeout=300
    )


def call(*arguments: object) -> subprocess.CompletedProcess:
    """Run the command in this process, which has 8 fake devices."""
    jax.devices()  # otherwise the command would choose the number of fake devices of this process
    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("helix_jax")
    handlers, propagate = logger.handlers, logger.propagate
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # raised by the parser
        status = stop.code
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def json_of(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def result(*arguments: object) -> dict:
    return json_of(call("generate", *arguments, "--json"))


def assert_bad_input(done: subprocess.CompletedProcess, message: str) -> None:
    """Check that the command printed one line on stderr, with `message` in it, and returned 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


# layout


LAYOUT = ("layout", "--prompt", 400, "--decode", 400, "--block", 100, "--cp", 4)


def test_layout_json_is_the_contract():
    assert json_of(call(*LAYOUT, "--json")) == {
        "placement": "helix",
        "block": 100,
        "cp": 4,
        "ranks": [
            {"rank": r, "tokens": 200, "ranges": [[100 * r, 100 * r + 100], [400 + 100 * r, 500 + 100 * r]]}
            for r in range(4)
        ],
        "skew_tokens": 0,
    }
    last = json_of(call(*LAYOUT, "--json", "--placement", "last_rank"))
    assert last["ranks"][3] == {"rank": 3, "tokens": 500, "ranges": [[300, 800]]}
    assert last["skew_tokens"] == 400


def test_layout_of_no_tokens_and_of_one_rank():
    empty = json_of(call("layout", "--prompt", 0, "--decode", 0, "--block", 4, "--cp", 2, "--json"))
    assert [rank["ranges"] for rank in empty["ranks"]] == [[], []]
    one = json_of(call("layout", "--prompt", 3, "--decode", 5, "--block", 4, "--cp", 1, "--json"))
    assert one["ranks"][0]["ranges"] == [[0, 8]]


def test_layout_prints_a_table_and_draws_a_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "growth.png"
    done = call("layout", "--prompt", 40, "--decode", 90, "--block", 8, "--cp", 4, "--plot", file)
    assert done.returncode == 0
    assert "0-16, 40-48, 72-80, 104-112" in done.stdout
    assert file.read_bytes().startswith(b"\x89PNG")


def test_lines_of_ranks_that_coincide_are_distinguishable():
    styles = [line_style(rank, 4, 91) for rank in range(4)]
    for name in ("color", "linewidth", "marker", "markevery"):
        assert len({style[name] for style in styles}) == 4, name
    widths = [style["linewidth"] for style in styles]
    assert widths == sorted(widths, reverse=True)  # so that earlier lines are seen behind later ones


def test_bad_input_to_layout_is_one_line_and_exit_2():
    for change, message in [
        (("--placement", "spiral"), f"--placement is 'spiral': choose one of {', '.join(PLACEMENTS)}"),
        (("--prompt", -1), "--prompt is -1: give at least 0"),
        (("--cp", 0), "cp is 0: give at least 1"),
        (("--block", 0), "block is 0"),
        (("--plot", "/nowhere/x.png"), "--plot '/nowhere/x.png' cannot be written (No such file or directory)"),
        (("--plot", "/tmp/x.nonsense"), "nonsense"),
        (("--plot", ""), "--plot '.' has no suffix: give a file like figure.png"),
        (("--prompt", 99999999999, "--block", 4), "25000000100 blocks are too many to list: increase --block"),
        (("--block", 300000000, "--cp", 8), "block 300000000 x cp 8 exceeds 32-bit integers"),
        (("--prompt", "many"), "invalid int value: 'many'"),
    ]:
        assert_bad_input(call(*LAYOUT, *change), message)


# generate


@pytest.fixture(scope="module")
def unsharded() -> dict:
    return result("--prompt-file", PASSAGE, "--max-new-tokens", 40, "--cp", 1)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(("tp", "cp"), [(2, 4), (1, 8)])
def test_a_real_passage_continues_alike_sharded_and_unsharded(tp: int, cp: int, unsharded):
    tokens = len(PASSAGE.read_bytes())
    assert tokens >= 1500
    assert unsharded["mesh"] == {"tp": 1, "cp": 1}
    assert unsharded["prompt_tokens"] == tokens
    sharded = result(
        *("--prompt-file", PASSAGE, "--max-new-tokens", 40, "--tp", tp, "--cp", cp),
        *("--placement", "striped", "--combine", "all_to_all", "--verify"),
    )
    assert sharded["tokens"] == unsharded["tokens"]
    assert sharded["text"] == unsharded["text"] == bytes(sharded["tokens"]).decode()
    assert sharded["verified"] is True
    assert sharded["mesh"] == {"tp": tp, "cp": cp}
    assert (sharded["platform"], sharded["kernel"], sharded["seed"]) == ("cpu", "xla", None)
    assert [rank["rank"] for rank in sharded["ranks"]] == list(range(cp))
    assert sum(rank["tokens"] for rank in sharded["ranks"]) == tokens + 39
    assert min(sharded["compile_s"], sharded["prefill_s"], sharded["decode_s_per_token"]) > 0


SHORT = ("--prompt", "In the beginning", "--max-new-tokens", 12)


def test_text_goes_to_stdout_and_everything_else_to_stderr(byte_model: Path):
    done = helix("generate", "--model", byte_model, *SHORT, "--cp", 2)
    assert done.returncode == 0
    assert done.stdout == result("--model", byte_model, *SHORT, "--cp", 2)["text"] + "\n"
    assert "the CPU is split into 2 fake devices" in done.stderr
    assert "s per token" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # no bars and no colours without a terminal


def test_a_prompt_may_be_ids_and_sampling_follows_the_seed(byte_model: Path, tmp_path: Path):
    (tmp_path / "ids.json").write_text(json.dumps(list(b"In the beginning")))
    sampling = ("--model", byte_model, "--temperature", 1, "--top-k", 20, "--top-p", 0.9)
    from_ids = result("--prompt-ids", tmp_path / "ids.json", *SHORT[2:], *sampling, "--seed", 3, "--cp", 2)
    from_text = result(*SHORT, *sampling, "--seed", 3, "--cp", 1)
    assert from_ids["tokens"] == from_text["tokens"]
    assert (from_text["verified"], from_text["seed"]) == (None, 3)
    assert result(*SHORT, *sampling, "--seed", 3 + 2**32, "--cp", 1)["tokens"] != from_ids["tokens"]


def test_a_seed_is_drawn_if_none_is_given_and_repeats_the_output(byte_model: Path):
    sampling = ("--model", byte_model, *SHORT, "--temperature", 1, "--top-k", 20, "--top-p", 0.9, "--cp", 1)
    first, second = result(*sampling), result(*sampling)
    assert first["seed"] != second["seed"]
    assert first["tokens"] != second["tokens"]
    done = call("generate", *sampling, "--seed", first["seed"])
    assert done.stdout == first["text"] + "\n"
    assert f"--seed {first['seed']} repeats this output" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("--temperature", 0.8, "--seed", 1)], ids=str)
def test_a_draft_model_changes_no_token(byte_model: Path, settings: tuple):
    arguments = ("generate", "--prompt", "And", "--model", byte_model, "--max-new-tokens", 40, "--cp", 2, *settings)
    done = call(*arguments, "--speculate", byte_model, "--draft-tokens", 3, "--verify", "--json")
    assert json_of(done)["verified"] is True
    [drafted] = re.findall(r"(\d+) of (\d+) draft tokens were right: ([\d.]+) tokens per step", done.stderr)
    assert drafted[0] == drafted[1]
    assert float(drafted[2]) > 3


def test_a_prompt_may_come_through_a_pipe(byte_model: Path):
    reader, writer = os.pipe()
    os.write(writer, b"And")
    os.close(writer)
    arguments = ("--prompt-file", f"/dev/fd/{reader}", "--max-new-tokens", 1, "--model", byte_model, "--cp", 1)
    done = result(*arguments)
    os.close(reader)
    assert done["prompt_tokens"] == 3
    assert done["decode_s_per_token"] is None


@pytest.mark.slow
def test_without_cp_all_fake_devices_of_the_environment_are_used(byte_model: Path):
    arguments = ("generate", "--model", byte_model, "--prompt", "And", "--json", "--max-new-tokens", 2, "--tp", 2)
    flag = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert json_of(helix(*arguments, **flag))["mesh"] == {"tp": 2, "cp": 2}


@pytest.mark.parametrize(
    ("variables", "cp"), [pytest.param({}, 1, marks=pytest.mark.slow), ({"JAX_NUM_CPU_DEVICES": "2"}, 2)]
)
def test_without_cp_the_mesh_has_the_devices_of_the_environment(variables: dict[str, str], cp: int):
    script = "from helix_jax.devices import open_mesh; print(open_mesh('auto', 1, None).shape['cp'])"
    environment = ENVIRONMENT | variables
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) == cp


def test_bad_prompts_are_one_line_and_exit_2(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "words.json").write_text('["a"]')
    (tmp_path / "true.json").write_text("[65, true]")
    (tmp_path / "outside.json").write_text("[65, 300]")
    for arguments, message in [
        (["--prompt-file", "/nowhere.txt"], "prompt file '/nowhere.txt' cannot be read: No such file"),
        (["--prompt-file", tmp_path / "empty.txt"], "empty.txt' is empty: give at least one character"),
        (["--prompt-file", tmp_path / "latin.txt"], "is not valid UTF-8"),
        (["--prompt-ids", tmp_path / "words.json"], "is not a list of token ids: give one like [1, 2, 3]"),
        (["--prompt-ids", tmp_path / "true.json"], "is not a list of token ids: give one like [1, 2, 3]"),
        (["--prompt-ids", tmp_path / "empty.txt"], "is not JSON"),
        (["--prompt-ids", tmp_path / "outside.json", "--cp", 8], "token id 300 is outside the vocabulary of 256"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "x" * 8100, "--cp", 8], "8100 tokens and 128 new ones exceed the maximum of 8192 positions"),
        (["--prompt-file", tmp_path], "cannot be read: Is a directory"),
        ([], "one of the arguments --prompt --prompt-file --prompt-ids is required"),
    ]:
        assert_bad_input(call("generate", *arguments), message)


def test_bad_settings_are_one_line_and_exit_2(tmp_path: Path):
    is_hopper_only = "runs on Hopper GPUs, and this is a CPU"
    for arguments, message in [
        (["--placement", "spiral"], "--placement is 'spiral': choose one of helix, striped, last_rank"),
        (["--combine", "ring"], "--combine is 'ring'"),
        (["--kernel", "triton"], "--kernel is 'triton': choose one of auto, xla, mosaic_gpu"),
        (["--kernel", "mosaic_gpu"], is_hopper_only if jax.__version_info__ >= (0, 11) else "needs JAX 0.11 or later"),
        (["--experts", "tp"], "--experts is 'tp': choose one of flat, cp"),
        (["--dtype", "int8"], "--dtype is 'int8': choose one of float32, bfloat16"),
        (["--platform", "npu"], "--platform is 'npu': choose one of auto, cpu, gpu, tpu"),
        (["--chat"], "has no chat template: give text instead of messages, without --chat"),
        (
            ["--tp", 3, "--cp", 2],
            "of them: choose one of these meshes (tp x cp) of up to 6 devices: 1 x 6, 2 x 3, 4 x 1",
        ),
        (["--tp", 0], "tp is 0: give at least 1"),
        (["--block", 0], "block is 0"),
        (["--page", 0], "page is 0"),
        (["--max-new-tokens", 0], "max_new_tokens is 0"),
        (["--top-k", 0], "--top-k is 0: give at least 1"),
        (["--top-p", 0], "top_p is 0.0: give a probability above 0"),
        (["--seed", -1], "seed is -1: give a whole number from 0 to 2^64 - 1"),
        (["--speculate", "medusa"], "--speculate is 'medusa': give ngram, or the folder of a draft model"),
        (["--speculate", LATENT], "the draft model has a vocabulary of 97 tokens, and the model one of 256: give a"),
        (["--speculate", "ngram", "--draft-tokens", 8], "--draft-tokens is 8: give at most 7"),
        (["--draft-tokens", 3], "nothing is drafted without --speculate: give both, or neither"),
        (["--model", tmp_path], "config.json' does not exist: give a Hugging Face folder"),
        (["--platform", "gpu"], "platform is gpu, but JAX found only"),
    ]:
        assert_bad_input(call("generate", "--prompt", "And", "--cp", 4, *arguments), message)


def test_bad_input_in_a_process_of_its_own_is_one_line_and_exit_2(tmp_path: Path):
    (tmp_path / "ids.json").write_text("[1]")
    done = helix("generate", "--prompt-ids", tmp_path / "ids.json", "--model", LATENT, "--tp", 3, "--cp", 2)
    assert_bad_input(done, "tp 3 does not divide the 8 query heads: choose one of these meshes (tp x cp) of up to 6")


def test_a_model_folder_without_weights_is_an_error(tmp_path: Path):
    (tmp_path / "config.json").write_bytes((ROOT / "helix_jax" / "demo" / "config.json").read_bytes())
    done = call("generate", "--prompt", "And", "--model", tmp_path, "--cp", 1)
    assert_bad_input(done, "has no weights: add model.safetensors")


def test_without_a_tokenizer_text_is_refused_and_ids_are_not(byte_model: Path, tmp_path: Path):
    config = json.loads((byte_model / "config.json").read_text())
    del config["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(byte_model / "model.safetensors")
    (tmp_path / "ids.json").write_text("[65, 110, 100]")
    refused = call("generate", "--prompt", "And", "--model", tmp_path)
    assert_bad_input(refused, "has no tokenizer.json: give token ids instead of text")
    arguments = ("--prompt-ids", tmp_path / "ids.json", "--model", tmp_path, "--max-new-tokens", 3, "--cp", 1)
    as_json = result(*arguments)
    assert as_json["text"] is None
    assert json.loads(call("generate", *arguments).stdout) == as_json["tokens"]
    assert len(as_json["tokens"]) == 3


@pytest.mark.parametrize(
    "folder",
    [pytest.param(f, marks=[] if f.name == "deepseek_v3" else [pytest.mark.slow], id=f.name) for f in UNQUANTISED],
)
def test_a_folder_continues_greedily_as_in_transformers(folder: Path, tmp_path: Path):
    golden = np.load(folder / "golden.npz")
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(golden["tokens"][: golden["prompt_len"]].tolist()))
    settings = ("--dtype", "float32", "--ignore-eos", "--max-new-tokens", 64, "--block", 4, "--experts", "cp", "--json")
    tp = 1 if folder.name == "llama_9_heads" else 2
    done = call("generate", "--model", folder, "--prompt-ids", ids, "--tp", tp, "--cp", 4 // tp, *settings)
    assert json_of(done)["tokens"] == golden["greedy"].tolist()
    lines = ["helix-jax: the CPU is split into 4 fake devices"]
    if folder.name.startswith("deepseek"):
        copied_bytes = 4 * 3 * (24 + 8)  # of 3 layers in float32
        text = f"tp 2 stores its latent on 2 devices: the copies take {copied_bytes} bytes of cache per token"
        lines.append(f"helix-jax: {text}")
    if folder.name == "deepseek_v3":
        skipped = "model.layers.3.eh_proj.weight to model.layers.3.shared_head.norm.weight"
        assert skipped in done.stderr.splitlines()[0]
        lines.insert(0, done.stderr.splitlines()[0])
    *others, capacity = done.stderr.splitlines()
    assert others == lines
    tokens = re.fullmatch(r"helix-jax: the cache stores (\d+) tokens as float32", capacity)
    assert tokens is not None
    assert int(tokens[1]) >= golden["prompt_len"] + 64


def test_meshes_that_do_not_divide_latent_attention_are_refused_with_those_that_do(tmp_path: Path):
    (tmp_path / "ids.json").write_text("[1]")
    done = call("generate", "--prompt-ids", tmp_path / "ids.json", "--model", LATENT, "--tp", 3, "--cp", 1)
    assert_bad_input(done, "choose one of these meshes (tp x cp) of up to 3 devices: 1 x 3, 2 x 1")


def test_chat_puts_the_prompt_into_the_models_template(chat_model: Path, tmp_path: Path):
    """The ids that the template gives are continued in the same way when they are given as ids."""
    model = ("--model", chat_model, "--max-new-tokens", 3, "--cp", 1)
    chat = ("--prompt", "hello there", "--chat", *model)
    from_chat = result(*chat)
    assert from_chat["prompt_tokens"] == 6
    (tmp_path / "ids.json").write_text("[0, 1, 3, 4, 5, 1]")
    ids = ("--prompt-ids", tmp_path / "ids.json", *model)
    assert result(*ids)["tokens"] == from_chat["tokens"]
    assert_bad_input(call("generate", *ids, "--chat"), "--chat needs text, not --prompt-ids")
    assert_bad_input(call("generate", "--prompt", "", "--chat", *model), "--prompt is empty: give at least one")


def test_a_model_that_is_neither_a_folder_nor_in_the_hub_cache_is_one_line(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not installed
    done = call("generate", "--prompt", "And", "--model", "owner/name")
    assert_bad_input(
        done, f"model 'owner/name' is neither a folder nor complete in the hub cache '{tmp_path}': pip inst"
    )


# Devices


class Accelerator:
    platform = "gpu"


class Tpu:
    platform = "tpu"


def test_too_few_accelerators_is_an_error_with_their_count_and_a_fix(monkeypatch):
    from helix_jax.devices import open_mesh

    monkeypatch.setattr(jax, "devices", lambda: [Accelerator()] * 2)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    message = "tp 1 x cp 8 needs 8 devices, but there are 2 of platform 'gpu': .* --platform cpu"
    with pytest.raises(ValueError, match=message):
        open_mesh("auto", 1, 8)
    with pytest.raises(ValueError, match="tp 4 needs 4 devices, but there are 2: try --platform cpu"):
        open_mesh("gpu", 4, None)
    with pytest.raises(ValueError, match="platform is tpu, but JAX found only 2 x gpu"):
        open_mesh("tpu", 1, 1)


def test_the_output_of_libtpus_search_for_a_tpu_is_discarded(monkeypatch, capfd):
    from helix_jax import devices

    def searching():
        os.write(2, b"no TPU worker hostnames\n")
        return real()

    real = jax.devices
    monkeypatch.setattr(jax, "devices", searching)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert devices.open_mesh("auto", 2, 4).size == 8
    assert capfd.readouterr().err == ""
    real = lambda: [Tpu()]  # noqa: E731
    with pytest.raises(ValueError, match="needs 8 devices"):
        devices.open_mesh("auto", 2, 4)
    assert capfd.readouterr().err == "no TPU worker hostnames\n"


def test_without_any_device_the_error_names_the_cpu(monkeypatch):
    from helix_jax.devices import open_mesh

    def no_devices():
        raise RuntimeError("Unable to initialize backend")

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(ValueError, match=r"no device \(Unable to initialize backend\): try --platform cpu"):
        open_mesh("auto", 1, 1)


# --verify, errors and Ctrl-C


def test_a_difference_is_exit_1_with_its_index_and_gap(monkeypatch, byte_model: Path):
    """The unsharded run, the only one that calls `Engine.generate`, is changed to return another token."""
    real = Engine.generate

    def changed(engine, *arguments):
        [output] = real(engine, *arguments)
        return [replace(output, tokens=(*output.tokens[:3], 300, *output.tokens[4:]))]

    monkeypatch.setattr(Engine, "generate", changed)
    arguments = ("generate", "--model", byte_model, "--prompt", "In the", "--cp", 2, "--max-new-tokens", 6, "--verify")
    done = call(*arguments)
    assert done.returncode == 1
    assert re.search(r"not verified: new token 3 is \d+, but 300 .* are [\d.]+ apart", done.stderr)
    done = call(*arguments, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["verified"] is False
    monkeypatch.setattr(Engine, "generate", real)
    assert call(*arguments).returncode == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("block is 0:\ngive 1"), "helix-jax: block is 0: give 1"),
        (MissingPackageError("--plot needs the package x: pip install x"), "helix-jax: --plot needs the package x"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\n..."),
            "out of device memory (RESOURCE_EXHAUSTED: 9 GB)",
        ),
    ],
)
def test_an_error_is_one_line_and_exit_2(monkeypatch, error: Exception, message: str):
    from helix_jax.cli import layout

    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(layout, "run", fail)
    assert_bad_input(call(*LAYOUT), message)


def test_other_errors_of_the_devices_are_not_hidden(monkeypatch):
    from helix_jax.cli import layout

    def fail(options: object) -> int:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(layout, "run", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        call(*LAYOUT)


def test_ctrl_c_is_130(byte_model: Path):
    command = [*HELIX, "generate", "--model", byte_model, "--prompt", "And", "--max-new-tokens", 500, "--cp", 2]
    arguments = [str(argument) for argument in command]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, errors="replace"
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(1)  # it decodes
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_a_ctrl_c_that_python_swallows_still_ends_the_command():
    swallow = """
import os, signal, sys, time
from helix_jax import cli
from helix_jax.cli import layout
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def run(options):
    Swallows()
    time.sleep(60)
    return 0
layout.run = run
sys.exit(cli.main(["layout", "--prompt", "1", "--decode", "1", "--block", "1", "--cp", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", swallow], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["", "helix-jax: interrupted"]  # and no "Exception ignored in"


def test_checked_interrupts_raises_again_if_the_interrupt_was_swallowed():
    before = signal.getsignal(signal.SIGINT)
    with checked_interrupts() as check:
        check()
        with suppress(KeyboardInterrupt):  # as Python does while an object is destroyed
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_closes_the_pipe_early_is_no_error(byte_model: Path):
    command = f"{' '.join(HELIX)} generate --model {byte_model} --prompt And --max-new-tokens 500 | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, env=ENVIRONMENT, check=False
    )
    assert len(done.stdout) == 10
    assert b"Traceback" not in done.stderr


def test_the_version():
    done = call("--version")
    assert done.returncode == 0
    assert done.stdout == f"helix-jax {__version__}\n"
    assert np.all([part.isdigit() for part in __version__.split(".")])


COMMANDS = ("layout", "generate", "batch", "train", "eval", "plan")


def test_help_lists_all_commands():
    done = call("--help")
    assert done.returncode == 0
    assert all(f"\n    {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "eval needles", "eval perplexity"])
def test_the_help_of_a_command_is_grouped_and_ends_with_an_example_that_it_accepts(command: str, monkeypatch):
    done = call(*command.split(), "--help")
    assert done.returncode == 0
    before, example = done.stdout.split("\nexample:\n")
    ungrouped = before.split("\noptions:\n")[1].split("\n\n")[0]
    assert ungrouped.split() == ["-h,", "--help", "show", "this", "help", "message", "and", "exit"]
    for line in example.splitlines():
        program, name, *arguments = shlex.split(line)
        assert (program, name) == ("helix-jax", command.split()[0])
        _parser([name]).parse_args([name, *arguments])  # exits if an option does not exist
