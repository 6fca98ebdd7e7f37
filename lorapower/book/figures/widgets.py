"""Figures that readers touch: they move controls, and see what was found there.

Scripts only draw what the run gave. Without scripts a picture of one setting stands there.
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

from ._style import looks, squeeze_rounding

# A bend of less than this part of the drawing's height is not seen.
_STRAIGHT = 1e-4
# What a reader hears, and sees above the drawing: templates for Python and for the script.
_SETTING = "Rank {rank}, {depth} frozen layers, {spectrum} spectrum: "
_SENTENCES = (
    _SETTING + "the relative error is {error}, by the bound at most {bound}. "
    "From rank {threshold} on it is rounding.",
    _SETTING
    + "the relative error is rounding, below {rounding}. So it is from rank {threshold} on.",
)


@dataclass(frozen=True, eq=False, repr=False)
class Frames:
    """Pictures in a row; a slider, named ``label``, shows one of them, at first ``start``.

    A sentence, by the slider's value like its picture, stands above that and is read aloud.
    """

    label: str
    pictures: Mapping[str, Figure]
    sentences: Mapping[str, str]
    start: str

    @cached_property
    def drawn(self) -> dict[str, str]:
        """Each picture as SVG."""
        return {value: _draw_svg(figure) for value, figure in self.pictures.items()}

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        images = []
        for value, svg in self.drawn.items():
            hidden = "" if value == self.start else " hidden"
            sentence = self.sentences[value]
            images.append(_image(svg, sentence, f' data-value="{escape(value)}"{hidden}'))
        attributes = f'data-label="{escape(self.label)}"'
        return {
            "text/html": _widget(attributes, "\n".join(images), "frames.js"),
            "image/svg+xml": self.drawn[self.start],
            "text/plain": self.sentences[self.start],
        }


@dataclass(frozen=True, eq=False, repr=False)
class Touch:
    """Errors of a construction, and a function that it makes, at every rank, depth and spectrum.

    Readers set these and see the error against the rank, below ``rounding`` in a strip, and the
    function, piecewise linear, along a line of inputs.

    ``ranks`` of the adapters, ``depths`` of the frozen network and places ``at`` ``[points]`` on
    the line rise in equal steps. ``layers`` ``[depths]`` counts those of a block, whose ranks add
    up. ``spectra`` has, by name, the singular values that a block's adapters have to make up for.
    The construction is exact from ranks ``thresholds`` ``[depths, spectra]`` on; ``errors`` and
    ``bounds`` are ``[depths, spectra, ranks]``. The functions at the places are ``target``
    ``[points]``, ``frozen`` ``[depths, spectra, points]`` and ``adapted`` ``[depths, spectra,
    ranks, points]``. ``start`` is the first rank, depth and spectrum, shown also by the picture.
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

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the script draws from, in plain numbers; functions are flat lists of x and y."""
        lists = ("ranks", "depths", "layers", "_start", "_ends")
        functions = ("target", "frozen", "adapted")
        return {
            **{name.strip("_"): [*getattr(self, name)] for name in lists},
            **{name: self._bends(np.asarray(getattr(self, name))) for name in functions},
            **{name: _round(np.asarray(getattr(self, name))) for name in ("errors", "bounds")},
            "spectra": {name: _round(np.asarray(s)) for name, s in self.spectra.items()},
            "thresholds": np.asarray(self.thresholds).astype(int).tolist(),
            "rounding": self.rounding,
            "said": [text.replace("{rounding}", _power(self.rounding)) for text in _SENTENCES],
        }

    @property
    def sentence(self) -> str:
        """The first setting and its error in words."""
        rank, depth, spectrum = self.start
        r, i, j = self._start
        error, bound = (np.asarray(values)[i, j, r] for values in (self.errors, self.bounds))
        return self.data["said"][int(error < self.rounding)].format(
            rank=rank,
            depth=depth,
            spectrum=spectrum,
            error=f"{error:.2g}",
            bound=f"{bound:.2g}",
            threshold=self.data["thresholds"][i][j],
        )

    def picture(self) -> Figure:
        """The first setting, for where there are no scripts."""
        r, i, j = self._start
        look = looks(("construction", "frozen", "target"))
        construction, frozen = look["construction"], look["frozen"]
        errors, bounds = (np.asarray(values)[i, j] for values in (self.errors, self.bounds))
        bounds = np.where(bounds >= self.rounding, bounds, np.nan)
        threshold = self.data["thresholds"][i][j]
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4))
        left.plot(self.ranks, errors, label="measured", **construction.style() | {"ls": ""})
        left.plot(self.ranks[r], errors[r], "o", color=construction.color)
        left.plot(self.ranks, bounds, color=construction.color, lw=1.5, label="bound")
        left.axvline(threshold, color=frozen.color, ls=":", label="threshold")
        left.set(xlabel="rank $R$ of each adapter", title="relative error", yscale="log")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        squeeze_rounding(left, self.rounding)
        thick = {"color": look["target"].color, "alpha": 0.35, "lw": 4.5}
        right.plot(self.at, self.target, label="target", **thick)
        before, after = np.asarray(self.frozen)[i, j], np.asarray(self.adapted)[i, j, r]
        right.plot(self.at, before, color=frozen.color, ls=frozen.line, label="frozen")
        right.plot(self.at, after, color=construction.color, ls=construction.line, label="adapted")
        right.set(xlabel="place on a line of inputs", title="one output", ylim=self._ends)
        for ax in (left, right):
            ax.legend(fontsize="small")
        return figure

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        svg = _draw_svg(self.picture())
        colors = "; ".join(
            f"--{name}: {to_hex(look.color)}"
            for name, look in looks(("construction", "frozen")).items()
        )
        data = json.dumps(self.data, separators=(",", ":"))
        content = f'{_image(svg, self.sentence)}\n<script type="application/json">{data}</script>'
        return {
            "text/html": _widget(f'style="{colors}"', content, "touch.js"),
            "image/svg+xml": svg,
            "text/plain": self.sentence,
        }

    @property
    def _start(self) -> tuple[int, int, int]:
        rank, depth, spectrum = self.start
        values = (rank, self.ranks), (depth, self.depths), (spectrum, self.spectra)
        r, i, j = ([*choices].index(value) for value, choices in values)
        return r, i, j

    @cached_property
    def _ends(self) -> tuple[float, float]:
        """Ends of the function's axis: twice the target's range, or less if nothing goes beyond."""
        drawn = [np.asarray(values) for values in (self.target, self.frozen, self.adapted)]
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
        points = np.stack([np.asarray(self.at)[kept], y[kept]], axis=1)
        return [round(value, 4) for value in points.ravel().tolist()]


def _draw_svg(figure: Figure) -> str:
    file = StringIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    return file.getvalue()


def _image(svg: str, sentence: str, attributes: str = "") -> str:
    source = f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
    return f'<img src="{source}" alt="{escape(sentence)}"{attributes}>'


def _widget(attributes: str, content: str, script: str) -> str:
    """A figure with controls, made by a script, with the style of all of them."""
    style, code = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("touch.css", script)
    )
    return (
        f'<div class="touch" {attributes}><style>{style}</style>\n{content}\n'
        f"<script>{code}</script></div>"
    )


def _round(values: NDArray[np.float64]) -> Any:
    """Nested lists of numbers to three digits."""
    return [_round(row) for row in values] if values.ndim else float(f"{float(values):.3g}")


def _power(value: float) -> str:
    """A power of ten, as text that is read aloud well enough."""
    exponent = str(round(np.log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
