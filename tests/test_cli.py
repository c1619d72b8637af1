"""The command, run as a user would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from helix_jax import __version__
from helix_jax.cli import main
from helix_jax.layout import PLACEMENTS
from tests.conftest import COMPILATION_CACHE, FAST_COMPILATION, GOLDEN, ROOT
from tests.test_families import PLAIN

PASSAGE = ROOT / "scripts" / "data" / "passage.txt"
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_", "PYTEST"))}
ENVIRONMENT |= {"JAX_PLATFORMS": "cpu"}  # on a machine with GPUs too
ENVIRONMENT |= {"JAX_COMPILATION_CACHE_DIR": str(COMPILATION_CACHE), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}


def helix(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "helix_jax", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd="/", env=ENVIRONMENT | environment, check=False, timeout=300
    )


def result(*arguments: object, **environment: str) -> dict:
    done = helix(*arguments, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# layout ---------------------------------------------------------------------------------------------------------------


def test_layout_json_is_the_contract(capsys):
    arguments = ["layout", "--prompt", "400", "--decode", "400", "--block", "100", "--cp", "4", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {
        "placement": "helix",
        "block": 100,
        "cp": 4,
        "ranks": [
            {"rank": r, "tokens": 200, "ranges": [[100 * r, 100 * r + 100], [400 + 100 * r, 500 + 100 * r]]}
            for r in range(4)
        ],
        "skew_tokens": 0,
    }
    assert main([*arguments, "--placement", "last_rank"]) == 0
    last = json.loads(capsys.readouterr().out)
    assert last["ranks"][3] == {"rank": 3, "tokens": 500, "ranges": [[300, 800]]}
    assert last["skew_tokens"] == 400


def test_layout_of_nothing_and_of_one_rank(capsys):
    assert main(["layout", "--prompt", "0", "--decode", "0", "--block", "4", "--cp", "2", "--json"]) == 0
    assert [rank["ranges"] for rank in json.loads(capsys.readouterr().out)["ranks"]] == [[], []]
    assert main(["layout", "--prompt", "3", "--decode", "5", "--block", "4", "--cp", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"][0]["ranges"] == [[0, 8]]


def test_layout_prints_a_table_and_draws_a_plot(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "growth.png"
    arguments = ["layout", "--prompt", "40", "--decode", "90", "--block", "8", "--cp", "4", "--plot", str(file)]
    assert main(arguments) == 0
    assert "0-16, 40-48, 72-80, 104-112" in capsys.readouterr().out
    assert file.read_bytes().startswith(b"\x89PNG")


def test_layout_bad_input_is_one_line_and_exit_2(capsys):
    good = {"--prompt": "4", "--decode": "4", "--block": "4", "--cp": "4"}
    for change, message in [
        ({"--placement": "spiral"}, f"placement is 'spiral': choose one of {', '.join(PLACEMENTS)}"),
        ({"--prompt": "-1"}, "--prompt is -1: give 0 tokens or more"),
        ({"--cp": "0"}, "cp is 0: give at least 1"),
        ({"--block": "0"}, "block is 0"),
        ({"--plot": "/nowhere/x.png"}, "/nowhere/x.png"),
        ({"--plot": "/tmp/x.nonsense"}, "nonsense"),
        ({"--plot": ""}, "--plot '.' has no ending: give a file like growth.png"),
        ({"--prompt": "99999999999"}, "25000000001 blocks are too many to list: give a longer --block"),
        ({"--block": "300000000", "--cp": "8"}, "block 300000000 x cp 8 passes 32-bit integers"),
    ]:
        assert main(["layout", *(word for pair in (good | change).items() for word in pair)]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""
        assert message in printed.err
    with pytest.raises(SystemExit) as stop:
        main(["layout", "--prompt", "many"])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# generate -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unsharded() -> dict:
    return result("generate", "--prompt-file", PASSAGE, "--max-new-tokens", 40)


@pytest.mark.parametrize(("tp", "cp"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_a_real_passage_continues_alike_sharded_and_not(tp: int, cp: int, unsharded):
    tokens = len(PASSAGE.read_bytes())
    assert tokens >= 1500
    assert unsharded["mesh"] == {"tp": 1, "cp": 1}
    assert unsharded["prompt_tokens"] == tokens
    found = result(
        *("generate", "--prompt-file", PASSAGE, "--max-new-tokens", 40, "--tp", tp, "--cp", cp),
        *("--placement", "striped", "--combine", "all_to_all", "--verify"),
    )
    assert found["tokens"] == unsharded["tokens"]
    assert found["text"] == unsharded["text"] == bytes(found["tokens"]).decode()
    assert found["verified"] is True
    assert found["mesh"] == {"tp": tp, "cp": cp}
    assert (found["platform"], found["kernel"]) == ("cpu", "xla")
    assert [rank["rank"] for rank in found["ranks"]] == list(range(cp))
    assert sum(rank["tokens"] for rank in found["ranks"]) == tokens + 39
    assert min(found["compile_s"], found["prefill_s"], found["decode_s_per_token"]) > 0


def test_text_goes_to_stdout_and_all_else_to_stderr(unsharded):
    done = helix("generate", "--prompt-file", PASSAGE, "--max-new-tokens", 40, "--cp", 8)
    assert done.returncode == 0
    assert done.stdout == unsharded["text"] + "\n"
    assert "the CPU is split into 8 fake devices" in done.stderr
    assert "s per token" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr  # no bars, no colours where no terminal is


def test_prompts_may_be_ids_and_draws_follow_the_seed(byte_model: Path, tmp_path: Path):
    (tmp_path / "ids.json").write_text(json.dumps(list(b"In the beginning")))
    drawing = ("--model", byte_model, "--temperature", 1, "--top-k", 20, "--top-p", 0.9, "--max-new-tokens", 12)
    by_ids = result("generate", "--prompt-ids", tmp_path / "ids.json", *drawing, "--seed", 3, "--cp", 2)
    by_text = result("generate", "--prompt", "In the beginning", *drawing, "--seed", 3)
    assert by_ids["tokens"] == by_text["tokens"]
    assert by_text["verified"] is None
    assert result("generate", "--prompt", "In the beginning", *drawing, "--seed", 4)["tokens"] != by_ids["tokens"]


def test_a_prompt_may_come_through_a_pipe():
    command = f"echo -n And | {sys.executable} -m helix_jax generate --prompt-file /dev/stdin --max-new-tokens 2 --json"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert json.loads(done.stdout)["prompt_tokens"] == 3


def test_left_out_cp_takes_the_fake_devices_that_the_environment_asks_for(byte_model: Path):
    asked = ("generate", "--model", byte_model, "--prompt", "And", "--max-new-tokens")
    one = result(*asked, 1)
    assert one["mesh"] == {"tp": 1, "cp": 1}
    assert one["decode_s_per_token"] is None
    flag = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert result(*asked, 2, "--tp", 2, **flag)["mesh"] == {"tp": 2, "cp": 2}
    found = result(*asked, 2, JAX_NUM_CPU_DEVICES="2")
    assert found["mesh"] == {"tp": 1, "cp": 2}


def bad(arguments: Sequence[object], message: str):
    done = helix("generate", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_bad_prompts_are_one_line_and_exit_2(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "words.json").write_text('["a"]')
    (tmp_path / "outside.json").write_text("[65, 300]")
    bad(["--prompt-file", "/nowhere.txt"], "prompt file '/nowhere.txt' cannot be read: No such file")
    bad(["--prompt-file", tmp_path / "empty.txt"], "empty.txt' is empty: give at least one character")
    bad(["--prompt-file", tmp_path / "latin.txt"], "is not valid UTF-8")
    bad(["--prompt-ids", tmp_path / "words.json"], "is not a list of token ids: give one like [1, 2, 3]")
    bad(["--prompt-ids", tmp_path / "empty.txt"], "is not JSON")
    bad(["--prompt-ids", tmp_path / "outside.json", "--cp", 8], "token id 300 is outside the vocabulary of 256")
    bad(["--prompt", ""], "--prompt is empty")
    bad(["--prompt", "x" * 8100, "--cp", 8], "8100 tokens and 128 new ones exceed the model's 8192 positions")
    bad(["--prompt-file", tmp_path], "cannot be read: Is a directory")
    bad([], "one of the arguments --prompt --prompt-file --prompt-ids is required")


def test_bad_settings_are_one_line_and_exit_2(tmp_path: Path):
    prompt = ("--prompt", "And", "--cp", 4)
    bad([*prompt, "--placement", "spiral"], "placement is 'spiral': choose one of helix, striped, last_rank")
    bad([*prompt, "--combine", "ring"], "combine is 'ring'")
    bad([*prompt, "--kernel", "triton"], "kernel is 'triton': choose one of auto, xla, mosaic_gpu")
    needs = "runs on Hopper GPUs, and this is a CPU" if jax.__version_info__ >= (0, 11) else "needs JAX 0.11 or later"
    bad([*prompt, "--kernel", "mosaic_gpu"], needs)
    bad([*prompt, "--experts", "tp"], "unknown experts 'tp': choose one of flat, cp")
    bad([*prompt, "--chat"], "has no chat template: leave out --chat")
    bad([*prompt, "--tp", 4], "tp 4 does not divide the 2 key/value heads: choose tp 2")
    bad(["--prompt", "And", "--cp", 3], "tp 1 x cp 3 = 3 does not divide the 8 query heads: choose cp 2 or 4")
    bad([*prompt, "--block", 0], "block is 0")
    bad([*prompt, "--page", 0], "page is 0")
    bad([*prompt, "--max-new-tokens", 0], "max_new_tokens is 0")
    bad([*prompt, "--top-k", 0], "--top-k is 0: give at least 1, or leave it out")
    bad([*prompt, "--model", tmp_path], "config.json' does not exist: give a Hugging Face folder")
    bad([*prompt, "--platform", "gpu"], "--platform gpu: JAX found only")


def test_a_model_folder_without_weights_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_bytes((ROOT / "helix_jax" / "demo" / "config.json").read_bytes())
    bad(["--prompt", "And", "--model", tmp_path], "has no weights: it needs model.safetensors")


def test_without_a_tokenizer_text_is_refused_and_ids_are_not(byte_model: Path, tmp_path: Path):
    config = json.loads((byte_model / "config.json").read_text())
    del config["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(byte_model / "model.safetensors")
    (tmp_path / "ids.json").write_text("[65, 110, 100]")
    bad(["--prompt", "And", "--model", tmp_path], "has no tokenizer.json: give token ids with --prompt-ids")
    found = result("generate", "--prompt-ids", tmp_path / "ids.json", "--model", tmp_path, "--max-new-tokens", 3)
    assert found["text"] is None
    shown = helix("generate", "--prompt-ids", tmp_path / "ids.json", "--model", tmp_path, "--max-new-tokens", 3)
    assert json.loads(shown.stdout) == found["tokens"]
    assert len(found["tokens"]) == 3


SLOW = [f for f in PLAIN if f.name not in ("gpt_oss", "gemma3_text", "deepseek_v3")]


@pytest.mark.parametrize(
    "folder",
    [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else [], id=f.name) for f in PLAIN],
)
def test_a_folder_goes_on_greedily_as_in_transformers(folder: Path, tmp_path: Path):
    golden = np.load(folder / "golden.npz")
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(golden["tokens"][: golden["prompt_len"]].tolist()))
    settings = ("--dtype", "float32", "--ignore-eos", "--max-new-tokens", 64, "--block", 4, "--experts", "cp", "--json")
    done = helix("generate", "--model", folder, "--prompt-ids", ids, "--tp", 2, "--cp", 2, *settings)
    assert json.loads(done.stdout)["tokens"] == golden["greedy"].tolist()
    said = ["helix-jax: the CPU is split into 4 fake devices"]
    if folder.name.startswith("deepseek"):
        said.append("helix-jax: a latent serves all heads: the cache is held 2 times, once for each of tp 2")
    if folder.name == "deepseek_v3":
        skipped = "model.layers.3.eh_proj.weight to model.layers.3.shared_head.norm.weight"
        said.insert(0, f"helix-jax: skipped 5 tensors that decoding has no use for: {skipped}")
    assert done.stderr.splitlines() == said


def test_meshes_that_do_not_fit_latent_attention_are_refused_with_those_that_do(tmp_path: Path):
    (tmp_path / "ids.json").write_text("[1]")
    model = ("--prompt-ids", tmp_path / "ids.json", "--model", GOLDEN / "deepseek_v3")
    bad([*model, "--tp", 3, "--cp", 1], "tp 3 does not divide the 8 query heads: choose tp 2 or 4")
    bad([*model, "--tp", 2, "--cp", 8], "tp 2 x cp 8 = 16 does not divide the 8 query heads: choose cp 4")


def test_chat_puts_the_prompt_into_the_models_template(tmp_path: Path):
    """Asked by itself, the template gives ids: the same ids, given as ids, are answered alike."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = {"user": 0, ":": 1, "hello": 2, "there": 3, "model": 4, "?": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(GOLDEN / "llama" / file)
    chat = ["--prompt", "hello there", "--chat", "--model", tmp_path, "--max-new-tokens", 3]
    bad(chat, "has no chat template: leave out --chat")
    turns = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    template = turns + "{% if add_generation_prompt %}model :{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template})
    )
    found = result("generate", *chat)
    assert found["prompt_tokens"] == 6
    (tmp_path / "ids.json").write_text("[0, 1, 2, 3, 4, 1]")
    ids = ["--prompt-ids", tmp_path / "ids.json", "--model", tmp_path, "--max-new-tokens", 3]
    assert result("generate", *ids)["tokens"] == found["tokens"]
    bad([*ids, "--chat"], "--chat needs text, not --prompt-ids")


class Accelerator:
    platform = "gpu"


class Tpu:
    platform = "tpu"


def test_too_few_accelerators_is_said_with_their_count_and_the_way_out(monkeypatch):
    import jax

    from helix_jax.cli.devices import open_mesh

    monkeypatch.setattr(jax, "devices", lambda: [Accelerator()] * 2)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    message = "tp 1 x cp 8 needs 8 devices, but there are 2 of platform 'gpu': .* --platform cpu"
    with pytest.raises(ValueError, match=message):
        open_mesh("auto", 1, 8)
    with pytest.raises(ValueError, match="--tp 4 needs 4 devices, but there are 2: try --platform cpu"):
        open_mesh("gpu", 4, None)
    with pytest.raises(ValueError, match="--platform tpu: JAX found only 2 x gpu"):
        open_mesh("tpu", 1, 1)


def test_libtpus_search_for_a_tpu_is_not_shown(monkeypatch, capfd):
    import jax

    from helix_jax.cli import devices

    def chattering():
        os.write(2, b"no TPU worker hostnames\n")
        return real()

    real = jax.devices
    monkeypatch.setattr(jax, "devices", chattering)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert devices.open_mesh("auto", 2, 4).size == 8
    assert capfd.readouterr().err == ""
    real = lambda: [Tpu()]  # noqa: E731
    with pytest.raises(ValueError, match="needs 8 devices"):
        devices.open_mesh("auto", 2, 4)
    assert capfd.readouterr().err == "no TPU worker hostnames\n"


def test_a_difference_is_exit_1_with_its_index_and_gap(monkeypatch, capsys):
    """The unsharded run is made to say another word; run in this process, which has its 8 devices."""
    from helix_jax.cli import generate as command

    real = command.stream

    def another(model, prompts, plan, **options):
        said = 0
        for event in real(model, prompts, plan, **options):
            if isinstance(event, command.Decoded) and plan.layout.ranks == 1:
                said += 1
                event = event._replace(tokens=(65,)) if said == 4 else event
            yield event

    monkeypatch.setattr(command, "stream", another)
    monkeypatch.setattr(command, "open_mesh", lambda platform, tp, cp, processes: command.make_mesh(tp, cp))
    arguments = ["generate", "--prompt", "In the", "--cp", "2", "--max-new-tokens", "6", "--verify"]
    assert main(arguments) == 1
    assert re.search(r"not verified: new token 3 is \d+, but 65 .* lie [\d.]+ apart", capsys.readouterr().err)
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verified"] is False
    monkeypatch.setattr(command, "stream", real)
    assert main(arguments) == 0


def test_ctrl_c_is_130():
    command = [
        sys.executable,
        "-m",
        "helix_jax",
        "generate",
        "--prompt",
        "And",
        "--max-new-tokens",
        "2000",
        "--cp",
        "8",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(5)  # it decodes
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors


def test_a_ctrl_c_that_python_swallows_ends_the_command_all_the_same():
    lose_it = """
import os, signal, sys, time
from helix_jax import cli
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
def run(options):
    Lost()
    time.sleep(60)
    return 0
cli.layout.run = run
sys.exit(cli.main(["layout", "--prompt", "1", "--decode", "1", "--block", "1", "--cp", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", lose_it], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 130
    assert "helix-jax: interrupted" in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m helix_jax generate --prompt And --max-new-tokens 500 | head -c 10"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, env=ENVIRONMENT, check=False
    )
    assert len(done.stdout) == 10
    assert b"Traceback" not in done.stderr


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"helix-jax {__version__}\n"
    assert np.all([part.isdigit() for part in __version__.split(".")])
