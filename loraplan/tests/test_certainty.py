"""How sure plans are: certificates, price lists and checks, by the code that makes them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import checkpoint_files as files
import numpy as np
import pytest
from checkpoint_files import Patch
from numpy.typing import NDArray
from scipy import stats

from loraplan import Evidence, InputError, Planner, Text, _export, quantile_limit, workflow
from loraplan._limits import (
    DOUBT,
    SIZES,
    allowed,
    are_alike,
    exceed,
    fewest,
    quantile,
    ratio,
)
from loraplan._measuring import Compared, Measurement, TunedOutputs, _parts
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


# Plans of files, with adapters of which only the error is known


class Tokenizer:
    """Makes a token of each character."""

    unk_token_id, pad_token_id = 3, 0

    def __call__(
        self, plain: list[str], *, max_length: int = 99, **_: Any
    ) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * min(len(text), max_length) for text in plain]}


PAIR = files.short(Tokenizer(), "encoder")


class Scaled:
    """As an adapter that loses so many times what each text has."""

    def __init__(self, error: float) -> None:
        self.error, self.parameters = error, round(1000 / error)


class Part(TunedOutputs):
    """As the texts of a part, which lose by their places in the file; all effects are 1."""

    def __init__(self, batches: Any, losses: Losses) -> None:
        super().__init__(batches, cast("Any", None), [])
        self.own = losses[np.concatenate([batch.places for batch in batches])]
        self.effect, self.typical = np.ones(len(self.own)), 1.0

    def squares(self, network: Any, states: Any) -> Losses:
        return np.square(network.error * self.own)

    def compare(self, network: Any, states: Any) -> Compared:
        nothing = np.full(len(self.own), math.nan)
        squares = self.squares(network, states)
        return Compared(squares, nothing, nothing, self.effect, nothing, nothing)


class Drawn:
    """As a `Planner` of a file, divided as it is. ``truth`` is what nine of ten texts lose at most.

    Its adapters go to and past what may be certified; the one just past it is the hardest to tell.
    """

    #: Their errors, in units of the largest that may be certified.
    STEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.001, 1.1, 2.0)

    def __init__(self, sample: Sample, seed: int = 0) -> None:
        given, losses, truth = sample
        self.texts = prepare(PAIR, given, None, tokens=8, seed=seed)
        parts = [*self.texts.fit, *self.texts.select], self.texts.select, self.texts.test
        self.planned, self.select, self.test = (Part(part, losses) for part in parts)
        self.truth = truth
        self.pair, self.seed, self.most = SimpleNamespace(differing={}), seed, 10**9

    def sizes(self, aim: float, *, estimate: bool) -> tuple[list[int], int]:
        made = (Scaled(aim / self.truth * step) for step in self.STEPS)
        self.tried = {each.parameters: each for each in made}
        return [*self.tried], 0

    def at(self, parameters: int) -> Scaled:
        return self.tried[parameters]

    def report(self, *_: Any) -> None:
        """Tell nobody."""

    def run(self, *adapters: Any) -> list[Measurement]:
        return [Measurement(getattr(self, part), cast("Any", each), []) for each, part in adapters]

    def parameters(self, rank: int) -> int:
        return 4 * rank

    def offer(self, number: int) -> Scaled:
        return Scaled(1 / number)

    def neighbours_alike(self, squares: Losses) -> bool:
        return Planner.neighbours_alike(cast("Any", self), squares)


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
    draw, found = np.random.default_rng(certifying), 0
    for seed in range(plans):
        try:
            planner: Any = Drawn(sample(draw, certifying), seed)
        except InputError:  # too few different texts to plan with
            continue
        assert len(planner.test.own) == certifying
        made: Any = workflow._search(planner, 0.1, False)
        found += made.reached and made.adapter.error * planner.truth > 0.1
    return found / plans


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
    """The share of plans that warn of neighbours that lose alike."""
    draw = np.random.default_rng(plans)
    planners = (Drawn(sample(draw, 116), seed) for seed in range(plans))
    alike = (p.neighbours_alike(p.planned.squares(Scaled(1.0), [])) for p in planners)
    return sum(alike) / plans


@pytest.mark.parametrize("plans", PLANS)
def test_lines_of_documents_are_noticed(plans: int) -> None:
    assert warned(independent, plans) <= bound(plans, 0.01)
    assert warned(documents(5, grouped=False), plans) >= 0.9
    assert warned(documents(20, grouped=True), 1) == 0


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    planner: Any = Drawn(independent(np.random.default_rng(4), 116))
    measure, tried = planner.test.squares, list[Scaled]()

    def squares(network: Any, states: Any) -> Losses:
        tried.append(network)
        return cast("Losses", measure(network, states) * [1.0, math.nan][len({*tried}) == 3])

    planner.test.squares = squares
    found: Any = workflow._search(planner, 0.1, False).adapter
    assert found is [*dict.fromkeys(tried)][1]


def test_estimates_end_at_the_same_size_from_wherever_they_begin() -> None:
    planner: Any = Drawn(independent(np.random.default_rng(7), 116))
    sizes, _ = planner.sizes(0.1, estimate=True)
    for begin in range(len(sizes)):
        planner.sizes = lambda *_, at=begin, **__: (sizes, at)
        found: Any = workflow._search(planner, 0.1, True)
        # Only the smallest of all adapters loses more.
        assert found.adapter is planner.at(sizes[-2])
        assert found.measured.error <= 0.1 == found.aim
        assert found.reached
        assert math.isnan(found.certified)
        assert not workflow._search(planner, 0.01, True).reached


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
def test_all_prices_of_a_list_hold_at_once(certifying: int, plans: int, monkeypatch: Patch) -> None:
    """Losses of adapters are independent, which is the hardest case."""
    draw, wrong = np.random.default_rng(certifying), 0
    planner: Any = Drawn(independent(draw, certifying))
    planner.test.squares = lambda *_: draw.lognormal(0, 2 * SPREAD, certifying)
    monkeypatch.setattr(workflow, "_prepare", lambda *_, **__: planner)
    monkeypatch.setattr(_export, "estimate", lambda *_: (0, 0))
    for _ in range(plans):
        table = workflow.prices("base", "tuned", [])
        wrong += bool((table.certified < QUANTILE).any())
    assert len(table) == 7
    assert table.attrs["texts"] == certifying
    assert wrong / plans <= bound(plans)


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
