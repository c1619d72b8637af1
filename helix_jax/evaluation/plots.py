"""Draws the results of evaluations into matplotlib figures."""

from typing import Any

import numpy as np

from helix_jax.evaluation.needles import NeedleResults
from helix_jax.evaluation.perplexity import PerplexityResults
from helix_jax.evaluation.placements import ONE_DEVICE

_COLORS = "RdYlGn"  # red: none found, green: all found


def plot_needles(figure: Any, results: NeedleResults, plan: str) -> None:
    """Draw the share of passkeys that are found, depth by length, one panel per question.

    Args:
        figure: An empty matplotlib figure.
        results: What `run_needles` returns.
        plan: The plan to draw. Each cell names the rank that stores the passkey.
    """
    lengths = sorted({needle.length for needle in results.needles})
    depths = sorted({needle.depth for needle in results.needles})
    figure.set_size_inches(2.6 + max(2.6, 0.95 * len(lengths)) * results.questions, 1.9 + 0.42 * len(depths))
    panels, images = np.atleast_1d(figure.subplots(1, results.questions, sharey=True)), []
    for question, axes in enumerate(panels):
        share_DL = np.zeros((len(depths), len(lengths)))
        for (row, column), _ in np.ndenumerate(share_DL):
            indices = _cell(results, lengths[column], depths[row])
            share_DL[row, column] = results.correct(plan, question)[indices].mean()
            owners = sorted({results.plans[plan].owners[i] for i in indices})
            label = (
                f"{share_DL[row, column]:.0%}\n"
                + ("rank " if len(owners) == 1 else "ranks ")
                + ", ".join(map(str, owners))
            )
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color="black")
        images.append(axes.imshow(share_DL, vmin=0, vmax=1, cmap=_COLORS, alpha=0.8, aspect="auto"))
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        title = f"after {results.options.decoded} decoded tokens" if question else "directly after the context"
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("context, tokens")
    panels[0].set_ylabel("depth of the passkey in the context")
    figure.colorbar(images[-1], ax=list(panels), label="passkeys found", format=_as_percent, aspect=30)
    figure.suptitle(f"passkeys found under {plan}, and the cp ranks that store them", fontsize=11)


def plot_perplexity(figure: Any, results: PerplexityResults) -> None:
    """Draw bits per byte against position, one line per plan.

    Args:
        figure: An empty matplotlib figure.
        results: What `run_perplexity` returns.
    """
    axes = figure.add_subplot(xlabel="tokens before", ylabel="bits per byte", xscale="log")
    # The lines of all plans coincide, as they should: ever smaller markers and thinner lines show them all.
    for index, (name, bits) in enumerate(results.bits_per_byte.items()):
        style = {"marker": "os^Dv"[index % 5], "linestyle": ("-", "--", "-.", ":")[index % 4]}
        size = {"markersize": 10 - 2 * (index % 5), "linewidth": 3 - 0.5 * (index % 5)}
        axes.plot(results.options.positions, bits, label=name, zorder=2 + index, **style, **size)
    axes.set_xticks(results.options.positions, [f"{position:,}" for position in results.options.positions])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(title=f"{ONE_DEVICE} and each placement")


def _cell(results: NeedleResults, length: int, depth: float) -> list[int]:
    """Return the indices of the needles of a length and a depth."""
    return [i for i, needle in enumerate(results.needles) if (needle.length, needle.depth) == (length, depth)]


def _as_percent(share: float, _: int) -> str:
    return f"{share:.0%}"
