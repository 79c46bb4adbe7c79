"""The comparison in words: its tables and sentences, for the terminal, for Markdown and for the page."""

import textwrap

import numpy as np

from kronecker.audit import audit_line
from scripts.analysis.numbers import count
from scripts.analysis.report import Table, bullets, escaped, markdown_list
from scripts.analysis.runs import short

SIDES = {"input": "read", "target": "predicted"}  # of a loss by frequency: what was done with the token


def dash(x: float | None, form: str) -> str:
    """A number in a form; "-" where there is none."""
    return "-" if x is None else format(x, form)


def with_sign(x: float | None, digits: int = 4) -> str:
    """A difference with its sign."""
    return dash(x, f"+.{digits}f")


def span(interval: dict | None) -> str:
    """The ends of an interval of differences; "-" where one value gives none."""
    if not interval or interval["low"] is None:
        return "-"
    return f"{with_sign(interval['low'])} to {with_sign(interval['high'])}"


def with_span(g: dict) -> str:
    """A difference with the ends of its interval."""
    return f"{with_sign(g['mean'])} ({'one seed, no interval' if g['low'] is None else span(g)})"


def tables(c: dict) -> list[Table]:
    """The comparison's tables: losses, gains, steps to reach another's loss, sizes and speeds."""
    found = [loss_table(c), gain_table(c), reach_table(c), size_table(c), arm_table(c)]
    where = f"after {count(c['tokens'])} tokens"
    found += [frequency_table(c["frequency"].get(side, {}), side, c["baseline"], where) for side in SIDES]
    return [t for t in found if t.rows]


def bpb_column(c: dict) -> list[str]:
    """The header of bits per byte, where every arm has them."""
    return ["bits/byte"] * all("val_bpb" in f for f in c["final"].values())


def loss_table(c: dict) -> Table:
    """Final validation loss of every arm and seed."""
    several, bpb, rows = len(c["seeds"]) > 1, bpb_column(c), []
    seeds = c["seeds"] if len(c["seeds"]) <= 5 else []
    for arm, f in c["final"].items():
        row = [arm, *(dash(f["val_loss"].get(str(s)), ".4f") for s in seeds)]
        row += [f"{f['mean']:.4f}", dash(f["sd"], ".4f")] * several
        rows.append(row + [f"{f['val_bpb']['mean']:.4f}" for _ in bpb])
    header = ["arm", *(f"seed {s}" for s in seeds), *["mean", "SD"] * several, *bpb]
    title = f"Validation loss (nats/token) after {c['at_iter']:,} steps, {count(c['tokens'])} tokens"
    return Table(title, header, rows)


def gain_table(c: dict) -> Table:
    """Every pair of arms: gain, its interval, and the same in per cent, perplexity and bits per byte."""
    rows, bpb = [], bpb_column(c)
    for p in c["pairs"]:
        g = p["gain_nats"]
        row = [p["arm"], p["over"], with_sign(g["mean"]), dash(g["sd"], ".4f"), span(g)]
        percent = p["gain_percent"] or {}
        row.append(dash(percent.get("mean"), "+.2f") + "%" * bool(percent))
        row.append(f"{p['perplexity_ratio']['mean']:.3f}")
        rows.append(row + [with_sign(p["gain_bpb"]["mean"]) for _ in bpb])
    header = ["arm", "over", "gain, nats", "SD", "95% interval", "loss", "perplexity", *bpb]
    title = "Gain of one arm over another, paired by seed (positive: the arm is better)"
    note = "loss: gain in per cent of the other's loss; perplexity: the arm's over the other's."
    return Table(title, header, rows, left=2, note=note)


def reach_table(c: dict) -> Table:
    """When the better arm of a pair comes down to the other's last loss."""
    rows = []
    for p in c["pairs"]:
        gain = p["gain_nats"]["mean"]
        ahead = ("arm", "over") if gain > 0 else ("over", "arm")
        r = p["reaches"][ahead[0]]
        if gain and r["step"]:
            ratios = [f"{c['at_iter'] / s:.2f}x" if s else "never" for s in r["step_by_seed"].values()]
            each = " ".join(ratios[:6]) if len(ratios) > 1 else "-"
            rows.append([*(p[who] for who in ahead), f"{r['step']:,.0f}", f"{r['ratio']:.2f}x", each])
    note = (
        "Linear between evaluations. The learning rate has not come down at that step, so a schedule cut to it would do "
        "better."
    )
    title = f"Steps to reach another arm's last loss (of {c['at_iter']:,})"
    return Table(title, ["arm", "reaches", "at step", "fewer", "by seed"], rows, left=2, note=note)


def size_table(c: dict) -> Table:
    """Parameters, speed beside the baseline, and the drift of the embedding's RMS."""
    rows = []
    for arm, f in c["final"].items():
        params, rms = f.get("params") or {}, f["rms"] or {}
        speed = (c["speed"].get(arm) or {}).get("ratio") or {}
        ends = [float(np.mean(list(rms[end].values()))) if rms else None for end in ("first", "last")]
        cells = [(params.get("input"), ",", ""), (params.get("total"), ",", "")]
        cells += [(params.get("input_percent_of_stock"), ".1f", "%"), (speed.get("mean"), ".2f", "x")]
        cells += [*((x, ".4f", "") for x in ends), ((rms.get("ratio") or {}).get("mean"), ".2f", "x")]
        rows.append([arm, *(dash(x, form) + unit * (x is not None) for x, form, unit in cells)])
    note = (
        f"of stock: input side against a learned table; tokens/s: against {c['baseline']}, medians of the runs themselves (a "
        "benchmark pairs its sides more tightly)."
    )
    header = ["arm", "input side", "total", "of stock", "tokens/s", "rms first", "last", "drift"]
    return Table("Parameters, speed, drift of the table's RMS", header, rows, note=note)


def arm_table(c: dict) -> Table:
    """The keys that make each arm, where they are not at their defaults."""
    said = {arm: ", ".join(f"{k}={v}" for k, v in keys.items()) for arm, keys in c["arm_keys"].items()}
    rows = [[arm, keys or "-"] for arm, keys in said.items()]
    return Table("What makes each arm", ["arm", "keys that are not at their defaults"], rows, left=2)


def frequency_table(by_arm: dict[str, list], side: str, over: str, where: str) -> Table:
    """Gain of every arm over another by training count of the token read ("input") or predicted ("target")."""
    arms = [arm for arm, buckets in by_arm.items() if buckets]
    found = {arm: {b["count"]: b for b in by_arm[arm]} for arm in arms}
    tokens = {b["count"]: b["tokens"] for arm in arms for b in by_arm[arm]}
    rows = []
    for low in sorted(tokens):
        gains = [found[arm].get(low) for arm in arms]
        rows.append([f"{low:,}", f"{tokens[low]:,}", *(with_sign(b and b["mean"], 3) for b in gains)])
    title = f"Gain over {over} by training count of the token {SIDES[side]}, {where}"
    note = "count: powers of 4, from this one to the next, in the first 100M training tokens; tokens: of the validation."
    return Table(title, ["count", "tokens", *arms], rows, left=0, note=note)


def findings(c: dict) -> list[str]:
    """The decomposition, the codec and the paper's figures as sentences."""
    says, p = [], c["paper"]
    if d := c["decomposition"]:
        head, codec, total = (with_span(d[k]) for k in ("head", "codec", "total"))
        says.append(
            f"Where kronecker's gain over bpe_tied comes from: untying the head {head} nats, then the codec for the table "
            f"{codec}; together {total}."
        )
    if c["codec"]:
        says.append("The codec: " + audit_line(c["codec"]).removeprefix("kronecker: ") + ".")
    says.append(
        f"The paper ({p['scale']}; {p['pair']}): gain {p['gain_nats'][0]} ± {p['gain_nats'][1]} nats, "
        f"{p['gain_percent'][0]} ± {p['gain_percent'][1]}% of the loss, {p['steps_ratio']}x fewer steps."
    )
    return says


def all_notes(c: dict) -> list[str]:
    """The comparison's notes, and every run that was left out with the reason."""
    return c["notes"] + [f"Left out: {x['run']} ({x['state']})." for x in c["left_out"]]


def as_text(c: dict) -> str:
    """The whole comparison for a terminal, at most 110 columns."""
    parts = [*(t.text() for t in tables(c)), *(textwrap.fill(s, 108) for s in findings(c))]
    lists = {"What this can say": c["claims"], "Notes": all_notes(c)}
    return "\n\n".join(parts + [f"{heading}\n{bullets(items)}" for heading, items in lists.items() if items])


def as_markdown(c: dict, provenance: list[str]) -> str:
    """The whole comparison as a page beside curves.svg."""
    parts = ["# The arms compared", *(t.markdown() for t in tables(c)), *map(escaped, findings(c))]
    parts.append("![Validation loss, gain and training loss](curves.svg)")
    lists = {"What this can say": c["claims"], "Notes": all_notes(c), "Provenance": provenance}
    parts += [markdown_list(heading, items) for heading, items in lists.items() if items]
    return "\n\n".join(parts) + "\n"


def provenance(c: dict, made: dict) -> list[str]:
    """Which runs were compared, made by what, and how one knows that they match; made: see scripts/provenance.py."""

    def distinct(key):
        return ", ".join(sorted({str(r[key]) for r in c["runs"] if r.get(key)})) or "not recorded"

    val, schedule = (short(c["runs"][0][f"{key}_sha256"]) for key in ("val", "schedule"))
    return [
        f"Compared by `{made['command']}` on {made['date']}.",
        f"{len(c['runs'])} runs, made at commit {distinct('commit')} with torch {distinct('torch')} on {distinct('device')}.",
        f"Validation windows {val}, schedule {schedule}; training data and order, and bodies at step 0, are equal across "
        "arms for every seed.",
    ]


def section(c: dict, curves: list[dict], provenance: list[str]) -> list[dict]:
    """The comparison as blocks of the page (see report.write_section)."""
    losses, gains, *others = (t.block() for t in tables(c))
    # the claim stands beside the first table, where a reader would quote from
    blocks = [losses, {"claim": c["claims"]}, gains, {"text": findings(c)}, *curves, *others]
    of_run = ("arm", "seed", "state", "data_sha256", "body_sha256", "run")
    rows = [[short(r[k]) if "sha256" in k else r[k] for k in of_run] for r in c["runs"]]
    runs = Table("", ["arm", "seed", "state", "data", "body at step 0", "run"], rows, left=6)
    hidden = [runs.block(), {"text": [s.replace("`", "") for s in provenance]}]
    return [*blocks, {"text": all_notes(c)}, {"details": "Runs and provenance", "blocks": hidden}]
