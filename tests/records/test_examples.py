"""Adapters of an example, measured: on small networks, with what is recomputed here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpoint_files as files
import numpy as np
import pytest

from loraplan import Adapter, Pair, lab
from records import examples, pairs, parts
from records.examples import Example, Lost, Prepared

PROBLEM = Example(seed=3, sentences=61)
Found = tuple[Prepared, dict[tuple[str, float], Lost]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What looks like an example, whose tuning is small, so that derivatives predict it."""
    new = tmp_path_factory.mktemp("example")
    small = files.low_rank(8, size=0.02)
    assert files.pair(new, change=small) == (str(new / "base"), str(new / "tuned"))
    lines = [json.dumps({"text": text, "label": 0}) for text in dict.fromkeys(files.texts(160))]
    (new / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return new


@pytest.fixture(scope="module")
def measured(folder: Path) -> Found:
    settings = [s for s in examples.every(4, [1, 4], sentences=61) if s.problem == PROBLEM]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "example", lambda seed: {3: folder}[seed])
        examples.prepare.cache_clear()
        found = examples.measure(settings)
        example = examples.prepare(PROBLEM)
        examples.prepare.cache_clear()
    return example, {(s.way, s.asked): one for s, one in zip(settings, found, strict=True)}


def test_losses_are_those_of_the_command(measured: Found) -> None:
    example, found = measured
    planner = example.planner
    assert len(found) == len(examples.HALVES) + 2 * len(examples.WAYS) + 2
    for way in examples.WAYS:
        for rank in (1, 4):
            adapter = example.make(way, planner.parameters(rank))
            one = found[way, rank]
            assert adapter.parameters == one.parameters <= planner.parameters(rank)
            assert one.error == pytest.approx(lab.measure(planner, adapter).error, rel=1e-4)
            ranks = zip(example.modules, one.ranks, strict=True)
            assert {name: rank for name, rank in ranks if rank} == adapter.ranks
    for half in ("attention", "mlp"):
        assert found[half, 0].error == pytest.approx(parts.only(planner, half), rel=1e-4)
    base = lab.measure(planner, Adapter({}, {}))
    assert found["none", 0].error == pytest.approx(base.error, rel=1e-4)
    for aim in examples.AIMS:
        adapter = planner.smallest(aim)
        assert planner.error(adapter) <= aim
        assert found["least", aim].parameters == adapter.parameters


def test_a_small_tuning_is_linear_and_its_modules_are_not_unrelated(measured: Found) -> None:
    example, found = measured
    one = found["by module", 4]
    assert one.derivative == pytest.approx(one.chosen, rel=0.05)
    assert 0 < one.apart < math.inf
    # Of all directions nothing is missing.
    everything = example.make("by module", example.planner.most)
    assert example.predict(everything)["derivative"] < 0.01


def test_shares_of_the_norm_are_those_of_all_changes(folder: Path, measured: Found) -> None:
    _, found = measured
    pair = Pair.open(str(folder / "base"), str(folder / "tuned"))
    values = [np.linalg.svd(pair.change(name).numpy(), compute_uv=False) for name in pair.modules]
    squares = [each**2 for each in values]
    for rank in (1, 4):
        share = sum(each[:rank].sum() for each in squares) / sum(each.sum() for each in squares)
        assert found["same rank", rank].kept == pytest.approx(share, rel=1e-5)
