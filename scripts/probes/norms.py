"""Norms: does the embedding's scale drift while it is trained? Read from metrics.jsonl, no model is loaded.

    python scripts/probes/norms.py --runs out/demo

Two figures an evaluation: `wte/rms`, the RMS of the embedding's output over the vocabulary, and
`wte/weight_norm`, the mean Euclidean norm of the rows of its trainable matrix (of the table, or of the
projection, which the paper sees stay near 1.0 while a learned table drifts). Drift is given as the ratio of last
to first, and as the slope of the relative change per 1,000 steps over the second half of the run.
"""

import math
from itertools import product

if not __package__:
    import by_path  # noqa: F401

from engine.errors import RunError
from scripts.analysis import figures, stats
from scripts.analysis.report import INK, Table, arm_style
from scripts.probes import common

METRICS = {"wte/rms": "RMS of the embedding's output", "wte/weight_norm": "Row norm of the trainable matrix"}
SHOWN = ("first", "last", "ratio", "late_slope_per_1000")
NOTE = (
    "Mean ± SD over seeds. late drift: slope over the second half, in per cent of the last value per 1,000 "
    "steps. The paper: the table's norm drifts, the projection's stays near 1.0."
)


def drift(series: dict[int, float]) -> dict:
    """first, last and ratio of one run's {iter: value}, and its late slope per 1,000 steps (relative)."""
    values, late = list(series.values()), [i for i in series if i >= max(series) / 2]
    slope = stats.slope(late, [series[i] for i in late])
    return {
        "first": values[0],
        "last": values[-1],
        "ratio": values[-1] / values[0] if values[0] else None,
        "late_slope_per_1000": 1000 * slope / values[-1] if slope is not None and values[-1] else None,
    }


def summarise(found: dict, baseline: str) -> dict:
    """{arm: {seed: drift}} as {arm: {figure: over seeds, "by_seed": drifts}}."""
    over = {k: common.over_seeds(common.each(found, lambda d, k=k: d[k]), baseline) for k in SHOWN}
    return {arm: {k: over[k][arm] for k in SHOWN} | {"by_seed": mine} for arm, mine in found.items()}


def drift_table(metric: str, summary: dict, baseline: str) -> Table:
    rows = []
    for arm, of_arm in summary.items():
        first, last, ratio, slope = (of_arm[k] for k in SHOWN)
        less = common.interval_cell(ratio and ratio["difference"], 2)
        cells = common.cell(first, 4), common.cell(last, 4), common.cell(ratio, 2), less
        rows.append([arm, *cells, common.cell(slope, 1, 100) + "%"])
    header = ["arm", "first", "last", "ratio", f"ratio less {baseline}'s (95%)", "late drift/1,000"]
    return Table(f"{METRICS[metric]} ({metric})", header, rows)


def draw(series: dict):
    figure, axes = figures.plt.subplots(1, len(METRICS), figsize=(10.0, 3.7))
    for ax, (metric, heading) in zip(axes, METRICS.items(), strict=True):
        for arm, mine in series[metric].items():
            if mine:
                iters = sorted(set.intersection(*map(set, mine.values())))
                y = [[v[i] / (v[min(v)] or math.nan) for i in iters] for v in mine.values()]
                figures.band(ax, iters, y, arm, **arm_style(arm, series[metric]))
        ax.axhline(1, color=INK, linewidth=0.8)
        ax.set_title(f"{heading}, of its start")
        ax.set_xlabel("step")
        ax.set_xlim(left=0)
    axes[0].legend()
    return figure


def probe(args) -> common.Finding:
    finished = common.finished_runs(args.runs, args.allow_unfinished, needs_checkpoint=False)
    runs = [r for r in finished if r.series("wte/rms")]
    if not runs:
        raise RunError(f"no run with wte/rms in its metrics at or below {', '.join(args.runs)}")
    baseline = common.pick_baseline([r.arm for r in runs], args.baseline)
    series = {metric: {r.arm: {} for r in runs} for metric in METRICS}
    for metric, r in product(METRICS, runs):
        if found := r.series(metric):
            series[metric][r.arm][r.seed] = found
    result = {metric: summarise(common.each(x, drift), baseline) for metric, x in series.items()}
    tables = [drift_table(metric, x, baseline) for metric, x in result.items()]
    tables[-1].note = NOTE
    return common.Finding(
        "norms", "Norms of the embedding", 60, result, {}, tables, draw(series),
        common.BANDS[:-1] + "; relative to the value at step 0.",
        "A table that grows while the body learns is a moving target; the paper holds that the codec is not one.",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, needs_models=False)


if __name__ == "__main__":
    main()
