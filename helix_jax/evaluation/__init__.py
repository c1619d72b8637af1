"""Evaluates models over a sharded cache: passkey recall (needles) and perplexity, against one device.

`run_needles` and `run_perplexity` evaluate a model under several plans. `CacheSession` is the batch of rows that they
read, decode and question. `helix-jax eval` is one caller of both.
"""

from helix_jax.evaluation.needles import (
    Needle,
    NeedleAnswers,
    NeedleOptions,
    NeedleResults,
    ask_needles,
    make_needles,
    run_needles,
)
from helix_jax.evaluation.perplexity import PerplexityOptions, PerplexityResults, run_perplexity
from helix_jax.evaluation.placements import ONE_DEVICE, make_plans
from helix_jax.evaluation.scoring import score_span
from helix_jax.evaluation.session import CacheSession
from helix_jax.evaluation.texts import TokenText, held_out_text

__all__ = [
    "ONE_DEVICE",
    "CacheSession",
    "Needle",
    "NeedleAnswers",
    "NeedleOptions",
    "NeedleResults",
    "PerplexityOptions",
    "PerplexityResults",
    "TokenText",
    "ask_needles",
    "held_out_text",
    "make_needles",
    "make_plans",
    "run_needles",
    "run_perplexity",
    "score_span",
]
