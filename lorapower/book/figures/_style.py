"""The style of figures: one role, one colour, one marker, and a strip for rounding."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.typing import ColorType, LineStyleType
from numpy.typing import NDArray

GREY = "0.4"
_PALETTE = sns.color_palette("colorblind").as_hex()

#: What lines mean in the whole book. Keys are patterns with which one of a label's parts, between
#: commas, begins; values are colours and markers, none for what is computed, not measured.
ROLES: dict[str, tuple[ColorType, str]] = {
    "construction": (_PALETTE[0], "o"),
    "fitted": (_PALETTE[2], "D"),
    "trained(?: adapters)?": (_PALETTE[3], "s"),
    "final layers?": (_PALETTE[4], "^"),
    "all weights": (_PALETTE[1], "v"),
    "random": (_PALETTE[5], "P"),
    "pretrained": (_PALETTE[9], "X"),
    "target": ("0.15", ""),
    "frozen": (GREY, ""),
    "bound": ("0.15", ""),
    "floor": (GREY, ""),
    "best constant": (GREY, ""),
}
#: Levels, which are no curves, and what is before any adaptation are dashed everywhere.
_DASHED = ("floor", "best constant", "frozen")
#: Said of the plain kind of a line; beside one another, a bound is a line, the measured markers.
_PLAIN = ("", "bound", "measured")
#: Starts of trainings: a role of their own, or else always these kinds of a method's line.
_STARTS = ("random", "pretrained")
_DEPTH = re.compile(r"depth (\d+)|(\d+) blocks?")
_DEEPEST = 16
#: Roles of one figure alone take these, which mean nothing elsewhere.
_FREE = ("#882255", "#999933", "#661100", "#AA4499", "#6699CC", "#117733", "#DDCC77", "#CC6677")
MARKERS = "osD^vPX"
LINES: tuple[LineStyleType, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_FILLS = ("none", "full", "left", "bottom", "right")

# The least contrast of text.
_READABLE = 4.5
# The strip's part of the axis.
_SHARE = 0.15
_MOST_DECADES = 7
# The least value that is told from 0, in units of the level of rounding.
_LEAST = 1e-30

Heights = NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """How a line is drawn: colour, marker, kind of line, and how far its marker is filled."""

    color: ColorType
    marker: str
    line: LineStyleType = "-"
    fill: str = "none"

    def style(self, size: float = 7) -> dict[str, Any]:
        """Matplotlib's settings of a line, with markers of this size."""
        return {
            "color": self.color,
            "marker": self.marker,
            "ls": self.line,
            "fillstyle": self.fill,
            "ms": size,
            "mew": 1.5,
        }


def use_style() -> None:
    """Set matplotlib's defaults to the book's style."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=1.1)
    mpl.rcParams |= {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "figure.figsize": (6.4, 3.7),
        "grid.color": "0.9",
        "legend.edgecolor": "white",
        "legend.framealpha": 0.9,
        "lines.markersize": 6,
        "savefig.facecolor": "white",
        "svg.hashsalt": "lorapower",
    }


def looks(labels: Collection[str]) -> dict[str, Look]:
    """The look of each line by its label; what labels say beside a role looks alike in all."""
    read = {label: _read(label) for label in labels}
    said = dict.fromkeys("" if rest in _PLAIN else rest for _, rest in read.values())
    first = [rest for rest in ("", *_STARTS) if rest in said or (rest and said.keys() & {*_STARTS})]
    kinds = {rest: i for i, rest in enumerate(dict.fromkeys([*first, *said]))}
    own = dict.fromkeys(role for role, _ in read.values() if _fixed(role) is None)
    free = dict(zip(own, zip(cycle(_FREE), cycle(MARKERS), strict=False), strict=False))
    found = {}
    for label, (role, rest) in read.items():
        color, marker = _fixed(role) or free[role]
        kind = kinds.get(rest, 0)
        line, fill = LINES[kind % len(LINES)], _FILLS[kind % len(_FILLS)]
        if role in _DASHED:
            line = "--"
        elif rest == "bound":
            marker = ""
        elif rest == "measured":
            line = ""
        found[label] = Look(color, marker, line, fill)
    return found


def ink(color: ColorType) -> ColorType:
    """The colour, as much darker as text in it needs to be read on white."""
    while contrast(color, "white") < _READABLE:
        red, green, blue = to_rgb(color)
        color = 0.95 * red, 0.95 * green, 0.95 * blue
    return to_hex(color)


def contrast(color: ColorType, ground: ColorType) -> float:
    """How much lighter one colour is than the other, as the W3C's guidelines count it."""
    shades = np.array([to_rgb(color), to_rgb(ground)])
    linear = np.where(shades <= 0.04045, shades / 12.92, ((shades + 0.055) / 1.055) ** 2.4)
    light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return float((light[1] + 0.05) / (light[0] + 0.05))


def _read(label: str) -> tuple[str, str]:
    """The role that a label names, or else its first part, and what else it says."""
    parts = re.split(r", (?![^(]*\))", label)
    for i, part in enumerate(parts):
        if _DEPTH.fullmatch(part):
            return part, ", ".join(parts[:i] + parts[i + 1 :])
    for role in ROLES:
        for i, part in enumerate(parts):
            if named := re.match(rf"{role}\b", part):
                rest = [*parts[:i], part[named.end() :].strip(), *parts[i + 1 :]]
                return role, ", ".join(filter(None, rest))
    return parts[0], ", ".join(parts[1:])


def _fixed(role: str) -> tuple[ColorType, str] | None:
    """Colour and marker of a role that has them in the whole book."""
    if depth := _DEPTH.fullmatch(role):
        L = int(depth[1] or depth[2])
        shade = 0.8 * min(math.log(max(L, 1)) / math.log(_DEEPEST), 1)
        return mpl.colormaps["viridis"](shade), MARKERS[(L - 1) % len(MARKERS)]
    return ROLES.get(role)


def squeeze_rounding(ax: Axes, level: float) -> None:
    """Squeeze what is drawn below ``level``, if something is above, into a shaded strip."""
    drawn = _heights(ax)
    above, below = drawn[drawn >= level], drawn[drawn < level]
    if not (above.size and below.size):
        return
    log = ax.get_yscale() == "log"
    cut, top = level, above.max() * 1.05
    if log:
        # Markers at the top are seen whole, however many decades there are.
        cut, top = above.min() / 1.5, above.max() * 1.5 * (above.max() / above.min()) ** 0.05
    # A third up in the strip are the least values and zeros; below 0 is the foot of the axis.
    least = np.log10(max(min(below[below > 0], default=0), level * _LEAST))
    deepest = least - (np.log10(cut) - least) / 2
    start, end = (np.log10([cut, top])) if log else (cut, top)
    height = _SHARE * (end - start)
    decades = np.log10(cut) - deepest

    def forward(y: Heights) -> Heights:
        safe = np.maximum(y, cut)
        squeezed = np.log10(np.where(y < 0, 10**deepest, np.maximum(y, 10**least))) - deepest
        return np.where(
            y >= cut, np.log10(safe) if log else safe, start + height * (squeezed / decades - 1)
        )

    def inverse(u: Heights) -> Heights:
        safe = np.maximum(u, start)
        squeezed = deepest + decades * (np.minimum(u, start) - start + height) / height
        return np.where(u >= start, 10**safe if log else safe, 10**squeezed)

    ax.set_yscale("function", functions=(forward, inverse))
    ax.set_ylim(-1, top)
    ticks = _decades(cut, top) if log else np.maximum(MaxNLocator(6).tick_values(0, top), cut)
    ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if cut <= tick <= top]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(_power if log and top / cut > 1e3 else _plain))
    ax.axhspan(-1, cut, color="0.88", lw=0, zorder=0)
    middle = float(inverse(np.array(start - height / 2)))
    here = ax.get_yaxis_transform()
    ax.text(0.01, middle, "rounding", color="0.3", fontsize="small", va="center", transform=here)


def _heights(ax: Axes) -> Heights:
    """Heights of all points of lines and bands on the axis."""
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
