"""The recorded comparison of a language model's adapters, and how often limits hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lorapower import checkpoints

KEYS = ["tuning", "method", "asked"]


def test_errors_are_those_of_the_texts() -> None:
    adapters, texts = checkpoints.read_record()
    sums = texts.groupby(KEYS)[["squares", "effect", "equal", "divergence", "decisions"]].sum()
    sums = sums.loc[[tuple(key) for key in adapters[KEYS].to_numpy()]]
    found: dict[str, Any] = {
        "error": np.sqrt(sums.squares / sums.effect),
        "agreement": sums.equal / sums.decisions,
        "kl": sums.divergence / sums.decisions,
    }
    for name, values in found.items():
        np.testing.assert_allclose(adapters[name].to_numpy(), values.to_numpy(), rtol=1e-9)
    assert (adapters.error_upper > adapters.error).all()


def test_all_adapters_are_measured_on_the_same_texts() -> None:
    adapters, texts = checkpoints.read_record()
    assert not adapters.duplicated(KEYS).any()
    for _, rows in texts.groupby("tuning"):
        assert len(rows) == len(rows[KEYS].drop_duplicates()) * rows.text.nunique()
    for _, rows in texts.groupby(["tuning", "text"]):
        # Logits of float32 are summed over tokens and words.
        assert rows.effect.std() <= 1e-4 * rows.effect.mean()
        assert rows.decisions.nunique() == 1


def test_what_is_carried_includes_the_factors() -> None:
    adapters, _ = checkpoints.read_record()
    own = adapters[adapters.method != "mergekit"]
    assert (own.carried >= own.parameters).all()
    assert (adapters.bytes >= 4 * adapters.carried).all()
    assert adapters[["lorapower", "torch", "peft"]].notna().all(axis=None)


def test_limits_of_errors_that_texts_share_always_hold() -> None:
    effect = np.arange(1.0, 80.0)
    assert checkpoints.measure_coverage(0.25 * effect, effect, texts=40) == (1, 1)


@pytest.mark.parametrize("sigma", [0.5, 1.2])
def test_limits_hold_as_often_as_they_say(sigma: float) -> None:
    """At least in 90 of 100 draws, where 95 are meant: five more by chance are rare."""
    draw = np.random.default_rng(0)
    effect = draw.lognormal(0, 0.5, 300)
    squares = effect * draw.lognormal(0, sigma, 300)
    _, everywhere = checkpoints.measure_coverage(squares, effect, texts=120, draws=100)
    assert everywhere >= 0.9


def test_limits_fail_where_one_text_holds_the_error() -> None:
    """Two of three draws of 120 texts of 300 miss it."""
    effect = np.ones(300)
    squares = np.random.default_rng(0).uniform(0.5, 1.5, 300)
    squares[7] = 3000
    _, everywhere = checkpoints.measure_coverage(squares, effect, texts=120, draws=100)
    assert everywhere < 0.5
