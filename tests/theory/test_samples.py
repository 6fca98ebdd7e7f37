"""Risks of least squares of a given rank, and adapters in few bits with what they bound."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorapower import InputError, lowrank, randomness
from lorapower.adapters import Adapters
from lorapower.bounds import samples
from lorapower.experiments import coded, noisy, sweeps
from lorapower.experiments._codes import (
    CORE_SCALES,
    code_length,
    cores_length,
    quantize,
    quantize_core,
)
from lorapower.experiments.coded import Coded, Cores, Problem, Setting
from lorapower.lowrank import LowRank
from lorapower.networks import FNN, LinearNetwork
from lorapower.regression import reduced_rank

NETWORK: Any = FNN.random(2, 5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return randomness.normal(randomness.generator(seed, "test of samples"), *shape)


# --- Risks ----------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_divergence_is_that_of_the_best_approximation(out: int, span: int, seed: int) -> None:
    """The trace of the derivative of ``M ↦ LR_r(M)``, by differences."""
    M = normal(out, span, seed=seed)
    design = samples.Design(10, out, span, 1.0)
    found = samples.divergence(lowrank.spectrum(M), design)
    h = 1e-6

    def best(matrix: Tensor, rank: int) -> Tensor:
        return lowrank.truncated_svd(matrix, rank).matrix()

    for r in range(min(out, span) + 1):
        total = 0.0
        for i in range(out):
            for j in range(span):
                step = torch.zeros_like(M)
                step[i, j] = h
                difference = best(M + step, r)[i, j] - best(M - step, r)[i, j]
                total += float(difference) / (2 * h)
        assert float(found[r]) == pytest.approx(total, rel=1e-3, abs=1e-3)
    assert float(found[-1]) == pytest.approx(out * span)
    least = torch.arange(len(found)) * (out + span - torch.arange(len(found)))
    assert (found >= least - 1e-9).all()


def draws(
    E: Tensor, x: Tensor, noise: float, count: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular values of observations, risks of all ranks, and norms of projected noise."""
    rows = lowrank.svd(x).V[:, : int(lowrank.rank(x))]
    F = E @ x @ rows / x.shape[1] ** 0.5
    xi = noise / x.shape[1] ** 0.5 * normal(count, *F.shape, seed=seed)
    U, S, V = lowrank.svd(F + xi)
    risks = [
        ((U[..., :r] * S[..., None, :r]) @ V[..., :r].mT - F).square().sum((-2, -1))
        for r in range(min(F.shape) + 1)
    ]
    return S, torch.stack(risks, -1), lowrank.norm(xi)


def test_risks_are_those_of_reduced_rank_regression() -> None:
    """The closed form in the rows of ``X`` is least squares over all matrices of the rank."""
    E, x, rank = normal(5, 6), normal(6, 4, seed=1), 2
    y = E @ x + 0.3 * normal(5, 4, seed=2)
    K = reduced_rank(y, x, rank, intercept=False).update.matrix()
    rows = lowrank.svd(x).V[:, :4]
    best = lowrank.truncated_svd(y @ rows, rank).matrix() @ rows.mT
    torch.testing.assert_close(K @ x, best, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("span", [3, 6])
def test_the_expansion_is_the_mean_risk_for_small_noise(span: int) -> None:
    E = normal(5, 6) * torch.tensor([2.0, 1.0, 0.5, 0.25, 0.1, 0.05])
    x = normal(6, span, seed=1) @ normal(span, 40, seed=2)
    design = samples.Design(40, 5, span, 0.02)
    f = lowrank.spectrum(E @ x)[: min(5, span)] / 40**0.5
    S, risks, _ = draws(E, x, design.noise, 4000)
    predicted = samples.expected_risk(f, design)
    spread = risks.std(0) / len(risks) ** 0.5
    excess = predicted - samples.expected_risk(f, replace(design, noise=0.0))
    assert (
        (risks.mean(0) - predicted).abs() <= 5 * spread + 0.05 * excess + 1e-12 * predicted
    ).all()
    estimates = torch.stack([samples.sure(values, design) for values in S[:1500]])
    spread = (estimates - risks[:1500]).std(0) / 1500**0.5
    assert ((estimates - risks[:1500]).mean(0).abs() <= 5 * spread + 1e-10).all()


@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 60), st.floats(0, 3), st.integers(0, 99)
)
def test_the_oracle_inequality_is_never_violated(
    out: int, into: int, count: int, noise: float, seed: int
) -> None:
    E, x = normal(out, into, seed=seed), normal(into, count, seed=seed + 1)
    span = int(lowrank.rank(x))
    design = samples.Design(count, out, span, noise)
    f = lowrank.spectrum(E @ x)[: min(out, span)] / count**0.5
    _, risks, size = draws(E, x, noise, 50, seed)
    tau = samples.expected_risk(f, replace(design, noise=0.0)).sqrt()
    r = torch.arange(len(tau))
    bound = tau + 2 * (2 * r).sqrt() * size[:, None]
    assert (risks.sqrt() <= bound * (1 + 1e-9) + 1e-9).all()
    spread = risks.std(0) / len(risks) ** 0.5
    assert (risks.mean(0) - 4 * spread <= samples.oracle_bound(f, design) + 1e-9).all()
    assert (risks >= tau.square() * (1 - 1e-9) - 1e-9).all()


def test_simple_risks_are_below_and_equal_for_one_strong_spectrum() -> None:
    design = samples.Design(100, 6, 8, 0.5)
    f = torch.tensor([50.0, 40.0, 0.0, 0.0, 0.0, 0.0])
    simple, full = samples.simple_risk(f, design), samples.expected_risk(f, design)
    assert (simple <= full + 1e-12).all()
    assert float(simple[2]) == pytest.approx(float(full[2]), rel=1e-9)
    assert int(simple.argmin()) == 2


@pytest.mark.parametrize("noise", [None, 0.3])
def test_the_rank_that_samples_pay_for(noise: float | None) -> None:
    """A target at a distance of rank 3 from the frozen network, seen through noise."""
    frozen = LinearNetwork.random(2, 12)
    change = 3 * normal(12, 3) @ normal(12, 3, seed=1).mT / 12
    x = normal(12, 400, seed=2)
    y = (frozen.product() + change) @ x + 0.3 * normal(12, 400, seed=3)
    found = samples.paid_rank(frozen, x, y, noise=noise)
    assert found.rank == 3
    assert found.design.noise == pytest.approx(0.3, rel=0.05)
    few = samples.paid_rank(frozen, x[:, :8], y[:, :8], noise=30.0)
    assert few.rank == 0
    assert few.design.span == 8


def test_without_noise_all_ranks_pay_but_for_rounding() -> None:
    frozen, x = LinearNetwork.random(1, 8), normal(8, 60)
    found = samples.paid_rank(frozen, x, normal(8, 8, seed=1) @ x, noise=0.0)
    assert found.rank == 8
    assert (found.risks.diff() < 0).all()
    change = normal(8, 3, seed=1) @ normal(3, 8, seed=2)
    assert samples.paid_rank(frozen, x, (frozen.product() + change) @ x, noise=0.0).rank == 3


def test_span_and_noise_are_found() -> None:
    single = LinearNetwork.random(1, 8, dtype=torch.float32)
    frozen, x = LinearNetwork.random(1, 8), normal(8, 2) @ normal(2, 60, seed=1)
    # In the coarser of the types of inputs and network.
    for network, inputs in ((frozen, x.float()), (single, x), (frozen, x)):
        assert samples.paid_rank(network, inputs, normal(8, 60, seed=2)).design.span == 2
    x = normal(8, 200)
    y = 1e6 * normal(8, 8, seed=1) @ x + 1e-3 * normal(8, 200, seed=2)
    assert samples.paid_rank(frozen, x, y).design.noise == pytest.approx(1e-3, rel=0.1)


def test_what_leaves_the_rank_open_is_refused() -> None:
    frozen, x = LinearNetwork.random(1, 4), normal(4, 9)
    narrow = LinearNetwork([normal(2, 4), normal(4, 2)])
    for name, network, inputs, outputs in (
        ("noise", frozen, x[:, :4], x[:, :4]),
        ("frozen", narrow, x, x),
        ("inputs", frozen, 0 * x, x),
        ("outputs", frozen, x, x[:, 1:]),
    ):
        with pytest.raises(InputError, match=f"^{name}"):
            samples.paid_rank(network, inputs, outputs)
    with pytest.raises(InputError, match=r"^spectrum"):
        samples.sure(torch.ones(3), samples.Design(9, 2, 3, 1.0))
    for name, given_ in (("error", (1.5, 8, 10)), ("delta", (0.1, 8, 10, 1.0))):
        with pytest.raises(InputError, match=f"^{name}"):
            samples.kl_bound(*given_)


# --- Shrinking ------------------------------------------------------------------------------------


def shrunk_matrix(M: Tensor, limit: float, exponent: float) -> Tensor:
    U, S, V = lowrank.svd(M)
    kept = S * (1 - (limit / S) ** exponent).clamp(min=0)
    return (U * kept[..., None, :]) @ V.mT


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 2),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
    st.integers(0, 99),
)
def test_shrunk_risk_has_the_divergence_of_shrinking(
    out: int, span: int, part: float, exponent: int, equal: bool, seed: int
) -> None:
    """The trace of the derivative, by differences; also where singular values agree."""
    M = normal(out, span, seed=seed)
    if equal:
        U, _, V = lowrank.svd(M)
        M = U @ V.mT
    values = lowrank.spectrum(M)
    limit = part * float(values.mean())
    if (values - limit).abs().min() < 1e-4:
        return
    design = samples.Design(10, out, span, 2.0)
    found = samples.shrunk_risk(values, design, torch.tensor(limit), exponent)
    h, total = 1e-6, 0.0
    for i in range(out):
        for j in range(span):
            step = torch.zeros_like(M)
            step[i, j] = h
            ends = [shrunk_matrix(M + sign * step, limit, exponent)[i, j] for sign in (1, -1)]
            total += float(ends[0] - ends[1]) / (2 * h)
    missed = (shrunk_matrix(M, limit, exponent) - M).square().sum()
    predicted = float(missed) + design.variance * (2 * total - out * span)
    assert float(found) == pytest.approx(predicted, rel=1e-3, abs=1e-3)


def test_shrunk_risk_is_unbiased_at_the_edge() -> None:
    F, design = normal(6, 9), samples.Design(50, 6, 9, 5.0)
    observed = F + design.variance**0.5 * normal(4000, 6, 9, seed=1)
    values = lowrank.spectrum(observed)
    for limit, exponent in ((1.0, 1), (3.0, 2), (3.0, 8)):
        risks = (shrunk_matrix(observed, limit, exponent) - F).square().sum((-2, -1))
        estimates = samples.shrunk_risk(values, design, torch.tensor(limit), exponent)
        difference = estimates - risks
        assert float(difference.mean().abs()) <= 4 * float(difference.std()) / 4000**0.5


def test_shrinking_gives_an_update_of_the_rank_that_it_says() -> None:
    frozen = LinearNetwork.random(2, 12)
    change = 3 * normal(12, 3) @ normal(12, 3, seed=1).mT / 12
    x = normal(12, 400, seed=2)
    y = (frozen.product() + change) @ x + 0.3 * normal(12, 400, seed=3)
    found = samples.shrink(frozen, x, y)
    missing = y - frozen.product() @ x
    least = reduced_rank(missing, x, 12, intercept=False).update.matrix()
    # In the metric of the inputs, it is what least squares finds, shrunk.
    scaled = lowrank.svd(least @ x)
    kept = found.kept / (scaled.S / 400**0.5)[:12]
    assert ((kept >= 0) & (kept < 1 + 1e-12)).all()
    direct = (scaled.U * found.kept) @ scaled.V.mT * 400**0.5
    torch.testing.assert_close(found.update.matrix() @ x, direct)
    assert found.update.rank == int((found.kept > 0).sum()) >= 3

    def risk(K: Tensor) -> float:
        return float(((K - change) @ x).square().sum() / 400)

    fits = [reduced_rank(missing, x, r, intercept=False).update.matrix() for r in range(13)]
    assert risk(found.update.matrix()) <= 1.01 * min(map(risk, fits))
    assert found.risk == pytest.approx(risk(found.update.matrix()), abs=0.02)


def test_shrinking_without_noise_is_least_squares_and_with_much_nothing() -> None:
    frozen, x, change = LinearNetwork.random(1, 8), normal(8, 60), normal(8, 8, seed=1)
    y = (frozen.product() + change) @ x
    found = samples.shrink(frozen, x, y, noise=0.0)
    torch.testing.assert_close(found.update.matrix(), change)
    assert found.risk == pytest.approx(0, abs=1e-9)
    assert samples.shrink(frozen, x, y, noise=1e4).update.rank == 0


@pytest.mark.parametrize(("out", "span"), [(60, 60), (30, 90)])
def test_at_the_edge_a_direction_is_worth_as_much_as_nothing(out: int, span: int) -> None:
    design = samples.Design(1000, out, span, 2.0)

    def prices(strength: float, draws: int) -> tuple[float, float]:
        """Mean risks of keeping a direction of this strength and of shrinking it, over this."""
        F = torch.zeros(out, span, dtype=torch.float64)
        F[0, 0] = strength**0.5
        seen = noisy.Observation.draw(F, design, draws=draws, seed=0)
        shrunk = seen.risk(samples.shrink_values(seen.observed.S, design)[0])
        return float(seen.risks[:, 1].mean()) / strength, float(shrunk.mean()) / strength

    keep, shrunk = prices(samples.edge(design), 150)
    assert keep == pytest.approx(1, abs=0.07)
    assert shrunk < 0.95
    below, _ = prices(0.7 * samples.edge(design), 50)
    above, _ = prices(1.5 * samples.edge(design), 50)
    assert above < 0.8 < 1.2 < below
    square = samples.Design(100, 16, 16, 1.0)
    assert samples.edge(square) == pytest.approx(3 * 16 * square.variance)


# --- Choices of a rank ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", noisy.SPECTRA)
def test_what_draws_show_is_least_squares_of_the_change(kind: noisy.Spectrum) -> None:
    seen = noisy.observe(kind, 6, 30, 0.5, draws=40, seed=1)
    torch.testing.assert_close(lowrank.spectrum(seen.change), seen.spectrum)
    none, full = seen.risks[:, 0], seen.risks[:, -1]
    torch.testing.assert_close(none, none.new_full((40,), float(seen.change.square().sum())))
    mean = 36 * seen.design.variance
    assert float(full.mean()) == pytest.approx(mean, rel=6 * (2 / 36 / 40) ** 0.5)
    bound = samples.expected_risk(seen.spectrum, replace(seen.design, noise=0.0)).sqrt()
    steps = 2 * (2 * torch.arange(7)).sqrt() * seen.noise[:, None]
    assert (seen.risks.sqrt() <= bound + steps + 1e-9).all()


def test_numbers_beyond_half_precision_are_refused() -> None:
    with pytest.raises(InputError, match="part must be of entries up to 65504; got 1e"):
        quantize(1e5 * torch.ones(3, 1), 2)


# --- Bounds by codes ------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0, 5000), st.integers(1, 10**6), st.floats(1e-6, 0.99))
def test_kl_solves_its_equation_and_is_the_sharper(
    error: float, bits: float, count: int, delta: float
) -> None:
    kl, occam = (of(error, bits, count, delta) for of in (samples.kl_bound, samples.occam_bound))
    assert error <= kl <= 1
    assert kl <= occam + 1e-9
    if 1e-6 < error < kl < 1 - 1e-6:
        cost = (bits * math.log(2) - math.log(delta)) / count
        terms = error * math.log(error / kl) + (1 - error) * math.log((1 - error) / (1 - kl))
        assert terms == pytest.approx(cost, rel=1e-4, abs=1e-8)


def test_bounds_hold_as_often_as_they_say() -> None:
    """Random networks of a code of eight words: how often does the best one's bound fail?"""
    draw = np.random.default_rng(0)
    true, count, fails = np.linspace(0.1, 0.45, 8), 40, 0
    for _ in range(2000):
        seen = draw.binomial(count, true) / count
        fails += any(
            samples.kl_bound(s, 3, count, 0.2) < t for s, t in zip(seen, true, strict=True)
        )
    assert fails / 2000 <= 0.2


# --- Codes ----------------------------------------------------------------------------------------


def drawn(network: Any, ranks: tuple[int, ...], seed: int = 0, *, biases: bool = True) -> Adapters:
    each = iter(range(1000))
    updates = tuple(
        LowRank(*(normal(side, R, seed=seed + next(each)) for side in w.shape[-2:]))
        for w, R in zip(network.weights, ranks, strict=True)
    )
    changes = (
        tuple(normal(len(b), seed=seed + next(each)) for b in network.biases) if biases else ()
    )
    return Adapters(updates, changes)


@given(st.integers(0, 3), st.integers(0, 3), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_the_length_of_a_code_is_that_of_its_parts(
    first: int, second: int, bits: int, biases: bool, seed: int
) -> None:
    """A header, and for each column a scale of 16 bits and the number of a level for each entry."""
    adapters = drawn(NETWORK, (first, second), seed, biases=biases)
    parts = [factor for u in adapters.updates for factor in (u.left, u.right)]
    parts += [bias[:, None] for bias in adapters.bias_updates]
    wanted = sum(map(len, map(gamma, (bits, first + 1, second + 1, 1 + biases))))
    for column in (column for part in parts for column in quantize(part, bits).mT):
        assert len(column.unique()) <= 2**bits
        wanted += 16 + bits * len(column)
    assert code_length(adapters, bits) == wanted


def gamma(number: int) -> str:
    """Elias's gamma code: zeros for its length, then its digits."""
    digits = f"{number:b}"
    return "0" * (len(digits) - 1) + digits


def test_more_bits_are_nearer_and_zeros_stay() -> None:
    part = normal(30, 4)
    errors = [float((quantize(part, b) - part).square().mean()) for b in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    assert quantize(torch.zeros(3, 2), 2).abs().max() == 0
    ends = torch.tensor([[-1.0], [1.0]])
    assert torch.equal(quantize(ends, 1), ends)


def rounded_by_trial(part: Tensor, bits: int) -> Tensor:
    """The best of all scales for each column, entry by entry."""
    steps = 2**bits - 1
    columns = []
    for column in part.mT:
        best, least = column, float("inf")
        for clip in np.linspace(0, 1, 41):
            scale = float((torch.tensor(clip).float().double() * column.abs().max()).half())
            levels = scale * torch.arange(-steps, steps + 1, 2, dtype=part.dtype) / steps
            nearest = levels[(column[:, None] - levels).abs().argmin(1)]
            if (error := float((nearest - column).square().sum())) < least:
                best, least = nearest, error
        columns.append(best)
    return torch.stack(columns, 1)


@given(st.integers(1, 4), st.integers(0, 99))
def test_rounding_takes_the_nearest_levels_of_the_best_scale(bits: int, seed: int) -> None:
    part = normal(7, 3, seed=seed)
    torch.testing.assert_close(quantize(part, bits), rounded_by_trial(part, bits))


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_cores_are_rounded_to_few_levels_of_one_scale(rank: int, bits: int, seed: int) -> None:
    core = normal(rank, rank, seed=seed)
    rounded = quantize_core(core, bits)
    levels = CORE_SCALES[:, None] * torch.arange(1, 2**bits, 2) / (2**bits - 1)
    assert len(rounded.abs().unique()) <= 2 ** (bits - 1)
    assert float((rounded.abs().max() - levels).abs().min()) < 1e-12
    assert cores_length([core, core], bits) == sum(map(len, (gamma(bits), gamma(rank + 1)))) + 2 * (
        5 + bits * rank**2
    )


def test_cores_take_the_nearest_scale() -> None:
    core = 0.5 * normal(5, 5).sign()
    torch.testing.assert_close(quantize_core(core, 1), core)
    other = normal(5, 5)
    errors = [float((quantize_core(other, b) - other).square().sum()) for b in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


def test_codes_on_digits() -> None:
    problem = Problem(angle=15.0, steps=30)
    split = problem.split()
    sizes = [len(part[1]) for part in split]
    assert sizes == [1000, 400, 397]
    both = torch.cat([split.training[0], split.pretraining[0]], 1).mT
    assert len(torch.unique(both, dim=0)) >= 1390
    methods = [*sweeps.grid(Coded, ranks=[0, 1]), Coded(ranks=0, biases=False)]
    settings_ = sweeps.grid(Setting, problem=problem, method=methods)
    table = sweeps.run(settings_, coded.measure, progress=False)
    assert (table.kl <= table.occam + 1e-9).all()
    assert (table.kl >= table.training_error).all()
    frozen = problem.frozen()
    found = coded._fit(problem, Coded(ranks=1), frozen, split.training)
    assert table.length[1] == code_length(found, 2)
    for update in found.updates:
        torch.testing.assert_close(update.left, quantize(update.left, 2), rtol=1e-3, atol=1e-6)
    network = found.merge(frozen)
    wrong = (network(split.test[0].double()).argmax(0) != split.test[1]).double().mean()
    assert table.test_error[1] == pytest.approx(float(wrong))
    alone = (frozen(split.test[0].double()).argmax(0) != split.test[1]).double().mean()
    assert table.test_error[2] == pytest.approx(float(alone))
    assert table.length[2] == 3 + 1 + 1 + 1
    # The images that it was pretrained on are others, upright.
    again = problem.split(angle=0.0)
    assert torch.equal(again.training[1], split.training[1])


def test_cores_on_digits() -> None:
    problem = Problem(angle=15.0, steps=30)
    methods = [*sweeps.grid(Cores, ranks=[0, 2]), *sweeps.grid(Cores, ranks=[0, 2], prior=300)]
    settings_ = sweeps.grid(Setting, problem=problem, method=methods)
    frozen_row, cores, prior, both = coded.measure(settings_)
    frozen, split = problem.frozen(), problem.split()
    x, y = split.training[0].double(), split.training[1]
    wrong = float((frozen(x).argmax(0) != y).double().mean())
    assert frozen_row.training_error == pytest.approx(wrong)
    assert frozen_row.length == 2
    assert cores.length == both.length == 1 + 3 + 2 * (5 + 4)
    # The images that trained the prior do not count.
    for row in (prior, both):
        assert row.kl == samples.kl_bound(row.training_error, row.length, 700)
        assert row.training_error * 700 == pytest.approx(round(row.training_error * 700))
    assert prior.test_error < frozen_row.test_error
    known, rest = coded._divide(split.training, 300)
    assert torch.equal(torch.cat([known[1], rest[1]]), split.training[1])
    assert known[0].shape[1] == len(known[1]) == 300
