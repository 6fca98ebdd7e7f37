"""How sure plans are: certificates, price lists and checks, by the code that makes them."""

from __future__ import annotations

import math
from typing import Any, cast

import checkpoint_files as files
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from loraplan import Evidence, InputError, Text, quantile_limit
from loraplan._limits import (
    DOUBT,
    SIZES,
    allowed,
    are_alike,
    exceed,
    fewest,
    quantile,
    ratio,
    search,
)
from loraplan._measuring import Compared, TunedOutputs, _parts
from loraplan._texts import mix, prepare, prepare_all

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
    for doubt in (DOUBT, DOUBT / SIZES):
        least = int(quantile_limit(losses, doubt))
        first, before = stats.binom.sf([least - 1, least - 2], texts, 0.9)
        assert first <= doubt < before


def test_few_texts_certify_nothing_and_nothing_is_lost_of_nothing() -> None:
    assert quantile_limit(np.zeros(28)) == math.inf
    assert quantile_limit(np.zeros(29)) == 0
    assert not quantile_limit(np.full(61, np.nan)) <= 1
    assert quantile(np.arange(20.0)[::-1]) == 17
    assert (ratio(np.zeros(2), np.zeros(2)), ratio(np.ones(2), np.zeros(2))) == (0, math.inf)
    squares, effects = np.array([0.0, 0, 1, 4]), np.array([0.0, 1, 0, 1])
    assert _parts(squares, effects).tolist() == [0, 0, math.inf, 2]


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


PAIR = files.short(Tokenizer(), "encoder")
# Adapters go to and past what may be certified; the one just past it is the hardest to tell. They
# lose so many times what each text has, in units of the largest that may be certified.
STEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.001, 1.1, 2.0)


def divide(sample: Sample, seed: int = 0) -> tuple[Losses, Losses]:
    """Losses of texts to plan with, in the order of their file, and of those that certify."""
    given, losses, _ = sample
    texts = prepare(PAIR, given, None, tokens=8, seed=seed)
    parts = [*texts.fit, *texts.select], texts.test
    planned, test = (np.concatenate([batch.places for batch in part]) for part in parts)
    return losses[np.sort(planned)], losses[test]


def state(losses: Losses) -> float:
    """What is compared with an aim, of texts with effects of 1."""
    reference = TunedOutputs([], cast("Any", None), [])
    reference.effect, reference.typical = np.ones(len(losses)), 1.0
    return reference.stated(np.square(losses))


def independent(draw: np.random.Generator, certifying: int) -> Sample:
    """Texts that are drawn one by one."""
    losses = draw.lognormal(0, SPREAD, LINES[certifying])
    return [Text(str(i)) for i in range(len(losses))], losses, QUANTILE


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
        texts = [Text(str(i), None, str(d) if grouped else None) for i, d in enumerate(of)]
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
        return [Text(str(k)) for k in which], losses, 1.0

    return sample


def false_certificates(sample: Any, certifying: int, plans: int) -> float:
    """The share of plans whose adapter loses more than it is certified to on a tenth of texts."""
    draw, wrong = np.random.default_rng(certifying), 0
    for seed in range(plans):
        drawn = sample(draw, certifying)
        try:
            _, losses = divide(drawn, seed)
        except InputError:  # too few different texts to plan with
            continue
        assert len(losses) == certifying
        stated = [state(step / drawn[2] * losses) for step in STEPS]
        taken = search(stated.__getitem__, len(STEPS), 0, 1.0)
        wrong += stated[taken] <= 1 < STEPS[taken]
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
    planned = (divide(sample(draw, 116), seed)[0] for seed in range(plans))
    return sum(are_alike(np.square(losses)) for losses in planned) / plans


@pytest.mark.parametrize("plans", PLANS)
def test_lines_of_documents_are_noticed(plans: int) -> None:
    assert warned(independent, plans) <= bound(plans, 0.01)
    assert warned(documents(5, grouped=False), plans) >= 0.9


def test_searches_end_at_the_first_that_misses() -> None:
    def take(*losses: float, start: int = 0, estimate: bool = False) -> int:
        return search(losses.__getitem__, len(losses), start, 0.1, estimate=estimate)

    rising = 0.01, 0.05, 0.1, 0.11, 0.2
    assert take(*rising, 0.01) == 2
    assert (take(0.2, 0.01), take(0.01, 0.02)) == (0, 1)
    # Also with a loss that is no number.
    assert (take(0.05, math.nan, 0.01), take(math.nan), take(math.nan, estimate=True)) == (0, 0, 0)
    # Estimates end at the same size from wherever they begin.
    assert [take(*rising, start=k, estimate=True) for k in range(len(rising))] == [2] * len(rising)
    assert take(0.2, 0.3, start=1, estimate=True) == 0


@pytest.mark.parametrize(("certifying", "plans"), SIZES_OF_RUNS)
def test_limits_of_own_effects_hold_for_any_effects(certifying: int, plans: int) -> None:
    draw, wrong = np.random.default_rng(certifying), 0
    for _ in range(plans):
        reference = TunedOutputs([], cast("Any", None), [])
        reference.effect = draw.pareto(0.5, certifying)
        parts = draw.lognormal(0, SPREAD, certifying)
        ones = np.ones(certifying)
        compared = Compared(np.square(parts) * reference.effect, *[ones] * 5)
        wrong += reference.summarize(compared).own_effect < QUANTILE
    assert wrong / plans <= bound(plans)


@pytest.mark.parametrize(("certifying", "plans"), SIZES_OF_RUNS)
def test_all_prices_of_a_list_hold_at_once(certifying: int, plans: int) -> None:
    """Losses of adapters are independent, which is the hardest case."""
    losses = np.random.default_rng(certifying).lognormal(0, SPREAD, (plans, SIZES, certifying))
    limits = np.apply_along_axis(quantile_limit, 2, losses, DOUBT / SIZES)
    assert (limits < QUANTILE).any(1).mean() <= bound(plans)


# Checks of fresh texts


def test_evidence_is_a_product_of_likelihood_ratios() -> None:
    exceeds = np.random.default_rng(0).random(300) < 0.12
    one, other = Evidence().add(exceeds), Evidence()
    for part in np.split(exceeds, [1, 60, 61]):
        other = other.add(part)
    assert one == pytest.approx(other)
    assert one[:2] == (300, exceeds.sum())
    ratios = np.where(exceeds, 0.05 / 0.1, 0.95 / 0.9), np.where(exceeds, 0.2 / 0.1, 0.8 / 0.9)
    highest = [max(1, ratio.cumprod().max()) for ratio in ratios]
    assert np.exp(one[2:]) == pytest.approx(highest)
    assert Evidence().add(np.zeros(55, bool)).verdict == "undecided"
    assert Evidence().add(np.zeros(56, bool)).verdict == "confirmed"
    assert Evidence().add(np.repeat([False, True], [56, 20])).verdict == "failed"
    assert Evidence().add(np.ones(4, bool)).verdict == "undecided"
    assert Evidence().add(np.ones(5, bool)).verdict == "failed"
    assert [Evidence().add(np.zeros(n, bool)).missing(0.0) for n in (1, 10)] == [55, 46]


def test_one_large_loss_hides_no_neighbours_that_lose_alike() -> None:
    assert are_alike(np.append(np.arange(49.0), 1e9))


@pytest.mark.parametrize("plans", PLANS)
def test_checks_may_go_on_until_they_say_something(plans: int) -> None:
    """Of wrong certificates one in 20 is ever confirmed, and of true ones as many ever fail."""
    draw = np.random.default_rng(3)

    def said(share: float, verdict: str) -> float:
        found = 0
        for _ in range(plans):
            evidence = Evidence()
            for part in np.split(draw.random(1500) < share, np.sort(draw.integers(1500, size=9))):
                evidence = evidence.add(part) if len(part) else evidence
            found += evidence[2 + (verdict == "failed")] >= math.log(20)
        return found / plans

    assert said(0.1001, "confirmed") <= bound(plans)
    assert said(0.1, "failed") <= bound(plans)
    assert said(0.05, "confirmed") > 0.95
    assert said(0.2, "failed") > 0.95


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize(("share", "median", "within"), [(0.03, 84, 0.559), (0.05, 139, 0.520)])
def test_checks_take_so_many_texts(share: float, median: int, within: float, plans: int) -> None:
    """``within`` is how often a certificate is confirmed by then, of all paths of so many texts."""
    draw, needed = np.random.default_rng(4), []
    for _ in range(plans):
        evidence = Evidence()
        while evidence.verdict != "confirmed" and evidence.texts < 1500:
            evidence = evidence.add(draw.random(1) < share)
        needed.append(evidence.texts)
    assert abs(np.mean(np.array(needed) <= median) - within) <= 1.5 / math.sqrt(plans)
    assert Evidence().missing(share) == pytest.approx(np.mean(needed), rel=4 / math.sqrt(plans))


def test_rounding_of_merged_adapters_contradicts_no_limit() -> None:
    for losses, limit, exceeding in ((1.0005, 1, 0), (5e-6, 0, 0), (2e-5, 0, 1), (math.nan, 1, 1)):
        assert exceed(np.array([losses]), limit).sum() == exceeding


@pytest.mark.parametrize("plans", PLANS)
def test_lengths_of_texts_do_not_say_when_they_are_counted(plans: int) -> None:
    """A true limit that just the shortest tenth exceeds fails no more often than any other."""
    failed, draw = 0, np.random.default_rng(3)
    for _ in range(plans):
        short = draw.random(96) < 0.1
        given = [Text("long" * (not each) + str(i)) for i, each in enumerate(short)]
        batches, _ = prepare_all(PAIR, given, tokens=8, seed=0, used=(), certify=False)
        places = np.concatenate([batch.places for batch in batches])
        exceeds = short[places][mix(batches, 0)]
        failed += Evidence().add(exceeds).verdict == "failed"
    assert failed / plans <= bound(plans)
