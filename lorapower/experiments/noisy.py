"""Noisy samples: what each rank risks, and what ways to choose a rank, or to shrink, cost.

Linear networks are seen in the rows of their inputs (`bounds.samples`): risks of least squares need
no training there. ReLU networks are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .. import lowrank, randomness
from ..bounds import samples
from ..bounds.samples import Design
from ..lowrank import SVD
from ..networks.layers import FNN, LinearNetwork
from ..training.engine import train
from ..training.tuning import Fixed, Tuning

Spectrum = Literal["random networks", "halving", "slow decay", "few directions", "at the limit"]
SPECTRA: tuple[Spectrum, ...] = get_args(Spectrum)


class Seen(NamedTuple):
    """What draws of the noise show of a change, and the risks of least squares of each rank.

    ``change`` is ``E X / n^{1/2}`` in the rows of ``X``, ``spectrum`` its singular values.
    ``observed`` decomposes the change with noise, and ``noise`` is the norm of the noise alone.
    """

    change: Float[Tensor, "out span"]
    spectrum: Float[Tensor, " k"]
    design: Design
    observed: SVD
    risks: Float[Tensor, "draws ranks"]
    noise: Float[Tensor, " draws"]

    def risk(self, kept: Float[Tensor, "draws k"]) -> Float[Tensor, " draws"]:
        """The risk where so much is kept of each observed singular value."""
        return _distance(self.observed, kept, self.change)


def draw_change(kind: Spectrum, width: int, seed: int) -> Float[Tensor, "width width"]:
    """``E``: between random networks of two layers and one, or with given singular values.

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


def see(change: Float[Tensor, "out span"], design: Design, *, draws: int, seed: int) -> Seen:
    """Draw the noise of a design on ``E X / n^{1/2}``, given in the rows of ``X``."""
    generator = randomness.generator(seed, f"noise {design.noise}", design.samples)
    xi = design.variance**0.5 * randomness.normal(generator, draws, *change.shape)
    observed = lowrank.svd(change + xi)
    k = min(change.shape)
    leading = torch.ones(k + 1, k, dtype=change.dtype).tril(-1)
    risks = [_distance(observed, observed.S * part, change) for part in leading]
    spectrum = lowrank.spectrum(change)
    return Seen(change, spectrum, design, observed, torch.stack(risks, -1), lowrank.norm(xi))


def observe(kind: Spectrum, width: int, count: int, noise: float, *, draws: int, seed: int) -> Seen:
    """Draw ``count`` inputs once, and ``draws`` times their noise.

    ``"at the limit"`` has a single direction, 5 % above where counting parameters lets it pay.
    """
    X = randomness.normal(randomness.generator(seed, "inputs", count), width, count)
    rows = lowrank.svd(X).V
    F = draw_change(kind, width, seed) @ X @ rows / count**0.5
    design = Design(count, width, rows.shape[1], noise)
    if kind == "at the limit":
        F *= (1.05 * (width + design.span) * design.variance) ** 0.5 / lowrank.norm(F)
    return see(F, design, draws=draws, seed=seed)


def keep_direction(
    strength: float, design: Design, *, draws: int, seed: int = 0
) -> tuple[float, float]:
    """Mean risks over ``f²`` where a single direction ``f²`` is kept, and where it is shrunk.

    It is left out at a risk of ``f²``. Source: [prop-edge].
    """
    F = torch.zeros(design.outputs, design.span, dtype=torch.float64)
    F[0, 0] = strength**0.5
    seen = see(F, design, draws=draws, seed=seed)
    shrunk = seen.risk(samples.shrink_values(seen.observed.S, design)[0])
    return float(seen.risks[:, 1].mean()) / strength, float(shrunk.mean()) / strength


def judge(
    kind: Spectrum, width: int, count: int, noise: float, *, seed: int, draws: int = 100
) -> dict[str, float]:
    """The best rank of a setting, and mean risks of choices over the best rank's mean risk.

    ``counted`` and ``edge`` know the spectrum: the least `simple_risk`, and the number of
    directions above `edge`. ``sure`` and ``shrunk`` see each draw only, the first with the noise
    estimated from the part that no linear map explains. ``full`` is full rank.
    """
    seen = observe(kind, width, count, noise, draws=draws, seed=seed)
    f, design = seen.spectrum, seen.design
    mean = seen.risks.mean(0)
    best = int(mean.argmin())
    generator = randomness.generator(seed, "rest", count)
    free = design.outputs * (count - design.span)
    guesses = noise * randomness.normal(generator, draws, free).square().mean(1).sqrt()
    chosen = [
        int(samples.sure(values, replace(design, noise=guess)).argmin())
        for values, guess in zip(seen.observed.S, guesses.tolist(), strict=True)
    ]
    risks = {
        "counted": mean[int(samples.simple_risk(f, design).argmin())],
        "edge": mean[int((f.square() > samples.edge(design)).sum())],
        "sure": seen.risks[torch.arange(draws), chosen].mean(),
        "shrunk": seen.risk(samples.shrink_values(seen.observed.S, design)[0]).mean(),
        "full": mean[-1],
    }
    return {"best": best} | {name: float(risk / mean[best]) for name, risk in risks.items()}


def train_relu(
    width: int,
    count: int,
    ranks: Sequence[int],
    *,
    noise: float = 1.0,
    steps: int = 3000,
    seed: int,
) -> list[tuple[int, float, float]]:
    """A ReLU layer whose change has singular values ``2^-d``, trained on noisy samples to the end.

    For each rank: the rank, the mean squared error on new inputs summed over outputs, and
    ``σ²(R(2D − R) + D)/n + τ_R²/2``, that of least squares where each ReLU passes half the inputs.
    """
    frozen = FNN.random(1, width, seed=seed)
    change = draw_change("halving", width, seed)
    target = frozen.with_parameters([frozen.weights[0] + change], None)
    generator = randomness.generator(seed, "noisy", count)
    x, new, xi = (randomness.normal(generator, width, size) for size in (count, 5000, count))
    pair = x, target(x) + noise * xi
    tunings = [Tuning(R, learning_rate=1e-2, schedule="cosine") for R in ranks]
    runs = train(frozen, tunings, Fixed(pair, pair), steps=steps, every=10, seed=seed)
    errors = (runs.network.to(torch.float64)(new) - target(new)).square().sum(-2).mean(-1)
    missed = samples.expected_risk(lowrank.spectrum(change), Design(width, width, width, 0.0)) / 2
    costs = [noise**2 * (R * (2 * width - R) + width) / count for R in ranks]
    return [
        (R, float(error), float(cost + missed[R]))
        for R, error, cost in zip(ranks, errors, costs, strict=True)
    ]


def _distance(parts: SVD, kept: Tensor, change: Tensor) -> Tensor:
    shrunk = (parts.U * kept[..., None, :]) @ parts.V.mT
    return (shrunk - change).square().sum((-2, -1))
