"""Tests the evaluations: a session against a model without a cache, needles and perplexity against one device."""

import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax.checkpoint import DEMO_MODEL, load, read_config, save
from helix_jax.cli import eval as command
from helix_jax.cli import main
from helix_jax.evaluation import (
    ONE_DEVICE,
    CacheSession,
    Needle,
    NeedleAnswers,
    NeedleOptions,
    NeedleResults,
    PerplexityOptions,
    PerplexityResults,
    TokenText,
    ask_needles,
    held_out_text,
    make_needles,
    make_plans,
    run_perplexity,
)
from helix_jax.evaluation.phrases import Phrases
from helix_jax.evaluation.plots import plot_needles
from helix_jax.layout import BlockLayout
from helix_jax.mesh import make_mesh
from helix_jax.plan import Plan
from helix_jax.text import ByteTokenizer, open_tokenizer
from helix_jax.training.passkeys import DIGITS, fact, question
from tests.conftest import GOLDEN, ROOT
from tests.reference import BYTES, naive_logits, plan_of, tiny_model

KJV = ROOT / "scripts" / "data" / "kjv.txt"
TEXT = KJV.read_bytes()[-3000:]
TOKENIZER = ByteTokenizer()
BYTE_TEXT = TokenText(np.frombuffer(TEXT, np.uint8).astype(np.int32), TOKENIZER)

# All tests of the byte model share these shapes, so that each program is compiled once per plan.
ROWS, MAX_LEN, CHUNK = 4, 200, 64
PLAN = {"cp": 4, "block": 4}
PROMPTS = [list(TEXT[:70]), list(TEXT[100:133]), list(TEXT[200:201]), list(TEXT[300:428])]


@pytest.fixture(scope="module")
def open_session(byte_model: Path) -> Callable[..., CacheSession]:
    def open_session(placement: str = "helix") -> CacheSession:
        plan = plan_of(**PLAN, placement=placement)
        return CacheSession(load(byte_model, plan, jnp.float32), plan, PROMPTS, MAX_LEN, CHUNK)

    return open_session


@pytest.fixture
def evaluate(byte_model: Path) -> Callable[..., int]:
    """Return a function that runs `helix-jax eval` on the byte model, in this process, and returns the exit code."""

    def evaluate(*arguments: object) -> int:
        name, *options = map(str, arguments)
        shared = [word for key, value in PLAN.items() for word in (f"--{key}", str(value))]
        shared += ["--model", str(byte_model), "--prefill-chunk", str(CHUNK)]
        try:
            return main(["eval", name, *shared, *options])
        except SystemExit as stop:
            return int(stop.code or 0)

    return evaluate


# sessions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["helix", pytest.param("striped", marks=pytest.mark.slow)])
def test_a_session_decodes_what_a_model_without_a_cache_does(open_session, byte_model: Path, placement: str):
    model, session = load(byte_model, plan_of(cp=1), jnp.float32), open_session(placement)
    appended = [TEXT[400:409], TEXT[500:520], TEXT[600:601], TEXT[700:720]]
    session.append(appended)
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS, appended, strict=True)]
    decoded_BS = np.concatenate([session.decode(DIGITS) for _ in range(3)], 1)
    for text, decoded in zip(texts, decoded_BS.tolist(), strict=True):
        logits = naive_logits(model, [[*text, *decoded]], MAX_LEN)[0]
        at = np.arange(len(text) - 1, len(text) + len(decoded) - 1)
        assert (logits[at].max(-1) - logits[at, decoded]).max() < 1e-4
    before = session.lengths
    assert before.tolist() == [len(text) + 15 for text in texts]
    logits_BV = session.append_one(np.arange(ROWS))
    assert session.lengths.tolist() == np.asarray(session.rows.length_B).tolist() == (before + 1).tolist()
    expected = naive_logits(model, [[*texts[1], *decoded_BS[1].tolist(), 1]], MAX_LEN)[0, before[1]]
    np.testing.assert_allclose(logits_BV[1], expected, rtol=1e-4, atol=1e-4)


def test_a_question_leaves_no_trace(open_session):
    questioned, untouched = open_session(), open_session()
    questions = [b"What is this?", b"And that?", b"?", b"Who?"]
    first = questioned.answer(questions, DIGITS)
    np.testing.assert_array_equal(first, questioned.answer(questions, DIGITS))
    np.testing.assert_array_equal(questioned.decode(DIGITS), untouched.decode(DIGITS))


def test_zeroing_a_rank_changes_only_its_pages(open_session):
    session = open_session()
    before = jax.tree.map(np.asarray, session.caches)
    session.zero_rank(2)
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(session.caches), strict=True):
        was_R, now_R = (np.asarray(x).reshape(4, -1) for x in (was, now))
        assert was_R[2].any()
        assert not now_R[2].any()
        np.testing.assert_array_equal(np.delete(was_R, 2, 0), np.delete(now_R, 2, 0))
    with pytest.raises(ValueError, match="rank is 4, but there are 4 cp ranks: choose one from 0 to 3"):
        session.zero_rank(4)


def test_a_session_refuses_tokens_that_it_has_no_pages_for(open_session):
    session = open_session()
    for extend in (
        lambda: session.decode(73),
        lambda: session.append([b"", b"", b"", b"x" * 73]),
        lambda: session.answer([b"", b"", b"", b"x" * 70], DIGITS),
    ):
        with pytest.raises(ValueError, match=f"have 20[13] positions, but max_len is {MAX_LEN}: give a larger one"):
            extend()
    assert session.lengths.tolist() == [len(prompt) for prompt in PROMPTS]


# needles --------------------------------------------------------------------------------------------------------------

NEEDLES = ("needles", "--lengths", 100, 130, "--depths", 2, "--decoded", DIGITS)


def check_needles(found: dict, placements: list[str]) -> None:
    """Check that every placement answers like one device, and that each needle is where it says."""
    plans = found["plans"]
    assert list(plans) == [ONE_DEVICE, *placements]
    assert len(found["needles"]) == ROWS
    for name in placements:
        assert plans[name]["answers"] == plans[ONE_DEVICE]["answers"]
        assert all(len(answers) == 2 for answers in plans[name]["answers"])
        np.testing.assert_allclose(plans[name]["bits_per_byte"], plans[ONE_DEVICE]["bits_per_byte"], rtol=1e-5)
        layout = BlockLayout(PLAN["cp"], PLAN["block"], name)
        for needle, owner in zip(found["needles"], plans[name]["owners"], strict=True):
            context, position = needle["context"], needle["key_position"]
            assert context[position:].startswith(needle["key"])
            assert owner == int(layout.owner(position, len(context)))


def test_needles_are_answered_alike_on_a_mesh_and_on_one_device(evaluate, capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "n.json", "--plot", tmp_path / "n.png")
    assert evaluate(*NEEDLES, "--placement", "helix", *files) == 0
    assert f"again after {DIGITS} tokens" in capsys.readouterr().out
    found = json.loads((tmp_path / "n.json").read_text())
    check_needles(found, ["helix"])
    assert found["cp"] == PLAN["cp"]
    assert (tmp_path / "n.png").stat().st_size > 1000

    # A zeroed rank changes the answers on the mesh only, and then nothing is compared.
    assert evaluate(*NEEDLES, "--placement", "helix", "--zero-rank", 0, "--json", tmp_path / "z.json") == 0
    zeroed = json.loads((tmp_path / "z.json").read_text())
    assert zeroed["plans"][ONE_DEVICE]["answers"] == found["plans"][ONE_DEVICE]["answers"]
    assert zeroed["plans"]["helix"]["answers"] != found["plans"]["helix"]["answers"]
    assert zeroed["plans"]["helix"]["bits_per_byte"] is None


@pytest.mark.slow
def test_needles_are_answered_alike_under_every_placement(evaluate, tmp_path: Path):
    assert evaluate(*NEEDLES, "--json", tmp_path / "n.json") == 0
    check_needles(json.loads((tmp_path / "n.json").read_text()), ["helix", "striped", "last_rank"])


def test_the_passkeys_of_a_zeroed_rank_are_lost_and_no_others():
    """The demo model finds all passkeys, but not those that a zeroed rank stored."""
    plan = plan_of(cp=4)
    model = load(DEMO_MODEL, plan, jnp.float32)
    options = NeedleOptions(lengths=(400,), depths=5, decoded=0, rows=5, chunk=64).for_model(8192, TOKENIZER)
    needles = make_needles(held_out_text(KJV.read_bytes(), 0.05, TOKENIZER, 256, 400), options)
    keys = [needle.key for needle in needles]
    assert ask_needles(model, plan, needles, options, TOKENIZER) == [[key] for key in keys]
    owners = [int(plan.layout.owner(needle.key_position, len(needle.context))) for needle in needles]
    assert set(owners) == {0, 1, 2, 3}
    answers = ask_needles(model, plan, needles, dataclasses.replace(options, zero_rank=1), TOKENIZER)
    for key, [answer], owner in zip(keys, answers, owners, strict=True):
        assert (answer == key) == (owner != 1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.optimized
def test_the_demo_model_finds_passkeys_at_every_depth_of_its_whole_context(evaluate, tmp_path: Path):
    options = ("--model", DEMO_MODEL, "--cp", 8, "--block", 16, "--prefill-chunk", 512)
    shape = ("--lengths", 7600, "--depths", 8, "--rows", 8, "--json", tmp_path / "n.json")
    assert evaluate("needles", *options, *shape) == 0  # every placement answers like one device
    found = json.loads((tmp_path / "n.json").read_text())
    assert len(found["plans"][ONE_DEVICE]["answers"]) == 8
    for answers, needle in zip(found["plans"]["helix"]["answers"], found["needles"], strict=True):
        assert answers == [needle["key"]] * 2


def drawn_needles(decoded: int):
    """Draw needles of which those of the second length are not found."""
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    lengths = (100, 2000)
    options = NeedleOptions(lengths=lengths, depths=2, decoded=decoded)
    needles = [Needle(length, depth, "amber", "12345", 0, "", ()) for length in lengths for depth in (0.0, 1.0)]
    results = NeedleResults(options, needles)
    answers = [["12345" if needle.length == 100 else "?"] * results.questions for needle in needles]
    results.plans["helix"] = NeedleAnswers(answers, [0, 3, 0, 3], None)
    plot_needles(figure, results, "helix")
    figure.canvas.draw()
    return figure


def test_the_heat_map_has_labels_a_colour_bar_and_text_in_each_cell():
    *panels, bar = drawn_needles(decoded=5).axes
    assert [panel.get_title() for panel in panels] == ["directly after the context", "after 5 decoded tokens"]
    assert bar.get_ylabel() == "passkeys found"
    assert panels[0].get_ylabel() == "depth of the passkey in the context"
    for panel in panels:
        assert panel.get_xlabel() == "context, tokens"
        assert [label.get_text() for label in panel.get_xticklabels()] == ["100", "2,000"]
        assert [cell.get_text() for cell in panel.texts] == ["100%\nrank 0", "0%\nrank 0", "100%\nrank 3", "0%\nrank 3"]
        assert min(cell.get_fontsize() for cell in panel.texts) >= 8
    assert len(drawn_needles(decoded=0).axes) == 2


# perplexity -----------------------------------------------------------------------------------------------------------


def test_perplexity_equals_that_of_one_pass_without_a_cache(evaluate, byte_model: Path, capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    positions, span = (2, 180), 20
    options = ("--positions", *positions, "--span", span, "--windows", ROWS, "--placement", "helix")
    files = ("--json", tmp_path / "p.json", "--plot", tmp_path / "p.png")
    assert evaluate("perplexity", *options, *files) == 0
    printed = capsys.readouterr()
    assert "180 tokens" in printed.out
    assert "helix: 1 of 2 done" in printed.err  # there is no terminal
    assert (tmp_path / "p.png").stat().st_size > 1000
    found = json.loads((tmp_path / "p.json").read_text())["bits_per_byte"]
    text, model = KJV.read_bytes()[-int(0.05 * KJV.stat().st_size) :], load(byte_model, plan_of(cp=1), jnp.float32)
    for row, position in enumerate(positions):
        nats = []
        for start in np.linspace(0, len(text) - position - span, ROWS).astype(int):
            window = list(text[start : start + position + span])
            logits = naive_logits(model, [window], MAX_LEN)[0].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nats += [-logp[at - 1, window[at]] for at in range(position, position + span)]
        for name in (ONE_DEVICE, "helix"):
            np.testing.assert_allclose(found[name][row], np.mean(nats) / np.log(2), rtol=1e-5)


@pytest.mark.parametrize(
    ("cache_dtype", "gap", "fails"),
    [("auto", 0.5, True), ("auto", 5e-4, False), ("fp8", 0.5, False), ("fp8", np.nan, True)],
)
def test_losses_over_an_fp8_cache_may_differ_from_one_device(cache_dtype: str, gap: float, fails: bool, monkeypatch):
    """Rounding to float8 magnifies the differences of 1e-6 that another mesh makes."""
    losses = iter([0.0, gap])
    monkeypatch.setattr("helix_jax.evaluation.perplexity.score_span", lambda *_, **__: np.full((2, 4), next(losses)))
    plan = Plan(make_mesh(devices=jax.devices()[:1]), 16, cache_dtype=cache_dtype)
    options = PerplexityOptions((2,), span=4, windows=2)
    results = run_perplexity(lambda _: None, {ONE_DEVICE: plan, "cp": plan}, BYTE_TEXT, options)
    assert list(results.different()) == ["cp"] * fails
    np.testing.assert_array_equal(results.gap_nats["cp"], gap)


def test_perplexity_needs_one_device_first():
    plans = {"helix": plan_of(cp=2)}
    with pytest.raises(ValueError, match="the plans are .'helix'.: give 'one device' first"):
        run_perplexity(lambda plan: pytest.fail("loaded"), plans, BYTE_TEXT, PerplexityOptions((2,)))


# other tokenizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model whose tokenizer merges bytes, and begins each text with a special token."""
    tokenizers = pytest.importorskip("tokenizers")
    folder, made = tmp_path_factory.mktemp("token_model"), tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet)
    made.train_from_iterator([TEXT.decode()], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    save(tiny_model(dataclasses.replace(BYTES, vocab=400, tokenizer=None)), folder)
    return folder


def test_needles_of_other_tokenizers_begin_with_their_special_token_and_are_counted_in_tokens(token_model: Path):
    tokenizer = open_tokenizer(token_model, read_config(token_model))
    assert tokenizer is not None
    options = NeedleOptions(lengths=(90, 120), depths=3, decoded=5).for_model(512, tokenizer)
    text = held_out_text(KJV.read_bytes(), 0.01, tokenizer, 400, options.max_len)
    phrases = Phrases(tokenizer)
    for needle in make_needles(text, options):
        ids = needle.context_ids
        assert len(ids) + len(phrases.question(needle.name)) == needle.length
        assert (ids[0], ids.count(0)) == (0, 1)
        assert needle.context.count(f" The passkey of {needle.name} is {needle.key}.") == 1
        answer = phrases.answer(list(ids[needle.key_position : needle.key_position + phrases.answer_tokens]))
        assert answer == needle.key
    assert options.max_len <= 120 + 5 + options.question_tokens
    windows_BS = text.windows(50, 3)
    assert windows_BS[:, 0].tolist() == [0] * 3
    spans = [tokenizer.decode(row[-20:]) for row in windows_BS.tolist()]
    assert text.count_bytes(windows_BS, 20) == sum(len(span.encode()) for span in spans)


def test_a_model_with_another_tokenizer_is_evaluated(evaluate, token_model: Path, capsys, tmp_path: Path):
    (tmp_path / "text.txt").write_bytes(TEXT)
    model = ("--model", token_model, "--text", tmp_path / "text.txt", "--held-out", 1, "--placement", "helix")
    shape = ("--lengths", 100, 130, "--depths", 2, "--decoded", 0)
    assert evaluate("needles", *model, *shape, "--json", tmp_path / "n.json") == 0
    found = json.loads((tmp_path / "n.json").read_text())
    assert found["plans"]["helix"]["answers"] == found["plans"][ONE_DEVICE]["answers"]
    assert 2 < found["plans"]["helix"]["bits_per_byte"] < 8  # at random log2(400) per token, and more than 1 byte each
    assert "130 tokens" in capsys.readouterr().out


def test_a_model_on_the_hub_has_its_tokenizer(evaluate, token_model: Path, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--owner--name" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--owner--name" / "snapshots" / "a1").symlink_to(token_model)
    assert evaluate("needles", "--model", "owner/name", "--lengths", 5000) == 2
    assert "a context of 5000 tokens" in capsys.readouterr().err


# results and input ----------------------------------------------------------------------------------------------------


def test_a_placement_that_differs_from_one_device_is_exit_1(evaluate, monkeypatch, capsys):
    def run_needles(load, plans, text, options, **_):
        results = NeedleResults(options, make_needles(text, options))
        for name in plans:
            answers = [[needle.key, name if name == "striped" else "12345"] for needle in results.needles]
            results.plans[name] = NeedleAnswers(answers, [0] * len(answers), 2.0)
        return results

    monkeypatch.setattr(command, "run_needles", run_needles)
    assert evaluate(*NEEDLES) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("under striped, 4 of 4 needles are answered differently than on one device")

    gaps = {ONE_DEVICE: 0.0, "helix": 9e-4, "striped": 0.25, "last_rank": float("nan")}
    results = PerplexityResults(PerplexityOptions((2,)), {name: [1.0] for name in gaps}, gaps)
    monkeypatch.setattr(command, "run_perplexity", lambda *_, **__: results)
    assert evaluate("perplexity", "--positions", 2) == 1
    striped, last_rank = capsys.readouterr().err.splitlines()
    assert "under striped, the loss of a token differs by 0.25 nats" in striped
    assert "under last_rank, the loss of a token differs by nan nats" in last_rank


def test_the_default_contexts_and_positions_fit_the_model():
    needles = NeedleOptions(decoded=100).for_model(1024, TOKENIZER)
    assert len(needles.lengths) == 4
    assert needles.max_len == 1024
    assert PerplexityOptions().for_model(1024).positions == (64, 128, 256, 512)
    assert PerplexityOptions(span=50).for_model(100).positions == (50,)


def test_windows_are_spaced_evenly_over_the_text():
    windows_BS = TokenText(np.arange(10), TOKENIZER).windows(4, 3)
    assert windows_BS.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_a_needle_is_at_its_depth_in_a_context_of_the_given_length():
    needles = make_needles(BYTE_TEXT, NeedleOptions(lengths=(1000,), depths=3))
    assert [needle.depth for needle in needles] == [0.0, 0.5, 1.0]
    for needle in needles:
        check_needle(needle, 1000)


def check_needle(needle: Needle, length: int) -> None:
    """Check where a needle is in a context of bytes."""
    hidden = fact(needle.name, needle.key).decode()
    count = length - len(hidden) - len(question(needle.name))
    assert len(needle.context) == len(needle.context_ids) == count + len(hidden)
    assert needle.context.find(hidden) == round(needle.depth * count)
    assert needle.context[needle.key_position :].startswith(needle.key)


def test_plans_begin_with_one_device():
    mesh = make_mesh(1, 2)
    plans = make_plans(mesh, ["striped"], block=8)
    assert list(plans) == [ONE_DEVICE, "striped"]
    assert plans[ONE_DEVICE].mesh.size == 1
    assert plans["striped"] == Plan(mesh, 8, "striped")


GOLDEN_LLAMA = GOLDEN / "llama"
SHORT = ["--lengths", 100, "--decoded", 9]


@pytest.mark.parametrize(
    ("evaluation", "options", "message"),
    [
        ("needles", ["--lengths", 500, "--decoded", 9], "a context of 500 tokens, 9 decoded tokens and a question"),
        ("needles", ["--lengths", 20, "--decoded", 0], "a context of 20 tokens"),
        ("needles", [*SHORT, "--zero-rank", 4], "zero_rank is 4, but there are 4 cp ranks: choose one from 0 to 3"),
        ("needles", ["--zero-rank", -1], "zero_rank is -1: give at least 0"),
        ("needles", ["--depths", 0], "depths is 0: give at least 1"),
        ("needles", [*SHORT, "--held-out", 0], "the held-out share is 0.0: give a number above 0"),
        ("needles", ["--model", GOLDEN_LLAMA], "has no tokenizer: add the tokenizer.json of the model"),
        ("needles", [*SHORT, "--plot", "/nowhere/n.png"], "--plot '/nowhere/n.png' cannot be written"),
        ("needles", ["--decoded", 100000], "100000 decoded tokens"),
        ("needles", [*SHORT, "--cp", 0], "cp is 0: give at least 1"),
        ("needles", [*SHORT, "--placement", "spiral"], "--placement is 'spiral': choose one of"),
        ("needles", [*SHORT, "--plot", "p.foo"], "--plot 'p.foo'"),
        ("needles", [*SHORT, "--json", "/nowhere/n.json"], "/nowhere/n.json"),
        ("needles", [*SHORT, "--text", "/nowhere/t.txt"], "/nowhere/t.txt"),
        ("perplexity", ["--held-out", "inf"], "the held-out share is inf"),
        ("perplexity", ["--span", 1000], "a span of 1000 tokens exceed the model's 512 positions"),
        ("perplexity", ["--positions", 500], "position 500 and a span of 64 tokens exceed"),
        ("perplexity", ["--positions", 1], "a position is 1: give at least 2"),
        ("perplexity", ["--model", GOLDEN_LLAMA], "has no tokenizer: add the tokenizer.json of the model"),
        ("perplexity", ["--held-out", 0.00001], "the held-out text has 44 tokens, but 320 are needed: give more text"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(evaluate, capsys, evaluation: str, options, message: str):
    assert evaluate(evaluation, *options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_a_checkout_the_text_must_be_given(evaluate, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(command, "DEFAULT_TEXT", tmp_path / "kjv.txt")
    assert evaluate("perplexity") == 2
    assert "is only in a checkout of the repository: give --text FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("eval_needle.py", ["--trials", "0"], "trials is 0: give at least 1"),
        ("eval_perplexity.py", ["--windows", "0"], "windows is 0: give at least 1"),
    ],
)
def test_the_scripts_run_the_subcommands(monkeypatch, capsys, script: str, options: list[str], message: str):
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
