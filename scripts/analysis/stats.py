"""Small statistics that the comparison and the probes share: intervals over seeds, paired tests, crossings.

Everything here is paired where it can be: the arms share their data, their order and their initial bodies,
so the difference of two runs of one seed carries far less noise than the difference of two means.
"""

import math

import numpy as np
from scipy import stats


def interval(values) -> dict:
    """Mean, sample SD and 95% t interval of a handful of values (for differences: the paired t interval).

    Returns {"n", "mean", "sd", "low", "high"}; with one value sd, low and high are None.
    """
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        raise ValueError("an interval needs at least one value")
    mean = float(x.mean())
    if x.size == 1:
        return {"n": 1, "mean": mean, "sd": None, "low": None, "high": None}
    sd = float(x.std(ddof=1))
    half = float(stats.t.ppf(0.975, x.size - 1)) * sd / math.sqrt(x.size)
    return {"n": int(x.size), "mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def mcnemar(kept_a, kept_b) -> dict:
    """Exact McNemar test: do two arms keep their top-1 on different numbers of the same pairs?

    kept_a, kept_b: equally long booleans. Only the discordant pairs speak: only_a (a kept, b lost) and
    only_b; under the null each falls on either side with probability 1/2 (two-sided exact binomial).
    """
    a, b = np.asarray(kept_a, dtype=bool), np.asarray(kept_b, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"McNemar's test needs the same pairs on both sides, got {a.size} and {b.size}")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    p = float(stats.binomtest(only_a, n, 0.5).pvalue) if n else 1.0
    return {"n": int(a.size), "only_a": only_a, "only_b": only_b, "p_value": p}


def p_cell(tests: dict[str, dict]) -> str:
    """The p values of tests of one hypothesis, one a seed, the first five; below 1e-4 only that they are."""
    values = [test["p_value"] for test in tests.values()][:5]
    return " ".join("<1e-4" if p < 1e-4 else f"{p:.2g}" for p in values)


def bootstrap_mean(differences, seed: int = 0) -> dict:
    """95% percentile bootstrap of the mean of paired differences: {"n", "mean", "low", "high"}.

    Resamples the pairs, not the arms: each pair keeps both its values. Seeded: a rerun prints the same.
    """
    d = np.asarray(list(differences), dtype=np.float64)
    if d.size == 0:
        raise ValueError("a bootstrap needs at least one difference")
    mean = float(d.mean())
    if d.size == 1 or np.ptp(d) == 0:  # no spread to resample
        edge = mean if d.size > 1 else None
        return {"n": int(d.size), "mean": mean, "low": edge, "high": edge}
    how = {"method": "percentile", "batch": max(1, 2_000_000 // d.size)}
    ci = stats.bootstrap((d,), np.mean, random_state=np.random.default_rng(seed), **how).confidence_interval
    return {"n": int(d.size), "mean": mean, "low": float(ci.low), "high": float(ci.high)}


def first_crossing(steps, losses, target: float) -> float | None:
    """The step at which a falling curve first comes down to `target` (linear between points), or None."""
    for k, loss in enumerate(losses):
        if loss <= target:
            if k == 0:
                return float(steps[0])
            s0, s1, l0, l1 = steps[k - 1], steps[k], losses[k - 1], loss
            return float(s0 + (s1 - s0) * (l0 - target) / (l0 - l1))
    return None


def slope(x, y) -> float | None:
    """Least-squares slope of y over x; None below two points."""
    if len(x) < 2 or np.ptp(x) == 0:
        return None
    return float(stats.linregress(x, y).slope)


def smooth(values, window: int):
    """Centred running mean that narrows at both ends; the same length as its input."""
    x = np.asarray(values, dtype=np.float64)
    if window <= 1 or x.size < 3:
        return x
    total = np.concatenate([[0.0], np.cumsum(x)])
    k = np.arange(x.size)
    half = np.minimum(window // 2, np.minimum(k, x.size - 1 - k))
    return (total[k + half + 1] - total[k - half]) / (2 * half + 1)


# ---- power: the smallest true difference that so many pairs would show (two-sided at 5%) in 80 of 100 repetitions


def detectable_mean(sd: float, n: int) -> float:
    """Of a paired t test on n differences with that standard deviation."""
    return float(stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)) * sd / math.sqrt(n)


def detectable_rate(discordant: float, n: int) -> float | None:
    """Of McNemar's test on n pairs, of which that share differs between the arms (Connor, Biometrics 1987, 43:207).

    The difference d of the two rates solves d sqrt(n) = z sqrt(p) + z' sqrt(p - d^2). None where no
    difference would do: it cannot exceed the share of discordant pairs.
    """
    z, z_power = float(stats.norm.ppf(0.975)), float(stats.norm.ppf(0.8))
    a = z * math.sqrt(discordant)
    root = a**2 * n - (n + z_power**2) * (a**2 - z_power**2 * discordant)
    if n < 2 or root < 0:
        return None
    d = (a * math.sqrt(n) + math.sqrt(root)) / (n + z_power**2)
    return d if 0 < d <= discordant else None
