"""Drawings that explain an idea: what adapters add is blue, what training does vermilion."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from ._style import GREY, ink, looks

_LOOKS = looks(("construction", "trained", "target"))
_ADAPTED, _TRAINED, _TARGET = (look.color for look in _LOOKS.values())
_FROZEN = "0.85"
_ARROW: dict[str, Any] = {
    "arrowstyle": "->",
    "color": "0.3",
    "lw": 1.5,
    "shrinkA": 0,
    "shrinkB": 0,
}
_MIDDLE: dict[str, Any] = {"ha": "center", "va": "center"}


def adapted_stack() -> Figure:
    """A frozen stack with thin adapters, and the singular values that each of these takes.

    Three layers have adapters of rank 2, so six of the eight singular values of E are taken.
    """
    layers, rank, width = 3, 2, 8
    shades = mpl.colormaps["Blues"](np.linspace(0.85, 0.4, layers))
    figure, (stack, values) = plt.subplots(1, 2, figsize=(5.4, 3.4))
    for i, shade in enumerate(shades):
        y = 1.35 * i
        stack.add_patch(Rectangle((0, y), 1, 1, fc=_FROZEN, ec=GREY))
        stack.text(0.5, y + 0.5, f"$W_{i + 1}$", **_MIDDLE)
        stack.text(1.25, y + 0.5, "+", **_MIDDLE)
        stack.add_patch(Rectangle((1.5, y), 0.22, 1, fc=shade))
        stack.add_patch(Rectangle((1.8, y + 0.78), 1, 0.22, fc=shade))
        stack.text(1.9, y + 0.36, rf"$A_{i + 1}B_{i + 1}^\top$", va="center", fontsize="small")
        _lead(stack, (0.5, y - 0.35), (0.5, y))
    _lead(stack, (0.5, 3.7), (0.5, 4.05))
    stack.text(0.5, -0.4, "$x$", ha="center", va="top")
    stack.text(0.5, 4.1, r"$\widehat W_3\,\widehat W_2\,\widehat W_1\,x$", ha="center", va="bottom")
    stack.set(xlim=(-0.5, 2.85), ylim=(-0.8, 4.65), aspect="equal")
    stack.axis("off")
    heights = 0.92 - 0.11 * np.arange(width)
    parts = {f"layer {i + 1}": shade for i, shade in enumerate(shades)} | {"error": GREY}
    for i, (name, shade) in enumerate(parts.items()):
        d = np.arange(rank * i, rank * (i + 1))
        values.bar(d + 1, heights[d], color=shade)
        values.text(rank * i + 1.5, heights[d[0]] + 0.03, name, ha="center")
    values.set(title="singular values of $E$", xlabel="$d$", yticks=[], ylim=(0, 1.05))
    values.set_xticks(range(1, width + 1))
    values.grid(visible=False)
    return figure


def moved_kink() -> Figure:
    """A ReLU on a region, with a kink inside; a larger bias moves the kink to the region's edge."""
    figure, axes = plt.subplots(1, 2, figsize=(5.4, 2.7), sharey=True)
    x = np.linspace(-1.9, 1.5, 341)
    for ax, title, bias in zip(axes, ("frozen bias", "tuned bias"), (0.25, 1.0), strict=True):
        ax.axvspan(-1, 1, color=_ADAPTED, alpha=0.12, lw=0)
        ax.text(0, -0.98, "region", ha="center", color="0.3")
        ax.axhline(0, color="0.2", lw=1)
        ax.plot(x, np.maximum(x + bias, 0), color=_ADAPTED, lw=2.5)
        ax.plot(-bias, 0, "o", color=_ADAPTED, ms=8)
        ax.annotate("kink", (-bias, 0.1), (-bias - 0.15, 1.1), ha="center", arrowprops=_ARROW)
        ax.set(title=title, xlabel="$x$", ylim=(-1.2, 2.5), xticks=[-1, 0, 1], yticks=[0])
        ax.set_xticklabels([r"$-\rho$", "0", r"$\rho$"])
        ax.grid(visible=False)
    axes[1].plot(x, x, color=GREY, ls="--", lw=1.5)
    _lead(axes[1], (0.6, 1.6), (0.6, 0.63))
    axes[1].text(1.02, 0.22, "next bias", **_MIDDLE)
    axes[0].set_ylabel("activation")
    return figure


def far_token() -> Figure:
    """What blocks add to a far token, seen by norms; and a kink of the target without a partner.

    On the right the adapted network differs from the target by the best affine map.
    """
    figure, (plane, line) = plt.subplots(
        1, 2, figsize=(5.4, 2.9), gridspec_kw={"width_ratios": (1.1, 1)}
    )
    token = np.array([2.5, 1.5])
    steps = np.array([[0.6, 0.15], [-0.2, 0.6], [-0.75, 0.1], [-0.15, -0.6]])
    stream = token + np.vstack([np.zeros(2), np.cumsum(steps, 0)])
    plane.add_patch(Circle((0, 0), 1, fill=False, ec=GREY, lw=1.5))
    for start, end in zip(stream, [*stream[1:], None], strict=True):
        n = start / np.linalg.norm(start)
        plane.plot(*np.stack([start, n], 1), color="0.8", lw=1, zorder=0)
        plane.plot(*n, "o", color=_TARGET, ms=4)
        if end is not None:
            _lead(plane, start, end, color=_ADAPTED, lw=2)
    plane.plot(*token, "o", color=_TARGET, ms=7)
    plane.text(2.5, 1.3, "token $cv$", ha="center", va="top")
    plane.text(2.3, 2.55, "blocks add little", ha="center", color=ink(_ADAPTED))
    plane.text(0.6, 0.35, r"$\widehat n$", **_MIDDLE)
    plane.text(0, -1.1, "after any norm", ha="center", va="top")
    plane.set(xlim=(-1.3, 3.6), ylim=(-1.6, 2.95), aspect="equal", title="far out")
    plane.axis("off")
    t = np.linspace(-1, 1, 401)
    target = np.maximum(t, 0)
    units = 0.4 * np.maximum(t + 0.5, 0) + 0.4 * np.maximum(t - 0.5, 0)
    adapted = units + np.polyval(np.polyfit(t, target - units, 1), t)
    line.fill_between(t, target, adapted, color=GREY, alpha=0.25, lw=0)
    line.plot(t, adapted, color=_ADAPTED, lw=2)
    line.plot(t, target, color=_TARGET, lw=2)
    line.plot(0, 0, "o", color=_TARGET, ms=7)
    line.annotate(
        "no partner\nfor this kink",
        (0.03, -0.02),
        (0.45, -0.35),
        ha="center",
        va="top",
        arrowprops=_ARROW,
    )
    line.text(0.5, 0.85, "target", ha="right", color=_TARGET)
    line.text(-0.2, 0.3, "adapted", ha="right", color=ink(_ADAPTED))
    line.set(
        title="at a kink", xlabel="direction of the token", xticks=[], yticks=[], ylim=(-0.75, 1.1)
    )
    return figure


def residual_stream() -> Figure:
    """A block with residual connections: what reads the stream through norms and adds to it.

    Linear pieces are coloured, one colour for each pair or weight that adapters change together.
    """
    figure, ax = plt.subplots(figsize=(6.4, 3.7))
    kinds = looks(("query–key", "value–output", "inner", "outer"))
    query_key, value_output, inner, outer = (look.color for look in kinds.values())
    ax.annotate("", (10.6, 0), (0, 0), arrowprops=_ARROW | {"lw": 5, "color": "0.6"})
    ax.text(0, -0.55, "tokens $Z$", ha="left", va="top")
    ax.text(4.95, -0.55, "$U$", ha="center", va="top")
    ax.text(10.5, -0.55, "$Y$", ha="right", va="top")
    weights = [
        (0.9, 2.5, "$W_Q,W_K$", query_key),
        (2.5, 2.5, "$W_V$", value_output),
        (4.1, 3.8, "$W_O$", value_output),
        (6.3, 2.5, "$W_1$", inner),
        (7.8, 2.5, "$W_3$", inner),
        (9.4, 3.8, "$W_2$", outer),
    ]
    for x, y, text, color in weights:
        dashed = {"ls": "--"} if "3" in text else {}
        box = {"boxstyle": "round,pad=0.4", "fc": to_rgba(color, 0.25), "ec": color, "lw": 2}
        ax.text(x, y, text, bbox=box | dashed, **_MIDDLE)
    curved = [
        (1.7, 1.2, "$N_1$"),
        (7.05, 1.2, "$N_2$"),
        (0.9, 3.8, "softmax"),
        (6.3, 3.8, r"$\sigma$"),
    ]
    for x, y, text in curved:
        box = {"boxstyle": "round4,pad=0.4", "fc": "white", "ec": "0.2"}
        ax.text(x, y, text, bbox=box, **_MIDDLE)
    for x in (2.5, 7.8):
        ax.text(x, 3.8, r"$\times$", fontsize="x-large", **_MIDDLE)
    paths = [((1.7, 0.1), (1.7, 0.8)), ((7.05, 0.1), (7.05, 0.8))]
    for x, norm in ((0.9, 1.5), (2.5, 1.9), (6.3, 6.85), (7.8, 7.25)):
        paths.append(((norm, 1.6), (x, 2.05)))
        paths.append(((x, 2.95), (x, 3.4)))
    paths += [((1.75, 3.8), (2.3, 3.8)), ((2.7, 3.8), (3.6, 3.8))]
    paths += [((6.65, 3.8), (7.6, 3.8)), ((8.0, 3.8), (8.9, 3.8))]
    paths += [((4.1, 3.35), (4.1, 0.1)), ((9.4, 3.35), (9.4, 0.1))]
    for start, end in paths:
        _lead(ax, start, end)
    for x, text in ((2.5, "attention"), (7.85, "feed-forward layer")):
        ax.text(x, 4.75, text, color="0.3", **_MIDDLE)
    ax.set(xlim=(-0.3, 10.9), ylim=(-1.2, 5.1))
    ax.axis("off")
    return figure


def transformer_segments() -> Figure:
    """A transformer's block and output, cut at non-linearities; thick frames have adapters."""
    figure, ax = plt.subplots(figsize=(6.4, 6.2))
    kinds = looks(("query–key", "value–output", "output"))
    query_key, value_output, after = (look.color for look in kinds.values())
    weights = [
        (1.4, 1.6, "$W_Q,\\ W_K$", query_key, True),
        (4.6, 1.6, "$W_V$", value_output, True),
        (4.6, 3.8, "$W_O$", value_output, True),
        (4.6, 5.0, "$W_1,\\ b_1$", value_output, False),
        (4.6, 7.4, "$W_2,\\ b_2$", after, True),
        (4.6, 8.6, r"$W_{\rm out}$", after, True),
    ]
    steps = [(1.4, 2.8, "softmax"), (4.6, 6.2, "ReLU")]
    for x, y, text, color, adapted in weights:
        box = {"boxstyle": "round,pad=0.45", "fc": to_rgba(color, 0.25), "ec": color}
        ax.text(x, y, text, ha="center", va="center", bbox=box | {"lw": 3 if adapted else 1})
    for x, y, text in steps:
        box = {"boxstyle": "round4,pad=0.45", "fc": "white", "ec": "0.2"}
        ax.text(x, y, text, ha="center", va="center", bbox=box)
        ax.plot([x - 1.6, x], [y, y], color="0.2", ls="--", lw=1.5, zorder=0)
    ax.text(4.6, 2.8, r"$\times$", ha="center", va="center", fontsize="x-large")
    ax.text(3.0, 0.3, "tokens", ha="center", va="center")
    ax.text(4.6, 9.8, "output", ha="center", va="center")
    arrow = {"arrowstyle": "->", "color": "0.3", "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    paths = [((2.7, 0.55), (1.4, 1.1)), ((3.3, 0.55), (4.6, 1.1)), ((1.4, 2.1), (1.4, 2.35))]
    paths += [((2.3, 2.8), (4.3, 2.8))]
    lows, highs = (2.1, 3.05, 4.3, 5.5, 6.65, 7.9, 9.1), (2.55, 3.3, 4.5, 5.75, 6.9, 8.1, 9.6)
    paths += [((4.6, low), (4.6, high)) for low, high in zip(lows, highs, strict=True)]
    for start, end in paths:
        ax.annotate("", xy=end, xytext=start, arrowprops=arrow)
    ax.text(5.3, 3.8, "summed over heads", ha="left", va="center", fontsize="small", color="0.3")
    ax.set(xlim=(-0.4, 7.6), ylim=(0, 10.1))
    ax.axis("off")
    return figure


def split_product() -> Figure:
    """The loss of a product, a bowl, and of its two factors, with a saddle; and how to get across.

    The factors' gradient descent passes by the saddle. The product's goes straight; what it finds
    is then split.
    """
    figure, (product, factors) = plt.subplots(
        1, 2, figsize=(5.4, 2.9), gridspec_kw={"width_ratios": (1, 1.25)}
    )
    first = np.array([1.1, -1.15])
    p = np.linspace(-1.7, 3.1, 97)
    steps = 1 - (1 - first.prod()) * 0.55 ** np.arange(7)
    product.plot(p, (p - 1) ** 2, color=GREY, lw=2)
    product.plot(steps, (steps - 1) ** 2, "o-", color=_ADAPTED, ms=6)
    product.text(1, 2.7, "train it", ha="center", color=ink(_ADAPTED))
    product.set(title="the product", xlabel="$w_2w_1$", xticks=[0, 1], yticks=[], ylim=(-0.4, 7))
    product.set_ylabel("loss")
    product.grid(visible=False)
    axis = np.linspace(-2, 2, 161)
    w1, w2 = np.meshgrid(axis, axis)
    levels = [0.02, 0.2, 0.6, 1, 2, 4, 8]
    factors.contour(axis, axis, (w1 * w2 - 1) ** 2, levels, colors="0.75", linewidths=1)
    for low, high in ((0.5, 2.0), (-2.0, -0.5)):
        w = np.linspace(low, high, 60)
        factors.plot(w, 1 / w, color=_TARGET, lw=2.5)
    path = [first]
    for _ in range(400):
        w = path[-1]
        path.append(w - 0.02 * (w.prod() - 1) * w[::-1])
    factors.plot(*np.stack(path, 1), color=_TRAINED, lw=2)
    factors.plot(*first, "o", color=_TARGET, ms=7)
    factors.plot(0, 0, "x", color=_TRAINED, ms=9, mew=2)
    _lead(factors, first, (first[0], 1 / first[0]), color=_ADAPTED, lw=2)
    factors.text(1.2, -0.1, "split it", color=ink(_ADAPTED), va="center")
    factors.text(-0.12, 0.1, "saddle", ha="right", color=ink(_TRAINED))
    factors.text(first[0], -1.35, "start", ha="center", va="top")
    factors.set(title="its factors", xlabel="$w_1$", ylabel="$w_2$", xticks=[0], yticks=[0])
    factors.grid(visible=False)
    return figure


def planning() -> Figure:
    """From two checkpoints and texts to ranks, to an adapter, and to its error on other texts."""
    figure, ax = plt.subplots(figsize=(5.4, 2.5))
    box = {"boxstyle": "round,pad=0.4", "fc": _FROZEN, "ec": GREY}
    for y, name in zip((2.5, 1.5, 0.5), ("base", "tuned", "texts"), strict=True):
        ax.text(0.6, y, name, **_MIDDLE, bbox=box)
        _lead(ax, (1.2, y), (1.95, 1.5 + 0.25 * (y - 1.5)))
    ranks = np.array([[0, 0, 2, 1], [1, 0, 3, 1], [0, 1, 3, 2], [0, 0, 1, 1]])
    shades = mpl.colormaps["Blues"](ranks / 4)
    for (row, column), rank in np.ndenumerate(ranks):
        x, y = 2.1 + 0.42 * column, 0.74 + 0.42 * (3 - row)
        ax.add_patch(Rectangle((x, y), 0.38, 0.38, fc=shades[row, column]))
        color = "white" if rank > 2 else _TARGET
        ax.text(x + 0.19, y + 0.17, str(rank), color=color, fontsize="small", **_MIDDLE)
    _lead(ax, (3.85, 1.5), (4.45, 1.5))
    for i, size in enumerate((0.08, 0.05, 0.14, 0.1)):
        y = 2.1 - 0.42 * i
        ax.add_patch(Rectangle((4.6, y - 0.15), size, 0.3, fc=_ADAPTED))
        ax.add_patch(Rectangle((4.8, y - size / 2 + 0.05), 0.7, size, fc=_ADAPTED))
    _lead(ax, (5.6, 1.5), (6.2, 1.5))
    ax.text(6.9, 1.5, "error on\nother\ntexts", **_MIDDLE, bbox=box)
    for x, name in zip((2.93, 5.05, 6.9), ("plan", "extract", "check"), strict=True):
        ax.text(x, 0.15, name, family="monospace", **_MIDDLE)
    ax.text(2.93, 2.75, "ranks", **_MIDDLE)
    ax.text(5.05, 2.75, "adapter", **_MIDDLE)
    ax.set(xlim=(0, 7.6), ylim=(-0.1, 3))
    ax.axis("off")
    return figure


def paid_ranks() -> Figure:
    """What each further rank explains against what it costs; added up, bias, cost and risk."""
    width, price = 12, 0.014
    rank = np.arange(width + 1)
    gains = 0.7 ** rank[1:]
    cost = price * rank * (2 * width - rank)
    bias = np.append(gains[::-1].cumsum()[::-1], 0)
    risk = bias + cost
    best = int(risk.argmin())
    figure, (each, total) = plt.subplots(1, 2, figsize=(5.4, 2.9))
    colors = [_ADAPTED] * best + [_FROZEN] * (width - best)
    each.bar(rank[1:], gains, color=colors)
    each.plot(rank[1:], np.diff(cost), color=_TRAINED, lw=2)
    each.text(2.2, 0.55, "explains", color=ink(_ADAPTED))
    each.text(12.3, np.diff(cost)[8] + 0.04, "costs", ha="right", color=ink(_TRAINED))
    each.set(title="one more rank", xlabel="rank $r$", xticks=[1, best, width], yticks=[])
    total.plot(rank, bias, color=_ADAPTED, lw=2)
    total.plot(rank, cost, color=_TRAINED, lw=2)
    total.plot(rank, risk, color=_TARGET, lw=2.5)
    total.plot(best, risk[best], "o", color=_TARGET, ms=8)
    total.text(6.3, 0.33, "bias", color=ink(_ADAPTED))
    total.text(11, cost[11] - 0.12, "cost", ha="right", va="top", color=ink(_TRAINED))
    total.text(7.5, risk[8] + 0.1, "risk", ha="right", color=_TARGET)
    total.set(
        title="all ranks", xlabel="rank $r$", xticks=[0, best, width], yticks=[], ylim=(0, None)
    )
    for ax in (each, total):
        ax.grid(visible=False)
    return figure


def adapter_sizes() -> Figure:
    """Three ways to an adapter of one size: train it, or train more and keep the most important."""
    figure, ax = plt.subplots(figsize=(5.4, 3.0))
    rows = ("small", None, 0.07), ("all", "extract", 0.7), ("large", "shrink", 0.3)
    for y, (much, then, size) in zip((2.2, 1.2, 0.2), rows, strict=True):
        if then == "extract":
            ax.add_patch(Rectangle((1.75, y), 0.7, 0.7, fc=_TRAINED))
        elif then:
            _draw_factors(ax, 1.65, y, size, _TRAINED)
        ax.text(0, y + 0.35, f"train {much}", va="center", color=ink(_TRAINED))
        _draw_factors(ax, 4.3, y, 0.07, _ADAPTED if then else _TRAINED)
        _lead(ax, (2.85 if then else 1.65, y + 0.35), (4.1, y + 0.35))
        if then:
            ax.text(3.45, y + 0.45, then, ha="center", color=ink(_ADAPTED))
    ax.text(4.75, 3.15, "one size", ha="center")
    ax.set(xlim=(-0.1, 5.5), ylim=(0.1, 3.4), aspect="equal")
    ax.axis("off")
    return figure


def paired_losses() -> Figure:
    """Losses of two models on the same texts, which scatter, and their differences, which do not.

    Each line joins the losses of one text.
    """
    figure, (losses, differences) = plt.subplots(1, 2, figsize=(5.4, 2.9))
    first = np.array([2.2, 2.7, 3.1, 3.3, 3.9, 4.2, 4.8, 5.3, 5.9])
    gain = np.array([0.42, 0.3, 0.36, 0.5, 0.27, 0.4, 0.33, 0.46, 0.38])
    losses.plot([0, 1], [first, first - gain], color="0.75", lw=1.2)
    for x, values, color in ((0, first, _TRAINED), (1, first - gain, _ADAPTED)):
        losses.plot(np.full(len(values), x), values, "o", color=color, ms=5)
    losses.set(title="losses", xlim=(-0.5, 1.5), ylim=(0, 6.6), yticks=[0, 2, 4, 6])
    losses.set_xticks([0, 1], ["one model", "other"])
    differences.axhline(0, color=GREY, ls="--", lw=1.5)
    differences.plot(np.linspace(-0.4, 0.4, len(gain)), gain, "o", color=_TARGET, ms=5)
    differences.set(title="differences", xlim=(-1, 1), ylim=(-1.1, 5.5), yticks=[0, 2, 4])
    differences.set_xticks([0], ["the same texts"])
    for ax in (losses, differences):
        ax.grid(visible=False)
    losses.set_ylabel("nats a token")
    return figure


def _draw_factors(ax: Axes, x: float, y: float, rank: float, color: Any) -> None:
    """Two factors of a matrix of height .7, the second lying beside the first."""
    ax.add_patch(Rectangle((x, y), rank, 0.7, fc=color))
    ax.add_patch(Rectangle((x + rank + 0.08, y + 0.7 - rank), 0.7, rank, fc=color))


def _lead(ax: Axes, start: Any, end: Any, **changes: Any) -> None:
    """An arrow, with its head at the end."""
    ax.annotate("", xy=end, xytext=start, arrowprops=_ARROW | changes)
