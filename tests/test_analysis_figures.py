"""scripts/analysis/figures.py: bands, limits and names in a figure."""

import xml.etree.ElementTree

import numpy as np
import pytest

from scripts.analysis import figures


@pytest.fixture
def ax():
    with figures.plt.rc_context(figures.STYLE):
        figure, ax = figures.plt.subplots()
        yield ax
        figures.plt.close(figure)


def test_a_band_is_mean_lowest_and_highest(ax):
    figures.band(ax, [0, 1], [[1.0, 2.0], [3.0, 6.0]], "arm", color="#123456")
    assert ax.lines[0].get_ydata().tolist() == [2.0, 4.0]
    corners = ax.collections[0].get_paths()[0].vertices
    assert {tuple(c) for c in corners} >= {(0, 1), (0, 3), (1, 2), (1, 6)}
    figures.band(ax, [0, 1], [[1.0, 2.0]], "alone", color="#123456")
    assert len(ax.collections) == 1  # one seed has no band


def test_the_axis_leaves_out_the_first_plunge(ax):
    curves = [(np.array([0, 1, 2]), np.array([[90.0, 2.0, 1.0]]))]
    figures.focus(ax, curves, begin=1, pad=0.1)
    assert ax.get_ylim() == pytest.approx((0.9, 2.1))
    figures.focus(ax, curves, begin=1, pad=0.1, also=[0.0])
    assert ax.get_ylim() == pytest.approx((-0.2, 2.2))


@pytest.mark.parametrize("name", ["_hidden", "$x^{2$", "\x1b[31mred", "a<b&c", "\\frac"])
def test_any_name_is_drawn_and_stays_in_the_legend(ax, name, tmp_path):
    figures.band(ax, [0, 1], [[1.0, 2.0]], name, color="#123456")
    legend = ax.legend()
    (shown,) = [text.get_text() for text in legend.get_texts()]
    assert shown.strip().startswith(name[:1] if name[0] != "\x1b" else "\\x1b")
    figures.save(ax.figure, tmp_path / "f")
    xml.etree.ElementTree.parse(tmp_path / "f.svg")  # whole, whatever the name held
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
