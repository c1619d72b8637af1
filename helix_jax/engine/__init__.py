"""Serves many requests on one mesh: continuous batching over a paged cache that all requests share."""

from helix_jax.engine.engine import Engine
from helix_jax.engine.logprobs import PromptLogprobs
from helix_jax.engine.params import SamplingParams, sampling_params
from helix_jax.engine.requests import EngineStats, Event, FinishedEvent, RequestOutput, TokenEvent
from helix_jax.engine.transfer import transfer

__all__ = [
    "Engine",
    "EngineStats",
    "Event",
    "FinishedEvent",
    "PromptLogprobs",
    "RequestOutput",
    "SamplingParams",
    "TokenEvent",
    "sampling_params",
    "transfer",
]
