"""Axes on which all that is rounding takes one strip, and what is more takes the space."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

# The strip's part of the axis.
_SHARE = 0.15
_MOST_DECADES = 7
# The least value that is told from 0, in units of the level.
_LEAST = 1e-30

Heights = NDArray[np.float64]


def strip(ax: Axes, level: float) -> None:
    """Squeeze what is drawn below ``level`` into a shaded strip, named rounding.

    The axis, linear or logarithmic, goes on from the strip with what is least of all above the
    level. Without values on both sides of the level nothing is done.
    """
    drawn = _heights(ax)
    above, below = drawn[drawn >= level], drawn[drawn < level]
    if not (above.size and below.size):
        return
    log = ax.get_yscale() == "log"
    cut, top = (above.min() / 1.5, above.max() * 1.5) if log else (level, above.max() * 1.05)
    # A third up in the strip are the least values, and all that the strip would not hold: zeros.
    least = np.log10(max(min(below[below > 0], default=0), level * _LEAST))
    deepest = least - (np.log10(cut) - least) / 2
    start, end = (np.log10([cut, top])) if log else (cut, top)
    height = _SHARE * (end - start)
    decades = np.log10(cut) - deepest

    def forward(y: Heights) -> Heights:
        safe = np.maximum(y, cut)
        squeezed = np.log10(np.where(y < 10**deepest, 10**least, y)) - deepest
        return np.where(
            y >= cut, np.log10(safe) if log else safe, start + height * (squeezed / decades - 1)
        )

    def inverse(u: Heights) -> Heights:
        safe = np.maximum(u, start)
        squeezed = deepest + decades * (np.minimum(u, start) - start + height) / height
        return np.where(u >= start, 10**safe if log else safe, 10**squeezed)

    ax.set_yscale("function", functions=(forward, inverse))
    ax.set_ylim(10**deepest, top)
    ticks = _decades(cut, top) if log else np.maximum(MaxNLocator(6).tick_values(0, top), cut)
    ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if cut <= tick <= top]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_power if log and top / cut > 1e3 else _plain))
    ax.axhspan(10**deepest, cut, color="0.88", lw=0, zorder=0)
    middle = float(inverse(np.array(start - height / 2)))
    here = ax.get_yaxis_transform()
    ax.text(0.01, middle, "rounding", color="0.3", fontsize="small", va="center", transform=here)


def _heights(ax: Axes) -> Heights:
    """Of all points of lines and bands that stand on the axis."""
    lines = [
        np.asarray(line.get_ydata(), dtype=float)
        for line in ax.lines
        if line.get_transform().contains_branch_seperately(ax.transData)[1]
    ]
    bands = [np.asarray(path.vertices)[:, 1] for c in ax.collections for path in c.get_paths()]
    drawn = np.concatenate([*lines, *bands]) if lines or bands else np.empty(0)
    return drawn[np.isfinite(drawn)]


def _decades(low: float, high: float) -> list[float]:
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    step = -(-(last - first) // _MOST_DECADES)
    steps = (1, 2, 5) if high / low <= 1e3 else (1,)
    return [float(m) * 10.0**k for k in range(last, first - 1, -step) for m in steps]


def _plain(value: float, _: object) -> str:
    return f"{value:.4g}" if value > 1e-6 else "0"


def _power(value: float, _: object) -> str:
    return f"$10^{{{round(np.log10(value))}}}$"
