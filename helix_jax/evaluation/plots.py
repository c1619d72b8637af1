"""Draws the results of evaluations into matplotlib figures."""

from typing import Any

import numpy as np

from helix_jax.evaluation.needles import NeedleResults
from helix_jax.evaluation.perplexity import PerplexityResults
from helix_jax.evaluation.placements import ONE_DEVICE


def plot_needles(figure: Any, results: NeedleResults, plan: str) -> None:
    """Draw the share of passkeys that are found, depth by length, one panel per question.

    Args:
        figure: An empty matplotlib figure.
        results: What `run_needles` returns.
        plan: The plan to draw. Each cell names the rank that stores the passkey.
    """
    lengths = sorted({needle.length for needle in results.needles})
    depths = sorted({needle.depth for needle in results.needles})
    figure.set_size_inches(1.5 + 1.1 * len(lengths) * results.questions, 1.5 + 0.4 * len(depths))
    panels = np.atleast_1d(figure.subplots(1, results.questions, sharey=True))
    for question, axes in enumerate(panels):
        correct, share = results.correct(plan, question), np.zeros((len(depths), len(lengths)))
        for (row, column), _ in np.ndenumerate(share):
            cell = (lengths[column], depths[row])
            indices = [i for i, needle in enumerate(results.needles) if (needle.length, needle.depth) == cell]
            share[row, column] = correct[indices].mean()
            rank = results.plans[plan].owners[indices[0]]
            axes.text(column, row, f"rank {rank}", ha="center", va="center", fontsize=7)
        axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        title = f"after {results.options.decoded} decoded tokens" if question else "directly after the context"
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("context, bytes")
    panels[0].set_ylabel("depth of the passkey")
    figure.suptitle(f"passkeys found, {plan}", fontsize=10)


def plot_perplexity(figure: Any, results: PerplexityResults) -> None:
    """Draw bits per byte against position, one line per plan.

    Args:
        figure: An empty matplotlib figure.
        results: What `run_perplexity` returns.
    """
    axes = figure.add_subplot(xlabel="bytes before", ylabel="bits per byte", xscale="log")
    for name, bits in results.bits_per_byte.items():
        style = "o-" if name == ONE_DEVICE else "x--"
        axes.plot(results.options.positions, bits, style, label=name, markersize=4)
    axes.legend()
