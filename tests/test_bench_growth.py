"""Growth is a power law's exponent, in the table and in the figure alike."""

import math

import pytest

from scripts.bench.growth import growth, slope


def test_slope_of_known_power_laws():
    xs = [1, 10, 100, 1000]
    assert slope(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert slope(xs, [7, None, 7, 7]) == pytest.approx(0)
    assert math.isnan(slope([5], [1]))


def test_table_and_figure_state_the_slopes(tmp_path):
    xs = [256, 1024, 4096]
    series = {"ours": [1.0, 4.0, 16.0], "theirs": [1.0, 16.0, None]}
    table, link = growth("Time by tokens", "tokens", "ms", xs, series, tmp_path / "time")
    assert table.rows == [
        ["256", "1", "1"],
        ["1,024", "4", "16"],
        ["4,096", "16", "-"],
        ["log-log slope", "1.00", "2.00"],
    ]
    assert link == "![Time by tokens](time.svg)"
    drawn = (tmp_path / "time.svg").read_text()
    assert "ours: slope 1.00" in drawn and "theirs: slope 2.00" in drawn and (tmp_path / "time.png").exists()
