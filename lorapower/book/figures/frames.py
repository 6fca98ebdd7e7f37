"""A figure that steps through pictures: readers move a slider, and see what was found there.

All pictures are in the page, which loads nothing. Where scripts do not run, the first one to be
seen stands there.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib import resources
from io import StringIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...errors import InputError, brief
from .._given import check_some


@dataclass(frozen=True, eq=False, repr=False)
class Frames:
    """Pictures in a row, of which a slider shows one.

    A notebook shows it as a figure with a control.

    Raises `InputError` for no pictures, for a sentence too many or too few, and for a start that is
    none of the values.

    Parameters
    ----------
    label : str
        What the slider sets, in words.
    pictures : mapping
        Figures by the value of the slider, in its order; closed when they are drawn.
    sentences : mapping
        What each shows, in words, which are read aloud and stand above it.
    start : str
        The value to begin with.
    """

    label: str
    pictures: Mapping[str, Figure]
    sentences: Mapping[str, str]
    start: str

    def __post_init__(self) -> None:
        check_some(pictures=self.pictures)
        if [*self.sentences] != [*self.pictures]:
            raise InputError(
                "sentences", allowed=f"of {brief([*self.pictures])}", given=brief([*self.sentences])
            )
        if self.start not in self.pictures:
            raise InputError(
                "start", allowed=f"among {brief([*self.pictures])}", given=brief(self.start)
            )

    @cached_property
    def drawn(self) -> dict[str, str]:
        """Each picture as SVG."""
        found = {}
        for value, figure in self.pictures.items():
            file = StringIO()
            figure.savefig(file, format="svg")
            plt.close(figure)
            found[value] = file.getvalue()
        return found

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        parts = resources.files(__package__)
        style, script = (
            (parts / name).read_text(encoding="utf-8") for name in ("touch.css", "frames.js")
        )
        images = []
        for value, svg in self.drawn.items():
            source = f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"
            hidden = "" if value == self.start else " hidden"
            said = escape(self.sentences[value])
            images.append(f'<img src="{source}" alt="{said}" data-value="{escape(value)}"{hidden}>')
        html = (
            f'<div class="touch" data-label="{escape(self.label)}"><style>{style}</style>\n'
            + "\n".join(images)
            + f"\n<script>{script}</script></div>"
        )
        return {
            "text/html": html,
            "image/svg+xml": self.drawn[self.start],
            "text/plain": self.sentences[self.start],
        }


def counts(table: pd.DataFrame, *, most: float, xlabel: str, ylabel: str, label: str) -> Figure:
    """Whole numbers in a grid, each written on a shade that says how large it is.

    ``most`` has the darkest shade, so that several grids can be compared; 0 has none. Raises
    `InputError` for an empty table.
    """
    if table.empty:
        raise InputError("table", allowed="of at least one number", given="an empty one")
    figure, ax = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(table)))
    values = table.to_numpy(dtype=float)
    ax.imshow(np.sqrt(values), vmin=0, vmax=most**0.5, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        dark = value > most / 3
        ax.text(
            column,
            row,
            f"{value:.0f}",
            ha="center",
            va="center",
            color="white" if dark else "black",
        )
    ax.set(
        xticks=range(len(table.columns)),
        yticks=range(len(table)),
        xlabel=xlabel,
        ylabel=ylabel,
        title=label,
    )
    ax.set_xticklabels(map(str, table.columns))
    ax.set_yticklabels(map(str, table.index))
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return figure
