"""An experiment's numbers (fair.numbers) as tables, findings and limits: results/NAME/README.md."""

import math

import numpy as np

from scripts import experiment
from scripts.analysis.fair_figures import longest
from scripts.analysis.numbers import count
from scripts.analysis.report import Table, arm_sort_key, bullets, escaped, markdown_list
from scripts.analysis.words import frequency_table, span, with_sign

WHICH = {"shared": "one shared setting for all", "best": "each arm at its own best setting"}
READING = (
    "A gain is the other arm's final validation loss minus this arm's, in nats a token, paired by seed: positive means "
    "that this arm is better. Brackets hold the paired 95% t interval over seeds. A cell is a rung (a size of the model) at "
    "one length of training."
)


def place(of: dict) -> str:
    return f"rung {of['rung']}, {count(of['tokens'])} tokens"


def capital(s: str) -> str:
    return s[:1].upper() + s[1:]


def setting(keys: dict) -> str:
    """Keys in short: lr 0.006, mult 16."""
    return ", ".join(f"{experiment.SHORT.get(k, k)} {v:g}" for k, v in keys.items())


def measured(g: dict) -> str:
    """A gain with what it rests on."""
    if g["low"] is None:
        return f"{with_sign(g['mean'])} (one seed, no interval)"
    verdict = "" if g["called"] else ", not called a difference"
    return f"{with_sign(g['mean'])} ({span(g)}, {g['n']} seeds{verdict})"


# ---------------------------------------------------------------------------------------------- tables


def tables(c: dict) -> list[Table]:
    """What was compared, the questions over all cells, each cell, the best settings, and the gain by frequency."""
    over, order = c["gap"]["over"], list(c["rungs"])
    cells = sorted(c["cells"], key=lambda x: (order.index(x["rung"]), x["tokens"], x["which"] == "best"))
    found = [arm_table(c), rung_table(c), question_table(cells)]
    found += [cell_table(cell, over, first=cell is cells[0]) for cell in cells]
    found.append(setting_table(c))
    for cell in longest(c):
        where = f"{place(cell)}, {WHICH[cell['which']]}"
        found += [frequency_table(by_arm, side, over, where) for side, by_arm in cell["frequency"].items()]
    return [t for t in found if t.rows]


def arm_table(c: dict) -> Table:
    rows = [[arm, c["about"][arm]] for arm in sorted(c["arms"], key=arm_sort_key)]
    return Table("The arms", ["arm", "what it is"], rows, left=2)


def rung_table(c: dict) -> Table:
    """Shapes and sizes of the rungs."""
    rows = [
        [rung, *(x.get(k, "-") for k in ("n_layer", "n_embd", "block_size")), count(x["body"]), count(x["table"]), x["tuned_on"]]
        for rung, x in c["rungs"].items()
    ]  # fmt: skip
    header = ["rung", "layers", "width", "block", "body", "table", "settings from rung"]
    return Table(
        "The rungs", header, rows, note="body, table: parameters of the transformer and of a learned table."
    )


def cell_table(cell: dict, over: str, first: bool) -> Table:
    """Losses of every arm in one cell and their gains over the reference, the best first."""
    base = cell["loss"].get(over)
    rows = []
    for arm, by_seed in cell["loss"].items():
        losses, g = list(by_seed.values()), cell["gains"].get(arm)
        sd = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else "-"
        bpb = "-" if cell["bpb"][arm] is None else f"{cell['bpb'][arm]:.4f}"
        row = [arm, setting(cell["settings"][arm]), f"{100 * cell['input_share'][arm]:.1f}%", len(losses)]
        row += [f"{np.mean(losses):.4f}", sd, bpb]
        row += [with_sign(g["mean"]), span(g), called(g)] if g else [""] * 3
        # by the paired gain where there is one: means over different seeds have no order
        behind = -g["mean"] if g else np.mean(losses) - np.mean(list((base or by_seed).values()))
        rows.append((behind, row))
    header = "arm|setting|of table|seeds|val loss|SD|bits/byte".split("|")
    note = (
        "of table: input parameters in per cent of a learned table's; lr, mult, rms: learning_rate, wte_lr_mult and "
        "wte_init_rms where they are not the arm's usual ones; called: whether the rule calls it a difference."
    )
    return Table(
        capital(f"{place(cell)}: {WHICH[cell['which']]}"),
        [*header, f"gain over {over}", "95% interval", "called"],
        [row for _, row in sorted(rows, key=lambda pair: pair[0])],
        left=2,
        note=note if first else "",
    )


def called(g: dict) -> str:
    return "-" if g["low"] is None else "yes" if g["called"] else "no"


def question_table(cells: list[dict]) -> Table:
    """What each gain says, over all cells."""
    rows = [
        (q["what"], [q["arm"], q["over"], x["rung"], count(x["tokens"]), x["which"], q["n"], with_sign(q["mean"]), span(q), called(q)])
        for x in cells
        for q in x["questions"]
    ]  # fmt: skip
    asked = list(dict.fromkeys(what for what, _ in rows))
    rows = [[what, *row] for what, row in sorted(rows, key=lambda pair: asked.index(pair[0]))]
    header = "what it says|arm|over|rung|tokens|setting|seeds|gain, nats|95% interval|called".split("|")
    return Table("How much is the head, how much the codec, how much of that is bytes", header, rows, left=4)


def setting_table(c: dict) -> Table:
    """The setting that the tuning chose for each arm on each rung."""
    chosen = {(x["arm"], x["rung"]): setting(x["keys"]) for x in c["settings"]}
    names = list(dict.fromkeys(rung for _, rung in chosen))
    arms = sorted({arm for arm, _ in chosen}, key=arm_sort_key)
    rows = [[arm, *(chosen.get((arm, rung), "-") for rung in names)] for arm in arms]
    title = "Best settings, chosen from the tuning runs alone"
    return Table(title, ["arm", *(f"rung {r}" for r in names)], rows, left=1 + len(names))


# ---------------------------------------------------------------------------------------------- sentences


def findings(c: dict) -> list[str]:
    """What can be quoted, a sentence a question, each figure with its interval."""
    pair = (c["gap"]["arm"], c["gap"]["over"])
    shared = f"at one shared setting ({setting(c['shared'])}) for all arms, "
    return [
        *map(capital, question_findings(c, "best")),
        *(capital(shared + s) for s in question_findings(c, "shared", pair)),
        *gap_findings(c),
        *prize_findings(c),
    ]


def question_findings(c: dict, which: str, pair: tuple | None = None) -> list[str]:
    """A sentence for each question, or for that of one pair: in how many cells the arm is ahead, and every gain."""
    asked: dict[tuple, list[tuple[dict, dict]]] = {}
    for cell in (x for x in c["cells"] if x["which"] == which):
        for q in cell["questions"]:
            if pair in (None, (q["arm"], q["over"])):
                asked.setdefault((q["what"], q["arm"], q["over"]), []).append((cell, q))
    says = []
    for (what, arm, over), answers in asked.items():
        counts = {
            "ahead": sum(q["called"] and q["mean"] > 0 for _, q in answers),
            "behind": sum(q["called"] and q["mean"] < 0 for _, q in answers),
            "not called": sum(not q["called"] for _, q in answers),
        }
        verdict = ", ".join(f"{how} in {n}" for how, n in counts.items() if n)
        by_rung: dict[str, list[str]] = {}
        for cell, q in sorted(answers, key=lambda pair: pair[0]["tokens"]):
            by_rung.setdefault(cell["rung"], []).append(f"{measured(q)} at {count(cell['tokens'])}")
        each = "; ".join(f"rung {rung} {', '.join(by_rung[rung])}" for rung in c["rungs"] if rung in by_rung)
        of = f" of {len(answers)} cells" if len(answers) > 1 else " cell"
        says.append(f"{what} ({arm} over {over}): {verdict}{of}. In nats, by tokens: {each}.")
    return says


def gap_findings(c: dict) -> list[str]:
    """The fit of the gap, its held-out prediction, and where it crosses zero."""
    g = c["gap"]
    pair, fit = f"{g['arm']} over {g['over']}", g["fit"]
    if fit is None:
        return [f"The gap ({pair}) is not fitted: {g['reason']}."]
    terms = {"ln_tokens": "training tokens", "ln_body": "parameters in the body"}
    double = {
        k: {end: math.log(2) * fit[k][end] for end in ("mean", "low", "high")} for k in terms if k in fit
    }
    slopes = [f"{with_sign(x['mean'])} nats ({span(x)}) with twice the {terms[k]}" for k, x in double.items()]
    exact = fit["cells"] == fit["terms"]
    miss = (
        "all of which it meets by construction"
        if exact
        else f"which it misses by at most {fit['largest_miss']:.4f} nats"
    )
    says = [
        f"The gap ({pair}, own best settings) changes by {' and by '.join(slopes)}, in a fit to {fit['cells']} cells, {miss}. "
        "Its intervals hold the chance of seeds, not of the form of the fit."
    ]
    if h := g["held_out"]:
        off, miss = with_sign(h["off"]["mean"]), h["off"]
        if miss["low"] is None:
            off += " (one seed, no interval)"
        else:
            sure = miss["low"] > 0 or miss["high"] < 0
            off += f" ({span(miss)}): {'the fit fails there' if sure else 'no miss beyond chance'}"
        says.append(
            f"For {place(h)}, which the fit has not seen, it predicts {with_sign(h['predicted']['mean'])} "
            f"({span(h['predicted'])}); measured {with_sign(h['measured']['mean'])} ({span(h['measured'])}); measured "
            f"minus predicted {off}."
        )
    return says + [crossing(x) for x in g["crossings"]]


def crossing(x: dict) -> str:
    """Where the fitted gap of a rung is zero, as far as the intervals at both ends of its lengths allow."""
    start, end = x["at_from"], x["at_to"]
    ends = (
        f"{with_sign(start['mean'])} ({span(start)}) at {count(x['from'])} tokens, {with_sign(end['mean'])} ({span(end)}) "
        f"at {count(x['to'])}"
    )
    signs = [1 if e["low"] > 0 else -1 if e["high"] < 0 else 0 for e in (start, end)]
    if 0 in signs:
        return f"On rung {x['rung']} it is open whether the fitted gap crosses zero: it is {ends}."
    if signs[0] == signs[1]:
        within = f"between {count(x['from'])} and {count(x['to'])} tokens"
        return f"On rung {x['rung']} the fitted gap does not cross zero {within}: it is {ends}."
    within = f"{count(x['tokens'])} tokens ({count(x['low'])} to {count(x['high'])})"
    return f"On rung {x['rung']} the fitted gap is zero at {within}: it is {ends}."


def prize_findings(c: dict) -> list[str]:
    """Whether an arm with few input parameters beats the tuned untied table."""
    says = []
    for p in c["prize"]:
        short = (
            f", the longest so far of {count(p['planned'])} planned," if p["tokens"] < p["planned"] else ""
        )
        where = f"At {place(p)}{short}"
        judged = {arm: g for arm, g in p["arms"].items() if g["low"] is not None}
        if p["winners"]:
            each = "; ".join(
                f"{arm} by {with_sign(judged[arm]['mean'])} ({span(judged[arm])}) with {100 * judged[arm]['share']:.1f}% of "
                "its input parameters"
                for arm in p["winners"]
            )
            says.append(f"{where} the tuned {c['gap']['over']} is beaten by {each}.")
        else:
            says.append(
                f"{where} none of the arms tried with at most 15% of the table's input parameters ({', '.join(judged)}) "
                f"beats the tuned {c['gap']['over']} by the rule."
            )
        if alone := [arm for arm in p["arms"] if arm not in judged]:
            says.append(f"{where} {', '.join(alone)} cannot be judged: one seed.")
    return says


def limits(c: dict) -> list[str]:
    """What limits these figures: the rule, what the intervals leave out, missing runs, edges of grids, divergence."""
    n, seeds = sum(len(x["questions"]) for x in c["cells"]), c["tuning"]["seeds"]
    says = [
        "A difference is called one when its paired 95% t interval over seeds does not hold zero and its mean is at least "
        f"{c['smallest_difference']:g} nats. What is not called one may still be there.",
        "The intervals hold the chance of initialisation and of the order of the data. They leave out the choice of the data, "
        f"of the validation windows and of the settings (each chosen in runs of {seeds} seed{'s' * (seeds > 1)}), and are not corrected for their "
        f"number ({n} in the table of questions).",
    ]
    if c["cells"]:
        bodies, lengths = [x["body"] for x in c["cells"]], [x["tokens"] for x in c["cells"]]
        says.append(
            f"Final runs have {from_to(bodies)} parameters in the body and {from_to(lengths)} training tokens: nothing here "
            "speaks of larger ones."
        )
    lent = [
        f"; rung {rung} has those of rung {x['tuned_on']}"
        for rung, x in c["rungs"].items()
        if x["tuned_on"] != rung
    ]
    says.append(
        f"Best settings were chosen in runs of {count(c['tuning']['tokens'])} tokens and kept for longer ones{''.join(lent)}."
    )
    if {"tune", "final"} <= c["validation"].keys():
        tune, final = c["validation"]["tune"], c["validation"]["final"]
        says.append(
            f"Validation tokens of {final['dataset'] or 'the data set'}: {tune['eval_tokens']:,} in the tuning; in final runs "
            f"{final['eval_tokens']:,} others, which begin after {final['eval_skip_tokens']:,}."
        )
    says += not_run(c["missing"])
    if not c["complete"]:
        says.append("The tuning has not ended, so no arm has a best setting on every rung yet.")
    says += c["edges"]
    if c["diverged"]:
        each = "; ".join(
            f"{x['arm']} at {setting(x['setting'])}, rung {x['rung']}, {x['length']} tokens, seed {x['seed']} ({x['stage']})"
            for x in c["diverged"]
        )
        says.append(f"Diverged, and in no mean: {each}.")
    return says


def not_run(missing: list[dict]) -> list[str]:
    """Which final runs are missing: a sentence for each place that has some, and one for those that have none."""
    says = []
    for m in (m for m in missing if m["missing"] < m["runs"]):
        arms_of: dict[tuple, list[str]] = {}
        for arm, seeds in m["seeds"].items():
            arms_of.setdefault(tuple(seeds), []).append(arm)
        each = "; ".join(
            f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of "
            + ("every arm" if len(arms) == m["arms"] else ", ".join(arms))
            for seeds, arms in arms_of.items()
        )
        where = f"{place(m)}, {WHICH[m['which']]}"
        says.append(
            f"Not run for want of time: {m['missing']} of {m['runs']} final runs of {where} ({each})."
        )
    whole = [f"{place(m)}, {WHICH[m['which']]} ({m['runs']})" for m in missing if m["missing"] == m["runs"]]
    return says + [f"Not run for want of time: all final runs of {'; '.join(whole)}."] * bool(whole)


def from_to(values: list) -> str:
    low, high = count(min(values)), count(max(values))
    return low if low == high else f"{low} to {high}"


def as_text(c: dict) -> str:
    """The report for a terminal."""
    return "\n\n".join([*(t.text() for t in tables(c)), bullets(findings(c)), bullets(limits(c))])


def provenance(c: dict, made: dict) -> list[str]:
    """Who made the report and the runs."""
    runs = c["runs"]
    days = f" on {' to '.join(dict.fromkeys([runs['days'][0], runs['days'][-1]]))}" if runs["days"] else ""
    return [
        f"Made by `{made['command']}` at commit {made['commit']} on {made['date']} from the records alone.",
        f"{runs['tuning']} tuning and {runs['final']} final runs, made{days} at commit {', '.join(runs['commit'])} with torch "
        f"{', '.join(runs['torch'])} on {', '.join(runs['device'])}.",
    ]


def as_markdown(c: dict, made: dict, figures: dict[str, str], file: str) -> str:
    """The report as a page beside its figures. file: text of the experiment's file, which the page quotes."""
    shown = {name: f"![{name}]({name}.svg)\n\n{caption}" for name, caption in figures.items()}
    parts = [
        f"# {escaped(capital(c['experiment']))}: input embeddings compared, every arm tuned alike",
        READING,
        markdown_list("Findings", findings(c)),
        shown.pop("gap", ""),
        markdown_list("What limits them", limits(c)),
        *(t.markdown() for t in tables(c)),
        "## Where the gain sits, and how the settings were found" if shown else "",
        *shown.values(),
        f"## What was asked\n\nThe experiment's file:\n\n~~~python\n{file.strip()}\n~~~",
        markdown_list("Provenance", provenance(c, made)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
