"""scripts/analysis/stats.py against numbers worked out by hand."""

import numpy as np
import pytest

from scripts.analysis import stats


def test_stats():
    # 5 and 1 discordant pairs: 2 * (C(6,0) + C(6,1)) / 2^6 = 0.21875
    a = [True] * 5 + [False] + [True] * 4
    b = [False] * 5 + [True] + [True] * 4
    m = stats.mcnemar(a, b)
    assert (m["only_a"], m["only_b"], m["n"]) == (5, 1, 10) and m["p_value"] == pytest.approx(0.21875)
    assert stats.mcnemar([True], [True])["p_value"] == 1.0
    assert stats.first_crossing([0, 10, 20], [5.0, 3.0, 1.0], 2.0) == 15.0
    assert stats.first_crossing([0, 10], [5.0, 3.0], 2.0) is None
    assert stats.first_crossing([0, 10], [5.0, 3.0], 6.0) == 0.0
    assert stats.slope([0, 1, 2], [1.0, 3.0, 5.0]) == pytest.approx(2.0)
    x = np.random.default_rng(0).normal(1.0, 2.0, 400)
    boot = stats.bootstrap_mean(x, seed=3)
    half = 1.96 * x.std(ddof=1) / 20  # the normal interval of a mean of 400
    assert boot["low"] == pytest.approx(x.mean() - half, abs=0.04)
    assert boot["high"] == pytest.approx(x.mean() + half, abs=0.04)
    assert boot == stats.bootstrap_mean(x, seed=3)
    assert stats.smooth([1.0, 2.0, 6.0, 4.0], 3) == pytest.approx([1.0, 3.0, 4.0, 4.0])
