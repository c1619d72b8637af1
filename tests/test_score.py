"""Scores of texts: the log-probabilities of given tokens, chunk by chunk, on every mesh."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import Engine, FinishedEvent, ModelConfig, SamplingParams, load, shard, transfer
from helix_jax.abstract import abstract_weights
from helix_jax.cli.jsonl import RequestLine, ResultsFile, read_requests
from helix_jax.engine import PromptLogprobs, programs, sampling_params
from helix_jax.mesh import ROWS_B, sharding
from helix_jax.sampling import MAX_LOGPROBS
from helix_jax.text import ByteTokenizer
from tests.conftest import GOLDEN
from tests.reference import TINY, naive_logits, plan_of, tiny_model

PADDED = 160  # one program for the reference
SHAPE = {"rows": 4, "page": 4, "pages": 12, "max_len": 160, "chunk": 32}
TEXTS = [np.random.default_rng(3).integers(0, TINY.vocab, length).tolist() for length in (97, 5, 32, 33, 2)]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """Return the log-probabilities of all tokens at each position of each text, from one pass without a cache."""
    model = tiny_model()
    logits_BSV = naive_logits(model, TEXTS, PADDED)[..., : TINY.vocab]
    return [log_softmax(logits_SV[: len(text) - 1]) for logits_SV, text in zip(logits_BSV, TEXTS, strict=True)]


@pytest.fixture(scope="module")
def make_engine():
    """Return a function that creates engines. It shards the weights once per mesh."""
    sharded = {}

    def make(tp=2, cp=4, dp=1, placement="helix", **options) -> Engine:
        plan = plan_of(tp, cp, dp, block=4, placement=placement)
        if (tp, cp, dp) not in sharded:
            sharded[tp, cp, dp] = shard(tiny_model(), plan)
        return Engine(sharded[tp, cp, dp], plan, **(SHAPE | options))

    return make


def log_softmax(logits_SV) -> np.ndarray:
    logits_SV = np.asarray(logits_SV, np.float64)
    largest_S1 = logits_SV.max(-1, keepdims=True)
    return logits_SV - largest_S1 - np.log(np.exp(logits_SV - largest_S1).sum(-1, keepdims=True))


def check_scores(scores: PromptLogprobs, text: list[int], expected_SV: np.ndarray, top: int) -> None:
    """Check the scores of a text against the log-probabilities of all tokens, at every position."""
    assert scores.top_ids_SC.shape == scores.top_SC.shape == (len(text) - 1, top)
    np.testing.assert_allclose(scores.logprobs_S, expected_SV[np.arange(len(text) - 1), text[1:]], atol=1e-4)
    np.testing.assert_allclose(scores.top_SC, -np.sort(-expected_SV)[:, :top], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(expected_SV, scores.top_ids_SC, 1), scores.top_SC, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "top"),
    [
        ({}, 20),
        ({"tp": 1, "cp": 2, "dp": 2, "placement": "striped", "page": 8, "chunk": 5}, 1),
        pytest.param({"tp": 1, "cp": 8, "placement": "last_rank", "chunk": 7}, 0, marks=pytest.mark.slow),
        pytest.param({"tp": 1, "cp": 1, "pages": 80, "chunk": 200}, 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scores_are_those_of_one_pass_without_a_cache(make_engine, expected, options, top):
    """On each mesh, and with chunks that end before, at and after the ends of the texts."""
    engine = make_engine(**options)
    for text, scores, expected_SV in zip(TEXTS, engine.score(TEXTS, top), expected, strict=True):
        check_scores(scores, text, expected_SV, top)
    assert engine.stats().decoded_tokens == 0
    assert set(engine.stats().pages_in_use) == {0}


@pytest.mark.parametrize(
    ("family", "tp", "cp"),
    [("llama", 2, 2), *(pytest.param(f, 1, 4, marks=pytest.mark.slow) for f in ("deepseek_v3", "gpt_oss", "granite"))],
)
def test_scores_are_those_of_transformers(family: str, tp: int, cp: int):
    golden, plan = np.load(GOLDEN / family / "golden.npz"), plan_of(tp, cp, block=4)
    text = golden["tokens"].tolist()[: len(golden["logits"]) + 1]
    engine = Engine(load(GOLDEN / family, plan, jnp.float32), plan, rows=1, page=8, max_len=len(text), chunk=16)
    [scores] = engine.score([text], 2)
    check_scores(scores, text, log_softmax(golden["logits"][: len(text) - 1]), 2)


def test_requests_that_score_and_generate_run_beside_others(make_engine, expected):
    """Generated tokens are the same with and without scores. Of a preempted request no score is lost or twice there."""
    params = SamplingParams(max_new_tokens=40)
    scoring = SamplingParams(max_new_tokens=40, prompt_logprobs=2, logprobs=1)
    alone = [make_engine().generate([text], params)[0].tokens for text in TEXTS[:4]]
    engine = make_engine(steps_per_call=4, budget=24)
    outputs = engine.generate(TEXTS[:4] * 2, [scoring] * 4 + [params] * 4)
    assert [output.tokens for output in outputs] == alone * 2
    assert sum(output.preemptions for output in outputs[:4]) >= 1
    for text, output, expected_SV in zip(TEXTS, outputs[:4], expected, strict=False):
        check_scores(output.prompt_logprobs, text, expected_SV, 2)
        assert len(output.logprobs) == 40
    assert [output.prompt_logprobs for output in outputs[4:]] == [None] * 4


def test_a_preempted_request_continues_to_score_where_it_was(make_engine, expected):
    """In the middle of its prompt: what was scored is not scored again."""
    engine = make_engine(rows=2, placement="striped")
    id = engine.submit(TEXTS[0], SamplingParams(max_new_tokens=1, prompt_logprobs=2))
    for _ in range(2):
        engine.step()
    request = engine.requests[id]
    assert request.num_scored == 64
    engine.scheduler._preempt(request)
    outputs = [event.result for event in engine.events() if isinstance(event, FinishedEvent)]
    check_scores(outputs[0].prompt_logprobs, TEXTS[0], expected[0], 2)
    assert [len(part) for part in request.prompt_logprobs] == [32, 32, 32]
    assert engine.stats().prefilled_tokens == 64 + 97 - 64  # its own prefix was cached


def test_cached_prefixes_are_registered_by_requests_that_score_but_not_used(make_engine, expected):
    engine = make_engine(placement="striped")
    text, ten = TEXTS[0], SamplingParams(max_new_tokens=10)
    engine.score([text])
    [output] = engine.generate([text], ten)
    assert output.shared_tokens == 96
    [scored] = engine.generate([text], SamplingParams(max_new_tokens=10, prompt_logprobs=0))
    assert (scored.shared_tokens, scored.tokens) == (0, output.tokens)
    check_scores(scored.prompt_logprobs, text, expected[0], 0)


def test_tokens_before_the_first_that_is_reported_may_be_cached(make_engine, expected):
    engine, text = make_engine(placement="striped"), TEXTS[0]
    engine.generate([text], SamplingParams(max_new_tokens=1))
    starts = (1, 16, 17, 40, 96, 97)
    params = [SamplingParams(max_new_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start) for start in starts]
    outputs = engine.generate([text] * len(starts), params)
    assert [output.shared_tokens for output in outputs] == [0, 0, 16, 32, 80, 80]
    for start, output in zip(starts, outputs, strict=True):
        check_scores(output.prompt_logprobs, text[start - 1 :], expected[0][start - 1 :], 1)
    with pytest.raises(ValueError, match="prompt_logprobs_start is 97, but there are 2 tokens: give at most 2"):
        engine.generate([[1, 2]], params[-1])


def test_scores_move_with_a_transferred_request(make_engine, expected):
    source, target = make_engine(), make_engine(tp=1, cp=2, page=2, pages=200)
    id = source.submit(TEXTS[0], SamplingParams(max_new_tokens=3, prompt_logprobs=2))
    for _ in range(2):
        source.step()
    transfer(id, source, target)
    [output] = [event.result for event in target.events() if isinstance(event, FinishedEvent)]
    check_scores(output.prompt_logprobs, TEXTS[0], expected[0], 2)
    assert len(output.tokens) == 3


def test_a_cancelled_request_has_the_scores_so_far(make_engine, expected):
    engine = make_engine()
    id = engine.submit(TEXTS[0], SamplingParams(max_new_tokens=0, prompt_logprobs=1))
    for _ in range(2):
        engine.step()
    engine.cancel(id)
    [output] = [event.result for event in engine.events() if isinstance(event, FinishedEvent)]
    assert output.finish_reason == "cancelled"
    assert 0 < len(output.prompt_logprobs) < len(TEXTS[0]) - 1
    check_scores(output.prompt_logprobs, TEXTS[0][: len(output.prompt_logprobs) + 1], expected[0][:32], 1)


def test_no_program_scores_unless_a_request_asks(make_engine, monkeypatch):
    engine, calls = make_engine(), []
    monkeypatch.setattr(engine.runner, "call", lambda program, *rest: calls.append(program) or program(*rest))
    engine.generate([TEXTS[1]], SamplingParams(max_new_tokens=2, logprobs=1))
    assert programs.prefill in calls
    assert not {programs.prefill_to_score, programs.score_tokens} & set(calls)
    engine.score([TEXTS[1]])
    assert {programs.prefill_to_score, programs.score_tokens} <= set(calls)


def test_a_text_may_have_one_token_more_than_the_engine_has_positions(make_engine, expected):
    """The last token is scored and not read. A text of one token has no score."""
    engine = make_engine(tokenizer=ByteTokenizer())
    longest, one, text = engine.score([(TEXTS[0] * 2)[:161], [1], "01"], 1)
    assert (len(longest), len(one), len(text)) == (160, 0, 1)
    check_scores(longest[:96], TEXTS[0], expected[0], 1)
    assert list(one) == []
    [generating] = engine.generate([[1]], SamplingParams(max_new_tokens=2, prompt_logprobs=3))
    assert (len(generating.prompt_logprobs), len(generating.tokens)) == (0, 2)
    [output] = engine.generate(["01"], SamplingParams(max_new_tokens=0, prompt_logprobs=1))
    assert (output.tokens, output.text, output.finish_reason, output.ttft_s) == ((), "", "length", None)
    np.testing.assert_array_equal(output.prompt_logprobs.logprobs_S, text.logprobs_S)


def test_scores_are_entries_and_arrays(make_engine):
    [scores] = make_engine().score([TEXTS[1]], 2)
    assert len(scores) == len(list(scores)) == 4
    logprob, top = scores[-1]
    assert (logprob, [id for id, _ in top]) == (float(scores.logprobs_S[3]), scores.top_ids_SC[3].tolist())
    assert list(scores[1:3]) == [scores[1], scores[2]]
    assert isinstance(scores[1:3], PromptLogprobs)
    with pytest.raises(IndexError):
        _ = scores[4]


@pytest.mark.parametrize(
    ("texts", "top", "error", "message"),
    [
        ([[1, 2]], -1, ValueError, "top is -1: give 0 to 20"),
        ([[1, 2]], MAX_LOGPROBS + 1, ValueError, "top is 21: give 0 to 20"),
        ([[1, 2]], True, TypeError, "top is True: give a whole number"),
        ([[1, 2], []], 0, ValueError, "prompt 1 is empty: give at least one token"),
        (["text"], 0, ValueError, "text needs a tokenizer, and the engine has none"),
        ("text", 0, TypeError, "prompts is a string: give a list"),
        ([[1] * 162], 0, ValueError, "162 tokens and 0 new ones exceed the maximum of 160 positions"),
        ([[1, 61]], 0, ValueError, "token id 61 is outside the vocabulary of 61"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(make_engine, texts, top, error, message):
    engine = make_engine()
    with pytest.raises(error, match=re.escape(message)):
        engine.score(texts, top)
    assert not engine.busy


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"prompt_logprobs": -1}, ValueError, "prompt_logprobs is -1: give 0 to 20"),
        ({"prompt_logprobs": 21}, ValueError, "prompt_logprobs is 21: give 0 to 20"),
        ({"prompt_logprobs": True}, TypeError, "prompt_logprobs"),
        ({"prompt_logprobs": 1.5}, TypeError, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "max_new_tokens": -1}, ValueError, "max_new_tokens is -1: give at least 0"),
        ({"prompt_logprobs": 1, "prompt_logprobs_start": 0}, ValueError, "prompt_logprobs_start is 0: give at least 1"),
        ({"prompt_logprobs_start": 2}, ValueError, "is 2 without prompt_logprobs: give prompt_logprobs too"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0: give at least 1"),
    ],
)
def test_invalid_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        sampling_params(params)


def test_batch_lines_request_and_report_scores(tmp_path: Path, make_engine):
    line = {"prompt_ids": TEXTS[1], "prompt_logprobs": 2, "max_new_tokens": 1}
    [request] = read_requests([json.dumps(line).encode()], ())
    assert isinstance(request, RequestLine)
    [output] = make_engine().generate([request.prompt], request.params)
    with ResultsFile(tmp_path / "out.jsonl") as results:
        results.add(request.id, output)
    written = json.loads((tmp_path / "out.jsonl").read_text())
    assert len(written["tokens"]) == 1
    assert len(written["prompt_logprobs"]) == len(TEXTS[1]) - 1
    for entry, (logprob, top) in zip(written["prompt_logprobs"], output.prompt_logprobs, strict=True):
        assert entry == {"logprob": logprob, "top": [list(pair) for pair in top]}


@pytest.mark.optimized
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 4)])
def test_the_temporary_memory_of_scoring_is_that_of_a_few_tokens(tp: int, cp: int):
    """A chunk has 32 times as many tokens as are scored at once, so the logits of a whole chunk would show."""
    config = ModelConfig(
        layers=1, width=16, heads=8, kv_heads=8, head_width=2, ff_width=16, vocab=16_384, max_positions=8192
    )
    plan, T = plan_of(tp, cp), 32 * programs.SCORED_AT_ONCE
    weights = abstract_weights(config, plan.mesh, jnp.float32)
    where = sharding(plan.mesh, ROWS_B)
    x_XTD = jax.ShapeDtypeStruct((1, T, config.width), jnp.float32, sharding=where)
    next_XT = jax.ShapeDtypeStruct((1, T), jnp.int32, sharding=where)
    lowered = programs.score_tokens.lower(config, plan, weights, x_XTD, next_XT, MAX_LOGPROBS)
    at_once = programs.SCORED_AT_ONCE * config.vocab * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes <= 3 * at_once
