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


def rejected(test, draw, times: int = 2000) -> float:
    rng = np.random.default_rng(7)
    return np.mean([test(draw(rng)) < 0.05 for _ in range(times)])


@pytest.mark.parametrize(("n", "discordant"), [(400, 0.2), (3000, 0.05)])
def test_power_of_mcnemar_by_simulation(n, discordant):
    """Draw pairs that truly differ by what is called detectable: the exact test finds it 8 times in 10."""
    from scipy.stats import binom

    d = stats.detectable_rate(discordant, n)
    shares = [(discordant + d) / 2, (discordant - d) / 2]
    for size, low, high in ((1.0, 0.75, 0.83), (0.5, 0.15, 0.4)):
        p = [shares[0] - (1 - size) * d / 2, shares[1] + (1 - size) * d / 2, 1 - discordant]

        def p_value(counts):
            a, b, _ = counts
            return min(1.0, 2 * binom.cdf(min(a, b), a + b, 0.5))

        assert low < rejected(p_value, lambda rng, p=p: rng.multinomial(n, p)) < high
    assert stats.detectable_rate(0.0, n) is None  # arms that never differ cannot be told apart
    assert stats.detectable_rate(0.02, 20) is None


def test_power_of_the_paired_t_test_by_simulation():
    from scipy.stats import ttest_1samp

    d = stats.detectable_mean(2.0, 50)
    found = rejected(lambda x: ttest_1samp(x, 0).pvalue, lambda rng: rng.normal(d, 2.0, 50))
    assert 0.77 < found < 0.83
