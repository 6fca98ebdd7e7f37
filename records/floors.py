"""What adapters on all modules leave far out [prop-whole-floor]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lorapower import bounds, lowrank
from lorapower.networks import Transformer


class Floor(NamedTuple):
    """The least error of far tokens, of which values and feed-forward layers are two parts."""

    value: float
    values: float
    feed_forward: float


class WholeFloor:
    """Compute the floor of two networks of one kind, for any rank and any directions.

    Both are pre-norm networks without a final norm. First gains are frozen. The part of
    feed-forward layers is 0 unless the networks have neither hidden biases nor second shifts; it
    assumes that adapted networks have none either, and that second gains are frozen too.
    """

    def __init__(self, frozen: Transformer, target: Transformer) -> None:
        self.frozen, self.target = frozen, target
        self.change = _value_map(target) - _value_map(frozen)
        self.spectra: tuple[Tensor, ...] = ()
        unbiased = not any(
            network.parameters[kind].any()
            for network in (frozen, target)
            for kind in {"b_1", "b_3", "s_2"} & {*network.kinds}
        )
        if unbiased and frozen.settings.gated == target.settings.gated:
            spectra = _form_spectra if frozen.settings.gated else _map_spectrum
            self.spectra = spectra(frozen, target)

    def at(
        self, ranks: int | Mapping[str, int], tokens: Float[Tensor, "width samples"] | None = None
    ) -> Floor:
        """Compute the floor with one rank on each matrix, all heads in one as PEFT has them.

        Or at total ranks of some kinds of matrices. Equal tokens before the last one have the
        directions of ``tokens``, by default any.
        """
        D, m = self.frozen.width, self.frozen.dimension
        root = self.frozen.basis() * (D / m) ** 0.5
        if tokens is not None:
            n = bounds.directions(self.frozen, self.target, tokens)
            root = (n - n.mean(-1, keepdim=True)) / n.shape[-1] ** 0.5
        spectrum = lowrank.spectrum(self.change @ root)
        values = float(spectrum[self._total(ranks, "W_V", "W_O") :].square().sum()) / D
        left = 0.0
        if self.frozen.settings.gated and self.spectra:
            outer, inner = self.spectra
            of_units = inner[: self._total(ranks, "W_1", "W_3")].sum()
            missed = float(outer[self._total(ranks, "W_2") :].sum() - 2 * of_units)
            left = max(missed, 0.0) * 2 * D / (m * (m + 2))
        elif self.spectra:
            left = float(self.spectra[0][self._total(ranks, "W_1", "W_2") :].sum()) / m
        return Floor(values + left, values, left)

    def _total(self, ranks: int | Mapping[str, int], *kinds: str) -> int:
        """Sum the ranks of adapters on some kinds of matrices, over all blocks."""
        if isinstance(ranks, Mapping):
            return sum(ranks.get(kind, 0) for kind in kinds)
        numbers = [self.frozen.parameters[kind][0].numel() for kind in kinds]
        width = self.frozen.width
        return self.frozen.depth * sum(min(ranks, width, n // width) for n in numbers)


def _value_map(network: Transformer) -> Float[Tensor, "width width"]:
    """Sum ``W_O W_V diag(g_1)`` over heads and blocks."""
    W_V = network.each_head(network.W_V)
    return torch.einsum("lhoi,lhij,lj->oj", network.W_O, W_V, network.g_1)


def _map_spectrum(frozen: Transformer, target: Transformer) -> tuple[Tensor]:
    """Square the singular values of half the maps' difference, ``W_2 W_1 diag(g_2) V``."""
    maps = [
        torch.einsum("lof,lfi,li->oi", network.W_2, network.W_1, network.g_2) / 2
        for network in (frozen, target)
    ]
    return (lowrank.spectrum((maps[1] - maps[0]) @ frozen.basis()).square(),)


def _form_spectra(frozen: Transformer, target: Transformer) -> tuple[Tensor, Tensor]:
    """Square the singular values of what gated layers' forms differ by, unfolded in two ways.

    It takes minutes for real models.
    """
    V, (D, m) = frozen.basis(), (frozen.width, frozen.dimension)
    forms = V.new_zeros(D, m, m)
    for sign, network in ((0.25, target), (-0.25, frozen)):
        for l in range(network.depth):
            gains = network.g_2[l][:, None] * V
            gate, up = ((W[l] @ gains).mT for W in (network.W_1, network.W_3))
            for i in range(0, m, 32):
                # Forms are symmetric: of rows i to i + 31, what is left of the diagonal is known.
                products = gate[i : i + 32, None, :] * up[None, i:, :]
                products += up[i : i + 32, None, :] * gate[None, i:, :]
                made = network.W_2[l] @ products.flatten(0, 1).mT
                forms[:, i : i + 32, i:] += sign * made.unflatten(-1, (-1, m - i))
    forms.triu_()
    forms += forms.triu(1).mT
    trace = forms.diagonal(dim1=-2, dim2=-1)
    trace -= trace.mean(-1, keepdim=True)
    outer, inner = forms.flatten(1), forms.flatten(0, 1)
    grams = outer @ outer.mT, inner.mT @ inner
    first, second = (torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0) for gram in grams)
    return first, second
