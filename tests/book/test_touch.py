"""The figure that readers touch: its numbers are the package's, and its controls move it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from browsing import Reader
from playwright.sync_api import Browser, FloatRect, Locator, Page

from lorapower.book import figures

mpl.use("agg")

AT = np.linspace(-1, 1, 81)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Piecewise linear functions that come nearer to a target with the rank, and reach it."""
    random = np.random.default_rng(0)
    target = np.abs(AT) - 0.3 * np.abs(AT - 0.5)
    frozen = np.maximum(0, random.normal(size=(2, 2, 1)) * AT)
    thresholds = np.array([[3, 3], [2, 2]])
    parts = np.clip(np.arange(4) / thresholds[..., None], 0, 1)
    errors = np.where(parts < 1, 1 - parts, 1e-17) * random.uniform(0.5, 1, (2, 2, 4))
    return {
        "ranks": range(4),
        "depths": (1, 2),
        "layers": (1, 2),
        "spectra": {"one": [3.0, 2.0, 1.0], "other": [3.0, 1.0, 0.5]},
        "thresholds": thresholds,
        "errors": errors,
        "bounds": 2 * errors,
        "at": AT,
        "target": target,
        "frozen": frozen,
        "adapted": frozen[:, :, None] + parts[..., None] * (target - frozen)[:, :, None],
        "start": (1, 2, "other"),
    }


@pytest.fixture(scope="module")
def bundle(results: dict[str, Any]) -> dict[str, str]:
    return figures.Touch(**results)._repr_mimebundle_()


@pytest.fixture
def page(browser: Browser, bundle: dict[str, str], tmp_path: Path) -> Iterator[Page]:
    (tmp_path / "page.html").write_text(
        f'<!doctype html><meta charset="utf-8">{bundle["text/html"]}', encoding="utf-8"
    )
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "page.html").as_uri())
    yield page
    page.close()


def embedded(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json">(.*?)</script>', html)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_page_holds_the_results_at_every_setting(
    results: dict[str, Any], bundle: dict[str, str]
) -> None:
    data = embedded(bundle["text/html"])
    for name in ("errors", "bounds"):
        np.testing.assert_allclose(data[name], results[name], rtol=6e-3, atol=1e-300)
    assert data["thresholds"] == results["thresholds"].tolist()
    for name in ("target", "frozen", "adapted"):
        functions = np.asarray(results[name]).reshape(-1, len(AT))
        flat = data[name]
        while isinstance(flat[0], list) and isinstance(flat[0][0], list):
            flat = [one for row in flat for one in row]
        drawn = flat if isinstance(flat[0], list) else [flat]
        for wanted, points in zip(functions, drawn, strict=True):
            line = np.interp(AT, points[::2], points[1::2])
            np.testing.assert_allclose(line, wanted, atol=2e-2 * np.ptp(functions))


def test_script_replaces_the_picture_and_says_the_same(page: Page, bundle: dict[str, str]) -> None:
    assert page.locator(".touch > img").count() == 0
    assert page.locator(".touch-panels > svg").count() == 2
    assert page.locator("[aria-live]").inner_text() == bundle["text/plain"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keys_move_sliders_and_drawing(page: Page, results: dict[str, Any]) -> None:
    state, curve = page.locator("[aria-live]"), page.locator(".touch-panels path.adapted").last
    rank, depth = page.get_by_label("Rank R"), page.get_by_label("Frozen layers L")
    before = curve.get_attribute("d")
    rank.focus()
    page.keyboard.press("End")
    assert rank.get_attribute("aria-valuetext") == "rank 3"
    assert curve.get_attribute("d") != before
    assert state.inner_text().startswith("Rank 3, 2 frozen layers, other spectrum")
    assert "rounding, below 10⁻⁹" in state.inner_text()
    depth.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowLeft")
    error = float(results["errors"][0, 0, 2])
    assert state.inner_text().startswith(
        f"Rank 2, 1 frozen layers, one spectrum: the relative error is {error:.2g}, "
    )


def test_curves_lie_on_one_another_at_the_threshold(page: Page) -> None:
    def drawn(kind: str) -> Any:
        path = page.locator(f".touch-panels > svg > svg path.{kind}").get_attribute("d") or ""
        x, y = np.array([point.split() for point in re.split("[ML]", path)[1:]], dtype=float).T
        return np.interp(np.linspace(x.min(), x.max(), 100), x, y)

    assert np.abs(drawn("adapted") - drawn("target")).max() > 2
    page.get_by_label("Rank R").fill("2")
    np.testing.assert_allclose(drawn("adapted"), drawn("target"), atol=0.5)


@pytest.mark.parametrize("scripts", [True, False])
def test_book_shows_the_figure_with_scripts_and_the_picture_without(
    browser: Browser, book: Path, scripts: bool
) -> None:
    context = browser.new_context(java_script_enabled=scripts)
    page = context.new_page()
    reader = Reader(page, book)
    page.goto((book / "chapters" / "03-partitions.html").as_uri())
    figure = page.locator("figure#fig-partitions-touch")
    assert figure.locator("figcaption").count() == 1
    assert figure.locator("img").count() == (not scripts)
    assert figure.locator("input, select").count() == (3 if scripts else 0)
    if not scripts:
        assert figure.locator("img").is_visible()
        assert "relative error" in (figure.locator("img").get_attribute("alt") or "")
    assert reader.faults == []
    context.close()


def test_long_proofs_open_by_key_and_on_paper(browser: Browser, book: Path) -> None:
    page = browser.new_page()
    page.goto((book / "chapters" / "03-partitions.html").as_uri())
    folded = page.locator("div.proof details")
    assert folded.count() >= 3
    content = folded.first.locator("p").first
    assert not content.is_visible()
    page.emulate_media(media="print")
    assert content.is_visible()
    page.emulate_media(media="screen")
    folded.first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert content.is_visible()
    page.close()


def bounds(element: Locator) -> FloatRect:
    box = element.bounding_box()
    assert box is not None
    return box


def test_a_slider_steps_through_pictures(browser: Browser, tmp_path: Path) -> None:
    tables = {value: pd.DataFrame([[n, 1]]) for n, value in enumerate(("0.1", "0.2", "0.5"))}
    frames = figures.Frames(
        "Error",
        {
            value: figures.counts(table, most=2, xlabel="x", ylabel="y", label=value)
            for value, table in tables.items()
        },
        {value: f"Shows {value}." for value in tables},
        "0.2",
    )
    html = frames._repr_mimebundle_()["text/html"]
    (tmp_path / "page.html").write_text(
        f'<!doctype html><meta charset="utf-8">{html}', encoding="utf-8"
    )
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((tmp_path / "page.html").as_uri())
    slider, said = page.get_by_label("Error"), page.locator("[aria-live]")
    seen = page.locator("img:visible")
    ticks = page.locator(".touch-ticks span")
    assert ticks.all_inner_texts() == [*tables]
    places = [box["x"] + box["width"] / 2 for box in map(bounds, ticks.all())]
    ends = bounds(slider)
    steps = [ends["x"] + 8 + (ends["width"] - 16) * n / 2 for n in range(3)]
    assert places == pytest.approx(steps, abs=2)
    assert (seen.count(), seen.get_attribute("alt"), said.inner_text()) == (1, *["Shows 0.2."] * 2)
    for key, value in (("ArrowRight", "0.5"), ("ArrowRight", "0.5"), ("Home", "0.1")):
        slider.press(key)
        assert slider.get_attribute("aria-valuetext") == value
        assert (seen.count(), seen.get_attribute("alt")) == (1, f"Shows {value}.")
        assert said.inner_text() == f"Shows {value}."
    page.close()
