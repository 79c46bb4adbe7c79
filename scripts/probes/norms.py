"""Norms: does the embedding's scale drift while it is trained? Read from metrics.jsonl, no model is loaded.

    python scripts/probes/norms.py --runs out/demo

Two figures an evaluation: `wte/rms`, the RMS of the embedding's output over the vocabulary, and
`wte/weight_norm`, the mean Euclidean norm of the rows of its trainable matrix (of the table, or of the
projection, which the paper sees stay near 1.0 while a learned table drifts). Drift is given as the ratio of last
to first, and as the slope of the relative change per 1,000 steps over the second half of the run.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from scripts import compare
from scripts.analysis import report, stats
from scripts.probes import common

METRICS = {"wte/rms": "RMS of the embedding's output", "wte/weight_norm": "Row norm of the trainable matrix"}


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


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="norms.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        runs = [compare.load_folder(p) for p in compare.find_run_folders(args.runs)]
        for r in runs if not args.allow_unfinished else ():
            if r.state != "finished":
                common.progress(f"left out: {r.name} ({r.state}); --allow-unfinished takes it in")
        runs = [r for r in runs if r.state == "finished" or args.allow_unfinished]
        runs = [r for r in runs if any(isinstance(v.get("wte/rms"), (int, float)) for v in r.val)]
        if not runs:
            raise common.ProbeError(f"no run with wte/rms in its metrics at or below {', '.join(args.runs)}")
        runs.sort(key=lambda r: (*report.arm_sort_key(r.arm), r.seed))
        arms = compare.arms_of(runs)
        baseline = common.pick_baseline(arms, args.baseline)
        series, result, tables = {}, {}, []
        for metric, heading in METRICS.items():
            found = {}
            for run in runs:
                rows = [r for r in run.val if isinstance(r.get(metric), (int, float))]
                if rows:
                    series[metric, run.arm, run.seed] = [r["iter"] for r in rows], [r[metric] for r in rows]
                    found[run.arm, run.seed] = drift(*series[metric, run.arm, run.seed])
            keys = ("first", "last", "ratio", "late_slope_per_1000")
            summary = {
                k: common.over_seeds({run: d[k] for run, d in found.items()}, arms, baseline) for k in keys
            }
            result[metric] = {
                arm: {k: summary[k][arm] for k in keys}
                | {"by_seed": {str(s): d for (a, s), d in found.items() if a == arm}}
                for arm in arms
            }
            rows = [
                [
                    arm,
                    common.cell(summary["first"][arm], 4),
                    common.cell(summary["last"][arm], 4),
                    common.cell(summary["ratio"][arm], 2),
                    common.difference_cell(summary["ratio"][arm], 2),
                    common.cell(summary["late_slope_per_1000"][arm], 1, 100) + "%",
                ]
                for arm in arms
            ]
            tables.append(
                {
                    "title": f"{heading} ({metric})",
                    "header": [
                        "arm",
                        "first",
                        "last",
                        "ratio",
                        f"ratio less {baseline}'s (95%)",
                        "late drift/1,000",
                    ],
                    "rows": rows,
                    "left": 1,
                    "note": "",
                }
            )
        tables[-1]["note"] = (
            "Mean ± SD over seeds. late drift: slope over the second half, in per cent of the last value per 1,000 "
            "steps. The paper: the table's norm drifts, the projection's stays near 1.0."
        )
        result["provenance"] = common.provenance(argv)
        title, order = "Norms of the embedding", 60
        common.finish(
            common.out_folder(args, ""),
            "norms",
            title,
            order,
            result,
            tables,
            draw(series, arms),
            "Line: mean over seeds; band: lowest to highest seed; relative to the value at step 0.",
            [
                "A table that grows while the body learns is a moving target; the paper holds that the codec is not one."
            ],
        )
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


def draw(series: dict, arms):
    with report.plt.rc_context(report.FIGURE_STYLE):
        figure, axes = report.plt.subplots(1, len(METRICS), figsize=(10.0, 3.7))
        for ax, (metric, heading) in zip(axes, METRICS.items(), strict=True):
            for arm in arms:
                mine = [v for (m, a, _), v in series.items() if m == metric and a == arm]
                if not mine:
                    continue
                iters = sorted(set.intersection(*(set(i) for i, _ in mine)))
                y = np.array([[dict(zip(i, v, strict=True))[k] / v[0] for k in iters] for i, v in mine])
                style = report.arm_style(arm, arms)
                ax.plot(iters, y.mean(0), label=arm, linewidth=1.8, **style)
                if len(mine) > 1:
                    ax.fill_between(iters, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
            ax.axhline(1, color=report.INK, linewidth=0.8)
            ax.set_title(f"{heading}, of its start")
            ax.set_xlabel("step")
            ax.set_xlim(left=0)
        axes[0].legend()
    return figure


if __name__ == "__main__":
    main()
