"""An experiment's numbers (fair.numbers) as tables, findings and figures: results/NAME/README.md."""

from pathlib import Path

import numpy as np

from scripts import experiment
from scripts.analysis.figures import STYLE, label, plt, save
from scripts.analysis.numbers import count
from scripts.analysis.report import Table, arm_sort_key, arm_style, bullet, escaped
from scripts.analysis.words import frequency_table, span, with_sign

WHICH = {"shared": "one shared setting for all", "best": "each arm at its own best setting"}


def place(c: dict) -> str:
    return f"rung {c['rung']}, {count(c['tokens'])} tokens"


# ---------------------------------------------------------------------------------------------- tables


def tables(c: dict) -> list[Table]:
    """One table a cell, the questions over all cells, the best settings, and the gain by frequency."""
    over = c["gap"]["over"]
    found = [cell_table(cell, over) for cell in c["cells"]]
    found += [question_table(c), setting_table(c)]
    for cell in longest(c):
        where = f"{place(cell)}, {WHICH[cell['which']]}"
        found += [frequency_table(by_arm, side, over, where) for side, by_arm in cell["frequency"].items()]
    return [t for t in found if t.rows]


def cell_table(cell: dict, over: str) -> Table:
    """Losses of every arm in one cell, the best first, and their gains over the reference."""
    rows = []
    for arm, by_seed in sorted(cell["loss"].items(), key=lambda item: np.mean(list(item[1].values()))):
        losses, g = list(by_seed.values()), cell["gains"].get(arm)
        row = [
            arm,
            experiment.setting_name(cell["settings"][arm].items()),
            f"{100 * cell['input_share'][arm]:.1f}%",
        ]
        row += [
            len(losses),
            f"{np.mean(losses):.4f}",
            f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-",
        ]
        row += [f"{cell['bpb'][arm]:.4f}"]
        row += [with_sign(g["mean"]), span(g), "yes" if g["called"] else "no"] if g else [""] * 3
        rows.append(row)
    header = [
        "arm",
        "setting",
        "of table",
        "seeds",
        "val loss",
        "SD",
        "bits/byte",
        f"gain over {over}",
        "95% interval",
    ]
    return Table(
        capital(f"{place(cell)}: {WHICH[cell['which']]}"),
        [*header, "a difference"],
        rows,
        left=2,
        note="of table: input parameters in per cent of a learned table's; lr, mult, rms: learning rate, wte_lr_mult "
        "and wte_init_rms where they are not the arm's usual ones.",
    )


def question_table(c: dict) -> Table:
    """What each gain says, over all cells."""
    rows = [
        [q["what"], q["arm"], q["over"], cell["rung"], count(cell["tokens"]), cell["which"], q["n"], with_sign(q["mean"]), span(q),
         "yes" if q["called"] else "no"]
        for cell in c["cells"]
        for q in cell["questions"]
    ]  # fmt: skip
    rows.sort(key=lambda r: r[0])
    header = [
        "what it says",
        "arm",
        "over",
        "rung",
        "tokens",
        "setting",
        "seeds",
        "gain, nats",
        "95% interval",
        "a difference",
    ]
    return Table("How much is the head, how much the codec, how much of that is bytes", header, rows, left=3)


def setting_table(c: dict) -> Table:
    """The setting that the tuning chose for each arm."""
    rows = [[s["rung"], s["arm"], experiment.setting_name(s["keys"].items())] for s in c["settings"]]
    rows.sort(key=lambda r: (r[0] != "xs", r[0], arm_sort_key(r[1])))
    return Table("Best settings, chosen from the tuning runs alone", ["rung", "arm", "setting"], rows, left=3)


def longest(c: dict) -> list[dict]:
    """For each rung the cell of the longest length at the arms' best settings."""
    best = [cell for cell in c["cells"] if cell["which"] == "best"]
    return [
        max((x for x in best if x["rung"] == rung), key=lambda x: x["tokens"])
        for rung in dict.fromkeys(x["rung"] for x in best)
    ]


# ---------------------------------------------------------------------------------------------- sentences


def findings(c: dict) -> list[str]:
    """What can be quoted, a sentence a question, each figure with its interval."""
    says = []
    for which, how in WHICH.items():
        asked: dict[tuple, list[str]] = {}
        for cell in (x for x in c["cells"] if x["which"] == which):
            for q in cell["questions"]:
                verdict = "" if q["called"] else ", no difference by the rule"
                answer = f"{with_sign(q['mean'])} nats on {place(cell)} ({span(q)}, {q['n']} seeds{verdict})"
                asked.setdefault((q["what"], q["arm"], q["over"]), []).append(answer)
        says += [
            f"{capital(what)} ({arm} over {over}), {how}: {'; '.join(all_)}."
            for (what, arm, over), all_ in asked.items()
        ]
    return says + gap_findings(c) + prize_findings(c)


def capital(s: str) -> str:
    return s[:1].upper() + s[1:]


def gap_findings(c: dict) -> list[str]:
    """The fit of the gap, its held-out prediction, and where it crosses zero."""
    g = c["gap"]
    pair = f"{g['arm']} over {g['over']}"
    if g["fit"] is None:
        return [f"The gap ({pair}) is not fitted: {g['reason']}."]
    terms = {"ln_tokens": "each e-fold of training tokens", "ln_body": "each e-fold of body parameters"}
    says = [
        f"The gap ({pair}, own best settings) changes by {with_sign(g['fit'][name]['mean'])} nats ({span(g['fit'][name])}) "
        f"with {what}, in a fit to {g['fit']['cells']} cells."
        for name, what in terms.items()
        if name in g["fit"]
    ]
    h = g["held_out"]
    if h:
        inside = h["predicted"]["low"] <= h["measured"]["mean"] <= h["predicted"]["high"]
        says.append(
            f"For rung {h['rung']} at {h['length']} tokens, which the fit has not seen, it predicts "
            f"{with_sign(h['predicted']['mean'])} ({span(h['predicted'])}); measured {with_sign(h['measured']['mean'])} "
            f"({span(h['measured'])}): {'within' if inside else 'outside'} the prediction's interval."
        )
    for x in g["crossings"]:
        within = f"between {count(x['from'])} and {count(x['to'])} tokens"
        if x["tokens"]:
            says.append(
                f"On rung {x['rung']} the fitted gap is zero at {count(x['tokens'])} tokens "
                f"({count(x['low'])} to {count(x['high'])})."
            )
        else:
            says.append(f"On rung {x['rung']} the fitted gap does not cross zero {within}.")
    return says


def prize_findings(c: dict) -> list[str]:
    """Whether an arm with few input parameters beats the tuned untied table."""
    says = []
    for p in c["prize"]:
        where = f"rung {p['rung']}, {p['length']} tokens"
        if p["winners"]:
            each = "; ".join(
                f"{arm} by {with_sign(p['arms'][arm]['mean'])} ({span(p['arms'][arm])}) with {100 * p['arms'][arm]['share']:.1f}% of its input parameters"
                for arm in p["winners"]
            )
            says.append(f"At {where} the tuned {c['gap']['over']} is beaten by {each}.")
        else:
            tried = ", ".join(p["arms"])
            says.append(
                f"At {where} none of the arms tried with at most 15% of the table's input parameters ({tried}) beats the "
                f"tuned {c['gap']['over']} by the rule."
            )
    return says


def caveats(c: dict) -> list[str]:
    """What limits these figures: missing runs, edges of grids, divergence, the rule."""
    says = [
        f"A difference is called one when its paired 95% t interval over seeds does not hold zero and its mean is at least "
        f"{c['smallest_difference']:g} nats."
    ]
    says += [
        f"Missing: {m['missing']} of {m['runs']} final runs of rung {m['rung']} at {m['length']} tokens ({WHICH[m['which']]})."
        for m in c["missing"]
    ]
    if not c["complete"]:
        says.append("The tuning has not ended, so no arm has a best setting on every rung yet.")
    says += c["edges"]
    if c["diverged"]:
        says.append(f"Diverged: {', '.join(c['diverged'])}.")
    return says


def as_text(c: dict) -> str:
    """The report for a terminal."""
    parts = [t.text() for t in tables(c)]
    parts += ["\n".join(bullet(s) for s in findings(c)), "\n".join(bullet(s) for s in caveats(c))]
    return "\n\n".join(parts)


def provenance(c: dict, made: dict) -> list[str]:
    """Who made the report and the runs."""
    runs = c["runs"]
    return [
        f"Made by `{made['command']}` at commit {made['commit']} on {made['date']} from the records alone.",
        f"{runs['tuning']} tuning and {runs['final']} final runs, made at commit {', '.join(runs['commit'])} with torch "
        f"{', '.join(runs['torch'])} on {', '.join(runs['device'])}.",
    ]


def as_markdown(c: dict, made: dict, figures: list[tuple[str, str]]) -> str:
    """The report as a page beside its figures."""

    def listed(heading: str, items: list[str]) -> str:
        return f"## {heading}\n\n" + "\n".join(f"- {escaped(s)}" for s in items)

    parts = [
        f"# {escaped(capital(c['experiment']))}",
        listed("Findings", findings(c)),
        listed("What limits them", caveats(c)),
    ]
    parts += [f"![{caption}]({file}.svg)\n\n{caption}" for file, caption in figures]
    parts += [t.markdown() for t in tables(c)]
    parts.append(listed("Provenance", provenance(c, made)))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------- figures


def draw(c: dict, folder: Path) -> list[tuple[str, str]]:
    """Write the figures into a folder; [(name without suffix, caption)]."""
    drawn = []
    with plt.rc_context(STYLE):
        for name, caption, maker in (
            ("learning_rates", "Tuning: validation loss by learning rate at each arm's own defaults, and by the input side's "
             "multiplier at the best learning rate and scale.", draw_tuning),
            ("gap", "Gain over the reference at each arm's own best setting, mean and 95% interval over seeds; the line is the "
             "fit, hollow marks took no part in it.", draw_gap),
            ("frequency", "Where the gain sits: by training count of the token read and of the token predicted, at the longest "
             "length of each rung.", draw_frequency),
        ):  # fmt: skip
            figure = maker(c)
            if figure is not None:
                save(figure, folder / name)
                drawn.append((name, caption))
    return drawn


def draw_tuning(c: dict):
    """Two panels for each rung: loss by learning rate, and loss by the multiplier of the input side."""
    points = [p for p in c["curves"] if p["loss"] is not None and p["stage"] == "tune"]
    if not points:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for arm in sorted({p["arm"] for p in points}, key=arm_sort_key):
        usual = experiment.own_keys(arm)
        mine = [p for p in points if p["arm"] == arm]
        at_default = [p for p in mine if all(p[k] == usual[k] for k in ("wte_lr_mult", "wte_init_rms"))]
        at_default.sort(key=lambda p: p["learning_rate"])
        style = arm_style(arm, c["arms"])
        draw_line(left, at_default, "learning_rate", arm, style)
        best = min(mine, key=lambda p: p["loss"])
        line = sorted(
            (
                p
                for p in mine
                if (p["learning_rate"], p["wte_init_rms"]) == (best["learning_rate"], best["wte_init_rms"])
            ),
            key=lambda p: p["wte_lr_mult"],
        )
        draw_line(right, line, "wte_lr_mult", arm, style)
    low = min(p["loss"] for p in points)
    for ax, key, title in (
        (left, "learning_rate", "Loss by learning rate"),
        (right, "wte_lr_mult", "Loss by the input side's multiplier"),
    ):
        ax.set_xscale("log", base=2)
        ticks = sorted({p[key] for p in points})
        ax.set_xticks(ticks, [f"{v:g}" for v in ticks])
        ax.xaxis.set_minor_formatter(lambda v, _: "")
        ax.set_title(title)
        ax.set_xlabel(key)
        ax.set_ylabel("validation loss (nats/token)")
        # far from the optimum nothing is read
        ax.set_ylim(low - 0.03, min(low + 1.0, max(p["loss"] for p in points) + 0.03))
    legend_below(figure, left)
    return figure


def draw_line(ax, points: list[dict], key: str, arm: str, style: dict) -> None:
    """Loss of an arm's tuning runs by one key, a mark a run."""
    ax.plot(
        [p[key] for p in points],
        [p["loss"] for p in points],
        marker="o",
        markersize=4,
        label=label(arm),
        **style,
    )


def draw_gap(c: dict):
    """Gain over the reference by tokens, an arm a colour, a rung a panel."""
    best = [cell for cell in c["cells"] if cell["which"] == "best" and cell["gains"]]
    if not best:
        return None
    rungs = list(dict.fromkeys(cell["rung"] for cell in best))
    figure, axes = plt.subplots(1, len(rungs), figsize=(5.4 * len(rungs), 4.2), squeeze=False, sharey=True)
    fit, pair = c["gap"]["fit"], c["gap"]["arm"]
    held = c["gap"]["held_out"] or {}
    for ax, rung in zip(axes[0], rungs, strict=True):
        of_rung = sorted((cell for cell in best if cell["rung"] == rung), key=lambda cell: cell["tokens"])
        arms = sorted({arm for cell in of_rung for arm in cell["gains"]}, key=arm_sort_key)
        for k, arm in enumerate(arms):
            shift = 1.03 ** (k - len(arms) / 2)  # side by side, so that no interval hides another
            style = arm_style(arm, c["arms"])
            drawn = [
                (cell["tokens"] * shift, cell["gains"][arm]) for cell in of_rung if cell["gains"].get(arm)
            ]
            x, y = [t for t, _ in drawn], [g["mean"] for _, g in drawn]
            half = [0 if g["low"] is None else g["high"] - g["mean"] for _, g in drawn]
            ax.errorbar(
                x, y, half, marker="o", markersize=4, capsize=2, linewidth=1, label=label(arm), **style
            )
        for cell in of_rung:
            if (rung, cell["length"]) == (held.get("rung"), held.get("length")) and cell["gains"].get(pair):
                at = cell["tokens"] * 1.03 ** (arms.index(pair) - len(arms) / 2)
                ax.plot(
                    at,
                    cell["gains"][pair]["mean"],
                    "o",
                    markersize=6,
                    zorder=5,
                    markerfacecolor="white",
                    color=arm_style(pair, c["arms"])["color"],
                )
        if fit and "ln_tokens" in fit:
            t = np.geomspace(of_rung[0]["tokens"], of_rung[-1]["tokens"])
            body = fit["ln_body"]["mean"] * np.log(of_rung[0]["body"]) if "ln_body" in fit else 0.0
            ax.plot(
                t,
                fit["intercept"]["mean"] + fit["ln_tokens"]["mean"] * np.log(t) + body,
                color=arm_style(pair, c["arms"])["color"],
                linewidth=1,
                linestyle=":",
            )
        ax.axhline(0, linewidth=1, color="#8a8f98")
        ax.set_xscale("log")
        ax.set_xticks(
            [cell["tokens"] for cell in of_rung], [count(cell["tokens"]) for cell in of_rung], minor=False
        )
        ax.xaxis.set_minor_formatter(lambda v, _: "")
        ax.set_xlim(of_rung[0]["tokens"] / 1.6, of_rung[-1]["tokens"] * 1.6)
        ax.set_xlabel("training tokens")
        ax.set_title(f"Gain over {c['gap']['over']}, rung {rung} (nats)")
    legend_below(figure, axes[0][0])
    return figure


def draw_frequency(c: dict):
    """Gain by bucket of training count, for the longest cell of each rung."""
    cells = [
        cell for cell in longest(c) if any(b for side in cell["frequency"].values() for b in side.values())
    ]
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 2, figsize=(11, 3.8 * len(cells)), squeeze=False)
    for row, cell in zip(axes, cells, strict=True):
        for ax, (side, arms) in zip(row, cell["frequency"].items(), strict=True):
            for arm in sorted((a for a in arms if arms[a]), key=arm_sort_key):
                buckets = [
                    b for b in arms[arm] if b["count"] > 0 and b["tokens"] >= 50
                ]  # fewer tokens say nothing
                ax.plot(
                    [b["count"] for b in buckets],
                    [b["mean"] for b in buckets],
                    marker="o",
                    markersize=3,
                    label=label(arm),
                    **arm_style(arm, c["arms"]),
                )
            ax.axhline(0, linewidth=1, color="#8a8f98")
            ax.set_xscale("log", base=4)
            ax.xaxis.set_major_formatter(lambda v, _: count(v))
            ax.set_xlabel(f"training count of the token {'read' if side == 'input' else 'predicted'} (from)")
            ax.set_title(f"Gain over {c['gap']['over']}, {place(cell)} (nats)")
    legend_below(figure, axes[0][0])
    return figure


def legend_below(figure, ax) -> None:
    """The names of all arms below the panels, where they hide no curve."""
    handles, names = ax.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=9)
