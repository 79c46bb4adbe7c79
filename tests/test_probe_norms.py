"""scripts/probes/norms.py: drift by hand."""

import pytest

from scripts.probes import norms


def test_norms_drift():
    d = norms.drift({0: 0.5, 500: 1.0, 1000: 2.0})
    assert (d["first"], d["last"], d["ratio"]) == (0.5, 2.0, 4.0)
    assert d["late_slope_per_1000"] == pytest.approx(1.0)  # +1 over 500 steps, of 2: 100% per 1,000
