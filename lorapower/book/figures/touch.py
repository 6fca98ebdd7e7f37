"""A figure that readers touch: they set rank, depth and spectrum, and see what was measured there.

All numbers come from the run. The page holds them beside a script of its own, `touch.js`, which
only draws; nothing else is loaded. Where scripts do not run, a picture of one setting stands there.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import resources
from io import StringIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ...errors import InputError, brief
from .._given import check_some, numbers
from .rounding import strip
from .style import looks

# A bend of less than this part of the drawing's height is not seen.
_STRAIGHT = 1e-4
# What a reader hears, and sees above the drawing: templates for Python and for the script.
_SETTING = "Rank {rank}, {depth} frozen layers, {spectrum} spectrum: "
_SAID = (
    _SETTING + "the relative error is {error}, by the bound at most {bound}. "
    "From rank {threshold} on it is rounding.",
    _SETTING
    + "the relative error is rounding, below {rounding}. So it is from rank {threshold} on.",
)


@dataclass(frozen=True, eq=False, repr=False)
class Touch:
    """Errors of a construction, and a function that it makes, at every rank, depth and spectrum.

    A notebook shows it as a figure with controls: the error against the rank, and the function,
    which is piecewise linear, along a line of inputs. Errors below ``rounding`` are in a strip.

    Raises `InputError` for shapes that do not fit, and for a start that is not among the settings.

    Parameters
    ----------
    ranks, depths : sequence of int
        Of the adapters and of the frozen network; rising, in equal steps.
    layers : sequence of int
        Of a block, whose adapters' ranks add up; ``[depths]``.
    spectra : mapping
        Singular values of what the adapters of a block have to make up for, by name.
    thresholds : ArrayLike
        The ranks from which the construction is exact; ``[depths, spectra]``.
    errors, bounds : ArrayLike
        Measured and predicted; ``[depths, spectra, ranks]``.
    at : ArrayLike
        The places on the line, in equal steps; ``[points]``.
    target, frozen, adapted : ArrayLike
        The functions there; ``[points]``, ``[depths, spectra, points]`` and ``[depths, spectra,
        ranks, points]``.
    start : tuple
        Rank, depth and spectrum of the first drawing, and of the picture.
    """

    ranks: Sequence[int]
    depths: Sequence[int]
    layers: Sequence[int]
    spectra: Mapping[str, ArrayLike]
    thresholds: ArrayLike
    errors: ArrayLike
    bounds: ArrayLike
    at: ArrayLike
    target: ArrayLike
    frozen: ArrayLike
    adapted: ArrayLike
    start: tuple[int, int, str]
    rounding: float = 1e-9

    def __post_init__(self) -> None:
        check_some(spectra=self.spectra)
        cases = len(self.depths), len(self.spectra)
        tried, points = (*cases, len(self.ranks)), np.shape(self.at)
        shapes: dict[str, tuple[int, ...]] = {
            "layers": cases[:1],
            "thresholds": cases,
            "errors": tried,
            "bounds": tried,
            "target": points,
            "frozen": (*cases, *points),
            "adapted": (*tried, *points),
        }
        for name, shape in shapes.items():
            if (found := self._arrays[name].shape) != shape:
                raise InputError(name, allowed=f"of shape {shape}", given=f"shape {found}")
        settings = self.ranks, self.depths, [*self.spectra]
        if len(self.start) != 3 or any(map(lambda s, all_: s not in all_, self.start, settings)):
            raise InputError(
                "start", allowed="a rank, a depth, a spectrum", given=brief(self.start)
            )

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the script draws from, in plain numbers; functions are flat lists of x and y."""
        arrays = self._arrays
        return {
            "ranks": [*self.ranks],
            "depths": [*self.depths],
            "layers": [*self.layers],
            "spectra": {
                name: _digits(numbers(name, sigma)) for name, sigma in self.spectra.items()
            },
            "thresholds": arrays["thresholds"].astype(int).tolist(),
            "errors": _digits(arrays["errors"]),
            "bounds": _digits(arrays["bounds"]),
            "rounding": self.rounding,
            "ends": [*self._ends],
            "target": self._bends(arrays["target"]),
            "frozen": self._bends(arrays["frozen"]),
            "adapted": self._bends(arrays["adapted"]),
            "start": [*self._start],
            "said": [text.replace("{rounding}", _power(self.rounding)) for text in _SAID],
        }

    @property
    def sentence(self) -> str:
        """The first setting and its error in words."""
        rank, depth, spectrum = self.start
        r, i, j = self._start
        error = self._arrays["errors"][i, j, r]
        return self.data["said"][int(error < self.rounding)].format(
            rank=rank,
            depth=depth,
            spectrum=spectrum,
            error=f"{error:.2g}",
            bound=f"{self._arrays['bounds'][i, j, r]:.2g}",
            threshold=self.data["thresholds"][i][j],
        )

    def picture(self) -> Figure:
        """The first setting, for where there are no scripts."""
        r, i, j = self._start
        arrays = self._arrays
        look = looks(("construction", "frozen", "target"))
        own, before = look["construction"], look["frozen"]
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
        errors, bounds = arrays["errors"][i, j], arrays["bounds"][i, j]
        bounds = np.where(bounds >= self.rounding, bounds, np.nan)
        left.plot(self.ranks, errors, label="measured", **own.style() | {"ls": ""})
        left.plot(self.ranks[r], errors[r], "o", color=own.color)
        left.plot(self.ranks, bounds, color=own.color, lw=1.5, label="bound")
        left.axvline(arrays["thresholds"][i, j], color=before.color, ls=":", label="threshold")
        left.set(xlabel="rank $R$ of each adapter", title="relative error", yscale="log")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        strip(left, self.rounding)
        ink = look["target"].color
        right.plot(arrays["at"], arrays["target"], color=ink, alpha=0.35, lw=4.5, label="target")
        drawn = {"frozen": (before, arrays["frozen"][i, j])}
        drawn |= {"adapted": (own, arrays["adapted"][i, j, r])}
        for name, (kind, values) in drawn.items():
            right.plot(arrays["at"], values, color=kind.color, ls=kind.line, label=name)
        right.set(xlabel="place on a line of inputs", title="one output", ylim=self._ends)
        for ax in (left, right):
            ax.legend(fontsize="small")
        return figure

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        figure, file = self.picture(), StringIO()
        figure.savefig(file, format="svg")
        plt.close(figure)
        svg = file.getvalue()
        parts = resources.files(__package__)
        style, script = (
            (parts / name).read_text(encoding="utf-8") for name in ("touch.css", "touch.js")
        )
        colors = "; ".join(
            f"--{name}: {to_hex(look.color)}"
            for name, look in looks(("construction", "frozen")).items()
        )
        source = f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
        html = (
            f'<div class="touch" style="{colors}"><style>{style}</style>\n'
            f'<img src="{source}" alt="{escape(self.sentence)}">\n'
            f'<script type="application/json">{json.dumps(self.data, separators=(",", ":"))}'
            f"</script>\n<script>{script}</script></div>"
        )
        return {"text/html": html, "image/svg+xml": svg, "text/plain": self.sentence}

    @cached_property
    def _arrays(self) -> dict[str, NDArray[np.float64]]:
        names = ("layers", "thresholds", "errors", "bounds", "at", "target", "frozen", "adapted")
        return {name: numbers(name, getattr(self, name)) for name in names}

    @property
    def _start(self) -> tuple[int, int, int]:
        rank, depth, spectrum = self.start
        return (
            [*self.ranks].index(rank),
            [*self.depths].index(depth),
            [*self.spectra].index(spectrum),
        )

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Of the function's axis: twice the target's range, or less if nothing goes beyond."""
        drawn = [self._arrays[name] for name in ("target", "frozen", "adapted")]
        low, high = float(drawn[0].min()), float(drawn[0].max())
        span = high - low or 1.0
        low = max(low - span, min(float(values.min()) for values in drawn))
        high = min(high + span, max(float(values.max()) for values in drawn))
        return low - 0.05 * span, high + 0.05 * span

    def _bends(self, y: NDArray[np.float64]) -> Any:
        """The points between which functions are straight: nested lists ``x, y, x, y, …``."""
        if y.ndim > 1:
            return [self._bends(row) for row in y]
        low, high = self._ends
        bent = np.abs(np.diff(y, 2)) > _STRAIGHT * (high - low)
        kept = np.concatenate([[True], bent, [True]])
        points = np.stack([self._arrays["at"][kept], y[kept]], axis=1)
        return [round(value, 4) for value in points.ravel().tolist()]


def _digits(values: NDArray[np.float64]) -> Any:
    """Nested lists of numbers to three digits."""
    return [_digits(row) for row in values] if values.ndim else float(f"{float(values):.3g}")


def _power(value: float) -> str:
    """A power of ten, as text that is read aloud well enough."""
    exponent = str(round(np.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
