"""The SVG charts: their geometry by hand, gaps, escaping."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracile.report.figures import (
    NARROW,
    WIDE,
    Bar,
    Dot,
    LayerBars,
    bar_chart,
    figure,
    layer_chart,
    line_chart,
    scatter,
    stacked_bar,
    thin,
    ticks,
)


def widths(svg, style):
    return [float(w) for w in re.findall(rf'width="([\d.]+)"[^>]*class="{style}"', svg)]


def test_bars_are_as_long_as_their_values():
    bars = [Bar("a", 10, "10"), Bar("b", 5, "5"), Bar("c", 2.5, "2.5")]
    ten, five, quarter = widths(bar_chart("t", {"": bars}, width=WIDE, unit="ms"), "after")
    assert (five, quarter) == (pytest.approx(ten / 2, abs=0.1), pytest.approx(ten / 4, abs=0.1))


def test_a_whisker_covers_its_interval():
    svg = bar_chart("t", {"": [Bar("a", 10, "10", (5, 10))]}, width=WIDE, unit="ms")
    bar = float(re.search(r'<rect x="([\d.]+)"', svg)[1]), widths(svg, "after")[0]
    low, high = re.search(
        r'<line x1="([\d.]+)"[^>]*x2="([\d.]+)"[^>]*class="whisker"', svg
    ).groups()
    assert float(low) == pytest.approx(bar[0] + bar[1] / 2, abs=0.1)
    assert float(high) == pytest.approx(bar[0] + bar[1], abs=0.1)


def test_stacked_parts_fill_the_bar():
    svg = stacked_bar("t", [("p-main", 0.25), ("p-plain", 0.75)])
    assert widths(svg, "p-main") == [250]
    assert widths(svg, "p-plain") == [750]
    assert 'x="250"' in svg


def test_a_line_goes_up_when_values_do():
    svg = line_chart("t", {"v": [(0, 0.0), (1, 1.0)]}, width=WIDE, x="epoch", y="%")
    (x0, y0), (x1, y1) = (p.split(",") for p in re.search(r'points="([^"]+)"', svg)[1].split())
    assert float(x1) > float(x0)
    assert float(y1) < float(y0)


def test_a_value_that_is_not_finite_breaks_the_line():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, float("nan")), (4, 2.0), (5, 1.0)]
    svg = line_chart("t", {"v": points}, width=WIDE, x="epoch", y="")
    assert svg.count("<polyline") == 2
    assert "nan" not in svg


def test_a_lonely_value_is_a_dot():
    assert "<circle" in line_chart("t", {"v": [(3, 1.0)]}, width=WIDE, x="epoch", y="")


def test_nothing_finite_is_said():
    svg = line_chart("t", {"v": [(0, None)]}, width=NARROW, x="epoch", y="")
    assert "no finite value" in svg


def test_layers_keep_their_order_and_show_what_changed():
    layers = [LayerBars("conv1", 16, 9, 8, 0.25), LayerBars("fc", 10, 10, None, None)]
    svg = layer_chart("t", layers, width=NARROW)
    assert svg.index("conv1") < svg.index(">fc<")
    assert "16 → 9" in svg
    assert "25 %" in svg
    before, after = widths(svg, "before"), widths(svg, "after")
    assert after[0] == pytest.approx(before[0] * 9 / 16, abs=0.1)


def test_scatter_crosses_are_two_standard_deviations_long():
    svg = scatter("t", [Dot("1", 2, 90, 0.5, 1), Dot("2", 4, 80)], width=WIDE, x="x", y="y")
    centres = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    whisker = re.search(r'<line x1="([\d.]+)"[^>]*x2="([\d.]+)"[^>]*class="whisker"', svg)
    unit = (centres[1] - centres[0]) / 2  # the dots are 2 apart
    assert float(whisker[2]) - float(whisker[1]) == pytest.approx(unit, abs=0.2)


def test_text_in_a_chart_is_escaped():
    evil = "<script>'\"&"
    svgs = [
        line_chart(evil, {evil: [(0, 1.0), (1, 2.0)]}, width=WIDE, x=evil, y=evil),
        bar_chart(evil, {evil: [Bar(evil, 1, evil)]}, width=WIDE, unit=evil),
        layer_chart(evil, [LayerBars(evil, 1, 1, 8, 0.0)], width=NARROW),
        scatter(evil, [Dot(evil, 1, 2)], width=WIDE, x=evil, y=evil),
        stacked_bar(evil, [("p-main", 1.0)]),
    ]
    for svg in svgs:
        assert "<script" not in svg
        assert "&lt;script&gt;" in svg


def test_a_figure_is_drawn_for_desk_and_phone():
    both = figure("t", lambda w: stacked_bar(str(w), [("p-main", 1)]))
    assert str(WIDE) in both.wide
    assert str(NARROW) in both.narrow


def test_charts_have_a_name_for_screen_readers():
    svg = stacked_bar("int8 60 %, float 40 %", [("p-main", 0.6), ("p-plain", 0.4)])
    assert 'role="img"' in svg
    assert 'aria-label="int8 60 %, float 40 %"' in svg
    assert "<title>int8 60 %, float 40 %</title>" in svg


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_evenly_spread(low, span):
    found = ticks(low, low + span)
    assert all(low - span * 1e-6 <= t <= low + span * (1 + 1e-6) for t in found)
    assert len(found) <= 7
    gaps = [b - a for a, b in pairwise(found)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-3, abs=1e-9) for gap in gaps)


@given(st.lists(st.floats(-10, 10) | st.none(), min_size=1, max_size=3000))
def test_thinning_keeps_the_extremes(values):
    points = [(float(i), v) for i, v in enumerate(values)]
    kept = thin(points, most=100)
    finite = [v for v in values if v is not None]
    assert len(kept) <= 160
    assert set(kept) <= set(points)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    if finite:
        left = [v for _, v in kept if v is not None]
        assert (min(left), max(left)) == (min(finite), max(finite))
