"""Many requests on one mesh: prefill and decode together, over pages that come and go."""

from helix_jax.engine.engine import Engine
from helix_jax.engine.transfer import transfer
from helix_jax.engine.params import SamplingParams, sampling_params
from helix_jax.engine.requests import FinishedEvent, Event, EngineStats, RequestOutput, TokenEvent

__all__ = ["FinishedEvent", "Engine", "Event", "EngineStats", "RequestOutput", "TokenEvent", "SamplingParams", "transfer", "sampling_params"]
