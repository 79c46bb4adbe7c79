"""The pieces of scripts/gpu/suite.py as one table, curves and a report: OUT/summary.md, OUT/compare/, OUT/gathered.json.

    python scripts/gpu/suite.py gather --out results/124m

Pieces come from several machines and days. Runs belong into one comparison when what had to be equal is equal:
data and order, body at step 0, schedule, validation windows (scripts/compare.py checks them), and the facts that
OUT/plan.json pins. Anything else is refused, and the sentence names the file.
"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from data.files import write_json, write_text
from engine.errors import RunError
from scripts.analysis import numbers, report, stats, words
from scripts.analysis.report import Table
from scripts.analysis.runs import Run, check_match, make_run
from scripts.compare import write_comparison
from scripts.probes import common as probe_common

# Figures of the probes that go into the table: (probe, figure, heading, digits).
PROBE_FIGURES = [
    ("spelling", "top1_match_rate", "typos: top-1 kept", 3),
    ("spelling", "mean_kl", "typos: KL, nats", 3),
    ("spelling_generated", "top1_match_rate", "synthetic typos: top-1 kept", 3),
    ("spelling_generated", "mean_kl", "synthetic typos: KL, nats", 3),
    ("spelling_published", "top1_match_rate", "the paper's typos: top-1 kept", 3),
    ("spelling_published", "mean_kl", "the paper's typos: KL, nats", 3),
    ("generation", "misspelled echo", "misspelled word comes back", 3),
    ("generation", "forced_oov echo", "made-up word comes back", 3),
    ("layers", "E_raw S", "neighbours of the word's family, embedding", 3),
    ("layers", "L0 S", "the same after block 0", 3),
    ("tradeoff", "separation first", "kin less byte-alike, embedding", 3),
    ("tradeoff", "separation last", "the same after the last block", 3),
    ("norms", "wte/rms ratio", "RMS of the embedding, last over first", 2),
    ("norms", "wte/weight_norm ratio", "row norm of the matrix, last over first", 2),
]


def figures_of_probe(name: str, content: dict) -> dict:
    """{run: {figure: value}} of a probe's JSON, and the tests between arms that it made."""
    by_run: dict[str, dict] = {}

    def put(run: str, figure: str, value) -> None:
        if isinstance(value, int | float):
            by_run.setdefault(run, {})[figure] = value

    if name.startswith("spelling"):
        for arm, of_arm in content.items():
            seeds = of_arm["agg"].get("by_seed", {}) if isinstance(of_arm, dict) and "agg" in of_arm else {}
            for seed, found in seeds.items():
                for figure, value in found.items():
                    put(f"{arm}_s{seed}", figure, value)
    elif name.startswith("generation"):
        for condition, rates in content["rates"].items():
            for rate, arms in rates.items():
                for arm, found in arms.items():
                    for seed, value in (found or {}).get("by_seed", {}).items():
                        put(f"{arm}_s{seed}", f"{condition} {rate}", value)
    elif name.startswith("layers"):
        for run, found in content["by_run"].items():
            for level, counts in found["overall_aggregate"].items():
                for kind, value in counts.items():
                    put(run, f"{level} {kind}", value)
    elif name == "tradeoff":
        for run, found in content["by_run"].items():
            put(run, "separation first", found["separation"][0])
            put(run, "separation last", found["separation"][-1])
    elif name == "norms":
        for metric, arms in content.items():
            for arm, found in arms.items() if metric.startswith("wte/") else ():
                for seed, drift in found["by_seed"].items():
                    put(f"{arm}_s{seed}", f"{metric} ratio", drift["ratio"])
    return {"by_run": by_run, "comparisons": content.get("comparisons", [])}


# ---------------------------------------------------------------------------------------------- reading


def read_pieces(out: Path) -> list[tuple[Path, dict]]:
    """Every piece in OUT, oldest first."""
    found = []
    for path in sorted(out.glob("*.json")):
        if path.name in ("plan.json", "gathered.json"):
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise RunError(f"{path} is not valid JSON ({e}); restore it or take it away") from None
        if not isinstance(content, dict) or "piece" not in content:
            raise RunError(f"{path} is no piece of the suite; take it away")
        found.append((path, content))
    if not found:
        raise RunError(f"{out} holds no piece yet; run some first")
    if len({c["toy"] for _, c in found}) > 1:
        toy = next(p for p, c in found if c["toy"])
        raise RunError(f"{toy} is a toy's beside real ones; take it away")
    return sorted(found, key=lambda pc: pc[1]["date"])


def runs_of(pieces, plan: dict | None, pinned: list[str], kind: str) -> list[Run]:
    """The runs of one kind of piece, each held to the plan (a sweep has none) and there only once."""
    found, where = [], {}
    for path, content in pieces:
        if content["piece"] != kind:
            continue
        key = (content["arm"], content["seed"])
        if key in where:
            raise RunError(
                f"{where[key]} and {path} are both {kind} of arm {key[0]}, seed {key[1]}; take one away"
            )
        where[key] = path
        run, config = content["run"], content["config"]
        if (run["arm"], run["seed"]) != key:
            raise RunError(
                f"{path} says arm {key[0]}, seed {key[1]}, but its run is {run['arm']}, {run['seed']}"
            )
        facts = run | {"tokens": run["tokens_per_step"] * config["max_iters"]}
        for name in pinned if plan is not None and kind == "train" else ():
            if facts[name] != plan[name]:
                raise RunError(
                    f"{path} does not belong to this comparison: its {name} is {facts[name]}, the plan's {plan[name]}"
                )
        found.append(make_run(path.name, config, run, content["metrics"]))
    return found


# ---------------------------------------------------------------------------------------------- tables


def correctness_table(pieces) -> Table | None:
    rows = []
    for _, c in pieces:
        if c["piece"] != "correctness":
            continue
        wrong = [x for x in c["checks"] if not x["ok"]]
        told = [f"{x['name']}: {'-' if x['value'] is None else format(x['value'], '.3g')}" for x in wrong]
        passed = f"{len(c['checks']) - len(wrong)} of {len(c['checks'])}"
        rows.append([c["device"], c["torch"], c["date"][:10], passed, "; ".join(told) or "none"])
    header = ["device", "torch", "date", "checks passed", "not passed"]
    return table(
        "Correctness", header, rows, 5, "Every check with its value and limit is in the piece's JSON."
    )


def tune_table(pieces) -> Table | None:
    rows = []
    for _, c in pieces:
        for r in c["tried"] if c["piece"] == "tune" else ():
            keys = ", ".join(f"{k}={v}" for k, v in r["keys"].items()) or "-"
            figures = [r.get("error", "")[:60], "-", "-"]
            if "error" not in r:
                mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1f}"
                figures = [f"{r['tokens_per_s']:,.0f}", mfu, f"{r['gb']:.1f}"]
            best = r["batch_size"] == c["best"]["batch_size"] and r["keys"] == c["best"]["keys"]
            rows.append([r["batch_size"], keys, *figures, "taken" if best else "", c["device"]])
    header = ["micro-batch", "keys", "tokens/s", "MFU, %", "peak GB", "", "device"]
    return table(
        "What makes a step fast", header, rows, 2, "bpe_untied, one process each, one after the other."
    )


def embedding_table(pieces) -> Table | None:
    rows = []
    for _, c in pieces:
        for dtype, bench in c.get("results", {}).items() if c["piece"] == "embedding" else ():
            for r in bench["rows"]:
                ms, share = r["fwd_bwd_ms"], r["share_of_bandwidth_bound"]
                reference = f"{ms['reference'] / ms['kronecker']:.0f}x" if "reference" in ms else "-"
                peak = (r.get("peak_bytes") or {}).get("kronecker")
                rows.append(
                    [f"{r['V']:,} x {r['d']:,}, pos_dim {r['pos_dim']}", r["ids"], dtype, f"{r['tokens']:,}",
                     f"{ms['kronecker']:.3f}", f"{ms['embedding']:.3f}", f"{ms['kronecker'] / ms['embedding']:.2f}x",
                     reference, f"{share['kronecker']:.0%}", "-" if not peak else f"{peak['extra'] / 1e6:,.0f}",
                     c["device"]]
                )  # fmt: skip
    header = [
        "embedding",
        "ids",
        "dtype",
        "tokens",
        "ms",
        "nn.Embedding, ms",
        "over nn.Embedding",
        "reference over",
    ]
    header += ["share of bandwidth", "extra MB", "device"]
    note = "Forward and backward, medians of interleaved runs; extra MB: peak of a step beyond output and gradient."
    return table("The embedding alone", header, rows, 3, note)


def ways_table(pieces) -> Table | None:
    """Milliseconds of the package's way and of the candidates."""
    rows, sides = [], ["package", "table", "slots", "nn.Embedding"]
    for _, c in pieces:
        for r in c.get("ways", []) if c["piece"] == "embedding" else ():
            what = f"{r['V']:,} x {r['d']:,}, pos_dim {r['pos_dim']}"
            rows.append(
                [what, r["dtype"], f"{r['tokens']:,}", *(f"{r['ms'][s]:.3f}" for s in sides), c["device"]]
            )
    header = ["embedding", "dtype", "tokens", *(f"{s}, ms" for s in sides), "device"]
    note = "Forward and backward; ids by a Zipf law. scripts/gpu/candidates.py says what the ways are."
    return table("Ways to the same embedding", header, rows, 2, note)


def speed_table(pieces) -> Table | None:
    rows, notes = [], []
    for _, c in pieces:
        if c["piece"] != "speed":
            continue
        rounds = {side: found for side, found in c["rounds"].items() if found}
        theirs = next((s for s in rounds if s.startswith("nanoGPT, as")), None)

        def ratio(side, base, rounds=rounds):
            if side not in rounds or base not in rounds:
                return "-"
            of_base = {f["round"]: f["tokens_per_s"] for f in rounds[base]}
            ratios = [f["tokens_per_s"] / of_base[f["round"]] for f in rounds[side] if f["round"] in of_base]
            return f"{statistics.median(ratios):.3f}x" if ratios else "-"

        for side, found in rounds.items():

            def median(key, found=found):
                values = [f[key] for f in found if f[key] is not None]
                return statistics.median(values) if values else None

            mfu = median("mfu")
            rows.append(
                [side, f"{median('tokens_per_s'):,.0f}", f"{median('ms'):,.1f}", f"{median('tokens'):,.0f}",
                 "-" if mfu is None else f"{mfu:.1f}", f"{median('gb'):.1f}", ratio(side, theirs),
                 ratio(side, "bpe_untied"), len(found), c["device"]]
            )  # fmt: skip
        keys = ", ".join(f"{k}={v}" for k, v in c["keys"].items()) or "no further keys"
        notes.append(f"{c['device']}, {c['date'][:10]}: micro-batch {c['batch_size']}, {keys}.")
        convention, peak = c["mfu"]["convention"], c["mfu"]["peak_flops"]
        told = f"peak {peak / 1e12:,.0f} TFLOP/s" if peak else "the device's peak is not known"
        notes.append(f"MFU: {convention}; {told}.")
    header = [
        "side",
        "tokens/s",
        "ms a step",
        "tokens a step",
        "MFU, %",
        "peak GB",
        "over nanoGPT",
        "over bpe_untied",
    ]
    return table("A training step", [*header, "rounds", "device"], rows, 1, " ".join(dict.fromkeys(notes)))


def probe_table(pieces, arms: list[str]) -> Table | None:
    values: dict = {}
    for _, c in pieces:  # oldest first: of two measurements of a run the newer stays
        for probe, found in c.get("probes", {}).items() if c["piece"] == "probes" else ():
            for run, figures in found["by_run"].items():
                arm, _, seed = run.rpartition("_s")
                for figure, value in figures.items():
                    values.setdefault((probe, figure), {})[arm, int(seed)] = value
    arms = arms or sorted({a for v in values.values() for a, _ in v}, key=report.arm_sort_key)
    baseline = "bpe_untied" if "bpe_untied" in arms else (arms or [""])[0]
    rows = []
    for probe, figure, heading, digits in PROBE_FIGURES:
        if (probe, figure) not in values:
            continue
        over = probe_common.over_seeds(values[probe, figure], arms, baseline)
        row = [heading, *(probe_common.cell(over[a], digits) for a in arms)]
        rows.append([*row, probe_common.difference_cell(over.get("kronecker"), digits)])
    header = ["probe", *arms, f"kronecker less {baseline} (95%)"]
    return table(
        "Probes", header, rows, 1, "Mean ± SD over seeds; what each figure is stands in scripts/probes/*.py."
    )


def sweep_table(runs: list[Run], says: list[str]) -> Table | None:
    """Arms of the sweep against bpe_untied and kronecker of the sweep itself."""
    if not runs:
        return None
    check_match(runs)
    by = {(r.arm, r.seed): r for r in runs if r.state == "finished"}
    rows = []
    for arm in report.arms_of(runs):
        mine = {s: r for (a, s), r in by.items() if a == arm}
        if not mine:
            continue
        final = {s: r.val[-1]["val/loss"] for s, r in mine.items()}
        params = next(iter(mine.values())).info["params"]
        gains = []
        for other in ("bpe_untied", "kronecker"):
            pairs = [by[other, s].val[-1]["val/loss"] - x for s, x in final.items() if (other, s) in by]
            gains.append("-" if arm == other or not pairs else words.with_sign(stats.interval(pairs)["mean"]))
        share = 100 * params["input"] / params["stock_table"]
        rows.append(
            [
                arm,
                f"{params['input']:,}",
                f"{share:.1f}%",
                f"{stats.interval(final.values())['mean']:.4f}",
                *gains,
            ]
        )
    best = min((r for r in rows if r[0] != "bpe_untied"), key=lambda r: float(r[3]), default=None)
    if best and best[4] != "-":
        better = float(best[4]) > 0
        says.append(
            f"Sweep: {best[0]} comes {'below' if better else 'no lower than'} bpe_untied "
            f"({best[4]} nats) with {best[2]} of a table's input parameters."
        )
    tokens = runs[0].max_iters * runs[0].info["tokens_per_step"]
    header = ["arm", "input parameters", "of a table", "val loss", "gain over bpe_untied", "over kronecker"]
    return table(
        f"What moves the gap: {numbers.count(tokens)} tokens each",
        header,
        rows,
        1,
        "One schedule of its own; nats.",
    )


def table(title: str, header, rows, left: int, note: str) -> Table | None:
    return Table(title, header, rows, left, note) if rows else None


# ---------------------------------------------------------------------------------------------- the whole


def gather(out: Path, plan: dict | None, pinned: list[str], command: str) -> dict:
    """Write summary.md, compare/ and gathered.json into OUT; returns what gathered.json holds."""
    pieces = read_pieces(out)
    trained = runs_of(pieces, plan, pinned, "train")
    c, says = None, []
    if trained:
        arms = report.arms_of(trained)
        c = numbers.compare(trained, "bpe_tied" if "bpe_tied" in arms else arms[0])
        write_comparison(c, trained, out, f"python scripts/gpu/suite.py {command}")
        says += words.findings(c)[: 1 if c["decomposition"] else 0] + c["claims"]
    swept = sweep_table(runs_of(pieces, plan, pinned, "sweep"), says)
    others = {
        "speed": speed_table(pieces),
        "tune": tune_table(pieces),
        "embedding": embedding_table(pieces),
        "ways": ways_table(pieces),
        "probes": probe_table(pieces, c["arms"] if c else []),
        "sweep": swept,
        "correctness": correctness_table(pieces),
    }
    tables = words.tables(c) if c else []
    for order, (name, t) in enumerate(others.items()):
        if t:
            tables.append(t)
            report.write_section(out, name, t.title, 20 + order, [t.block()])
    made = [
        f"`{p.name}`: `{x['command']}` at commit {x['commit']}, {x['device']}, torch {x['torch']}, {x['date'][:10]}, "
        f"{x['seconds']:.0f} s"
        for p, x in pieces
    ]
    lines = ["# What the GPU said" if not pieces[0][1]["toy"] else "# A toy: nothing here is a result"]
    lines += says
    for t in tables:
        lines.append(t.markdown())
    if c:
        lines.append("Curves and every pair of arms: `compare/report.html`, `compare/comparison.md`.")
    lines.append("## How it was made\n\n" + "\n".join(f"- {m}" for m in made))
    write_text(out / "summary.md", "\n\n".join(lines) + "\n")
    result = {"pieces": [p.name for p, _ in pieces], "says": says, "tables": [asdict(t) for t in tables]}
    write_json(out / "gathered.json", result)
    for t in tables:
        report.say("\n" + t.text())
    print("\n" + "\n".join(says) + f"\n\nwritten to {out / 'summary.md'}")
    return result
