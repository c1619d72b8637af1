"""The engine on devices: what a request says is its own, whatever comes, goes and runs out around it."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import (
    BlockLayout,
    FinishedEvent,
    Engine,
    Plan,
    TokenEvent,
    SamplingParams,
    generate,
    transfer,
    load,
    make_mesh,
    make_sampling,
    shard,
)
from helix_jax.engine import programs, sampling_params
from helix_jax.layout import PLACEMENTS
from helix_jax.sampling import apply_repetition_penalty
from helix_jax.text import Bytes
from tests.conftest import GOLDEN
from tests.reference import TIE, TINY, gaps_of, naive_logits, plan_of, tiny_model

BLOCK = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def engine_of(model):
    """Makes engines; the weights of a mesh are placed once."""
    placed = {}

    def make(tp=2, cp=4, placement="helix", **options):
        if (tp, cp) not in placed:
            placed[tp, cp] = shard(tiny_model(), plan_of(tp, cp))
        mesh = placed[tp, cp].embed_VD[...].sharding.mesh
        options = {"rows": 4, "page": 4, "max_len": 160, "chunk": 32} | options
        return Engine(placed[tp, cp], Plan(mesh, BLOCK, placement), **options)

    return make


def prompts_of(seed: int, count: int, longest: int, vocab: int = TINY.vocab) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, vocab, n).tolist() for n in random.integers(1, longest, count)]


def check_pages(engine: Engine) -> None:
    """None is lost, none is held beyond what rows need, and no rank is far ahead of another."""
    memory, layout = engine.scheduler.memory, engine.plan.layout
    free = np.array([len(free) for free in memory._free])
    assert (free + memory.in_use() + memory.cached() == memory.pages).all()
    for request in engine.scheduler.running:
        pages = np.array([len(mine) for mine in engine.scheduler.held[request.id].pages])
        assert (pages >= memory.needed(request.written, len(request.prompt))).all()
        skew = {"helix": 3 * layout.block - 1, "striped": layout.block}[layout.placement]
        ahead = -(-layout.block // memory.page)
        assert pages.max() - pages.min() <= -(-skew // memory.page) + ahead


def crowd(engine: Engine, requests: int, longest: int, most: int, cancelled: int, seed: int = 0):
    """Submits them over time, cancels some. Returns the prompts and the results of the others, by id."""
    random = np.random.default_rng(seed)
    prompts = prompts_of(seed, requests, longest, engine.config.vocab)
    prompts = [prompt[: max(1, int(len(prompt) * random.random() ** 3))] for prompt in prompts]  # most are short
    for alike in prompts[::4]:  # and some begin as others do
        alike[:] = (prompts[int(random.integers(0, 4))][: longest // 2] + alike)[:longest]
    doomed = set(random.choice(requests, cancelled, replace=False).tolist())
    results, index = {}, 0
    while engine.busy or index < requests:
        for _ in range(random.integers(0, 3)):
            if index < requests:
                engine.submit(prompts[index], SamplingParams(max_new_tokens=int(random.integers(1, most))), str(index))
                index += 1
        living = [id for id in engine.requests if int(id) in doomed]
        if living and random.random() < 0.1:
            engine.cancel(living[0])
        for event in engine.step():
            if isinstance(event, FinishedEvent):
                results[event.id] = event.result
        check_pages(engine)
    assert engine.scheduler.memory.in_use() == (0,) * engine.plan.layout.ranks
    assert len(results) == requests
    return {int(id): (prompts[int(id)], r) for id, r in results.items() if r.reason != "cancelled"}


def check_greedy(model, said) -> None:
    """Each token is the likeliest after what came before, by a model without a cache; or it is a tie."""
    ties = 0
    for prompt, result in said.values():
        length = len(prompt) + len(result.tokens)
        gaps = gaps_of(model, prompt, result.tokens, padded_to=max(128, 1 << (length - 1).bit_length()))
        assert gaps.max() < TIE
        ties += gaps.max() > 0
    assert ties <= max(1, len(said) // 300)


@pytest.mark.parametrize("placement", ["helix", "striped"])
def test_a_crowd_with_too_few_pages_says_what_each_would_say_alone(model, engine_of, placement):
    engine = engine_of(placement=placement, pages=8)
    said = crowd(engine, requests=40, longest=80, most=40, cancelled=6)
    assert engine.stats().preemptions >= 5
    check_greedy(model, said)
    assert [r.reason for _, r in said.values()] == ["length"] * len(said)


@pytest.mark.parametrize(("family", "tp", "cp"), [("gpt_oss", 2, 2), ("deepseek_v3", 1, 4)])
def test_a_crowd_of_windows_sinks_latents_and_experts_does_too(family: str, tp: int, cp: int):
    model, mesh = load(GOLDEN / family, plan_of(), jnp.float32), make_mesh(tp, cp)
    options = {"rows": 3, "pages": 5 * 4 // cp, "page": 4, "max_len": 100, "chunk": 16}
    plan = Plan(mesh, BLOCK, "striped")
    engine = Engine(load(GOLDEN / family, plan, jnp.float32), plan, **options)
    said = crowd(engine, requests=16, longest=60, most=30, cancelled=2)
    assert engine.stats().preemptions >= 1
    assert engine.stats().shared_tokens >= 16
    check_greedy(model, said)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("placement", ["helix", "striped"])
def test_a_great_crowd_with_too_few_pages(model, engine_of, placement):
    engine = engine_of(placement=placement, page=16, pages=38, max_len=2400, chunk=256, rows=8)
    said = crowd(engine, requests=300, longest=2000, most=400, cancelled=30)
    assert engine.stats().preemptions >= 50
    check_greedy(model, said)


def test_one_program_serves_every_step_of_a_shape(engine_of):
    before = Counter(
        {name: getattr(programs, name)._cache_size() for name in ("decode", "prefill", "seat", "edit_page_table")}
    )
    engine = engine_of(4, 2, "striped", rows=3)
    engine.warm_up()
    crowd(engine, requests=12, longest=100, most=20, cancelled=2)
    after = Counter({name: getattr(programs, name)._cache_size() for name in before})
    assert after - before == {"decode": 1, "prefill": 3, "seat": 1, "edit_page_table": 1}


def test_a_draw_depends_on_the_seed_and_not_on_the_batch(engine_of):
    """Every rule at once, alone and in a crowd; and `generate`, which knows no engine, draws the same."""
    prompts = prompts_of(3, 6, 30)
    params = [
        SamplingParams(max_new_tokens=12, temperature=1.0, seed=7),
        SamplingParams(max_new_tokens=12, temperature=2.0, top_k=9, seed=8),
        SamplingParams(max_new_tokens=12, temperature=1.5, top_p=0.8, min_p=0.05, seed=9),
        SamplingParams(max_new_tokens=12, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=12, logprobs=3),
        SamplingParams(max_new_tokens=12),
    ]
    engine = engine_of()
    together = engine.generate(prompts, params)
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert together[3].tokens != engine.generate([prompts[3]], SamplingParams(max_new_tokens=12))[0].tokens
    model = shard(tiny_model(), plan_of())
    plan = Plan(model.embed_VD[...].sharding.mesh)
    for row, rules in ((0, make_sampling(1, 1.0, seed=7)), (1, make_sampling(1, 2.0, 9, seed=8))):
        assert generate(model, [prompts[row]], plan, max_new_tokens=12, sampling=rules)[0] == list(alone[row].tokens)


def test_logprobs_are_those_of_the_logits(model, engine_of):
    prompt = prompts_of(4, 1, 20)[0]
    result = engine_of().generate([prompt], SamplingParams(max_new_tokens=5, logprobs=4))[0]
    assert len(result.logprobs) == 5
    for (chosen, top), token in zip(result.logprobs, result.tokens, strict=True):
        ids, values = zip(*top, strict=True)
        assert ids[0] == token
        assert chosen == values[0] == max(values)
        assert len(top) == 4
    text = [*prompt, *result.tokens]
    logits = naive_logits(model, [text], 32)[0, len(prompt) - 1 : len(text) - 1]
    expected = (
        logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1)[:, None]
    )
    np.testing.assert_allclose([c for c, _ in result.logprobs], expected.max(-1), atol=1e-5)


def test_a_repeated_token_is_penalised():
    logits_BV = jnp.asarray([[2.0, -2.0, 1.0], [2.0, -2.0, 1.0]])
    seen_BV = jnp.asarray([[True, True, False]] * 2)
    found = apply_repetition_penalty(logits_BV, seen_BV, jnp.asarray([2.0, 1.0]))
    np.testing.assert_array_equal(found, [[1.0, -4.0, 1.0], [2.0, -2.0, 1.0]])


def test_a_request_ends_at_a_stop_id_or_a_stop_string_and_wastes_no_page(engine_of):
    engine = engine_of(tokenizer=Bytes())
    prompt = prompts_of(5, 1, 20)[0]
    said = engine.generate([prompt], SamplingParams(max_new_tokens=20))[0]
    third = said.tokens[2]
    first_at = said.tokens.index(third)
    by_id = engine.generate([prompt], SamplingParams(max_new_tokens=20, stop_token_ids=(third,)))[0]
    assert (by_id.tokens, by_id.reason) == (said.tokens[: first_at + 1], "stop")
    by_text = engine.generate([prompt], SamplingParams(max_new_tokens=20, stop=(chr(third),)))[0]
    assert (by_text.reason, by_text.text) == ("stop", Bytes().decode(list(said.tokens[:first_at])))
    assert engine.scheduler.memory.in_use() == (0,) * 4


def test_half_a_character_is_refused(engine_of):
    with pytest.raises(ValueError, match=r"the prompt holds '\\ud800', half of a character"):
        engine_of(tokenizer=Bytes()).submit("a\ud800b")


def test_text_comes_as_it_is_said(engine_of):
    engine = engine_of(tokenizer=Bytes())
    id = engine.submit("0123 567", SamplingParams(max_new_tokens=15))
    events = list(engine.events())
    pieces = [event.text for event in events if isinstance(event, TokenEvent)]
    assert events[-1] == FinishedEvent(id, events[-1].result)
    assert "".join(pieces) == events[-1].result.text
    assert len(pieces) == 15


def test_a_shared_prefix_is_prefilled_once(model, engine_of):
    """Both are in a run of 16 tokens (4 ranks of a block); the second computes what is left, and says the same."""
    first = (prompts_of(6, 1, 90)[0] * 9)[:100]
    second = [*first[:90], 1, 2, 3]
    engine = engine_of(placement="striped")
    assert engine.sharing == "on"
    params = SamplingParams(max_new_tokens=10)
    results = [engine.generate([prompt], params)[0] for prompt in (first, second, first)]
    assert [r.shared_tokens for r in results] == [0, 80, 96]
    assert engine.stats().prefilled_tokens == 100 + 13 + 4
    assert results[0].tokens == results[2].tokens
    check_greedy(model, dict(enumerate(zip((first, second), results, strict=False))))
    at_once = engine_of(placement="striped", budget=512).generate([first, second, first], params)
    assert [(r.shared_tokens, r.tokens) for r in at_once] == [(r.shared_tokens, r.tokens) for r in results]
    apart = engine_of(placement="striped", share_prefixes=False)
    assert [r.tokens for r in apart.generate([first, second], params)] == [r.tokens for r in results[:2]]
    assert apart.sharing == "off: not asked for"
    assert engine_of().sharing == "off: under helix places depend on the prompt's length (choose striped)"


def test_a_long_prompt_does_not_hold_up_the_others(engine_of):
    """While it is prefilled, in 5 chunks, the other says a token in every step."""
    engine = engine_of(chunk=32)
    engine.submit([1, 2, 3], SamplingParams(max_new_tokens=30), "short")
    for _ in range(3):
        engine.step()
    engine.submit(list(range(60)) * 2 + [1, 2], SamplingParams(max_new_tokens=2), "long")
    steps = [[event.id for event in engine.step() if isinstance(event, TokenEvent)] for _ in range(8)]
    assert all("short" in said for said in steps)
    assert [("long" in said) for said in steps].index(True) >= 4


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"tp": 2, "cp": 1}, {"tp": 1, "cp": 4, "page": 8}),
        ({"tp": 2, "cp": 1, "placement": "striped"}, {"tp": 1, "cp": 4, "placement": "striped"}),
        pytest.param({"tp": 1, "cp": 4}, {"tp": 1, "cp": 2, "page": 2}, marks=pytest.mark.slow),
        ({"tp": 1, "cp": 4, "placement": "striped"}, {"tp": 1, "cp": 2, "placement": "helix"}),
    ],
)
def test_a_request_goes_on_in_another_engine(model, engine_of, source, target):
    """Decoding, in the middle of its prompt, and not yet begun."""
    source, target = engine_of(**source), engine_of(**target)
    prompts = prompts_of(8, 6, 90)
    prompts[3] = prompts[3] * 60
    prompts[3] = prompts[3][:120]
    for index, prompt in enumerate(prompts):
        source.submit(prompt, SamplingParams(max_new_tokens=10), str(index))
    tokens = {str(index): [] for index in range(6)}
    for _ in range(6):
        for event in source.step():
            if isinstance(event, TokenEvent):
                tokens[event.id].append(event.token)
    for id in ("0", "3", "5"):
        if id in source.requests:
            transfer(id, source, target)
    assert target.requests
    for engine in (source, target):
        for event in engine.events():
            if isinstance(event, TokenEvent):
                tokens[event.id].append(event.token)
        assert engine.scheduler.memory.in_use() == (0,) * engine.plan.layout.ranks
    for index, prompt in enumerate(prompts):
        assert len(tokens[str(index)]) == 10
        assert gaps_of(model, prompt, tokens[str(index)], 160).max() < TIE


def test_what_cannot_be_handed_over_stays(engine_of):
    source, target = engine_of(), engine_of(tp=1, cp=2, pages=2)
    prompt = list(range(40))
    params = SamplingParams(max_new_tokens=8)
    id = source.submit(prompt, params)
    source.step()
    with pytest.raises(ValueError, match="need 6 pages of 4 on one rank, and it has 2"):
        transfer(id, source, target)
    with pytest.raises(ValueError, match="no request 'x' is waiting or running"):
        transfer("x", source, target)
    target = engine_of(tp=1, cp=2, rows=1)
    target.submit(prompt, params, "mine")
    target.step()
    with pytest.raises(ValueError, match="no free row, or too few free pages"):
        transfer(id, source, target)
    target.submit(prompt, params, id)
    with pytest.raises(ValueError, match="has a request 'request-0' already"):
        transfer(id, source, target)
    assert [e.result.tokens for e in source.events() if isinstance(e, FinishedEvent)] == [
        e.result.tokens for e in target.events() if isinstance(e, FinishedEvent) and e.id == "mine"
    ]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 61], {}, "token id 61 is not one of the vocabulary: give ids from 0 to 60"),
        ("words", {}, "text needs a tokenizer, and the engine has none"),
        ([1] * 150, {"max_new_tokens": 11}, "150 tokens and 11 new ones exceed the 160 positions of a row"),
        ([1] * 100, {"max_new_tokens": 50}, "need 11 pages of 4 on one rank, and it has 9: ask for fewer"),
        ([1], {"temperature": -1}, "temperature is -1: give 0"),
        ([1], {"top_p": 0}, "top_p is 0: give a probability above 0"),
        ([1], {"min_p": 2}, "min_p is 2: give a share from 0 to 1"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty is 0: give"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0: give at least 1"),
        ([1], {"top_k": -3}, "top_k is -3: give 0"),
        ([1], {"stop": [""]}, "stop is ('',): give a list of strings that are not empty"),
        ([1], {"logprobs": 21}, "logprobs is 21: give 0 to 20"),
        ([1], {"beams": 2}, "unknown field 'beams': choose among max_new_tokens, temperature"),
    ],
)
def test_a_bad_request_is_refused_alone(engine_of, prompt, params, message):
    engine = engine_of(pages=9)
    engine.submit([1, 2], SamplingParams(max_new_tokens=3), "good")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        engine.submit(prompt, sampling_params(params))
    with pytest.raises(ValueError, match="a request 'good' has not ended yet"):
        engine.submit([1], id="good")
    with pytest.raises(ValueError, match="no request 'bad'"):
        engine.cancel("bad")
    assert list(engine.requests) == ["good"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows is 0: give a whole number, at least 1"),
        ({"pages": 0}, "pages is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"max_len": 5000}, "max_len is 5000: the model has 4096 positions"),
    ],
)
def test_a_bad_engine_is_refused(engine_of, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(**options)


def test_misuse_is_told_in_a_line(engine_of):
    engine = engine_of()
    with pytest.raises(ValueError, match="the prompts are one text"):
        engine.generate("0123")
    engine.submit(np.array([1, 2, 3]), SamplingParams(max_new_tokens=4, stop=["x"][:0]), "request-1")
    assert [engine.submit([1]), engine.submit([1])] == ["request-2", "request-3"]
    engine.step()
    with pytest.raises(ValueError, match="3 requests are running: warm up before"):
        engine.warm_up()


def test_who_leaves_the_events_early_finds_the_rest_later(engine_of):
    engine = engine_of()
    for _ in range(3):
        engine.submit([1, 2], SamplingParams(max_new_tokens=3))
    told = []
    while engine.busy:
        for event in engine.events():
            told.append(event.id)
            break
    assert Counter(told) == {f"request-{i}": 4 for i in range(3)}


def test_an_interrupted_step_loses_nothing(engine_of, monkeypatch):
    engine = engine_of()
    prompt = prompts_of(12, 1, 20)[0]
    expected = engine.generate([prompt], SamplingParams(max_new_tokens=9))[0].tokens
    engine.submit(prompt, SamplingParams(max_new_tokens=9))
    engine.step()
    engine.step()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "asarray", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.drain()
    assert [event.result.tokens for event in engine.events() if isinstance(event, FinishedEvent)] == [expected]


def test_who_comes_by_hand_over_is_the_youngest_there(engine_of):
    source, target = engine_of(tp=1, cp=2), engine_of()
    for _ in range(3):
        id = source.submit([1, 2, 3], SamplingParams(max_new_tokens=9))
    target.submit([1, 2], SamplingParams(max_new_tokens=9), "there")
    for engine in (source, target):
        engine.step()
    transfer(id, source, target)
    assert target.requests[id].order > target.requests["there"].order
    assert target.submit([1], SamplingParams(max_new_tokens=2)) != id


def test_prompts_that_cannot_run_leave_nothing_behind(engine_of):
    engine = engine_of()
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate([[1], []])
    with pytest.raises(ValueError, match="1 params, but 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
    assert not engine.busy
    other = engine.submit([1, 2], SamplingParams(max_new_tokens=3))
    assert len(engine.generate([[1]], SamplingParams(max_new_tokens=2))[0].tokens) == 2
    assert [event.id for event in engine.events()] == [other] * 4  # three tokens and its end


def test_every_placement_decodes(model, engine_of):
    for placement in PLACEMENTS:
        prompt = prompts_of(9, 1, 40)[0]
        result = engine_of(placement=placement, page=16).generate([prompt], SamplingParams(max_new_tokens=30))[0]
        assert gaps_of(model, prompt, result.tokens, 120).max() < TIE
