"""The project's figures: one style, one colour an arm, and one way to draw several seeds."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data.files import write_atomic
from scripts.analysis import stats
from scripts.analysis.numbers import count
from scripts.analysis.report import INK, arm_style, visible
from scripts.analysis.runs import Run, shared_iters

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # real text: sharper, smaller, searchable
    "svg.hashsalt": "kronecker-nanogpt",  # the same figure gives the same file
    "figure.constrained_layout.use": True,
}


def label(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    return " " + visible(name) if name.startswith("_") else visible(name)


def band(ax, x, y_SxT, name: str, alpha: float = 0.18, **style) -> None:
    """The mean over S runs as a line, and lowest to highest as a band where there are several.

    x: T values or names; style: matplotlib's, "color" among them.
    """
    y_SxT = np.asarray(y_SxT, dtype=float)
    ax.plot(x, y_SxT.mean(0), label=label(name), **{"linewidth": 1.8} | style)
    if len(y_SxT) > 1:
        ax.fill_between(x, y_SxT.min(0), y_SxT.max(0), color=style["color"], alpha=alpha, linewidth=0)


def focus(ax, curves: list, begin: float, pad: float, also=()) -> None:
    """Let the y axis span what the curves do from x = begin on: the first plunge would flatten all that differs.

    curves: [(x of T, y of S x T)]; pad: room above and below, as a share; also: values to span in any case.
    """
    late = [y[:, np.asarray(x) >= begin] for x, y in curves]
    values = np.concatenate([np.asarray(also, dtype=float), *(part.ravel() for part in late)])
    if values.size and (values.max() > values.min() or len(also)):
        room = pad * (values.max() - values.min()) or 0.01
        ax.set_ylim(values.min() - room, values.max() + room)


def dot_figure(names: list[str], panels: list[tuple[str, dict]]):
    """A row a name, a panel each (title, {arm: [[values of the runs] a row]}): large points are their means."""
    arms = list(panels[0][1])
    with plt.rc_context(STYLE):
        size = (10.0, (0.2 + 0.07 * len(arms)) * len(names) + 1.5)
        figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True)
        for ax, (title, by_arm) in zip(axes, panels, strict=True):
            for k, (arm, rows) in enumerate(by_arm.items()):
                dots = {"marker": "o", "linestyle": "", "color": arm_style(arm, arms)["color"]}
                y = np.arange(len(names)) + 0.6 / len(arms) * (k - (len(arms) - 1) / 2)
                for values, at in zip(rows, y, strict=True):
                    ax.plot(values, [at] * len(values), markersize=3, alpha=0.5, **dots)
                means = [np.mean(values) if values else np.nan for values in rows]
                ax.plot(means, y, markersize=7, label=label(arm), **dots)
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=5)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


def save(figure, base: Path) -> None:
    """Write `base`.svg and `base`.png, and close the figure."""
    base.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": "kronecker-nanogpt"}
    svg, png = {"metadata": metadata, "transparent": True}, {"dpi": 160, "facecolor": "white"}
    for suffix, options in ((".svg", svg), (".png", png)):
        content = io.BytesIO()
        with plt.rc_context(STYLE):  # text and ids of an SVG are made while it is saved
            figure.savefig(content, format=suffix[1:], **options)
        write_atomic(base.with_suffix(suffix), [content.getvalue()])
    plt.close(figure)


def draw_val(ax, c: dict, runs: list[Run]) -> None:
    """Validation loss by tokens, an arm a line."""
    curves = {arm: [r.series(upto=c["at_iter"]) for r in runs if r.arm == arm] for arm in c["arms"]}
    bands(ax, c, curves, begin=0.15)
    ax.set_title("Validation loss (nats/token)")
    ax.legend()


def draw_gain(ax, c: dict, runs: list[Run]) -> None:
    """Gain of every arm over the baseline by tokens, paired by seed."""
    base, curves = {r.seed: r.series(upto=c["at_iter"]) for r in runs if r.arm == c["baseline"]}, {}
    for r in runs:
        if r.arm != c["baseline"] and r.seed in base:
            other = base[r.seed]
            gains = {i: other[i] - x for i, x in r.series().items() if i in other}
            curves.setdefault(r.arm, []).append(gains)
    ax.axhline(0, linewidth=1.2, **arm_style(c["baseline"], c["arms"]))
    bands(ax, c, curves, begin=0.1, pad=0.08, also=[0.0])
    ax.set_title(f"Gain over {visible(c['baseline'])} (nats, up is better)")
    if len(c["arms"]) > 1:
        ax.legend()


def draw_train(ax, c: dict, runs: list[Run]) -> None:
    """Training loss by tokens as a running mean, an arm a line."""
    curves = {arm: [r.series("train/loss") for r in runs if r.arm == arm and r.train] for arm in c["arms"]}
    bands(ax, c, curves, begin=0.15, smooth=True, alpha=0.15, linewidth=1.4)
    ax.set_title("Training loss, running mean (nats/token)")


def bands(ax, c: dict, curves: dict, begin: float, pad=0.05, also=(), smooth=False, **style) -> None:
    """A band an arm over training tokens, the axis on what they do from that share of the training on.

    curves: {arm: [{iter: value} of each run]}, drawn where all runs of an arm have one; pad, also: see focus.
    """
    drawn = []
    for arm in c["arms"]:
        iters = shared_iters(curves.get(arm, []))
        if iters:
            y = [[run[i] for i in iters] for run in curves[arm]]
            if smooth:
                y = [stats.smooth(values, max(3, len(iters) // 25)) for values in y]
            drawn.append((np.array(iters) * c["tokens_per_step"], np.array(y)))
            band(ax, *drawn[-1], arm, **arm_style(arm, c["arms"]), **style)
    focus(ax, drawn, begin * c["tokens"], pad, also)
    ax.set_xlim(0, max(1, c["tokens"]))
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda v, _: count(v) if v else "0")
    ax.set_xlabel("training tokens")


PANELS = {"val": draw_val, "gain": draw_gain, "train": draw_train}


def draw_curves(c: dict, runs: list[Run], folder: Path) -> list[dict]:
    """curves.png and curves.svg with the three panels, each panel on its own, and their blocks for the page."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.0))
        for ax, panel in zip(axes, PANELS.values(), strict=True):
            panel(ax, c, runs)
        save(figure, folder / "curves")
        for name, panel in PANELS.items():
            figure, ax = plt.subplots(figsize=(5.4, 3.7))
            panel(ax, c, runs)
            save(figure, folder / "panels" / name)
    caption = "Line: mean over seeds; band: lowest to highest seed." if len(c["seeds"]) > 1 else "One seed."
    return [{"figures": [f"panels/{name}.svg" for name in PANELS], "caption": caption}]
