"""Many requests on one mesh: prefill and decode together, over pages that come and go."""

from helix_jax.engine.engine import Engine
from helix_jax.engine.handover import hand_over
from helix_jax.engine.params import SamplingParams, sampling_params
from helix_jax.engine.requests import Ended, Event, Figures, Result, Said

__all__ = ["Ended", "Engine", "Event", "Figures", "Result", "Said", "SamplingParams", "hand_over", "sampling_params"]
