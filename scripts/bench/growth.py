"""How time or memory grows with size: a table, its log-log slopes and the figure, for every bench."""

from pathlib import Path

import numpy as np

from scripts.analysis import figures
from scripts.analysis.report import SPARE_COLOURS, Table


def slope(xs: list, ys: list) -> float:
    """Exponent k of the least-squares power law y ~ x^k: 1 is linear growth. NaN for fewer than two points; None is none."""
    x, y = np.log(np.array([xs, ys], float))
    there = ~np.isnan(y)
    return float(np.polyfit(x[there], y[there], 1)[0]) if there.sum() > 1 else float("nan")


def growth(title: str, x_label: str, y_label: str, xs: list, series: dict[str, list], base: Path) -> list:
    """[table, link to its figure] of series {name: one value an x, None where there is none}; draws `base`.svg and .png.

    xs and values are positive; y_label names the unit. The table's last row is the slopes; they stand in the figure's
    legend, too.
    """
    slopes = {name: slope(xs, ys) for name, ys in series.items()}
    with figures.plt.rc_context(figures.STYLE):
        figure, ax = figures.plt.subplots(figsize=(5.4, 3.7))
        for (name, ys), colour in zip(series.items(), SPARE_COLOURS, strict=False):
            label = figures.label(f"{name}: slope {slopes[name]:.2f}")
            ax.loglog(xs, np.array(ys, float), marker="o", label=label, color=colour)
        values = np.array(list(series.values()), float)
        low, high = np.floor(np.log10([np.nanmin(values), np.nanmax(values)]))
        limits = (10**low, 10 ** (high + 2))  # whole decades, and one more for the legend
        ax.set(title=title, xlabel=x_label, ylabel=y_label, ylim=limits)
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
        ax.legend()
        base.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, base)
    cells = [["-" if y is None else f"{y:,.4g}" for y in ys] for ys in series.values()]
    rows = [[f"{x:,}", *line] for x, line in zip(xs, zip(*cells, strict=True), strict=True)]
    rows.append(["log-log slope", *(f"{k:.2f}" for k in slopes.values())])
    header = [x_label, *(f"{name} ({y_label})" for name in series)]
    return [Table(title, header, rows), f"![{title}]({base.name}.svg)"]
