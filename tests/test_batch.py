"""`helix-jax batch`: requests and results as JSON lines, and a batch that continues after an interruption."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from helix_jax.checkpoint import DEMO_MODEL
from helix_jax.cli import batch as command
from helix_jax.cli.console import Reporter
from helix_jax.cli.jsonl import RejectedLine, RequestLine, ResultCounter, ResultsFile, read_requests
from helix_jax.engine import Engine, FinishedEvent, RequestOutput, SamplingParams
from helix_jax.folder import ModelFolder
from tests.conftest import ROOT
from tests.test_cli import ENVIRONMENT, HELIX, assert_bad_input, call

SMALL = ("--cp", 2, "--platform", "cpu", "--rows", 2, "--max-len", 256, "--prefill-chunk", 4)
TEXT = "And it came to pass"


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, *entries: dict | str) -> Path:
    file.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
    return file


def output_of(id: str) -> RequestOutput:
    return RequestOutput(id, 3, (65, 66), "AB", "length", 0.5, 0.25, 0, 0, ((-0.5, ((65, -0.5),)), (-1.0, ())), 9)


# Requests


def read(*lines: str | bytes, done: tuple[str, ...] = ()) -> list[RequestLine | RejectedLine]:
    return list(read_requests((line if isinstance(line, bytes) else line.encode() for line in lines), set(done)))


def test_a_line_is_a_request_and_its_number_is_its_id_if_none_is_given():
    requests = read(
        '{"id": "a", "prompt": "And", "max_new_tokens": 5, "stop": ["."], "logprobs": 2}\n',
        " \n",
        '{"prompt_ids": [1, 2], "temperature": 0.5, "stop_token_ids": []}\n',
        '{"id": 7, "prompt": "\\u00e9"}',
    )
    assert requests == [
        RequestLine(1, "a", "And", SamplingParams(max_new_tokens=5, stop=(".",), logprobs=2)),
        RequestLine(3, 3, [1, 2], SamplingParams(temperature=0.5, stop_token_ids=())),
        RequestLine(4, 7, "é", SamplingParams()),
    ]


def test_null_means_the_default_of_every_field():
    names = ["id", "prompt", *(field.name for field in fields(SamplingParams))]
    [request] = read(json.dumps(dict.fromkeys(names) | {"prompt_ids": [1, 2]}))
    assert request == RequestLine(1, 1, [1, 2], SamplingParams())


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{not json", "not JSON (Expecting property name enclosed in double quotes, character 2): give one object"),
        (b'{"prompt": "\xe9"}', "not JSON ('utf-8' codec can't decode"),
        ("[" * 100_000, "not JSON (maximum recursion depth"),
        ("[1]", "request is [1]: give an object like"),
        ('{"id": true, "prompt": "a"}', "id is True: give a string or a whole number, or leave it out"),
        ('{"id": "", "prompt": "a"}', "id is ''"),
        ("{}", "request has no prompt: give one of prompt, prompt_ids, messages"),
        ('{"prompt": null}', "request has no prompt: give one of prompt, prompt_ids, messages"),
        ('{"prompt": "a", "prompt_ids": [1]}', "request has prompt and prompt_ids: give one of"),
        ('{"prompt": [1]}', "prompt is [1]: give text"),
        ('{"prompt_ids": "a"}', "prompt_ids is 'a': give a list of token ids"),
        ('{"prompt_ids": [true]}', "prompt_ids is [True]: give a list of token ids"),
        ('{"prompt": "a", "tmperature": 1}', "unknown key 'tmperature': choose one of"),
        ('{"prompt": "a", "top_k": true}', "top_k is True: give a whole number"),
        ('{"prompt": "a", "top_p": NaN}', "top_p is nan: give a probability above 0 and at most 1"),
        ('{"prompt": "a", "stop_token_ids": [true]}', "stop_token_ids is (True,): give a list of token ids"),
        ('{"messages": "Hello"}', "messages is 'Hello': give a list of messages, like [{'role': 'user', "),
        ('{"messages": []}', "messages has no messages: give at least one"),
        ('{"messages": ["Hello"]}', "messages, message 0 is 'Hello': give an object like {'role': 'user', "),
        ('{"messages": [{"content": "Hello"}]}', "messages, message 0: role is None: choose one of system, developer,"),
        (
            '{"messages": [{"role": "human", "content": "Hello"}]}',
            "messages, message 0: role is 'human': choose one of",
        ),
        ('{"messages": [{"role": "user"}]}', "messages, message 0: content is None: give text"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "content is [{'type': 'image_url'}]: ",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}], "prompt": "a"}',
            "request has prompt and messages: give one",
        ),
        ('{"custom_id": "a"}', "body is None: give an object with messages or a prompt"),
        ('{"custom_id": 1.5, "body": {"prompt": "a"}}', "custom_id is 1.5: give a string or a whole number"),
        ('{"body": {"max_tokens": 3}}', "request has no prompt: give one of"),
        ('{"body": {"prompt": "a", "max_tokens": "3"}}', "body: max_tokens is '3': give a whole number"),
        (
            '{"body": {"prompt": "a", "max_tokens": 3, "max_completion_tokens": 4}}',
            "max_tokens is 3 and max_completion",
        ),
        ('{"body": {"prompt": "a", "presence_penalty": 0.5}}', "body: presence_penalty is 0.5, which is not supported"),
        ('{"body": {"prompt": "a", "response_format": {"type": "json_object"}}}', "body: response_format is {'type': "),
        ('{"body": {"prompt": "a", "tmperature": 1}}', "body: unknown key 'tmperature': choose one of"),
        (
            '{"body": {"prompt": "a", "top_logprobs": 2}}',
            "body: top_logprobs is 2 without logprobs: give logprobs true",
        ),
        ('{"body": {"prompt": "a", "logprobs": 2, "top_logprobs": 2}}', "body: logprobs is 2 and top_logprobs is 2: "),
        ('{"body": {"prompt": ["a", "b"]}}', "prompt is ['a', 'b']: give text"),
        ('{"url": "/v1/embeddings", "body": {"prompt": "a"}}', "url is '/v1/embeddings': choose one of /v1/chat/comp"),
        (
            '{"url": "/v1/chat/completions", "body": {"prompt": "a"}}',
            "body has prompt, but url is '/v1/chat/completions'",
        ),
        ('{"method": "GET", "body": {"prompt": "a"}}', "method is 'GET': choose one of POST"),
        (
            '{"custom_id": "a", "prompt": "a", "body": {}}',
            "request: unknown key 'prompt': choose one of body, method, url",
        ),
    ],
)
def test_a_bad_line_is_an_error_and_the_other_lines_are_requests(line: str | bytes, error: str):
    good = '{"id": "good", "prompt": "And"}'
    before, bad, after = read(good, line, good.replace("good", "too"))
    assert isinstance(bad, RejectedLine)
    assert (bad.line, type(before), type(after)) == (2, RequestLine, RequestLine)
    assert error in bad.error
    assert "\n" not in bad.error


def test_the_second_of_two_lines_with_one_id_is_rejected_and_requests_that_are_done_are_skipped():
    same = '{"id": "a", "prompt": "And"}'
    number = '{"id": 1, "prompt": "And"}'
    [first, second] = read(same, same)
    assert isinstance(first, RequestLine)
    assert second == RejectedLine(2, "a", "id 'a' is used in line 1 already: give every line its own id")
    [second] = read(same, same, done=("a",))
    assert (second.line, type(second)) == (2, RejectedLine)
    [second] = read('{"prompt": "And"}', number, done=("1",))
    assert second == RejectedLine(2, 1, "id 1 is used in line 1 already: give every line its own id")


HELLO = [{"role": "user", "content": "Hello"}]


def test_messages_are_a_prompt_and_their_parts_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    [request, in_parts] = read(
        json.dumps({"messages": HELLO, "max_new_tokens": 5}),
        json.dumps({"messages": [{"role": "user", "content": parts}]}),
    )
    assert request == RequestLine(1, 1, HELLO, SamplingParams(max_new_tokens=5))
    assert in_parts == RequestLine(2, 2, HELLO, SamplingParams())


def test_with_chat_text_is_a_message_and_ids_are_refused():
    lines = ['{"prompt": "Hello"}', '{"prompt": ""}', json.dumps({"messages": HELLO}), '{"prompt_ids": [1]}']
    lines.append('{"body": {"prompt": "Hello"}}')
    *requests, refused, from_openai = read_requests((line.encode() for line in lines), set(), chat=True)
    assert [request.prompt for request in requests] == [HELLO, "", HELLO]
    assert refused.error == (
        "request has prompt_ids, and --chat needs text: give prompt or messages, or leave out --chat"
    )
    assert from_openai.prompt == HELLO


def test_lines_of_openais_batch_api_are_requests():
    body = {"model": "any", "messages": HELLO, "user": "me", "stream": False, "tools": None, "frequency_penalty": 0.0}
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ".", "n": 2, "top_k": 7}
    chat = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    [first, second, third, fourth] = read(
        json.dumps(
            chat | {"body": body | sampling | {"max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}}
        ),
        json.dumps(
            {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "And", "max_tokens": 4, "logprobs": 1}}
        ),
        json.dumps({"body": {"prompt": [1, 2], "logprobs": False}}),
        json.dumps({"body": body | {"logprobs": True}}),
    )
    params = SamplingParams(5, 0.5, 7, 0.9, seed=3, stop=(".",), n=2, logprobs=2)
    assert first == RequestLine(1, "a", HELLO, params)
    assert second == RequestLine(2, "b", "And", SamplingParams(max_new_tokens=4, logprobs=1))
    assert third == RequestLine(3, 3, [1, 2], SamplingParams())
    assert fourth == RequestLine(4, 4, HELLO, SamplingParams(logprobs=0))


class CountingEngine(Engine):
    """An engine that finishes its oldest request in each step."""

    def __init__(self):
        self.waiting: list[str] = []

    def submit(self, prompt, params=None, id=None):
        self.waiting.append(id or "")
        return id or ""

    def step(self):
        id = self.waiting.pop(0)
        return [FinishedEvent(id, output_of(id))]


def test_lines_are_read_only_as_far_ahead_as_requested(tmp_path: Path):
    out, taken, ahead = tmp_path / "out.jsonl", 0, 5

    def requests() -> Iterator[RequestLine]:
        nonlocal taken
        for line in range(1, 41):
            taken += 1
            yield RequestLine(line, line, "" if line == 20 else "And", SamplingParams())
            written = len(out.read_bytes().splitlines())  # each when it finishes
            assert taken - written <= ahead

    folder = ModelFolder.open(DEMO_MODEL)
    with ResultsFile(out) as results:
        command._answer_all(CountingEngine(), folder, requests(), results, ahead, Reporter())
        assert (results.answered, results.tokens, results.failed) == (39, 78, 1)
    assert [entry["id"] for entry in lines_of(out) if "text" in entry] == [n for n in range(1, 41) if n != 20]
    assert [entry for entry in lines_of(out) if "error" in entry] == [
        {"id": 20, "line": 20, "error": "the prompt is empty: give at least one character"}
    ]


# Results


def test_earlier_results_are_found_and_errors_are_not_written_twice(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with ResultsFile(out) as results:
        assert results.done == set()
        results.add("a", output_of("a"))
        results.add(7, output_of("7"))
        results.add_error(RejectedLine(3, "c", "bad"))
    assert lines_of(out)[0] == {
        "id": "a",
        "text": "AB",
        "tokens": [65, 66],
        "prompt_tokens": 3,
        "finish_reason": "length",
        "seed": 9,
        "ttft_s": 0.5,
        "s_per_token": 0.25,
        "logprobs": [{"logprob": -0.5, "top": [[65, -0.5]]}, {"logprob": -1.0, "top": []}],
    }
    before = out.read_bytes()
    with ResultsFile(out) as results:
        assert (results.done, results.truncated) == ({"a", "7"}, False)
        results.add_error(RejectedLine(3, "c", "bad"))
        assert (results.answered, results.failed) == (0, 1)
        assert out.read_bytes() == before
        results.add_error(RejectedLine(3, "c", "bad in another way"))
        assert results.first_failed == RejectedLine(3, "c", "bad")
    assert lines_of(out)[3:] == [{"id": "c", "line": 3, "error": "bad in another way"}]


def test_an_incomplete_line_is_not_a_result_wherever_it_ends(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    with ResultsFile(out) as results:
        results.add("a", output_of("a"))
    first = out.read_bytes()
    with ResultsFile(out) as results:
        results.add("b", output_of("b"))
    whole = out.read_bytes()
    for size in range(len(first) + 1, len(whole)):
        out.write_bytes(whole[:size])
        with ResultsFile(out) as results:
            assert results.done == {"a"}
            assert results.truncated
        assert out.read_bytes() == first


@pytest.mark.parametrize(
    "content",
    ["notes\n", "notes", '{"id": "a", "prompt": "And"}\n', '{"id": "a", "prompt": "And"}', '{"tokens": [1]}\n', "[]\n"],
)
def test_a_file_with_other_content_is_refused_and_unchanged(tmp_path: Path, content: str):
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match=r"out.jsonl' has no result in line 1: give another file"):
        ResultsFile(out)
    assert out.read_text() == content


def test_a_pipe_has_no_earlier_results():
    with ResultsFile(Path("/dev/null")) as results:
        results.add("a", output_of("a"))
        assert results.done == set()


def test_a_process_that_does_not_write_counts_in_the_same_way():
    with ResultCounter(["a"]) as results:
        results.add("b", output_of("b"))
        results.add_error(RejectedLine(3, "c", "bad"))
        assert (results.done, results.answered, results.failed) == ({"a"}, 1, 1)
        assert results.first_failed == RejectedLine(3, "c", "bad")


# The command, without weights


@pytest.fixture
def no_weights(monkeypatch):
    """Fail if weights are read."""

    def load(*_: object):
        raise AssertionError("weights are read")

    monkeypatch.setattr(command.DecodeSetup, "load", load)


@pytest.mark.usefixtures("no_weights")
def test_bad_settings_are_one_line_and_exit_2_before_weights_are_read(tmp_path: Path):
    file = write(tmp_path / "in.jsonl", {"prompt": "And"})
    other = write(tmp_path / "other.jsonl", "notes")
    out = ("--out", tmp_path / "out.jsonl", "--cp", 1)
    for change, message in [
        (["--rows", 0], "--rows is 0: give at least 1"),
        (["--pages", 0], "--pages is 0: give at least 1"),
        (["--max-len", -1], "--max-len is -1: give at least 1"),
        (["--max-len", 9000], "--max-len is 9000: give at most the model's 8192 positions"),
        (["--page", 0], "--page is 0"),
        (["--prefill-chunk", 0], "--prefill-chunk is 0"),
        (["--block", 0], "block is 0"),
        (["--chat"], "has no chat template: give text instead of messages, without --chat"),
        (["--tp", 3, "--cp", 1], "tp 3 neither divides the 2 key/value heads nor is a multiple of them"),
        (["--out", "/nowhere/out.jsonl"], "--out '/nowhere/out.jsonl' cannot be written (No such file or directory)"),
        (["--out", tmp_path], "cannot be written (Is a directory)"),
        (["--out", other], "has no result in line 1"),
        (["--out", file], "is the input file: give another file"),
    ]:
        assert_bad_input(call("batch", file, *out, *change), message)
    missing = call("batch", "/nowhere.jsonl", *out)
    assert_bad_input(missing, "'/nowhere.jsonl' cannot be read: No such file or directory")
    assert (other.read_text(), len(lines_of(file))) == ("notes\n", 1)


@pytest.mark.usefixtures("no_weights")
def test_without_a_request_to_answer_no_weights_are_read(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    file = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "And"}, "{no", "")
    with ResultsFile(out) as results:
        results.add("a", output_of("a"))
    done = call("batch", file, "--out", out, "--cp", 1)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"helix-jax: '{out}' has 1 results: their requests are skipped",
        "helix-jax: the first that failed is line 2: not JSON (Expecting property name enclosed in double quotes, "
        "character 2): give one object per line",
        f"helix-jax: 0 lines answered, 1 failed, in '{out}'",
    ]
    assert lines_of(out)[1]["id"] == 2
    assert call("batch", write(file, ""), "--out", out, "--cp", 1).returncode == 0


# The command, with a model


ANSWER_KEYS = {
    *("id", "text", "tokens", "prompt_tokens", "finish_reason", "seed", "ttft_s", "s_per_token", "logprobs"),
}


def test_requests_are_answered_and_each_bad_line_is_an_error(byte_model: Path, tmp_path: Path):
    prompt = list(TEXT.encode())
    stop = greedy_tokens(byte_model, 6)[5]
    file = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": TEXT, "max_new_tokens": 5},
        {"prompt_ids": prompt, "max_new_tokens": 9, "logprobs": 2},
        "{not json",
        {"id": "long", "prompt": "And", "max_new_tokens": 300},
        {"id": "empty", "prompt": ""},
        {"id": "true", "prompt_ids": [True]},
        {"id": "outside", "prompt_ids": [300]},
        {"id": "null", "prompt": TEXT, "max_new_tokens": 5, "temperature": None, "seed": None},
        {"id": "stopped", "prompt": TEXT, "max_new_tokens": 40, "stop_token_ids": [stop]},
        {"id": "sampled", "prompt": TEXT, "max_new_tokens": 9, "temperature": 1, "top_k": 20, "min_p": 0.01},
        {"id": "seeded", "prompt": TEXT, "max_new_tokens": 9, "temperature": 1, "top_k": 20, "seed": 3},
    )
    out = tmp_path / "out.jsonl"
    done = call("batch", file, "--out", out, "--model", byte_model, *SMALL)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    *_, compiling, compiled, caching, first_failed, summary = done.stderr.splitlines()
    assert compiling == "helix-jax: compiling: this takes a minute or more for a large model"
    assert re.fullmatch(r"helix-jax: compiled in [\d.]+ s", compiled)
    assert caching.startswith("helix-jax: prefix caching is ")
    assert first_failed.startswith("helix-jax: the first that failed is line 3: not JSON")
    counts = re.escape(f"helix-jax: 6 lines answered, 5 failed, in '{out}': ")
    counted = re.fullmatch(counts + r"(\d+) new tokens in ([\d.]+) s, ([\d.]+) tokens/s", summary)
    assert counted is not None
    assert "\x1b" not in done.stderr
    results = {entry["id"]: entry for entry in lines_of(out)}
    assert int(counted[1]) == sum(len(entry.get("tokens", ())) for entry in results.values())
    assert float(counted[2]) * float(counted[3]) == pytest.approx(int(counted[1]), rel=0.2)
    failed = {3, "long", "empty", "true", "outside"}
    assert set(results) == {"a", 2, "null", "stopped", "sampled", "seeded"} | failed
    for id, entry in results.items():
        assert set(entry) == ({"id", "line", "error"} if id in failed else ANSWER_KEYS), id
    assert "exceed the maximum of 256 positions" in results["long"]["error"]
    assert (results["empty"]["line"], results["empty"]["error"][:19]) == (5, "the prompt is empty")
    assert "prompt_ids is [True]: give a list of token ids" in results["true"]["error"]
    assert "token id 300 is outside the vocabulary of 256" in results["outside"]["error"]
    check_answers(results)


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_chats_are_answered_as_by_generate(count: int, chat_model: Path, tmp_path: Path):
    """As messages, as text with --chat, or as a line of OpenAI's batch API. One that the template refuses fails."""
    texts = [f"word{20 + number} hello there" for number in range(count)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    entries = [{"messages": chat, "max_new_tokens": 6} for chat in chats]
    entries += [{"prompt": texts[0], "max_new_tokens": 6}]
    entries += [{"custom_id": "openai", "body": {"messages": chats[0], "max_tokens": 6}}]
    entries += [{"id": "refused", "messages": [{"role": "tool", "content": "hello"}]}]
    file, out = write(tmp_path / "in.jsonl", *entries), tmp_path / "out.jsonl"
    done = call("batch", file, "--out", out, "--model", chat_model, "--chat", *SMALL)
    assert done.returncode == 1, done.stderr
    results = {entry["id"]: entry for entry in lines_of(out)}
    refused = (
        "the prompt: the chat template of '.*' does not accept these messages .it begins with a tool.: change them"
    )
    assert re.fullmatch(refused, results.pop("refused")["error"])
    model = ("--model", chat_model, "--cp", 2, "--max-new-tokens", 6, "--chat", "--json")
    expected = [json.loads(call("generate", "--prompt", text, *model).stdout) for text in texts]
    assert len({tuple(one["tokens"]) for one in expected}) > count // 3
    for key, one in [*enumerate(expected, 1), (count + 1, expected[0]), ("openai", expected[0])]:
        assert {name: results[key][name] for name in ("tokens", "text", "prompt_tokens")} == {
            name: one[name] for name in ("tokens", "text", "prompt_tokens")
        }


def greedy_tokens(model: Path, count: int) -> list[int]:
    """Return the greedy tokens after TEXT."""
    done = call("generate", "--model", model, "--prompt", TEXT, "--cp", 2, "--max-new-tokens", count, "--json")
    return json.loads(done.stdout)["tokens"]


def check_answers(results: dict) -> None:
    assert [len(results[id]["tokens"]) for id in ("a", 2, "sampled", "seeded")] == [5, 9, 9, 9]
    assert results[2]["tokens"][:5] == results["a"]["tokens"] == results["null"]["tokens"]
    assert results[2]["text"] == bytes(results[2]["tokens"]).decode(errors="replace")
    assert results[2]["prompt_tokens"] == len(TEXT)
    assert (results["a"]["logprobs"], results["a"]["seed"], results["null"]["seed"]) == (None, None, None)
    assert results["seeded"]["seed"] == 3
    assert 0 <= results["sampled"]["seed"] < 2**64
    logprobs = results[2]["logprobs"]
    assert [entry["top"][0][0] for entry in logprobs] == results[2]["tokens"]  # greedy: the most probable
    assert all(len(entry["top"]) == 2 and entry["logprob"] == entry["top"][0][1] <= 0 for entry in logprobs)
    assert results["stopped"]["finish_reason"] == "stop"
    assert results["a"]["finish_reason"] == "length"
    assert min(results["a"]["ttft_s"], results["a"]["s_per_token"]) > 0


@pytest.mark.slow
def test_requests_are_answered_alike_with_a_draft_model(byte_model: Path, tmp_path: Path):
    lines = [{"id": str(n), "prompt": TEXT, "max_new_tokens": 20 + n, "seed": n, "temperature": n} for n in range(3)]
    file, outs = write(tmp_path / "in.jsonl", *lines), [tmp_path / "plain.jsonl", tmp_path / "drafts.jsonl"]
    for out, drafts in zip(outs, ((), ("--speculate", byte_model, "--draft-tokens", 2)), strict=True):
        done = call("batch", file, "--out", out, "--model", byte_model, *SMALL, *drafts)
        assert done.returncode == 0, done.stderr
    assert "draft tokens were right" in done.stderr
    plain, drafted = ({line["id"]: line["tokens"] for line in lines_of(out)} for out in outs)
    assert drafted == plain


def test_results_survive_ctrl_c_and_the_next_run_continues(byte_model: Path, tmp_path: Path):
    entries = [{"id": f"r{n}", "prompt": TEXT[: n + 1], "max_new_tokens": 4} for n in range(4)]
    entries += [
        {"id": "long", "prompt": TEXT, "max_new_tokens": 230},
        {"id": "last", "prompt": TEXT, "max_new_tokens": 4},
    ]
    file, out = write(tmp_path / "in.jsonl", *entries), tmp_path / "out.jsonl"
    options = ["--out", out, "--model", byte_model, *SMALL]
    arguments = [str(argument) for argument in (*HELIX, "batch", file, *options)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True) as running:
        start = time.monotonic()
        while not (out.exists() and len(out.read_bytes().splitlines()) >= 3):
            assert running.poll() is None
            assert time.monotonic() - start < 120
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    finished = lines_of(out)
    assert 3 <= len(finished) < 6
    with out.open("a") as file_out:
        file_out.write('{"id": "last", "tok')

    extra = json.dumps({"id": "more", "prompt": TEXT, "max_new_tokens": 3}) + "\n"
    (tmp_path / "more.jsonl").write_text(file.read_text() + extra)
    done = call("batch", tmp_path / "more.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert f"the last line of '{out}' was incomplete: it was removed, and its request is repeated" in done.stderr
    assert f"'{out}' has {len(finished)} results: their requests are skipped" in done.stderr
    results = lines_of(out)
    assert results[: len(finished)] == finished
    assert sorted(entry["id"] for entry in results) == ["last", "long", "more", "r0", "r1", "r2", "r3"]
    assert {entry["id"]: len(entry["tokens"]) for entry in results}["long"] == 230


# The benchmark


@pytest.mark.slow
def test_the_benchmark_replays_one_trace_with_both_kinds_of_batching(byte_model: Path, tmp_path: Path):
    file = tmp_path / "engine.json"
    trace = ("--requests", 5, "--rows", 2, "--prompt", 4, 8, "--new", 2, 6, "--rate", 0.5, "--prefill-chunk", 8)
    model = ("--model", byte_model)
    command = [
        sys.executable,
        ROOT / "scripts" / "bench_engine.py",
        *trace,
        *model,
        "--platform",
        "cpu",
        "--json",
        file,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(file.read_text())
    continuous, static = measured["runs"]
    assert (continuous["batching"], static["batching"]) == ("continuous", "static")
    assert continuous["tokens"] == static["tokens"]
    assert continuous["steps"] < static["steps"]
    assert measured["ratio"] == continuous["tokens_per_s"] / static["tokens_per_s"]
    assert static["ttft_s"]["p50"] <= static["ttft_s"]["p90"] <= static["ttft_s"]["p99"]
    assert "static" in done.stdout
