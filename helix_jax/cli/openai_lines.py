"""Requests in the form of OpenAI's batch API, as the fields of our own."""

from collections.abc import Mapping
from reprlib import repr as shorten
from typing import Any

from helix_jax.validation import check_choice, check_int, check_keys

_PROMPT_OF_URL = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
_LIMITS = ("max_tokens", "max_completion_tokens")

# Fields of a body that are also fields of our requests: those of OpenAI, and those that vLLM adds.
_SAME = ("temperature", "top_p", "seed", "stop", "n")
_ADDED = ("top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids", "prompt_logprobs")

# Fields that change how a request is stored or delivered, and not its result.
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "user", "metadata", "store", "stream", "stream_options", "service_tier"),
        *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
    }
)

# Fields that are not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}


def is_openai(fields: Mapping[str, Any]) -> bool:
    """Return whether a line has the form of OpenAI's batch API."""
    return "body" in fields or "custom_id" in fields


def own_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request of OpenAI's batch API, without its custom_id, as the fields of our own.

    What the body leaves out has the default of our requests, not that of OpenAI: greedy decoding of up to 128 tokens.

    Raises:
        TypeError: The body is not an object, or a value has the wrong type.
        ValueError: The URL or the method is not supported, or the body has a field that is not supported and would
            change the result. The message names it.
    """
    check_keys("request", fields, ("method", "url", "body"))
    if fields.get("method") is not None:
        check_choice("method", fields["method"], ("POST",))
    if not isinstance(fields.get("body"), dict):
        raise TypeError(f"body is {shorten(fields.get('body'))}: give an object with messages or a prompt")
    body = {name: value for name, value in fields["body"].items() if value is not None and name not in _WITHOUT_EFFECT}
    own = _prompt(fields.get("url"), body)
    own |= {name: body.pop(name) for name in (*_SAME, *_ADDED) if name in body}
    own |= _limit(body) | _logprobs(body)
    for name, neutral in _NEUTRAL.items():
        value = body.pop(name, neutral[0])
        if value not in neutral:
            raise ValueError(f"body: {name} is {shorten(value)}, which is not supported: leave it out")
    check_keys("body", body, {"messages", "prompt", *_SAME, *_ADDED, *_LIMITS, "logprobs", "top_logprobs"})
    return own


def _prompt(url: Any, body: dict[str, Any]) -> dict[str, Any]:
    """Remove the prompt from a body, and return it."""
    if url is not None:
        check_choice("url", url, _PROMPT_OF_URL)
        other = {"messages": "prompt", "prompt": "messages"}[_PROMPT_OF_URL[url]]
        if other in body:
            raise ValueError(f"body has {other}, but url is '{url}': give {_PROMPT_OF_URL[url]}")
    own = {name: body.pop(name) for name in ("messages", "prompt") if name in body}
    prompt = own.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        own["prompt_ids"] = own.pop("prompt")
    return own


def _limit(body: dict[str, Any]) -> dict[str, Any]:
    """Remove the limit of new tokens, which has two names, from a body, and return it."""
    given = {name: body.pop(name) for name in _LIMITS if name in body}
    for name, value in given.items():
        check_int(f"body: {name}", value, least=0)
    if len(set(given.values())) > 1:
        values = " and ".join(f"{name} is {value}" for name, value in given.items())
        raise ValueError(f"body: {values}: give one of them")
    return {"max_new_tokens": next(iter(given.values()))} if given else {}


def _logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Remove the number of log-probabilities from a body: a flag and a number for chats, else a number."""
    flag, top = body.pop("logprobs", None), body.pop("top_logprobs", None)
    if isinstance(flag, bool) or flag is None:
        if top is not None and not flag:
            raise ValueError(f"body: top_logprobs is {shorten(top)} without logprobs: give logprobs true")
        return {"logprobs": top or 0} if flag else {}
    if top is not None:
        raise ValueError(f"body: logprobs is {shorten(flag)} and top_logprobs is {shorten(top)}: give logprobs true")
    return {"logprobs": flag}
