"""`helix-jax batch`: lines in, lines out, and a run that goes on where another was broken off."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helix_jax.cli import batch as command
from helix_jax.cli import main
from helix_jax.cli.jsonl import RequestLine, RejectedLine, ResultsFile, read_requests
from helix_jax.cli.console import Notes
from helix_jax.engine import FinishedEvent, Engine, RequestOutput, SamplingParams
from tests.conftest import ROOT
from tests.test_cli import ENVIRONMENT, helix

SMALL = ("--cp", 2, "--platform", "cpu", "--rows", 2, "--max-len", 256, "--prefill-chunk", 32)
TEXT = "And the LORD said"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, *entries: dict | str) -> Path:
    file.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return file


def ended(id: str) -> RequestOutput:
    return RequestOutput(id, 3, (65, 66), "AB", "length", 0.5, 0.25, 0, 0, ((-0.5, ((65, -0.5),)), (-1.0, ())))


# reading --------------------------------------------------------------------------------------------------------------


def read(*lines: str | bytes, done: tuple[str, ...] = ()) -> list[RequestLine | RejectedLine]:
    return list(read_requests((line if isinstance(line, bytes) else line.encode() for line in lines), set(done)))


def test_a_line_is_a_request_and_its_number_is_its_id_if_none_is_given():
    found = read(
        '{"id": "a", "prompt": "And", "max_new_tokens": 5, "stop": ["."], "logprobs": 2}\n',
        " \n",
        '{"prompt_ids": [1, 2], "temperature": 0.5, "stop_token_ids": []}\n',
        '{"id": 7, "prompt": "\\u00e9"}',
    )
    assert found == [
        RequestLine(1, "a", "And", SamplingParams(max_new_tokens=5, stop=(".",), logprobs=2)),
        RequestLine(3, 3, [1, 2], SamplingParams(temperature=0.5, stop_token_ids=())),
        RequestLine(4, 7, "é", SamplingParams()),
    ]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{not json", "not JSON (Expecting property name enclosed in double quotes, character 2): give one object"),
        (b'{"prompt": "\xe9"}', "not JSON ('utf-8' codec can't decode"),
        ("[" * 100_000, "not JSON (maximum recursion depth"),
        ("[1]", "list is not a request: give an object like"),
        ('{"id": true, "prompt": "a"}', "id is True: give a string or a whole number, or leave it out"),
        ('{"id": "", "prompt": "a"}', "id is ''"),
        ("{}", "there is no prompt: give prompt or prompt_ids"),
        ('{"prompt": "a", "prompt_ids": [1]}', "there are prompt and prompt_ids: give one of them"),
        ('{"prompt": [1]}', "prompt is [1]: give text"),
        ('{"prompt_ids": "a"}', "prompt_ids is 'a': give a list of token ids"),
        ('{"prompt": "a", "tmperature": 1}', "unknown field 'tmperature': choose among max_new_tokens, temperature"),
        ('{"prompt": "a", "top_p": NaN}', "top_p is nan: give a probability above 0, at most 1"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own_and_the_others_go_on(line: str | bytes, error: str):
    good = '{"id": "good", "prompt": "And"}'
    before, bad, after = read(good, line, good.replace("good", "too"))
    assert isinstance(bad, RejectedLine)
    assert (bad.line, type(before), type(after)) == (2, RequestLine, RequestLine)
    assert error in bad.error
    assert "\n" not in bad.error


def test_the_later_of_two_lines_with_one_id_is_refused_and_what_is_done_is_passed_over():
    same = '{"id": "a", "prompt": "And"}'
    number = '{"id": 1, "prompt": "And"}'
    [first, second] = read(same, same)
    assert isinstance(first, RequestLine)
    assert second == RejectedLine(2, "a", "id 'a' is that of line 1 already: give each line its own")
    [second] = read(same, same, done=("a",))
    assert (second.line, type(second)) == (2, RejectedLine)
    [second] = read('{"prompt": "And"}', number, done=("1",))
    assert second == RejectedLine(2, 1, "id 1 is that of line 1 already: give each line its own")


class Counting(Engine):
    """Ends the eldest request in each step."""

    def __init__(self):
        self.waiting: list[str] = []

    def submit(self, prompt, params=None, id=None):
        if prompt == "":
            raise ValueError("the prompt is empty")
        self.waiting.append(id or "")
        return id or ""

    def step(self):
        id = self.waiting.pop(0)
        return [FinishedEvent(id, ended(id))]


def test_no_more_lines_are_read_ahead_than_are_wanted(tmp_path: Path):
    out, taken, ahead = tmp_path / "out.jsonl", 0, 5

    def asked() -> Iterator[RequestLine]:
        nonlocal taken
        for line in range(1, 41):
            taken += 1
            yield RequestLine(line, line, "" if line == 20 else "And", SamplingParams())
            written = len(out.read_bytes().splitlines())  # each as it ends
            assert taken - written <= ahead

    with ResultsFile(out) as results:
        command._answer_all(Counting(), asked(), results, ahead, Notes())
        assert (results.answered, results.failed) == (39, 1)
    assert [entry["id"] for entry in lines_of(out) if "text" in entry] == [n for n in range(1, 41) if n != 20]
    assert [entry for entry in lines_of(out) if "error" in entry] == [
        {"id": 20, "line": 20, "error": "the prompt is empty"}
    ]


# results --------------------------------------------------------------------------------------------------------------


def test_results_are_found_again_and_errors_are_not_written_twice(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with ResultsFile(out) as results:
        assert results.done == set()
        results.add("a", ended("a"))
        results.add(7, ended("7"))
        results.add_error(RejectedLine(3, "c", "bad"))
    assert lines_of(out)[0] == {
        "id": "a",
        "text": "AB",
        "tokens": [65, 66],
        "prompt_tokens": 3,
        "finish_reason": "length",
        "ttft_s": 0.5,
        "s_per_token": 0.25,
        "logprobs": [{"logprob": -0.5, "top": [[65, -0.5]]}, {"logprob": -1.0, "top": []}],
    }
    before = out.read_bytes()
    with ResultsFile(out) as results:
        assert (results.done, results.mended) == ({"a", "7"}, False)
        results.add_error(RejectedLine(3, "c", "bad"))
        assert (results.answered, results.failed) == (0, 1)
        assert out.read_bytes() == before
        results.add_error(RejectedLine(3, "c", "bad in another way"))
        assert results.first_failed == RejectedLine(3, "c", "bad")
    assert lines_of(out)[3:] == [{"id": "c", "line": 3, "error": "bad in another way"}]


def test_a_half_written_line_is_not_done_wherever_it_ends(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with ResultsFile(out) as results:
        results.add("a", ended("a"))
    first = out.read_bytes()
    with ResultsFile(out) as results:
        results.add("b", ended("b"))
    whole = out.read_bytes()
    for size in range(len(first) + 1, len(whole)):
        out.write_bytes(whole[:size])
        with ResultsFile(out) as results:
            assert results.done == {"a"}
            assert results.mended
        assert out.read_bytes() == first


@pytest.mark.parametrize(
    "held",
    ["notes\n", "notes", '{"id": "a", "prompt": "And"}\n', '{"id": "a", "prompt": "And"}', '{"tokens": [1]}\n', "[]\n"],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, held: str):
    out = tmp_path / "out.jsonl"
    out.write_text(held)
    with pytest.raises(ValueError, match=r"out.jsonl' holds no result in line 1: give another file"):
        ResultsFile(out)
    assert out.read_text() == held


def test_a_pipe_has_no_past():
    with ResultsFile(Path("/dev/null")) as results:
        results.add("a", ended("a"))
        assert results.done == set()


# the command, in this process -----------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """Its devices are there already, and no weights are read."""
    from helix_jax.mesh import make_mesh

    def no_weights(*_: object):
        raise AssertionError("weights are read")

    monkeypatch.setattr(command, "open_mesh", lambda platform, tp, cp, processes: make_mesh(tp, cp or 1))
    monkeypatch.setattr(command.Setup, "load", no_weights)


def test_bad_settings_are_one_line_and_exit_2_before_weights_are_read(here, capsys, tmp_path: Path):
    given = write(tmp_path / "in.jsonl", {"prompt": "And"})
    other = write(tmp_path / "other.jsonl", "notes")
    good = ["batch", str(given), "--out", str(tmp_path / "out.jsonl")]
    for change, message in [
        (["--rows", "0"], "--rows is 0: give at least 1"),
        (["--pages", "0"], "--pages is 0: give at least 1"),
        (["--max-len", "-1"], "--max-len is -1: give at least 1"),
        (["--max-len", "9000"], "--max-len is 9000: the model has 8192 positions"),
        (["--page", "0"], "--page is 0"),
        (["--prefill-chunk", "0"], "--prefill-chunk is 0"),
        (["--block", "0"], "block is 0"),
        (["--cp", "3"], "does not divide the 8 query heads"),
        (["--out", "/nowhere/out.jsonl"], "--out '/nowhere/out.jsonl' cannot be written: No such file or directory"),
        (["--out", str(tmp_path)], "cannot be written: Is a directory"),
        (["--out", str(other)], "holds no result in line 1"),
        (["--out", str(given)], "is the file of requests: give another"),
    ]:
        assert main([*good, *change]) == 2
        printed = capsys.readouterr()
        assert len(printed.err.splitlines()) == 1
        assert printed.out == ""
        assert message in printed.err
    assert main(["batch", "/nowhere.jsonl", *good[2:]]) == 2
    assert "'/nowhere.jsonl' cannot be read: No such file or directory" in capsys.readouterr().err
    assert (other.read_text(), len(lines_of(given))) == ("notes\n", 1)


def test_where_nothing_is_to_do_no_weights_are_read(here, capsys, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    given = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "And"}, "{no", "")
    with ResultsFile(out) as results:
        results.add("a", ended("a"))
    assert main(["batch", str(given), "--out", str(out)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"helix-jax: '{out}' has 1 results: these are skipped",
        f"helix-jax: 0 lines answered, 1 failed, in '{out}'",
        "helix-jax: the first that failed is line 2: not JSON (Expecting property name enclosed in double quotes, "
        "character 2): give one object a line",
    ]
    assert lines_of(out)[1]["id"] == 2
    assert main(["batch", str(write(given, "")), "--out", str(out)]) == 0


# the command, as a user runs it ---------------------------------------------------------------------------------------


def test_requests_are_answered_and_each_failure_is_its_own(tmp_path: Path):
    given = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": TEXT, "max_new_tokens": 5},
        {"prompt_ids": list(TEXT.encode()), "max_new_tokens": 9, "logprobs": 2},
        "{not json",
        {"id": "long", "prompt": "And", "max_new_tokens": 300},
        {"id": "empty", "prompt": ""},
        {"id": "null", "prompt": TEXT, "temperature": None},
        {"id": "stopped", "prompt": TEXT, "max_new_tokens": 40, "stop": ["unto"]},
        {"id": "drawn", "prompt": TEXT, "max_new_tokens": 9, "temperature": 1, "top_k": 20, "min_p": 0.01, "seed": 3},
    )
    out = tmp_path / "out.jsonl"
    done = helix("batch", given, "--out", out, *SMALL)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.splitlines()[-2] == f"helix-jax: 4 lines answered, 4 failed, in '{out}'"
    assert "the first that failed is line 3: not JSON" in done.stderr
    assert "\x1b" not in done.stderr
    found = {entry["id"]: entry for entry in lines_of(out)}
    assert set(found) == {"a", 2, 3, "long", "empty", "null", "stopped", "drawn"}
    for name, entry in found.items():
        assert set(entry) == ({"id", "line", "error"} if name in (3, "long", "empty", "null") else ANSWER), name
    assert "exceed the 256 positions of a row" in found["long"]["error"]
    assert (found["empty"]["line"], found["empty"]["error"]) == (5, "the prompt is empty: give at least one token")
    assert found["null"]["error"] == "temperature is None: give a number"
    assert [len(found[name]["tokens"]) for name in ("a", 2, "drawn")] == [5, 9, 9]
    assert found[2]["tokens"][:5] == found["a"]["tokens"]
    assert found[2]["text"] == bytes(found[2]["tokens"]).decode()
    assert found[2]["prompt_tokens"] == len(TEXT)
    assert found["a"]["logprobs"] is None
    assert [told["top"][0][0] for told in found[2]["logprobs"]] == found[2]["tokens"]  # greedy: the likeliest
    assert all(len(told["top"]) == 2 and told["logprob"] == told["top"][0][1] <= 0 for told in found[2]["logprobs"])
    assert found["stopped"]["finish_reason"] == "stop"
    assert found[2]["text"].startswith(found["stopped"]["text"] + "unto")
    assert found["a"]["finish_reason"] == "length"
    assert min(found["a"]["ttft_s"], found["a"]["s_per_token"]) > 0


ANSWER = {"id", "text", "tokens", "prompt_tokens", "finish_reason", "ttft_s", "s_per_token", "logprobs"}


def test_what_is_finished_survives_ctrl_c_and_the_next_run_goes_on(tmp_path: Path):
    entries = [{"id": f"r{n}", "prompt": TEXT[: n + 1], "max_new_tokens": 4} for n in range(4)]
    entries += [{"id": "endless", "prompt": TEXT, "max_new_tokens": 230}, {"id": "last", "prompt": TEXT}]
    given, out = write(tmp_path / "in.jsonl", *entries), tmp_path / "out.jsonl"
    arguments = [sys.executable, "-m", "helix_jax", "batch", str(given), "--out", str(out), *map(str, SMALL)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True) as running:
        began = time.monotonic()
        while not (out.exists() and len(out.read_bytes().splitlines()) >= 3):
            assert running.poll() is None
            assert time.monotonic() - began < 120
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    finished = lines_of(out)
    assert 3 <= len(finished) < 6
    with out.open("a") as cut:
        cut.write('{"id": "last", "tok')

    extra = json.dumps({"id": "more", "prompt": TEXT, "max_new_tokens": 3}) + "\n"
    arguments[4] = "/dev/stdin"
    done = subprocess.run(
        arguments, input=given.read_text() + extra, capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"the last line of '{out}' was half written: it is gone, and done again" in done.stderr
    assert f"'{out}' has {len(finished)} results: these are skipped" in done.stderr
    found = lines_of(out)
    assert found[: len(finished)] == finished
    assert sorted(entry["id"] for entry in found) == ["endless", "last", "more", "r0", "r1", "r2", "r3"]
    assert {entry["id"]: len(entry["tokens"]) for entry in found}["endless"] == 230


# the benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_plays_one_trace_in_both_ways(tmp_path: Path):
    found = tmp_path / "engine.json"
    trace = ("--requests", 5, "--rows", 2, "--prompt", 4, 8, "--new", 2, 6, "--rate", 0.5, "--prefill-chunk", 8)
    command = [sys.executable, ROOT / "scripts" / "bench_engine.py", *trace, "--platform", "cpu", "--json", found]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(found.read_text())
    continuous, static = measured["runs"]
    assert (continuous["batching"], static["batching"]) == ("continuous", "static")
    assert continuous["tokens"] == static["tokens"]
    assert continuous["steps"] < static["steps"]
    assert measured["ratio"] == continuous["tokens_per_s"] / static["tokens_per_s"]
    assert static["ttft_s"]["p50"] <= static["ttft_s"]["p90"] <= static["ttft_s"]["p99"]
    assert "static" in done.stdout
