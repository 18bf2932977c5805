import doctest

import numpy as np
import pytest

from polyclinic.evaluation import labels
from polyclinic.report import model_card, svg, words
from polyclinic.report.plots import COLOURS, OTHER, grouped, palette
from polyclinic.report.svg import Axis, element, span


@pytest.mark.parametrize("module", [svg, words, model_card, labels])
def test_examples_in_docstrings_hold(module):
    vars(module)["np"] = np
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("scale", [1e-7, 0.013, 1.0, 47.0, 3e9])
def test_ticks_are_round_few_and_within(scale):
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = sorted(rng.normal(size=2) * scale)
        ticks = Axis(low, high, 0, 1).ticks()
        assert 2 <= len(ticks) <= 7
        assert min(ticks) >= low - 1e-9 * scale and max(ticks) <= high + 1e-9 * scale
        digits = {f"{abs(tick / (ticks[1] - ticks[0])):.6f}".split(".")[1] for tick in ticks}
        assert digits == {"000000"}


def test_log_ticks_are_decades_and_zero_stands_at_the_end():
    low, high = span([0.0, 3.0, 150.0], log=True)
    axis = Axis(max(low, 0.1), high, 100, 0, log=True)
    assert axis.ticks() == pytest.approx([0.1, 1, 10, 100, 1000])
    assert axis.at(0.0) == 100 and axis.at(1000) == pytest.approx(0)


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1.0], [1e-12, 2e-12]])
def test_equal_values_still_have_a_span(values):
    low, high = span(values)
    assert low < min(values) <= max(values) < high


def test_elements_escape_attributes_and_text():
    got = element("text", "<a&b>", aria_label='"><x', class_="c", x=1.25)
    assert got == '<text aria-label="&#34;&gt;&lt;x" class="c" x="1.2">&lt;a&amp;b&gt;</text>'


def test_maps_colour_the_largest_groups_and_grey_the_rest():
    names = [f"g{k}" for k in range(10) for _ in range(20 - k)] + [""] * 30
    groups, colours = grouped(names, palette(filter(None, names)))
    assert set(groups) == {*(f"g{k}" for k in range(7)), "other", "unlabelled"}
    assert colours["other"] == colours["unlabelled"] == OTHER
    assert sorted(colours[f"g{k}"] for k in range(7)) == sorted(COLOURS)
    few = palette(["b", "a"])
    assert grouped(["a", "b", "a"], few)[1] == few
