"""How time or memory grows with size: a table, its log-log slopes and the figure, for every bench."""

from pathlib import Path

import numpy as np

from scripts.analysis import figures
from scripts.analysis.report import SPARE_COLOURS, Table


def slope(xs, ys) -> float:
    """Exponent k of the least-squares power law y ~ x^k: 1 is linear growth. NaN for fewer than two points."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    if len(points) < 2:
        return float("nan")
    return float(np.polyfit(*np.log(points).T, 1)[0])


def growth(title: str, x_label: str, y_label: str, xs: list, series: dict[str, list], base: Path) -> Table:
    """Table of series {name: one value an x, None where there is none}, its last row the slopes; draws `base`.svg and .png.

    xs and values are positive; y_label names the unit. The slope of each series stands in the figure's legend, too.
    """
    plt, slopes = figures.plt, {name: slope(xs, ys) for name, ys in series.items()}
    with plt.rc_context(figures.STYLE):
        figure, ax = plt.subplots(figsize=(5.4, 3.7))
        for (name, ys), colour in zip(series.items(), SPARE_COLOURS, strict=False):
            points = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
            label = figures.label(f"{name}: slope {slopes[name]:.2f}")
            ax.loglog(*zip(*points, strict=True), marker="o", label=label, color=colour)
        exponents = np.log10([y for ys in series.values() for y in ys if y is not None])
        whole = (
            10 ** np.floor(exponents.min()),
            10 ** (np.floor(exponents.max()) + 2),
        )  # the legend stands in the last
        ax.set(title=title, xlabel=x_label, ylabel=y_label, ylim=whole)
        ax.set_xticks(xs, [f"{x:,}" for x in xs])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
        ax.legend()
        figures.save(figure, base)
    rows = [
        [f"{x:,}", *("-" if ys[i] is None else f"{ys[i]:,.4g}" for ys in series.values())]
        for i, x in enumerate(xs)
    ]
    rows.append(["log-log slope", *(f"{k:.2f}" for k in slopes.values())])
    return Table(title, [x_label, *(f"{name} ({y_label})" for name in series)], rows)
