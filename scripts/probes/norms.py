"""Norms: does the embedding's scale drift while it is trained? Read from metrics.jsonl, no model is loaded.

    python scripts/probes/norms.py --runs out/demo

Two figures an evaluation: `wte/rms`, the RMS of the embedding's output over the vocabulary, and
`wte/weight_norm`, the mean Euclidean norm of the rows of its trainable matrix (of the table, or of the
projection, which the paper sees stay near 1.0 while a learned table drifts). Drift is given as the ratio of last
to first, and as the slope of the relative change per 1,000 steps over the second half of the run.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from engine.errors import RunError, sentences
from scripts.analysis import figures, stats
from scripts.analysis.report import INK, Table, arm_style, arms_of
from scripts.probes import common

METRICS = {"wte/rms": "RMS of the embedding's output", "wte/weight_norm": "Row norm of the trainable matrix"}
SHOWN = ("first", "last", "ratio", "late_slope_per_1000")


def drift(iters: list[int], values: list[float]) -> dict:
    """first, last, ratio, lowest and highest of one run's series, and its late slope per 1,000 steps (relative)."""
    half = [k for k, i in enumerate(iters) if i >= iters[-1] / 2]
    late = stats.slope([iters[k] for k in half], [values[k] for k in half])
    return {
        "first": values[0],
        "last": values[-1],
        "ratio": values[-1] / values[0] if values[0] else None,
        "lowest": min(values),
        "highest": max(values),
        "late_slope_per_1000": 1000 * late / values[-1] if late is not None and values[-1] else None,
    }


def summarise(found: dict, arms: list[str], baseline: str) -> dict:
    """{(arm, seed): drift} as {arm: {figure: over seeds, "by_seed": drifts}}."""
    over = {k: common.over_seeds({run: d[k] for run, d in found.items()}, arms, baseline) for k in SHOWN}
    by_seed = {arm: {str(s): d for (a, s), d in found.items() if a == arm} for arm in arms}
    return {arm: {k: over[k][arm] for k in SHOWN} | {"by_seed": by_seed[arm]} for arm in arms}


def drift_table(metric: str, summary: dict, baseline: str) -> Table:
    """First and last value of a metric, and how it drifts, an arm a row."""
    rows = []
    for arm, of_arm in summary.items():
        first, last, ratio, slope = (of_arm[k] for k in SHOWN)
        cells = [common.cell(first, 4), common.cell(last, 4), common.cell(ratio, 2)]
        less = common.interval_cell(ratio and ratio["difference"], 2)
        rows.append([arm, *cells, less, common.cell(slope, 1, 100) + "%"])
    header = ["arm", "first", "last", "ratio", f"ratio less {baseline}'s (95%)", "late drift/1,000"]
    return Table(f"{METRICS[metric]} ({metric})", header, rows)


def draw(series: dict, arms: list[str]):
    """Every metric relative to its start, by step."""
    with figures.plt.rc_context(figures.STYLE):
        figure, axes = figures.plt.subplots(1, len(METRICS), figsize=(10.0, 3.7))
        for ax, (metric, heading) in zip(axes, METRICS.items(), strict=True):
            for arm in arms:
                mine = [v for (a, _), v in series[metric].items() if a == arm]
                if mine:
                    iters = sorted(set.intersection(*map(set, mine)))
                    starts = [next(iter(v.values())) for v in mine]
                    y = [[v[i] / start for i in iters] for v, start in zip(mine, starts, strict=True)]
                    figures.band(ax, iters, y, arm, **arm_style(arm, arms))
            ax.axhline(1, color=INK, linewidth=0.8)
            ax.set_title(f"{heading}, of its start")
            ax.set_xlabel("step")
            ax.set_xlim(left=0)
        axes[0].legend()
    return figure


def main(argv=None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    with sentences():
        runs = [r for r in common.finished_runs(args, needs_checkpoint=False) if r.series("wte/rms")]
        if not runs:
            raise RunError(f"no run with wte/rms in its metrics at or below {', '.join(args.runs)}")
        arms = arms_of(runs)
        baseline = common.pick_baseline(arms, args.baseline)
        series = {m: {(r.arm, r.seed): s for r in runs if (s := r.series(m))} for m in METRICS}
        result = {}
        for metric, of_runs in series.items():
            found = {run: drift(list(s), list(s.values())) for run, s in of_runs.items()}
            result[metric] = summarise(found, arms, baseline)
        tables = [drift_table(metric, result[metric], baseline) for metric in METRICS]
        tables[-1].note = (
            "Mean ± SD over seeds. late drift: slope over the second half, in per cent of the last value per 1,000 "
            "steps. The paper: the table's norm drifts, the projection's stays near 1.0."
        )
        common.finish(
            __file__, argv, args, "norms", "Norms of the embedding", 60,
            result, {}, tables, draw(series, arms),
            "Line: mean over seeds; band: lowest to highest seed; relative to the value at step 0.",
            "A table that grows while the body learns is a moving target; the paper holds that the codec is not one.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
