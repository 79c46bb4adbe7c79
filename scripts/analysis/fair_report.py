"""An experiment's numbers (fair.numbers) as tables, findings and limits: results/NAME/README.md."""

import math
from collections import Counter

import numpy as np

from scripts import experiment
from scripts.analysis.fair_figures import at_best, fullest
from scripts.analysis.numbers import count
from scripts.analysis.report import Table, arm_sort_key, bullets, escaped, markdown_list
from scripts.analysis.words import dash, frequency_table, span, with_sign, with_span

BUDGET = 0.15  # of the table's input parameters, for an arm that would win the prize
TERMS = {"tokens": "training tokens", "body": "parameters in the body"}  # of the fit
WHICH = {"shared": "one shared setting for all", "best": "each arm at its own best setting"}
SHORT_WHICH = {"shared": "shared", "best": "own best"}
READING = (
    "A gain is the other arm's final validation loss minus this arm's, in nats a token, paired by seed: positive means "
    "that this arm is better. Brackets hold the paired 95% t interval over seeds. A cell is a rung (a size of the model) at "
    "one length of training."
)
CELL_NOTE = (
    "of table: input parameters in per cent of a learned table's; lr, mult, rms: learning_rate, wte_lr_mult and "
    "wte_init_rms where they are not the arm's usual ones; called: whether the rule calls it a difference."
)


def place(of: dict) -> str:
    return f"rung {of['rung']}, {count(of['tokens'])} tokens"


def place_and_setting(of: dict) -> str:
    return f"{place(of)}, {WHICH[of['which']]}"


def capital(s: str) -> str:
    return s[:1].upper() + s[1:]


def setting(keys: dict) -> str:
    """Keys in short: lr 0.006, mult 16."""
    return ", ".join(f"{experiment.SHORT.get(k, k)} {v:g}" for k, v in keys.items())


def tables(c: dict) -> list[Table]:
    """The questions over all cells, what was compared, each cell, the best settings, and the gain by frequency."""
    over, order = c["gap"]["over"], list(c["rungs"])
    cells = sorted(c["cells"], key=lambda x: (order.index(x["rung"]), x["tokens"], x["which"] == "best"))
    found = [question_table(cells, c["shared"]), arm_table(c), rung_table(c)]
    found += [cell_table(cell, over, first=cell is cells[0]) for cell in cells]
    found += [setting_table(c), beside_table(c)]
    for cell in fullest(c):
        seeds = [g["n"] for g in cell["gains"].values()]
        where = f"{place_and_setting(cell)}, {from_to(seeds)} seed{'s' * (max(seeds) > 1)}"
        found += [frequency_table(by_arm, side, over, where) for side, by_arm in cell["frequency"].items()]
    return [t for t in found if t.rows]


def arm_table(c: dict) -> Table:
    rows = [[arm, c["about"][arm]] for arm in sorted(c["arms"], key=arm_sort_key)]
    return Table("The arms", ["arm", "what it is"], rows, left=2)


def rung_table(c: dict) -> Table:
    """Shapes and sizes of the rungs."""
    rows = []
    for rung, x in c["rungs"].items():
        shape = [x.get(k, "-") for k in ("n_layer", "n_embd", "block_size")]
        rows.append([rung, *shape, count(x["body"]), count(x["table"])])
    header = ["rung", "layers", "width", "block", "body", "table"]
    note = "body, table: parameters of the transformer and of a learned table."
    return Table("The rungs", header, rows, note=note)


def cell_table(cell: dict, over: str, first: bool) -> Table:
    """Losses of every arm in one cell and their gains over the reference, the best first."""
    base, rows = cell["loss"].get(over, {}), []
    for arm, by_seed in cell["loss"].items():
        losses, g = list(by_seed.values()), cell["gains"].get(arm)
        mean, sd = np.mean(losses), np.std(losses, ddof=1) if len(losses) > 1 else None
        share = f"{100 * cell['input_share'][arm]:.1f}%"
        seeds = f"{len(losses)}, {g['n']} paired" if g and g["n"] < len(losses) else f"{len(losses)}"
        if bad := cell["diverged"].get(arm):
            seeds += f", {bad} diverged"
        row = [arm, setting(cell["settings"][arm]), share, seeds]
        row += [f"{mean:.4f}", dash(sd, ".4f"), dash(cell["bpb"][arm], ".4f")]
        row += [with_sign(g["mean"]), span(g), called(g)] if g else [""] * 3
        # by the paired gain where there is one: means over different seeds have no order
        behind = -g["mean"] if g else mean - np.mean(list(base.values()) or [0.0])
        rows.append((behind, row))
    header = "arm|setting|of table|seeds|val loss|SD|bits/byte".split("|")
    header += [f"gain over {over}", "95% interval", "called"]
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    title = capital(f"{place(cell)}: {WHICH[cell['which']]}")
    return Table(title, header, rows, left=2, note=CELL_NOTE if first else "")


def called(g: dict) -> str:
    return "-" if g["low"] is None else "yes" if g["called"] else "no"


def question_table(cells: list[dict], shared: dict) -> Table:
    """A row a question, a column a cell that answers one: how much is the head, how much the codec, how much of that is
    bytes."""
    cells = [x for x in cells if x["questions"]]
    header, rows = ["question", "arms"], {}
    for number, x in enumerate(cells):
        n = from_to([q["n"] for q in x["questions"]])
        header.append(f"{x['rung']}, {count(x['tokens'])}, {SHORT_WHICH[x['which']]}, n = {n}")
        for q in x["questions"]:
            answers = rows.setdefault((q["what"], f"{q['arm']} over {q['over']}"), [""] * len(cells))
            answers[number] = with_span(q) + "†" * (q["low"] is not None and not q["called"])
    note = (
        f"Gains by rung and tokens, where all arms share one setting ({setting(shared)}) or each has its own best one, over n "
        "seeds. †: the rule does not call it a difference. Empty: not run."
    )
    title = "How much is the head, how much the codec, how much of that is bytes"
    return Table(title, header, [[*who, *answers] for who, answers in rows.items()], left=2, note=note)


def setting_table(c: dict) -> Table:
    """The setting that the tuning chose for each arm at each place where it was tuned."""
    best = {(x["arm"], f"rung {x['rung']}, {x['length']} tokens"): setting(x["keys"]) for x in c["settings"]}
    places = list(dict.fromkeys(place for _, place in best))
    arms = sorted({arm for arm, _ in best}, key=arm_sort_key)
    rows = [[arm, *(best.get((arm, place), "-") for place in places)] for arm in arms]
    title = "Best settings, chosen from the tuning runs alone"
    return Table(title, ["arm", *places], rows, left=1 + len(places))


def beside_table(c: dict) -> Table:
    """Settings that were tried apart from the tuning, against each arm's best one."""
    order = sorted(c["beside"], key=lambda x: (arm_sort_key(x["arm"]), -x["gain"]))
    rows = [[x["arm"], setting(x["setting"]), f"{x['loss']:.4f}", with_sign(x["gain"])] for x in order]
    note = "One seed and the tuning's validation windows. They choose nothing, and no final run has them; head: head_lr_mult."
    header = ["arm", "setting", "val loss", "gain over its best setting"]
    return Table("Settings tried beside the tuning's lines", header, rows, left=2, note=note)


def findings(c: dict) -> list[str]:
    """What can be quoted beside the table of questions, each figure with its interval."""
    return [*gap_findings(c), *prize_findings(c)]


def gap_findings(c: dict) -> list[str]:
    """The fit of the gap, its held-out prediction, and where it crosses zero."""
    g = c["gap"]
    pair, fit = f"{g['arm']} over {g['over']}", g["fit"]
    if fit is None:
        return [f"The gap ({pair}) is not fitted: {g['reason']}."]
    slopes = []
    for key, term in TERMS.items():
        if slope := fit.get(f"ln_{key}"):
            double = {end: math.log(2) * slope[end] for end in ("mean", "low", "high")}
            slopes.append(f"{with_sign(double['mean'])} nats ({span(double)}) with twice the {term}")
    miss = f"which it misses by at most {fit['largest_miss']:.4f} nats"
    if fit["cells"] == fit["terms"]:
        miss = "all of which it meets by construction"
    says = [
        f"The gap ({pair}, own best settings) changes by {' and by '.join(slopes)}, in a fit to {fit['cells']} cells, {miss}. "
        "Its intervals hold the chance of seeds, not of the form of the fit."
    ]
    if h := g["held_out"]:
        here = f"measured {with_span(h['measured'])}"
        if "untold" in h:
            lacking = " or ".join(TERMS[key] for key in h["untold"])
            says.append(f"The fit has no term for {lacking}, so for {place(h)}, it predicts nothing; {here}.")
        else:
            off, low, high = with_span(h["off"]), h["off"]["low"], h["off"]["high"]
            if low is not None:
                off += ": the fit fails there" if low > 0 or high < 0 else ": no miss beyond chance"
            says.append(
                f"For {place(h)}, which the fit has not seen, it predicts {with_span(h['predicted'])}; {here}; measured minus "
                f"predicted {off}."
            )
    return says + [crossing(x) for x in g["crossings"]]


def crossing(x: dict) -> str:
    """Where the fitted gap of a rung is zero, as far as the intervals at both ends of its lengths allow."""
    start, end, first, last = x["at_from"], x["at_to"], count(x["from"]), count(x["to"])
    signs = [1 if e["low"] > 0 else -1 if e["high"] < 0 else 0 for e in (start, end)]
    if 0 in signs:
        says = "it is open whether the fitted gap crosses zero"
    elif signs[0] == signs[1]:
        says = f"the fitted gap does not cross zero between {first} and {last} tokens"
    else:
        at = f"{count(x['tokens'])} tokens ({count(x['low'])} to {count(x['high'])})"
        says = f"the fitted gap is zero at {at}"
    it_is = f"{with_span(start)} at {first} tokens, {with_span(end)} at {last}"
    return f"On rung {x['rung']} {says}: it is {it_is}."


def prize_findings(c: dict) -> list[str]:
    """On each rung, at the longest length that an arm with few input parameters has several seeds of, whether it beats the
    tuned untied table. Arms of one length share a sentence."""
    says, over = [], f"the tuned {c['gap']['over']}"
    seen: set[tuple[str, str]] = set()  # (rung, arm) judged at a longer length
    for cell in sorted(at_best(c), key=lambda x: (list(c["rungs"]).index(x["rung"]), -x["tokens"])):
        small = {a: g for a, g in cell["gains"].items() if cell["input_share"][a] <= BUDGET}
        small = {arm: g for arm, g in small.items() if (cell["rung"], arm) not in seen}
        judged = [arm for arm, g in small.items() if g["low"] is not None]
        if not judged:
            continue
        planned = c["rungs"][cell["rung"]]["planned"]
        so_far = f" (the longest with several seeds of these arms so far; {count(planned)} are planned)"
        where = f"At {place(cell)}{so_far * (cell['tokens'] < planned)}"
        if won := [arm for arm in judged if small[arm]["called"] and small[arm]["mean"] > 0]:
            budget = {arm: f"{100 * cell['input_share'][arm]:.1f}% of its input parameters" for arm in won}
            each = [f"{arm} by {with_span(small[arm])} with {budget[arm]}" for arm in won]
            lost = [arm for arm in judged if arm not in won]
            not_by = f", not by {', '.join(lost)}" if lost else ""
            says.append(f"{where} {over} is beaten by {'; '.join(each)}{not_by}.")
        else:
            tried = f"the arms tried with at most 15% of the table's input parameters ({', '.join(judged)})"
            says.append(f"{where} none of {tried} beats {over} by the rule.")
        seen |= {(cell["rung"], arm) for arm in judged}
    return says


def limits(c: dict) -> list[str]:
    """What limits these figures: the rule, what the intervals leave out, missing runs, edges of grids, divergence."""
    n, seeds = sum(len(x["questions"]) for x in c["cells"]), c["tuning"]["seeds"]
    says = [
        "A difference is called one when its paired 95% t interval over seeds does not hold zero and its mean is at least "
        f"{c['smallest_difference']:g} nats. What is not called one may still be there.",
        "The intervals hold the chance of initialisation and of the order of the data. They leave out the choice of the data, "
        f"of the validation windows, of what an arm's file fixes, and of the settings (each chosen in runs of {seeds} seed{'s' * (seeds > 1)}), and are not "
        f"corrected for their number ({n} in the table of questions).",
    ]
    if c["cells"]:
        bodies, lengths = (from_to([x[key] for x in c["cells"]]) for key in ("body", "tokens"))
        says.append(
            f"Final runs have {bodies} parameters in the body and {lengths} training tokens: nothing here speaks of larger ones."
        )
    again = ", then the learning rate once more at those" * c["tuning"]["again"]
    says.append(
        "Settings were searched along lines: the learning rate at an arm's own defaults, then the input side's multiplier and "
        f"scale at the best one, each scale being one of the few in the file{again}. {beside(c['beside'])}"
    )
    for x in c["cells"]:
        if x["which"] == "best" and (x["rung"], x["tokens"]) != tuple(x["tuned_at"].values()):
            says.append(f"The best settings at {place(x)}, are those chosen at {place(x['tuned_at'])}.")
    if {"tune", "final"} <= c["validation"].keys():
        tune, final = c["validation"]["tune"], c["validation"]["final"]
        says.append(
            f"Validation tokens of {final['dataset'] or 'the data set'}: {tune['eval_tokens']:,} in the tuning; in final runs "
            f"{final['eval_tokens']:,} others, which begin after {final['eval_skip_tokens']:,}."
        )
    says += [f"The text is {c['data']}."] * bool(c["data"])
    says += mixed_pairs(c["cells"])
    says += not_run(c["missing"])
    if not c["complete"]:
        n, first = len(c["untuned"]), ", ".join(c["untuned"][:1])
        lacking = f" ({n} of its runs {'is' if n == 1 else 'are'} missing, {first} first)"
        says.append(
            f"The tuning has not ended{lacking}, so some arms have no best setting yet at some rung and length."
        )
    says += c["edges"]
    if n := c["runs"]["unasked"] - len(c["beside"]):
        records = (
            "1 record of a run that is not asked for is"
            if n == 1
            else f"{n} records of runs that are not asked for are"
        )
        says.append(f"{records} in no table.")
    if c["diverged"]:
        each = [
            f"{x['arm']} at {setting(x['setting'])}, rung {x['rung']}, {x['length']} tokens, seed {x['seed']} ({x['stage']})"
            for x in c["diverged"]
        ]
        says.append(f"Diverged, and in no mean: {'; '.join(each)}.")
    return says


def beside(tried: list[dict]) -> str:
    """What is known of settings beside the tuning's lines."""
    if not tried:
        return "A better setting may lie beside these lines."
    n, better = len(tried), sorted((x for x in tried if x["gain"] > 0), key=lambda x: -x["gain"])
    each = [f"{x['arm']} at {setting(x['setting'])}, by {x['gain']:.4f}" for x in better]
    which = f", {len(better)} of them better than the arm's best one ({'; '.join(each)})" if better else ""
    more = "1 more was tried in one run" if n == 1 else f"{n} more were tried in one run each"
    return f"Beside these lines {more}{which}; others may be better still."


def mixed_pairs(cells: list[dict]) -> list[str]:
    """How many pairs of runs were not made alike, in one sentence; none where all were."""
    pairs = sum((Counter(x["pairs"]) for x in cells), Counter())
    kinds = {"device": "different machines", "commit": "different commits"}
    mixed = " and ".join(f"in {pairs[key]} they are of {what}" for key, what in kinds.items() if pairs[key])
    says = f"Of the pairs of runs of one seed ({pairs['all']}) {mixed}, whose rounding may differ."
    return [says] * bool(mixed)


def not_run(missing: list[dict]) -> list[str]:
    """Which final runs are missing: a sentence for each place that has some, and one for those that have none. Runs of
    arms that have no setting yet wait for the tuning; the others are a matter of time."""
    reasons = ("Not run for want of time", "Waiting for tuning that there was no time for")
    says, whole = [], {why: [] for why in reasons}
    for m in missing:
        for why in reasons:
            mine = {arm: s for arm, s in m["seeds"].items() if (arm in m["unset"]) == (why != reasons[0])}
            n, of_place = sum(map(len, mine.values())), place_and_setting(m)
            if n == m["runs"]:
                whole[why].append(f"{of_place} ({n})")
            elif n:
                each = "; ".join(arms_by_seeds(mine, m["arms"]))
                says.append(f"{why}: {n} of {m['runs']} final runs of {of_place} ({each}).")
    return says + [f"{why}: all final runs of {'; '.join(of)}." for why, of in whole.items() if of]


def arms_by_seeds(seeds_of: dict[str, list[int]], all_arms: int) -> list[str]:
    """Arms that lack the same seeds in one phrase: seeds 11, 12 of kronecker, bpe_hash."""
    arms_of: dict[tuple, list[str]] = {}
    for arm, seeds in seeds_of.items():
        arms_of.setdefault(tuple(seeds), []).append(arm)
    phrases = []
    for seeds, arms in arms_of.items():
        whose = "every arm" if len(arms) == all_arms else ", ".join(arms)
        phrases.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of {whose}")
    return phrases


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
    commit, torch, device = (each_with_count(runs[k]) for k in ("commit", "torch", "device"))
    return [
        f"Made by `{made['command']}` at commit {made['commit']} on {made['date']} from the records alone.",
        f"Runs of the tuning, rechecks among them: {runs['tuning']}; final ones: {runs['final']}; made{days} at commit "
        f"{commit} with torch {torch} on {device}. (A run that went on elsewhere counts at each place.)",
    ]


def each_with_count(runs_of: dict[str, int]) -> str:
    """Names with the number of their runs, where there are several."""
    if len(runs_of) == 1:
        return next(iter(runs_of))
    return ", ".join(f"{name} ({n} run{'s' * (n > 1)})" for name, n in runs_of.items())


def heading(name: str) -> str:
    """The first line of an experiment's page."""
    return f"# {escaped(capital(name))}: input embeddings compared, every arm tuned alike"


def as_markdown(c: dict, made: dict, figures: dict[str, str], file: str) -> str:
    """The report as a page beside its figures. file: text of the experiment's file, which the page quotes."""
    shown = {name: f"![{name}]({name}.svg)\n\n{caption}" for name, caption in figures.items()}
    asked, *others = (t.markdown() for t in tables(c))
    parts = [
        heading(c["experiment"]),
        READING,
        asked,
        markdown_list("Findings", findings(c)),
        shown.pop("gap", ""),
        markdown_list("What limits them", limits(c)),
        *others,
        "## Where the gain sits, and how the settings were found" if shown else "",
        *shown.values(),
        f"## What was asked\n\nThe experiment's file:\n\n~~~python\n{file.strip()}\n~~~",
        markdown_list("Provenance", provenance(c, made)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
