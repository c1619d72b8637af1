"""Checks the options of an engine, before weights are read or anything is compiled."""

from collections.abc import Mapping
from typing import Any

from helix_jax.config import ModelConfig
from helix_jax.drafting import DEFAULT_DRAFT_TOKENS, check_draft_model
from helix_jax.engine.runner import DecodeOptions
from helix_jax.mesh import DP
from helix_jax.models.transformer import Transformer
from helix_jax.plan import Plan
from helix_jax.speculation import MAX_DRAFT_TOKENS, SPECULATIONS, check_draft_tokens
from helix_jax.step import check_model_placement
from helix_jax.text import Tokenizer
from helix_jax.validation import check_int, check_type

DEFAULT_PAGE, DEFAULT_ROWS = 64, 8


def check_options(config: ModelConfig, plan: Plan, options: Mapping[str, Any]) -> None:
    """Check options of an engine, which needs no weights.

    Args:
        config: The model.
        plan: How the mesh decodes.
        options: Arguments of `Engine`. Those that are missing or None have their defaults.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: dp does not divide the rows, a number is below 1, `max_len` exceeds the positions of the model, or
            `speculate` is unknown.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if "tokenizer" in given:
        check_type("tokenizer", given["tokenizer"], Tokenizer, "an object with encode and decode, see open_tokenizer")
    check_type("prefix_caching", given.get("prefix_caching", True), bool, "True or False")
    check_speculation(given.get("speculate"), given.get("draft_tokens"))
    for name in ("rows", "page", "chunk", "steps_per_call", "max_len", "pages", "budget"):
        if name in given:
            check_int(name, given[name], least=1)
    if given.get("max_len", 0) > config.max_positions:
        raise ValueError(f"max_len is {given['max_len']}: give at most the model's {config.max_positions} positions")
    dp, rows = plan.mesh.shape[DP], given.get("rows", DEFAULT_ROWS)
    if rows % dp:
        raise ValueError(f"dp {dp} does not divide {rows} rows: give a multiple of {dp}")


def check_speculation(speculate: object, draft_tokens: Any) -> None:
    """Check how tokens are drafted, and how many.

    Raises:
        TypeError: `speculate` is not a string or a model, or `draft_tokens` is not an int.
        ValueError: `speculate` is an unknown string, or `draft_tokens` is out of range, or useless because nothing is
            drafted.
    """
    if isinstance(speculate, str):
        if speculate not in SPECULATIONS:
            raise ValueError(f"speculate is {speculate!r}: give 'ngram', or a draft model of helix_jax.load")
    elif speculate is not None and not isinstance(speculate, Transformer):
        raise TypeError(f"speculate is {speculate!r}: give 'ngram', or a draft model of helix_jax.load")
    check_draft_tokens("draft_tokens", draft_tokens, "speculate", speculates=speculate is not None)


def make_decode_options(config: ModelConfig, plan: Plan, options: Mapping[str, Any]) -> DecodeOptions:
    """Return how rows decode. Check the draft model, if there is one.

    Args:
        config: The model.
        plan: How the mesh decodes.
        options: All arguments of `Engine`, after `check_options`, with a value of `max_len`.

    Raises:
        ValueError: The draft model does not fit the model, the plan or the pages.
    """
    steps, draft, draft_tokens = (options[name] for name in ("steps_per_call", "speculate", "draft_tokens"))
    if draft is None:
        return DecodeOptions(steps)
    if not isinstance(draft, Transformer):
        return DecodeOptions(steps, draft_tokens or MAX_DRAFT_TOKENS)
    check_draft_model(config, draft.config, options["max_len"])
    try:
        check_model_placement(draft, plan)
        plan.kernel_for_model(draft.config, options["page"], draft.dtype)
    except ValueError as error:
        raise ValueError(f"the draft model: {error}") from None
    return DecodeOptions(steps, draft_tokens or DEFAULT_DRAFT_TOKENS, draft)
