"""`LLM`: a model folder, a mesh and an engine in one object; and models that are named by an id on the hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helix_jax import LLM, FinishedEvent, SamplingParams, TokenEvent
from helix_jax.checkpoint import read_config, resolve_folder
from helix_jax.engine import state
from helix_jax.validation import MissingPackageError
from tests.conftest import GOLDEN
from tests.test_cli import ENVIRONMENT

HELLO = [{"role": "user", "content": "hello there"}]
HELLO_IDS = [0, 1, 3, 4, 5, 1]
EIGHT = SamplingParams(max_new_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=4, temperature=1.0, seed=3, n=2)
SIZES = {"rows": 2, "max_len": 64, "page": 8, "chunk": 8, "block": 4}


@pytest.fixture(scope="module", autouse=True)
def _eight_devices() -> None:
    """Start JAX. Otherwise an LLM would choose the number of fake devices of this process."""
    jax.devices()


@pytest.fixture(scope="module")
def llm(chat_model: Path) -> LLM:
    return LLM(chat_model, cp=2, **SIZES)


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(llm: LLM):
    """Whatever kind of prompt it is."""
    output = llm.generate(HELLO, EIGHT)
    assert (output.finish_reason, output.prompt_tokens, len(output.tokens)) == ("length", 6, 8)
    assert output.text.strip() == llm.folder.tokenizer.decode(list(output.tokens))
    ids = [HELLO_IDS, tuple(HELLO_IDS), np.array(HELLO_IDS)]
    assert {llm.generate(prompt, EIGHT).tokens for prompt in ids} == {output.tokens}
    text = llm.generate("user : hello there assistant :", EIGHT)
    assert (text.tokens, text.text) == (output.tokens, output.text)
    several = llm.generate(["user : hello there assistant :", HELLO, *ids], EIGHT)
    assert [one.tokens for one in several] == [output.tokens] * 5
    assert [one.tokens for one in llm.generate(np.array([HELLO_IDS]), EIGHT)] == [output.tokens]
    assert [one.tokens for one in llm.generate([HELLO], [EIGHT])] == [output.tokens]


def test_the_end_tokens_of_the_folder_and_stop_strings_end_an_output(llm: LLM):
    output = llm.generate(HELLO, EIGHT)
    stop = output.text.split()[2]
    stopped = llm.generate(HELLO, SamplingParams(max_new_tokens=8, ignore_eos=True, stop=stop))
    assert (stopped.finish_reason, stopped.text.strip()) == ("stop", output.text.partition(stop)[0].strip())
    assert llm.engine.config.eos_token_ids == (2,)


def test_several_samples_are_the_entry_of_their_prompt(llm: LLM):
    samples = llm.generate(HELLO, SAMPLED)
    assert [(sample.index, sample.seed) for sample in samples] == [(0, 3), (1, 4)]
    one, of_two = llm.generate([HELLO, HELLO], [EIGHT, SAMPLED])
    assert one.tokens == llm.generate(HELLO, EIGHT).tokens
    assert [sample.tokens for sample in of_two] == [sample.tokens for sample in samples]


@pytest.mark.slow
def test_a_draft_model_may_be_a_folder(llm: LLM, chat_model: Path):
    drafting = LLM(chat_model, cp=2, **SIZES, speculate=chat_model)
    assert drafting.generate([HELLO], EIGHT)[0].tokens == llm.generate([HELLO], EIGHT)[0].tokens
    stats = drafting.engine.stats()
    assert stats.accepted_tokens == stats.drafted_tokens > 2


def test_events_of_a_stream_are_those_of_its_prompts(llm: LLM):
    expected = llm.generate([HELLO, "there"], EIGHT)
    other = iter(llm.stream("hello", EIGHT))
    first_of_other = next(other)
    texts, tokens, finished = {"0": "", "1": ""}, {"0": [], "1": []}, {}
    for event in llm.stream([HELLO, "there"], EIGHT):
        if isinstance(event, FinishedEvent):
            finished[event.id] = event.result
        else:
            texts[event.id] += event.text or ""
            tokens[event.id].append(event.token)
    assert [(finished[id].id, finished[id].tokens) for id in "01"] == [
        (id, output.tokens) for id, output in zip("01", expected, strict=True)
    ]
    assert [(texts[id], tuple(tokens[id])) for id in "01"] == [(output.text, output.tokens) for output in expected]
    events = [first_of_other, *other]
    assert [type(event) for event in events] == [TokenEvent] * 8 + [FinishedEvent]
    assert {event.id for event in events} == {"0"}
    assert [event.id for event in llm.stream(HELLO, SAMPLED) if isinstance(event, FinishedEvent)] == ["0/0", "0/1"]
    assert not llm.engine.busy


def test_a_stream_that_is_stopped_early_and_an_interrupt_leave_nothing_behind(llm: LLM, monkeypatch):
    expected = llm.generate(HELLO, EIGHT).tokens
    stream = llm.stream([HELLO, "there"], EIGHT)
    next(stream)
    stream.close()
    llm.stream(HELLO)  # of which no event is requested
    assert not llm.engine.requests

    def interrupt(self: object, count: object) -> Iterator[None]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(llm.engine), "_count_drafts", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(HELLO, EIGHT)
    assert not llm.engine.requests
    assert llm.generate(HELLO, EIGHT).tokens == expected
    assert not llm.engine.busy


def test_texts_and_chats_are_scored(llm: LLM):
    [expected] = llm.engine.score([HELLO_IDS], top=1)
    text = llm.score("user : hello there assistant :", top=1)
    assert list(text) == list(expected)
    assert len(expected) == 5
    [chat] = llm.score([HELLO], top=1)  # without the beginning of an answer
    assert list(chat) == list(expected)[:3]


def test_a_prompt_that_does_not_fit_is_refused_with_the_values_and_the_fix(llm: LLM):
    message = "the prompt: 60 tokens and 8 new ones exceed the maximum of 64 positions: shorten the prompt or reduce "
    message += "max_new_tokens, or give a max_len of up to 4096"
    with pytest.raises(ValueError, match=message.replace("the prompt: ", "")):
        llm.generate([3] * 60, EIGHT)
    with pytest.raises(ValueError, match="60 tokens and 8 new ones exceed the maximum of 64 positions"):
        next(llm.stream(["hello", [3] * 60], EIGHT))
    assert not llm.engine.busy


def test_by_default_a_request_may_have_the_positions_of_the_model_and_pages_fit_the_memory(
    chat_model: Path, monkeypatch, tmp_path: Path
):
    page_bytes = 3 * 2 * 2 * 64 * 16 * 4  # layers, keys and values, heads, tokens, width, float32
    for kilobytes, pages in ((10**9, 2 * 33), (8 * 12 * page_bytes // 1024, 10)):
        (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {kilobytes} kB\n")
        monkeypatch.setattr(state, "_MEMORY_FILE", tmp_path / "meminfo")
        engine = LLM(chat_model, cp=2, rows=2).engine
        assert engine.stats().pages == pages
        assert engine.page == 64
    with pytest.raises(ValueError, match="2000 tokens and 128 new ones need 17 pages of 64 on one rank, and it has 10"):
        engine.submit([1] * 2000)


# Wrong uses, in a process without the type checks of the tests

WRONG_USES = [
    ("hx.LLM('/nowhere')", "ValueError: model folder '/nowhere' does not exist: give a Hugging Face folder"),
    ("hx.LLM(None)", "TypeError: the model folder is None: give a path, or an id on the Hugging Face Hub"),
    ("hx.LLM(folder, row=2)", "TypeError: LLM has no option 'row': choose one of tp, cp, dp, platform, dtype, block, "),
    ("hx.LLM(folder, temperature=1)", "TypeError: temperature is not an option of an engine: give helix_jax."),
    ("hx.LLM(folder, platform='npu')", "ValueError: platform is 'npu': choose one of auto, cpu, gpu, tpu"),
    ("hx.LLM(folder, dtype='int8')", "ValueError: dtype is 'int8': choose one of float32, bfloat16"),
    ("hx.LLM(folder, tp=0)", "ValueError: tp is 0: give at least 1"),
    ("hx.LLM(folder, cp=64)", "ValueError: tp 1 x cp 64 needs 64 devices, but there are 2 of platform 'cpu': choose "),
    ("hx.LLM(folder, tp='2')", "TypeError: tp is '2': give a whole number"),
    ("hx.LLM(folder, rows=0)", "ValueError: rows is 0: give at least 1"),
    ("hx.LLM(folder, rows=3, cp=1, dp=2)", "ValueError: dp 2 does not divide 3 rows: give a multiple of 2"),
    ("hx.LLM(folder, max_len=9000)", "ValueError: max_len is 9000: give at most the model's 512 positions"),
    (
        "hx.LLM(folder, placement='spiral')",
        "ValueError: placement is 'spiral': choose one of helix, striped",
    ),
    ("hx.LLM(folder, speculate='medusa')", "ValueError: speculate is 'medusa': give ngram, or the folder of a"),
    ("hx.LLM(folder, speculate=3)", "TypeError: speculate is 3: give 'ngram', or a draft model"),
    ("hx.LLM(folder, speculate=folder, draft_tokens=9)", "ValueError: draft_tokens is 9: give at most 7"),
    ("llm.generate([])", "ValueError: there are no prompts: give at least one"),
    ("llm.generate(None)", "TypeError: prompts is None: give text, token ids, messages, or a list of these"),
    ("llm.generate(b'And')", "TypeError: prompts is b'And': give text, token ids, messages, or a list of these"),
    ("llm.generate({'role': 'user', 'content': 'And'})", "TypeError: prompts is {'content': 'And', 'role': 'user'}: "),
    ("llm.generate(['And', 3])", "TypeError: prompt 1 is 3: give text, token ids or messages"),
    ("llm.generate('')", "ValueError: the prompt is empty: give at least one character"),
    (
        "llm.generate([65, 300])",
        "ValueError: the prompt: token id 300 is outside the vocabulary of 256: give ids",
    ),
    ("llm.generate([65, True])", "TypeError: the prompt is not a sequence of token ids"),
    (
        "llm.generate('And', {'temperature': 1})",
        "TypeError: params is {'temperature': 1}: give Sampling",
    ),
    ("llm.generate('And', 20)", "TypeError: params is 20: give SamplingParams(...), or a list of them"),
    ("llm.generate(['And'], [PARAMS, PARAMS])", "ValueError: there are 2 params for 1 prompts: give one for all, or "),
    ("llm.generate([{'role': 'user', 'content': 'And'}])", "ValueError: '{folder}' has no chat template: give text "),
    ("llm.stream('And', {'temperature': 1})", "TypeError: params is {'temperature': 1}: give Sampling"),
    ("llm.score('And', top=99)", "ValueError: top is 99: give 0 to 20"),
    (
        "llm.engine.submit('And', {'temperature': 1})",
        "TypeError: params is {'temperature': 1}: give Sampling",
    ),
    (
        "llm.engine.generate(['And'], {'temperature': 1})",
        "TypeError: params is {'temperature': 1}: give Sampling",
    ),
    (
        "hx.generate(MODEL, [[1]], llm.plan, {'seed': 1})",
        "TypeError: params is {'seed': 1}: give SamplingParams(...)",
    ),
    ("hx.stream(MODEL, [[1]], llm.plan, hx.make_sampling(1))", "TypeError: params is Sampling("),
    (
        "hx.generate(MODEL, [[1]], llm.plan, seed=1)",
        "TypeError: seed is not an option of an engine: give ",
    ),
]
SCRIPT = """
import json, sys
import helix_jax as hx
folder, uses = sys.argv[1], json.loads(sys.argv[2])
llm = hx.LLM(folder, cp=2, max_len=64)  # the CPU is split into two devices
MODEL, PARAMS = llm.engine.model, hx.SamplingParams()
errors = []
for use in uses:
    try:
        eval(use)
        errors.append("none")
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
print(json.dumps(errors))
"""


def test_wrong_uses_are_one_clear_line_each(byte_model: Path):
    uses = [use for use, _ in WRONG_USES]
    arguments = [sys.executable, "-c", SCRIPT, str(byte_model), json.dumps(uses)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for (use, message), error in zip(WRONG_USES, json.loads(done.stdout), strict=True):
        assert error.startswith(message.replace("{folder}", str(byte_model))), f"{use}: {error}"
        assert "\n" not in error.partition("Sampling(")[0], use


# Models that are named by an id on the hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """Return an empty hub cache. There is no package huggingface_hub."""
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return folder


def store(cache: Path, commit: str, *files: str, id: str = "owner/name") -> Path:
    """Store files of a golden folder in the cache, as huggingface_hub does."""
    snapshot = cache / f"models--{id.replace('/', '--')}" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).symlink_to(GOLDEN / "llama" / file)
    return snapshot


COMPLETE = ("config.json", "model.safetensors")


def test_an_id_is_found_in_the_hub_cache(cache: Path):
    only = store(cache, "b1", *COMPLETE)
    assert resolve_folder("owner/name") == only
    assert read_config("owner/name").layers == 3
    main = store(cache, "a2", *COMPLETE)
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a2")
    assert resolve_folder(Path("owner/name")) == main


def test_a_local_folder_wins(cache: Path, tmp_path: Path, monkeypatch):
    store(cache, "b1", *COMPLETE)
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert resolve_folder("owner/name") == Path("owner/name")


def test_sharded_weights_are_complete_if_all_files_of_the_index_are_there(cache: Path):
    snapshot = store(cache, "b1", "config.json")
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (snapshot / "1.safetensors").touch()
    with pytest.raises(MissingPackageError):
        resolve_folder("owner/name")
    (snapshot / "2.safetensors").touch()
    assert resolve_folder("owner/name") == snapshot


def test_without_the_package_the_error_says_how_to_download_the_model(cache: Path):
    store(cache, "b1", "config.json")  # a part
    message = (
        f"model 'owner/name' is neither a folder nor complete in the hub cache '{cache}': pip install huggingface_hub"
    )
    with pytest.raises(MissingPackageError, match=message):
        resolve_folder("owner/name")
    for path in ("name", "/owner/name", "./owner/name", "a/b/c"):
        assert resolve_folder(path) == Path(path)  # which is no id


def test_with_the_package_the_model_is_downloaded_or_the_error_names_the_reason(cache: Path, monkeypatch):
    calls, part = [], store(cache, "b1", "config.json")

    def download(id: str, **options: object) -> str:
        calls.append((id, options["cache_dir"], options["etag_timeout"]))
        if id == "owner/absent":
            raise OSError("Name or service not known\nmore")
        return str(part if id == "owner/name" else store(cache, "c3", *COMPLETE, id=id))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    assert resolve_folder("owner/other") == cache / "models--owner--other" / "snapshots" / "c3"
    assert calls == [("owner/other", cache, 5)]
    assert resolve_folder("owner/other").name == "c3"
    assert len(calls) == 1  # the second time it is in the cache
    advice = "check the name and the network, or run `hf download owner/absent --local-dir DIR` elsewhere"
    with pytest.raises(ValueError, match=rf"cannot be downloaded \(Name or service not known\): {advice}"):
        resolve_folder("owner/absent")
    with pytest.raises(ValueError, match="it has no config.json, or not all of its safetensors files"):
        resolve_folder("owner/name")
