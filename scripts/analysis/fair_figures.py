"""An experiment's numbers (fair.numbers) as figures."""

from pathlib import Path

import numpy as np

from scripts import experiment
from scripts.analysis.figures import STYLE, label, plt, save
from scripts.analysis.numbers import count
from scripts.analysis.report import arm_sort_key, arm_style
from scripts.analysis.words import SIDES

AXIS = "#8a8f98"
# Marks on an axis of gains; the finer ones where no gain is larger than the last of them.
GAINS = 0.25, 0.5, 1, 2, 4, 8
FINER = 0.02, 0.05, 0.1, 0.25
FEW = 50  # validation tokens in a bucket of frequency, below which its gain says nothing


def draw(c: dict, folder: Path) -> dict[str, str]:
    """Write the figures for which there are numbers; {name without suffix: caption}."""
    drawn, g = {}, c["gap"]
    goes_on = ", and what it predicts where the hollow mark is, which took no part in it"
    predicts = g["held_out"] and "predicted" in g["held_out"]
    dotted = f" Dotted: the gap of {g['arm']} as fitted{goes_on if predicts else ''}." * bool(g["crossings"])
    seeds = "One seed" if c["tuning"]["seeds"] == 1 else f"Means over {c['tuning']['seeds']} seeds"
    with plt.rc_context(STYLE):
        for name, make, caption in (
            ("gap", draw_gap, f"Gain over {g['over']}, each arm at its own best setting: mean and 95% interval over seeds, "
             "none where there is one seed. The axis is logarithmic beyond 0.5 either way." + dotted),
            ("learning_rates", draw_tuning, "The tuning: loss by learning rate at each arm's own defaults, by the input side's "
             "multiplier at the best of these, and by learning rate where it was chosen once more. Stars: each "
             f"arm's lowest. {seeds}; what diverged or lies more than 1 nat above the lowest is not shown."),
            ("frequency", draw_frequency, f"Where the gain over {g['over']} sits: by training count of the token read and of "
             "the token predicted, mean over seeds, at that length of each rung at which most arms have several, of equals the "
             f"longest. The axis is logarithmic beyond 0.5 either way; buckets of fewer than {FEW} validation tokens are left out."),
        ):  # fmt: skip
            figure = make(c)
            if figure is not None:
                legend_below(figure)
                save(figure, folder / name)
                drawn[name] = caption
    return drawn


def legend_below(figure) -> None:
    """The names of all arms below the panels, where they hide no curve."""
    named = {}
    for ax in figure.axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    order = sorted(named, key=arm_sort_key)
    columns = max(2, min(5, int(figure.get_figwidth() / 1.9)))
    handles = [named[name] for name in order]
    figure.legend(handles, order, loc="outside lower center", ncols=columns, fontsize=9)


def at_best(c: dict) -> list[dict]:
    """The cells of the arms' best settings that have gains."""
    return [cell for cell in c["cells"] if cell["which"] == "best" and any(cell["gains"].values())]


def fullest(c: dict) -> list[dict]:
    """For each rung the cell of the arms' best settings in which most arms have several seeds; of equals, the longest."""

    def rank(cell):
        return sum(g["n"] > 1 for g in cell["gains"].values()), cell["tokens"]

    best: dict[str, dict] = {}
    for cell in at_best(c):
        best[cell["rung"]] = max(best.get(cell["rung"], cell), cell, key=rank)
    return list(best.values())


def draw_tuning(c: dict):
    """Loss by learning rate and by the input side's multiplier, and by learning rate at each place that was rechecked."""
    points = [p for p in c["curves"] if p["loss"] is not None]
    tuned = [p for p in points if p["stage"] == "tune"]
    panels = [
        ("learning_rate", "Loss by learning rate", tuned, at_defaults),
        ("wte_lr_mult", "Loss by the input side's multiplier", tuned, multipliers),
        ("learning_rate", "Once more, at the best multiplier", tuned, beside_the_best),
    ]
    for rung, length in dict.fromkeys((p["rung"], p["length"]) for p in points if p["stage"] == "recheck"):
        mine = [p for p in points if (p["stage"], p["rung"], p["length"]) == ("recheck", rung, length)]
        panels.append(("learning_rate", f"Once more: rung {rung}, {length} tokens", mine, list))
    panels = [panel for panel in panels if len({p[panel[0]] for p in panel[2]}) > 1]
    if not panels:
        return None
    columns = len(panels) if len(panels) < 4 else 2  # more in a row could not be read on a page
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.4 * columns, 4.2 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (key, title, mine, choose) in zip(axes.flat, panels, strict=False):
        low, high = min(p["loss"] for p in mine), max(p["loss"] for p in mine)
        top, above = min(low + 1, high + 0.03), []  # far from all optima nothing is read
        for arm in sorted({p["arm"] for p in mine}, key=arm_sort_key):
            line = sorted(choose([p for p in mine if p["arm"] == arm]), key=lambda p: p[key])
            x, y = [p[key] for p in line], [p["loss"] for p in line]
            style = arm_style(arm, c["arms"])
            ax.plot(x, y, marker="o", markersize=4, label=label(arm), **style)
            if line:
                k = int(np.argmin(y))
                ax.plot(x[k], y[k], marker="*", markersize=11, color=style["color"])
                above += [f"{label(arm)}, lowest {y[k]:.2f} at {x[k]:g}"] * (y[k] > top)
        ax.set_xscale("log", base=2)
        ticks = sorted({p[key] for p in mine})
        # of many, every other one: their labels would run together
        names = [f"{v:g}" * (len(ticks) < 9 or n % 2) for n, v in enumerate(ticks)]
        ax.set_xticks(ticks, names, fontsize=8 if len(ticks) > 7 else None)
        ax.xaxis.set_minor_formatter(lambda v, _: "")
        ax.set_title(title)
        ax.set_xlabel(key + f"\n(above: {'; '.join(above)})" * bool(above))
        ax.set_ylim(low - 0.03, top)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss (nats/token)")
    return figure


def at_defaults(points: list[dict]) -> list[dict]:
    """Of one arm's tuning runs, those with the arm's own multiplier and scale."""
    usual = experiment.own_keys(points[0]["arm"])
    return [p for p in points if all(p[k] == usual[k] for k in ("wte_lr_mult", "wte_init_rms"))]


def multipliers(points: list[dict]) -> list[dict]:
    """Of one arm's tuning runs, the longest line of multipliers at one learning rate and scale; of equals, the best."""
    lines: dict[tuple, list[dict]] = {}
    for p in points:
        lines.setdefault((p["learning_rate"], p["wte_init_rms"]), []).append(p)
    return max(lines.values(), key=lambda line: (len(line), -min(p["loss"] for p in line)))


def beside_the_best(points: list[dict]) -> list[dict]:
    """Of one arm's tuning runs, those that differ from its best in the learning rate alone."""
    best = min(points, key=lambda p: p["loss"])
    return [p for p in points if all(p[k] == best[k] for k in ("wte_lr_mult", "wte_init_rms"))]


def gain_axes(axes) -> None:
    """Gains in nats on axes that are drawn: linear to 0.5 either way, so that one arm far off does not press the others
    together; each end at a mark beyond the data."""
    drawn = [ax.dataLim for ax in axes if ax.has_data()]
    low, high = min((box.ymin for box in drawn), default=0.0), max((box.ymax for box in drawn), default=0.0)
    marks = FINER if max(-low, high) < FINER[-1] else GAINS
    marks = [*(-v for v in reversed(marks)), 0, *marks]
    bottom = max((v for v in marks if v < min(low, 0)), default=2 * low)
    top = min((v for v in marks if v > max(high, 0)), default=2 * high)
    for ax in axes:
        ax.axhline(0, linewidth=1, color=AXIS)
        ax.set_yscale("symlog", linthresh=0.5, base=2)
        ax.yaxis.set_major_locator(plt.FixedLocator(marks))
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "0")
        ax.set_ylim(bottom, top)


def draw_gap(c: dict):
    """Gain over the reference by tokens, an arm a colour, a rung a panel."""
    best, g = at_best(c), c["gap"]
    if not best:
        return None
    names = [rung for rung in c["rungs"] if any(cell["rung"] == rung for cell in best)]
    arms = sorted({arm for cell in best for arm, gain in cell["gains"].items() if gain}, key=arm_sort_key)
    # no interval hides another
    shift = {arm: 1.03 ** (k - (len(arms) - 1) / 2) for k, arm in enumerate(arms)}
    size = (3 + 3.2 * len(names), 4.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, sharex=True, sharey=True)
    colour, fit, held = arm_style(g["arm"], c["arms"])["color"], g["fit"], g["held_out"]
    for ax, rung in zip(axes[0], names, strict=True):
        of_rung = sorted((cell for cell in best if cell["rung"] == rung), key=lambda cell: cell["tokens"])
        for arm in arms:
            seen = [(cell["tokens"], gain) for cell in of_rung if (gain := cell["gains"].get(arm))]
            half = [0 if gain["low"] is None else gain["high"] - gain["mean"] for _, gain in seen]
            x, y = [t * shift[arm] for t, _ in seen], [gain["mean"] for _, gain in seen]
            style = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
            ax.errorbar(x, y, half, label=label(arm), **style, **arm_style(arm, c["arms"]))
        line = [
            pair
            for x in g["crossings"]
            if x["rung"] == rung
            for pair in ((x["from"], x["at_from"]), (x["to"], x["at_to"]))
        ]
        if fit and held and held["rung"] == rung:
            mark = {"markersize": 6, "zorder": 5, "markerfacecolor": "white", "color": colour}
            ax.plot(held["tokens"] * shift[g["arm"]], held["measured"]["mean"], "o", **mark)
            line += [(held["tokens"], held["predicted"])] if line and "predicted" in held else []
        if line:  # straight in the logarithm of the tokens, which the other axis need not be
            ends = np.log([t for t, _ in line])
            t = np.linspace(ends[0], ends[-1])
            y = np.interp(t, ends, [value["mean"] for _, value in line])
            ax.plot(np.exp(t), y, color=colour, linewidth=1.5, linestyle=":")
        ax.set_xlabel("training tokens")
        ax.set_title(f"Rung {rung}, {count(c['rungs'][rung]['body'])} in the body")
    gain_axes(axes[0])
    lengths = sorted({cell["tokens"] for cell in best})
    ax.set_xscale("log")
    ax.set_xticks(lengths, [count(t) for t in lengths])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlim(lengths[0] / 1.6, lengths[-1] * 1.6)
    axes[0][0].set_ylabel(f"gain over {g['over']} (nats, up is better)")
    return figure


def draw_frequency(c: dict):
    """Gain by bucket of training count, for the fullest cell of each rung."""
    cells = [x for x in fullest(c) if any(b for side in x["frequency"].values() for b in side.values())]
    if not cells:
        return None
    size = (11, 3.8 * len(cells))
    figure, axes = plt.subplots(len(cells), 2, figsize=size, squeeze=False, sharex=True, sharey="col")
    for row, cell in zip(axes, cells, strict=True):
        for ax, (side, arms) in zip(row, cell["frequency"].items(), strict=True):
            for arm in sorted((a for a in arms if arms[a]), key=arm_sort_key):
                known = [b for b in arms[arm] if b["count"] > 0 and b["tokens"] >= FEW]
                x, y = [b["count"] for b in known], [b["mean"] for b in known]
                ax.plot(x, y, marker="o", markersize=3, label=label(arm), **arm_style(arm, c["arms"]))
            ax.set_xscale("log", base=4)
            ax.xaxis.set_major_formatter(lambda v, _: count(v))
            ax.set_title(f"Rung {cell['rung']}, {count(cell['tokens'])} tokens, by the token {SIDES[side]}")
        row[0].set_ylabel(f"gain over {c['gap']['over']} (nats)")
    for ax, side, of_side in zip(axes[-1], SIDES, axes.T, strict=True):
        gain_axes(of_side)
        ax.set_xlabel(f"training count of the token {SIDES[side]} (from)")
    return figure
