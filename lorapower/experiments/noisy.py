"""Observe changes of linear networks through noise, and what each rank then risks.

A network is seen in the rows of its inputs (`bounds.samples`), where least squares needs no
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank, randomness
from ..bounds.samples import Design
from ..lowrank import SVD
from ..networks.layers import LinearNetwork

Spectrum = Literal["random networks", "halving", "slow decay", "few directions", "at the limit"]
SPECTRA: tuple[Spectrum, ...] = get_args(Spectrum)


@dataclass(frozen=True, eq=False)
class Observation:
    """Hold what draws of the noise show of a change, and the risks of least squares of each rank.

    ``change`` is ``E X / n^{1/2}`` in the rows of ``X``, ``spectrum`` its singular values.
    ``observed`` decomposes the change with noise, and ``noise`` is the norm of the noise alone.
    """

    change: Float[Tensor, "out span"]
    spectrum: Float[Tensor, " k"]
    design: Design
    observed: SVD
    risks: Float[Tensor, "draws ranks"]
    noise: Float[Tensor, " draws"]

    @classmethod
    def draw(
        cls, change: Float[Tensor, "out span"], design: Design, *, draws: int, seed: int
    ) -> Observation:
        """Draw the noise of a design on ``E X / n^{1/2}``, given in the rows of ``X``."""
        generator = randomness.generator(seed, f"noise {design.noise}", design.samples)
        xi = design.variance**0.5 * randomness.normal(generator, draws, *change.shape)
        observed = lowrank.svd(change + xi)
        k = min(change.shape)
        kept = torch.ones(k + 1, k, dtype=change.dtype).tril(-1)
        risks = torch.stack([_risk(observed, observed.S * part, change) for part in kept], -1)
        return cls(change, lowrank.spectrum(change), design, observed, risks, lowrank.norm(xi))

    def risk(self, values: Float[Tensor, "draws k"]) -> Float[Tensor, " draws"]:
        """Compute the risk of replacing the observed singular values by these."""
        return _risk(self.observed, values, self.change)


def draw_change(kind: Spectrum, width: int, seed: int) -> Float[Tensor, "width width"]:
    """Draw ``E``: between random networks of two layers and one, or with given singular values.

    These are ``2^-d``, ``0.8^d``, or ones for a quarter of the directions or for a single one.
    """
    if kind == "random networks":
        frozen, target = (
            LinearNetwork.random(depth, width, seed=seed, purpose=purpose)
            for depth, purpose in ((2, "frozen"), (1, "target"))
        )
        return target.product() - frozen.product()
    d = torch.arange(width, dtype=torch.float64)
    values = {
        "halving": 0.5**d,
        "slow decay": 0.8**d,
        "few directions": (d < max(1, width // 4)).double(),
        "at the limit": (d < 1).double(),
    }[kind]
    generator = randomness.generator(seed, "spectrum", kind)
    left, right = (torch.linalg.qr(randomness.normal(generator, width, width))[0] for _ in range(2))
    return (left * values) @ right.mT


def observe(
    kind: Spectrum, width: int, count: int, noise: float, *, draws: int, seed: int
) -> Observation:
    """Draw ``count`` inputs once, and ``draws`` times their noise.

    ``"at the limit"`` has a single direction, 5 % above where counting parameters lets it pay.
    """
    X = randomness.normal(randomness.generator(seed, "inputs", count), width, count)
    rows = lowrank.svd(X).V
    F = draw_change(kind, width, seed) @ X @ rows / count**0.5
    design = Design(count, width, rows.shape[1], noise)
    if kind == "at the limit":
        F *= (1.05 * (width + design.span) * design.variance) ** 0.5 / lowrank.norm(F)
    return Observation.draw(F, design, draws=draws, seed=seed)


def _risk(parts: SVD, values: Tensor, change: Tensor) -> Tensor:
    kept = (parts.U * values[..., None, :]) @ parts.V.mT
    return (kept - change).square().sum((-2, -1))
