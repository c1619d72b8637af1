"""The adapter of lm-evaluation-harness: three local tasks, against its own model `hf`, and over several devices.

Its package is in the extra `eval`. Without it, only the message about that is tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from helix_jax import MissingPackageError, ModelConfig
from helix_jax.checkpoint import DEMO_MODEL, save
from tests.conftest import GOLDEN, ROOT
from tests.reference import BYTES_SHAPE, tiny_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm_eval is not installed: pip install 'helix_jax[eval]'")
# The warnings of lm_eval and its dependencies are not about this package.
pytestmark = pytest.mark.filterwarnings("default")

END = "<|end|>"
SMALL = {"device": "cpu", "rows": 2, "max_length": 64, "prefill_chunk": 32, "page": 8, "dtype": "float32"}
QUESTIONS = [
    {"q": "And it came to", "choices": ["pass", "a halt", "seven"], "answer": 0},
    {"q": "Spaces at the end  ", "choices": ["of a context", "xx"], "answer": 0},
    {"q": "", "choices": ["Without a context", "b"], "answer": 1},
    {"q": "A context that is longer than the model can read, cut from the left", "choices": ["a", "bc"], "answer": 1},
]
TEXTS = [{"text": "In the beginning"}, {"text": "God created the heaven and the earth. " * 5}]
PROMPTS = [{"q": "And it came", "a": "x"}, {"q": END + "The LORD is my shepherd; I shall not want. " * 2, "a": "y"}]


def load_adapter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from helix_jax.evaluation import lm_eval

        return lm_eval


def make_task(name: str, rows: list[dict[str, Any]], **config: Any) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}, "test_split": "test"}
    return ConfigurableTask(config={"task": name, **data, **config})


def make_tasks(questions: list[dict[str, Any]] = QUESTIONS) -> list[Any]:
    choices = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    metrics = {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    generation = {"until": ["e", END], "max_gen_toks": 6}
    return [
        make_task("choice", questions, output_type="multiple_choice", **choices, **metrics),
        make_task(
            "rolling",
            TEXTS,
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
        make_task(
            "generation",
            PROMPTS,
            output_type="generate_until",
            doc_to_text="{{q}}",
            doc_to_target="{{a}}",
            generation_kwargs=generation,
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


def evaluate(model: Any, tasks: list[Any], **options: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the metrics of each task, and its responses in order."""
    import lm_eval

    results = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, **options)
    ordered = {name: sorted(samples, key=lambda s: s["doc_id"]) for name, samples in results["samples"].items()}
    return results["results"], {name: [s["resps"] for s in samples] for name, samples in ordered.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model with a tokenizer of bytes and an end-of-text token, which transformers reads too."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokens")
    config = ModelConfig(**(BYTES_SHAPE | {"vocab": 257}), max_positions=64, tied_head=True, eos_token_ids=(256,))
    save(tiny_model(config), folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": template}))
    return folder


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_package_the_message_says_how_to_install_it():
    with pytest.raises(MissingPackageError, match=r"needs the package lm_eval: pip install 'helix_jax\[eval\]'"):
        load_adapter()


@needs_lm_eval
def test_results_are_those_of_the_model_hf(folder: Path):
    pytest.importorskip("torch")
    helix = load_adapter().HelixLM(folder, **SMALL, tp=2, cp=2)
    metrics, responses = evaluate(helix, make_tasks())
    arguments = {"pretrained": str(folder), "dtype": "float32", "max_length": 64}
    expected_metrics, expected = evaluate("hf", make_tasks(), model_args=arguments, device="cpu", batch_size=2)
    for ours, theirs in zip(responses["choice"], expected["choice"], strict=True):
        for [(score, is_greedy)], [(expected_score, expected_greedy)] in zip(ours, theirs, strict=True):
            assert score == pytest.approx(expected_score, abs=1e-3)
            assert is_greedy == expected_greedy
    flat = [(ours[0][0], theirs[0][0]) for ours, theirs in zip(responses["rolling"], expected["rolling"], strict=True)]
    assert [ours for ours, _ in flat] == pytest.approx([theirs for _, theirs in flat], abs=1e-3)
    assert responses["generation"] == expected["generation"]
    for name in ("acc,none", "acc_norm,none"):
        assert metrics["choice"][name] == expected_metrics["choice"][name]


@pytest.mark.slow
@needs_lm_eval
def test_results_of_the_demo_model_do_not_depend_on_the_mesh():
    adapter, results = load_adapter(), []
    for cp in (1, 8):
        helix = adapter.HelixLM(**SMALL, cp=cp, placement="striped", block=2, prefix_token_id=10)
        results.append(evaluate(helix, make_tasks()[:1]))
    (metrics, responses), (other_metrics, other_responses) = results
    assert metrics["choice"] == other_metrics["choice"]
    for ours, theirs in zip(responses["choice"], other_responses["choice"], strict=True):
        assert [pair[0][0] for pair in ours] == pytest.approx([pair[0][0] for pair in theirs], abs=1e-3)
        assert [pair[0][1] for pair in ours] == [pair[0][1] for pair in theirs]


@needs_lm_eval
def test_contexts_that_are_cut_are_reported(folder: Path, caplog: pytest.LogCaptureFixture):
    helix = load_adapter().HelixLM(folder, **SMALL, cp=1)
    with caplog.at_level("WARNING", "helix_jax"):
        evaluate(helix, make_tasks()[:1])
        evaluate(helix, make_tasks()[2:])
    expected = [
        f"{cut} of {requests} requests exceed the maximum length of 64: up to {removed} tokens were removed"
        for cut, requests, removed in ((2, 9, 5), (1, 2, 29))
    ]
    messages = [record.getMessage() for record in caplog.records if record.name == "helix_jax"]
    assert [message[: len(start)] for message, start in zip(messages, expected, strict=True)] == expected


@needs_lm_eval
def test_chat_templates_are_applied(folder: Path):
    helix = load_adapter().HelixLM(folder, **SMALL, cp=1)
    chat = [{"role": "user", "content": "Hello"}]
    assert helix.apply_chat_template(chat) == "user: Hello\nassistant:"
    assert helix.tokenizer_name == str(folder).replace("/", "__")
    assert "messages" in helix.chat_template(True)
    with pytest.raises(ValueError, match="has no chat template: leave out --apply_chat_template"):
        load_adapter().HelixLM(**SMALL, cp=1).apply_chat_template(chat)


@needs_lm_eval
def test_bad_options_and_arguments_are_refused(folder: Path):
    adapter = load_adapter()
    for options, message in (
        ({"cpp": 2}, "model_args: unknown key 'cpp': choose one of add_bos_token,"),
        ({"cp": "two"}, "model_args: cp is 'two': give a value of type int"),
        ({"max_length": 65}, "max_length is 65: give at most the model's 64 positions"),
        ({"rows": 0}, "rows is 0: give at least 1"),
        ({"dtype": "float16"}, "dtype is 'float16': choose one of float32, bfloat16"),
        ({"prefix_token_id": 257}, "prefix_token_id: token id 257 is outside the vocabulary of 257"),
        ({"placement": "random"}, "placement"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.HelixLM(folder, **(SMALL | {"cp": 1} | options))
    with pytest.raises(ValueError, match=r"has no tokenizer.json: add it, because tasks are texts"):
        adapter.HelixLM(GOLDEN / "llama", **SMALL)
    helix = adapter.HelixLM(folder, **SMALL, cp=1)
    for options, message in (
        ({"beams": 3}, "generation arguments: unknown key 'beams': choose one of"),
        ({"max_gen_toks": 64}, "64 tokens to generate leave no room for a context"),
    ):
        texts = {"doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": [{"metric": "exact_match"}]}
        arguments = {"generation_kwargs": {"until": ["."], **options}}
        task = make_task("bad", PROMPTS, output_type="generate_until", **texts, **arguments)
        with pytest.raises(ValueError, match=message):
            evaluate(helix, [task])
    with pytest.raises(
        ValueError, match="neither a beginning- nor an end-of-text token to begin a text with: give prefix"
    ):
        _ = adapter.HelixLM(DEMO_MODEL, **SMALL, cp=1).prefix_token_id


@pytest.mark.slow
@needs_lm_eval
def test_the_command_runs_a_task_over_several_devices(folder: Path, tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    arguments = f"pretrained={folder},cp=4,platform=cpu,rows=2,prefill_chunk=32"
    command = [sys.executable, "-m", "helix_jax.evaluation.lm_eval", "--model", "helix", "--model_args", arguments]
    command += ["--tasks", "local_choice", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout
