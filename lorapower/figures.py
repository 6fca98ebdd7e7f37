"""Figures: one function for each kind, all in one style.

The style is legible on a phone and for colour-blind readers, and opaque, so that it can stand on
a dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

MARKERS = "osD^vPX*"


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=1.1)
    mpl.rcParams |= {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.figsize": (6.4, 4.4),
        "grid.color": "0.9",
        "legend.edgecolor": "white",
        "legend.framealpha": 0.9,
        "lines.markersize": 6,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
    }


def spectrum(singular_values: Mapping[str, ArrayLike]) -> Figure:
    """Singular values ``σ_d`` against ``d``, one line for each entry: median and range.

    Values are ``[samples, k]``; a single sample is a plain line.
    """
    figure, ax = plt.subplots()
    for (label, values), marker in zip(singular_values.items(), MARKERS, strict=False):
        sigma = np.atleast_2d(np.asarray(values))
        d = np.arange(1, sigma.shape[1] + 1)
        (line,) = ax.plot(d, np.median(sigma, 0), marker=marker, label=label)
        ax.fill_between(d, sigma.min(0), sigma.max(0), color=line.get_color(), alpha=0.15, lw=0)
    ax.set(xlabel="index $d$", ylabel=r"singular value $\sigma_d$", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure


def error_against_rank(
    ranks: Mapping[str, ArrayLike],
    predicted: Mapping[str, ArrayLike],
    measured: Mapping[str, ArrayLike],
    *,
    thresholds: Mapping[str, float] | None = None,
    xlabel: str = "rank $R$ of each adapter",
    ylabel: str,
) -> Figure:
    """Predicted error (line) and measured error (open markers) against rank.

    Above on a linear axis, below on a logarithmic one. One colour for each entry; its threshold,
    where given, is a dotted vertical line.
    """
    figure, axes = plt.subplots(2, 1, sharex=True, figsize=(6.4, 6.8))
    colors = sns.color_palette("colorblind", len(measured))
    for i, (label, color) in enumerate(zip(measured, colors, strict=True)):
        # Predictions of exactly 0 have no place on a logarithmic axis: the line ends there.
        line = np.asarray(predicted[label], dtype=float)
        # Markers that coincide stay visible inside one another.
        style = {"ls": "", "marker": MARKERS[i], "markersize": max(12 - 2.2 * i, 4), "mew": 1.8}
        for ax in axes:
            ax.plot(ranks[label], np.where(line > 0, line, np.nan), color=color, lw=1.5)
            ax.plot(ranks[label], measured[label], color=color, label=label, mfc="none", **style)
            if thresholds:
                ax.axvline(thresholds[label], color=color, ls=":", lw=1.5, zorder=0)
    axes[0].set(ylabel=ylabel, ylim=(0, None))
    axes[1].set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend()
    return figure


def precision(
    x: Sequence[float],
    errors: Mapping[str, ArrayLike],
    *,
    guides: Mapping[str, ArrayLike] | None = None,
    xlabel: str,
    ylabel: str = "relative rounding error",
    logx: bool = True,
) -> Figure:
    """Rounding errors against what causes them: median and range of ``[len(x), samples]``.

    Guides are dashed lines, named in the legend.
    """
    figure, ax = plt.subplots()
    for (label, values), marker in zip(errors.items(), MARKERS, strict=False):
        samples = np.asarray(values)
        (line,) = ax.plot(x, np.median(samples, 1), marker=marker, label=label)
        low, high = samples.min(1), samples.max(1)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.15, lw=0)
    for (label, values), style in zip((guides or {}).items(), ("--", ":"), strict=False):
        ax.plot(x, np.asarray(values), style, color="0.4", lw=1.5, label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log", xscale="log" if logx else "linear")
    if not logx:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return figure
