"""How sure promises are, by the code that makes them."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import checkpoint_files as files
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, stats

from loraplan import (
    InputError,
    Promise,
    Text,
    binomial_limit,
    drop_limit,
    mean_limit,
    quantile_limit,
    repeated_limit,
)
from loraplan._limits import DOUBT, allowed, are_alike, fewest, quantile, ratio, search
from loraplan._measuring import Measured, TunedOutputs
from loraplan._texts import count_alike, drawn_order, prepare, prepare_all

Losses = NDArray[np.float64]
#: Texts of a file, what each loses, and what nine of ten such texts lose at most.
Sample = tuple[list[Text], Losses, float]
# Lognormal losses of texts: their spread, and the loss that nine of ten do not exceed.
SPREAD = 0.65
QUANTILE = math.exp(SPREAD * stats.norm.ppf(0.9))
# Lines that make so many texts certify.
LINES = {61: 122, 116: 240, 251: 502}


@pytest.mark.parametrize(("texts", "place"), [(61, 59), (116, 110), (120, 114), (251, 234)])
def test_certificates_are_order_statistics(texts: int, place: int) -> None:
    losses = np.arange(1, texts + 1, dtype=np.float64)
    np.random.default_rng(texts).shuffle(losses)
    assert quantile_limit(losses) == place
    first, before = stats.binom.sf([place - 1, place - 2], texts, 0.9)
    assert first <= DOUBT < before


def test_few_texts_certify_nothing_and_nothing_is_lost_of_nothing() -> None:
    assert quantile_limit(np.zeros(28)) == math.inf
    assert quantile_limit(np.zeros(29)) == 0
    assert not quantile_limit(np.full(61, np.nan)) <= 1
    assert quantile(np.arange(20.0)[::-1]) == 17
    assert (ratio(np.zeros(2), np.zeros(2)), ratio(np.ones(2), np.zeros(2))) == (0, math.inf)
    reference = reference_of(np.array([0.0, 1, 0, 1]))
    assert reference.own(np.array([0.0, 0, 1, 4])).tolist() == [0, 0, math.inf, 2]


def test_one_more_text_would_be_worth_it() -> None:
    """Of each number that may exceed, the least number of texts (Wilks)."""
    least = [next(n for n in range(300) if stats.binom.cdf(j, n, 0.1) <= 0.05) for j in range(18)]
    assert least[2:4] + least[-1:] == [61, 76, 251]
    assert all(fewest(n) == max(m for m in least if m <= n) for n in range(29, 257))
    assert [allowed(n) for n in least] == [*range(18)]
    # If a twentieth exceed, the texts that were dropped would only have cost certificates.
    chances = [stats.binom.cdf(allowed(n), n, 0.05) for n in (60, 61, 120, 116, 256, 251)]
    assert np.round(chances, 2).tolist() == [0.19, 0.41, 0.61, 0.64, 0.91, 0.92]


# Plans of files, by what each text loses


class Tokenizer:
    """Makes a token of each character."""

    unk_token_id, pad_token_id = 3, 0

    def __call__(
        self, plain: list[str], *, max_length: int = 99, **_: Any
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * min(len(text), max_length) for text in plain]}


def reference_of(effect: Losses) -> TunedOutputs:
    """The tuned network's outputs on texts with this effect."""
    reference = TunedOutputs([], cast("Any", None), [])
    reference.effect = effect
    return reference


PAIR = files.short(Tokenizer(), "encoder")
# Adapters go to and past what may be certified; the one just past it is the hardest to tell. They
# lose so many times what each text has, in units of the largest that may be certified.
STEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.001, 1.1, 2.0)


def divide(sample: Sample) -> tuple[Losses, Losses]:
    """Losses of texts to plan with, in the order of their file, and of those that certify."""
    given, losses, _ = sample
    texts = prepare(PAIR, given, None, tokens=8)
    parts = [*texts.fit, *texts.select], texts.test
    planned, test = (np.concatenate([batch.places for batch in part]) for part in parts)
    return losses[np.sort(planned)], losses[test]


def is_kept(losses: Losses) -> bool:
    """Whether nine of ten texts are certified to lose at most 1."""
    return Promise("error", 1.0).holds(measured(own_effect=quantile_limit(losses)))


def measured(**limits: float) -> Measured:
    return Measured(0, 1, 0, 1, **limits)  # type: ignore[arg-type]


#: Words of texts are never the same in two files, nor is the half that each is in.
serial = itertools.count()


def independent(draw: np.random.Generator, certifying: int) -> Sample:
    """Texts that are drawn one by one."""
    losses = draw.lognormal(0, SPREAD, LINES[certifying])
    return [Text(str(next(serial))) for _ in losses], losses, QUANTILE


def documents(lines: int, *, grouped: bool) -> Any:
    """Lines of documents, of so many each on average; of long documents they lose more."""

    def sample(draw: np.random.Generator, certifying: int) -> Sample:
        number = LINES[certifying] if grouped else math.ceil(LINES[certifying] / lines)
        means = draw.standard_normal(number)
        sizes = np.full(number, lines)
        if grouped:
            sizes = 1 + draw.binomial(2 * lines - 2, stats.norm.cdf(means))
        of = np.repeat(np.arange(number), sizes)
        normal = math.sqrt(0.8) * means[of] + math.sqrt(0.2) * draw.standard_normal(len(of))
        texts = [Text(str(next(serial)), None, str(d) if grouped else None) for d in of]
        if not grouped:
            texts, normal = texts[: LINES[certifying]], normal[: LINES[certifying]]
        return texts, np.exp(SPREAD * normal), QUANTILE

    return sample


def traffic(*, deduplicated: bool = False) -> Any:
    """Texts of which a fifth are one of 20 prompts, two of them hard: a little over a tenth."""
    shares = np.append(np.full(18, 0.4995 / 18), [0.25025] * 2)

    def sample(draw: np.random.Generator, certifying: int) -> Sample:
        # Enough that half of them have 61 different ones.
        number = max(LINES[certifying], 150) * (3 if deduplicated else 1)
        prompts = draw.choice(20, number, p=shares)
        which = np.where(draw.random(number) < 0.2, prompts, 20 + np.arange(number))
        if deduplicated:
            which = np.unique(which)
            which = draw.permutation(which)[: number // 3]
        losses = np.append(np.linspace(0.2, 0.9, 18), [1.0, 1.0])
        losses = np.append(losses, draw.uniform(0.2, 0.9, number))[which]
        start = next(serial)
        return [Text(f"{start} {k}") for k in which], losses, 1.0

    return sample


def false_certificates(sample: Any, certifying: int, plans: int) -> float:
    """The share of plans whose adapter loses more than it is certified to on a tenth of texts."""
    draw, wrong = np.random.default_rng(certifying), 0
    for _ in range(plans):
        drawn = sample(draw, certifying)
        try:
            _, losses = divide(drawn)
        except InputError:  # too few different texts to plan with
            continue
        assert len(losses) == certifying
        kept = [is_kept(step / drawn[2] * losses) for step in STEPS]
        taken = search(kept.__getitem__, len(STEPS))
        wrong += kept[taken] and STEPS[taken] > 1
    return wrong / plans


DRAWS = {
    "independent": independent,
    "groups of 20": documents(20, grouped=True),
    "repeated": traffic(),
}
# What the certificate does not speak of, and what it would be without groups or repetitions.
WRONG = {
    "12 documents, no groups": documents(20, grouped=False),
    "without repetitions": traffic(deduplicated=True),
}


def bound(plans: int, share: float = 0.05) -> float:
    """A share and three standard errors, as many cases are tried."""
    return share + 3 * math.sqrt(share * (1 - share) / plans)


nightly = pytest.mark.nightly
#: Texts that certify, and plans.
SIZES_OF_RUNS = [(61, 60), *(pytest.param(n, 1000, marks=nightly) for n in LINES)]
PLANS = [60, pytest.param(1000, marks=nightly)]


@pytest.mark.parametrize(("certifying", "plans"), SIZES_OF_RUNS)
@pytest.mark.parametrize("draws", DRAWS)
def test_certificates_are_wrong_once_in_twenty(draws: str, certifying: int, plans: int) -> None:
    assert false_certificates(DRAWS[draws], certifying, plans) <= bound(plans)


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize("draws", WRONG)
def test_other_draws_get_more_wrong_certificates(draws: str, plans: int) -> None:
    """So that the test above can fail: what is drawn and what is certified differ."""
    assert false_certificates(WRONG[draws], 116, plans) > bound(plans)


def warned(sample: Any, plans: int) -> float:
    """The share of files in which neighbours lose alike."""
    draw = np.random.default_rng(plans)
    planned = (divide(sample(draw, 116))[0] for _ in range(plans))
    return sum(are_alike(np.square(losses)) for losses in planned) / plans


@pytest.mark.parametrize("plans", PLANS)
def test_lines_of_documents_are_noticed(plans: int) -> None:
    assert warned(independent, plans) <= bound(plans, 0.01)
    assert warned(documents(5, grouped=False), plans) >= 0.9


def test_searches_end_at_the_first_that_misses() -> None:
    def take(*kept: bool) -> int:
        return search(kept.__getitem__, len(kept))

    assert (take(True, True, False, True), take(False, True), take(True, True)) == (1, 0, 1)


@pytest.mark.parametrize(
    ("promise", "limits"),
    [
        (Promise("same", 0.9), ({"same": 0.9}, {"same": 0.89}, {"same": math.nan})),
        (Promise("error", 0.1), ({"own_effect": 0.1}, {"own_effect": 0.11}, {})),
        (Promise("same_answers", 0.7), ({"same_answers": 0.7}, {"same_answers": 0.69}, {})),
    ],
)
def test_promises_hold_by_their_limits(promise: Promise, limits: Any) -> None:
    assert [promise.holds(measured(**each)) for each in limits] == [True, False, False]
    assert f"{round(100 * promise.share)}%" in promise.words
    with pytest.raises(InputError, match="must be given alone"):
        Promise.asked(same=0.9, error=0.1)


@pytest.mark.parametrize(("certifying", "plans"), SIZES_OF_RUNS)
def test_limits_of_own_effects_hold_for_any_effects(certifying: int, plans: int) -> None:
    draw, wrong = np.random.default_rng(certifying), 0
    for _ in range(plans):
        effect, parts = draw.pareto(0.5, certifying), draw.lognormal(0, SPREAD, certifying)
        own = reference_of(effect).own(np.square(parts) * effect)
        wrong += quantile_limit(own) < QUANTILE
    assert wrong / plans <= bound(plans)


# Checks of texts that chose nothing


def flips(number: int, failed: int) -> Losses:
    return np.repeat([1.0, 0.0], [failed, number - failed])


@pytest.mark.parametrize(("texts", "failed"), [(240, 5), (116, 6), (61, 0), (40, 30), (7, 7)])
def test_limits_of_shares_are_exact(texts: int, failed: int) -> None:
    once, often = binomial_limit(failed, texts), repeated_limit(flips(texts, failed))
    test = stats.binomtest(failed, texts, alternative="less")
    assert once == pytest.approx(test.proportion_ci(1 - DOUBT).high)
    assert once <= often <= 1
    if often < 1:
        # The evidence against it is that of all smaller shares, each as likely.
        def ratio_at(share: float) -> float:
            logs = stats.binom.logpmf(failed, texts, [share, often])
            return float(np.exp(logs[0] - logs[1]) / often)

        evidence = integrate.quad(ratio_at, 0, often, points=[failed / texts])[0]
        assert evidence == pytest.approx(1 / DOUBT, rel=1e-3)


def test_checks_cost_what_is_printed_of_them() -> None:
    limits = {
        (240, 5): (0.0433, 0.0575),
        (116, 6): (0.0995, 0.1296),
        (1000, 50): (0.0629, 0.0732),
    }
    for (texts, failed), wanted in limits.items():
        found = binomial_limit(failed, texts), repeated_limit(flips(texts, failed))
        assert found == pytest.approx(wanted, abs=1e-4)
    few = np.zeros(42)
    assert (quantile_limit(few, repeated=True), repeated_limit(few[:0])) == (math.inf, 1)
    assert binomial_limit(0, 0) == 1
    assert quantile_limit(np.zeros(43), repeated=True) == 0
    assert not mean_limit(np.array([0.5, math.nan])) < 1


# Losses in [0, 1] by the share that is wrong, at .001 above what is stated.
SHARES: dict[str, Any] = {
    "decisions": lambda draw, n, mean: (draw.random(n) < mean).astype(float),
    "tokens": lambda draw, n, mean: draw.binomial(20, draw.beta(mean * 8, (1 - mean) * 8, n)) / 20,
    "few that lose all": lambda draw, n, mean: np.where(draw.random(n) < mean / 0.9, 0.9, 0.0),
    "about the same": lambda draw, n, mean: draw.beta(mean * 200, (1 - mean) * 200, n),
}


@pytest.mark.parametrize("certifying", LINES)
@pytest.mark.parametrize("kind", SHARES)
def test_limits_of_means_are_wrong_once_in_twenty(kind: str, certifying: int) -> None:
    draw, plans = np.random.default_rng(certifying), 1000
    for mean in (0.051, 0.101):
        samples = [SHARES[kind](draw, certifying, mean) for _ in range(plans)]
        limits = [mean_limit(x) for x in samples]
        assert np.mean(np.array(limits) < mean) <= bound(plans)
        # And they are no idle ones.
        assert np.median(limits) < mean + 1.1 / math.sqrt(certifying)
        if kind == "decisions":
            counted = [binomial_limit(int(x.sum()), certifying) for x in samples]
            assert np.mean(np.array(counted) < mean) <= bound(plans)


def test_scores_of_two_models_fall_by_no_more() -> None:
    """However the file is sorted."""
    draw, wrong, plans = np.random.default_rng(4), 0, 300
    for _ in range(plans):
        tuned = (draw.random(240) < 0.8).astype(float)
        standin = np.where(draw.random(240) < 0.1, draw.random(240) < 0.5, tuned)
        # A tenth is drawn anew: of .8 it is .3 less.
        worst = np.argsort(standin - tuned)
        drop, again = drop_limit(tuned, standin), drop_limit(tuned[worst], standin[worst])
        assert again == pytest.approx(drop)
        assert drop < 0.17
        wrong += drop < 0.03
    assert wrong / plans <= bound(plans)
    assert drop_limit(np.ones(240), np.ones(240)) < 0.04
    assert drop_limit(np.zeros(240), np.ones(240)) < -0.9
    assert (mean_limit(np.zeros(0)), repeated_limit(np.zeros(0))) == (1, 1)


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize("kind", SHARES)
def test_limits_hold_however_often_one_looks(kind: str, plans: int) -> None:
    draw, wrong = np.random.default_rng(5), 0
    looks = np.geomspace(20, 5000, 10).astype(int)
    for _ in range(plans):
        losses = SHARES[kind](draw, 5000, 0.101)
        wrong += any(repeated_limit(losses[:n]) < 0.101 for n in looks)
    assert wrong / plans <= bound(plans)


@pytest.mark.parametrize("plans", PLANS)
def test_limits_of_quantiles_hold_however_often_one_looks(plans: int) -> None:
    draw, wrong = np.random.default_rng(6), 0
    for _ in range(plans):
        losses = draw.lognormal(0, SPREAD, 600)
        wrong += any(
            quantile_limit(losses[:n], repeated=True) < QUANTILE for n in range(50, 601, 50)
        )
    assert wrong / plans <= bound(plans)


def test_whoever_takes_the_best_of_many_looks_needs_the_other_limit() -> None:
    """So that the tests above can fail."""
    draw, wrong = np.random.default_rng(7), 0
    for _ in range(60):
        losses = SHARES["decisions"](draw, 3000, 0.101)
        looks = np.geomspace(20, 3000, 60).astype(int)
        wrong += any(binomial_limit(int(losses[:n].sum()), n) < 0.101 for n in looks)
    assert wrong / 60 > bound(60)


def test_one_large_loss_hides_no_neighbours_that_lose_alike() -> None:
    assert are_alike(np.append(np.arange(49.0), 1e9))


def test_texts_that_are_nearly_the_same_are_counted() -> None:
    text = "the quick brown fox jumps over the lazy dog again"
    others = ["a b", "a b", "c d e", f"{text} today", "quite another text about a brown fox"]
    assert count_alike([text, *others]) == 2
    assert count_alike([]) == count_alike(["one"]) == 0


def test_neither_lengths_nor_the_file_say_when_texts_are_counted() -> None:
    """The order is that of digests, also where the file is another one of the same texts."""
    given = [Text("long" * (i % 3) + str(i)) for i in range(96)]
    batches, *_ = prepare_all(PAIR, given, 8)
    places = np.concatenate([batch.places for batch in batches])[drawn_order(batches)]
    assert sorted(places) == [*range(96)]
    for order in (places, np.array([len(given[i].text) for i in places])):
        assert abs(stats.spearmanr(order, range(96)).statistic) < 0.25
    again, *_ = prepare_all(PAIR, given[::-1], 8)
    backwards = np.concatenate([batch.places for batch in again])[drawn_order(again)]
    assert np.array_equal(95 - backwards, places)
