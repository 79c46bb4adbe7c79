"""scripts/probes/norms.py: drift by hand."""

import numpy as np
import pytest

from scripts.probes import norms


def test_norms_drift():
    d = norms.drift({0: 0.5, 500: 1.0, 1000: 2.0})
    assert (d["first"], d["last"], d["ratio"]) == (0.5, 2.0, 4.0)
    assert d["late_slope_per_1000"] == pytest.approx(1.0)  # +1 over 500 steps, of 2: 100% per 1,000


def test_a_table_that_begins_at_zero_has_no_ratio_and_no_line():
    assert norms.drift({0: 0.0, 1: 1.0})["ratio"] is None
    series = {metric: {"bpe_tied": {1: {0: 0.0, 1: 1.0}}} for metric in norms.METRICS}
    figure = norms.draw(series)
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).all()
