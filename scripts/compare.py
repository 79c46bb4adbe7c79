"""Compare matched runs: who wins, by how much, how surely, and at what cost.

    python scripts/compare.py out/demo                      every run below out/demo
    python scripts/compare.py out/a out/b --baseline bpe_untied
    python scripts/compare.py --wandb entity/project        the same from wandb's servers

Prints the comparison and writes OUT/compare/: comparison.json, comparison.md, curves.png, curves.svg and
report.html (one file, no outside resources). Runs that do not match are refused: a difference between arms
means something only when data, order, body at step 0, schedule and validation windows are the same.

Signs: a gain is the other arm's loss minus this arm's, paired by seed; positive means this arm is better.
"""

import argparse
import datetime
import html
import json
import math
import sys
import textwrap
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from engine.errors import RunError
from kronecker.audit import audit_line
from scripts.analysis import report, stats

# What has to be equal, over which runs, and what it means when it is not.
MATCH_PER_SEED = {
    "data_sha256": "they did not read the same training tokens in the same order",
    "body_sha256": "their bodies were not the same at step 0",
}
MATCH_ALL = {
    "val_sha256": "they were not evaluated on the same validation windows",
    "schedule_sha256": "they did not follow the same learning-rate schedule",
    "tokens_per_step": "their global batches differ",
}
MATCH_IF_RECORDED = {"data_fingerprint": "they were trained on different data"}
# Config keys in which the seeds of one arm may differ without becoming another arm.
FREE_KEYS = set(
    "seed out_dir data_dir device compile dry_run init_from eval_only keep max_skipped deterministic batch_size "
    "gradient_accumulation_steps global_batch_size tracker".split()
)
FREE_PREFIXES = ("wandb_", "log_", "ckpt_")

PAPER = {
    "pair": "kronecker over bpe_tied",
    "scale": "GPT-2 124M, 2.5B tokens of FineWeb-Edu, three seeds",
    "gain_nats": [0.083, 0.007],
    "gain_percent": [2.5, 0.2],
    "perplexity_ratio": 0.91,
    "steps_ratio": 1.43,
}


class CompareError(RunError):
    """What is wrong with the runs, in one sentence for the person who asked."""


@dataclass
class Run:
    name: str  # the folder, or the run's path on wandb
    arm: str
    seed: int
    config: dict
    info: dict  # run.json
    train: list[dict] = field(default_factory=list)  # rows with train/loss, one an iter, rising
    val: list[dict] = field(default_factory=list)  # rows with val/loss, one an iter, rising
    state: str = "finished"

    @property
    def max_iters(self) -> int:
        return int(self.config["max_iters"])

    def val_curve(self, upto: int) -> tuple[list[int], list[float]]:
        rows = [r for r in self.val if r["iter"] <= upto]
        return [r["iter"] for r in rows], [r["val/loss"] for r in rows]

    def val_at(self, it: int, key: str = "val/loss"):
        return next((r.get(key) for r in self.val if r["iter"] == it), None)


# ---------------------------------------------------------------------------------------------- reading


def find_run_folders(paths) -> list[Path]:
    """Every folder at or below the paths that holds a run.json, sorted."""
    found = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise CompareError(f"there is no folder {path}; give a run's folder or one that holds runs")
        found.update(p.parent for p in path.rglob("run.json"))
    return sorted(found)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompareError(f"{path} is missing; {path.parent} is not a whole run folder") from None
    except ValueError as e:
        raise CompareError(f"{path} is not valid JSON ({e}); restore it or leave this run out") from None
    if not isinstance(content, dict):
        raise CompareError(f"{path} should hold a JSON object; restore it or leave this run out")
    return content


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl. A last line cut short by a kill is dropped; another bad line is an error."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise CompareError(
                f"line {number} of {path} is not valid JSON; mend or remove that line and compare again"
            ) from None
        if isinstance(row, dict) and "iter" in row:
            rows.append(row)
    return rows


def rows_with(rows, key: str) -> list[dict]:
    """Rows that carry `key`, rising by iter; after a resume the later row of an iter counts."""
    latest = {
        int(r["iter"]): {**r, "iter": int(r["iter"])} for r in rows if isinstance(r.get(key), (int, float))
    }
    return [latest[i] for i in sorted(latest)]


def make_run(name: str, config: dict, info: dict, rows: list[dict]) -> Run:
    for key, where in (("arm", info), ("seed", info), ("max_iters", config)):
        if where.get(key) is None:
            source = "config" if where is config else "run record"
            raise CompareError(f"{name} has no '{key}' in its {source}; it is not a run that can be compared")
    run = Run(
        name,
        str(info["arm"]),
        int(info["seed"]),
        config,
        info,
        rows_with(rows, "train/loss"),
        rows_with(rows, "val/loss"),
    )
    bad = next((r["iter"] for r in run.val if not math.isfinite(r["val/loss"])), None)
    if bad is not None:
        run.state = f"diverged: val/loss is not finite at iter {bad}"
        run.val = [r for r in run.val if r["iter"] < bad]
    elif not run.val:
        run.state = "no evaluation yet"
    elif run.val[-1]["iter"] < run.max_iters:
        run.state = f"unfinished: iter {run.val[-1]['iter']:,} of {run.max_iters:,}"
    return run


def load_folder(path: Path) -> Run:
    config, info = read_json(path / "config.json"), read_json(path / "run.json")
    return make_run(str(path), config, info, read_metrics(path / "metrics.jsonl"))


def load_wandb(project: str, group: str | None = None, api=None) -> list[Run]:
    """Runs of a wandb project (`entity/project`); `api` stands in for wandb.Api() in tests."""
    if project.count("/") != 1 or not all(project.split("/")):
        raise CompareError(f"--wandb wants entity/project, got {project!r}")
    if api is None:
        try:
            import wandb
        except ImportError:
            raise CompareError("reading from wandb needs the package wandb: pip install wandb") from None
        try:  # Api() would ask for a key at the terminal and wait
            known = wandb.login(prompt=False)
        except TypeError:  # older wandb has no such argument
            known = bool(wandb.api.api_key)
        except Exception as e:
            raise CompareError(f"wandb refused: {first_line(e)}") from None
        if not known:
            raise CompareError("wandb is not logged in; run `wandb login` or set WANDB_API_KEY")
        try:
            api = wandb.Api(timeout=30)
        except Exception as e:  # wandb raises its own errors, requests' and ValueError's
            raise CompareError(f"wandb refused ({first_line(e)}); log in with `wandb login`") from None
    runs = []
    try:
        for w in api.runs(project, filters={"group": group} if group else None):
            config = dict(w.config)
            info = config.pop("run", None)
            if not isinstance(info, dict):  # the same fields, flattened by whoever logged them
                info = {k[4:]: v for k, v in config.items() if k.startswith(("run/", "run."))}
            if not info:
                continue  # somebody else's run in the same project
            rows = [{k: v for k, v in row.items() if v is not None} for row in w.scan_history()]
            runs.append(make_run(f"{project}/{w.name}", config, info, [r for r in rows if "iter" in r]))
    except CompareError:
        raise
    except Exception as e:
        raise CompareError(f"cannot read {project} from wandb: {first_line(e)}") from None
    if not runs:
        raise CompareError(
            f"{project} on wandb holds no run made by this project" + (f" in group {group}" if group else "")
        )
    return sorted(runs, key=lambda r: r.name)


def first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


# ---------------------------------------------------------------------------------------------- matching


def check_match(runs: list[Run]) -> None:
    """Refuse runs that differ in what has to be equal, naming the field and the two runs."""
    seen: dict = {}
    for run in runs:
        other = seen.setdefault(("twin", run.arm, run.seed), run)
        if other is not run:
            raise CompareError(
                f"{other.name} and {run.name} are both arm {run.arm}, seed {run.seed}; give only one of them"
            )
    for fields, per_seed in ((MATCH_PER_SEED, True), (MATCH_ALL, False), (MATCH_IF_RECORDED, False)):
        for name, meaning in fields.items():
            for run in runs:
                value = run.info.get(name)
                if value is None and fields is MATCH_IF_RECORDED:
                    continue
                if value is None:
                    raise CompareError(
                        f"{run.name} records no {name}, so nothing shows that it matches; leave it out"
                    )
                other = seen.setdefault((name, run.seed if per_seed else None), run)
                if other.info[name] != value:
                    where = f" (seed {run.seed})" if per_seed else ""
                    raise CompareError(
                        f"runs do not match: {name} differs between {other.name} "
                        f"({short(other.info[name])}) and {run.name} ({short(value)}){where}: {meaning}"
                    )
    lengths = {run.max_iters: run for run in runs}
    if len(lengths) > 1:
        (a, ra), (b, rb) = list(lengths.items())[:2]
        raise CompareError(
            f"runs do not match: max_iters differs between {ra.name} ({a}) and {rb.name} ({b})"
        )


def short(value) -> str:
    return str(value)[:12]


def config_notes(runs: list[Run]) -> list[str]:
    """Settings that differ between seeds of one arm, or devices that differ: told, not refused."""
    notes = []
    for arm in arms_of(runs):
        mine = [r for r in runs if r.arm == arm]
        for key in sorted(set().union(*(r.config for r in mine))):
            if key in FREE_KEYS or key.startswith(FREE_PREFIXES):
                continue
            values = {json.dumps(r.config.get(key), sort_keys=True, default=str) for r in mine}
            if len(values) > 1:
                notes.append(f"The seeds of {arm} differ in {key}: {', '.join(sorted(values))}.")
    for key, what in (("device", "devices"), ("torch", "torch versions"), ("commit", "commits")):
        values = sorted({str(r.info.get(key)) for r in runs})
        if len(values) > 1:
            notes.append(f"The runs come from different {what}: {', '.join(v[:40] for v in values)}.")
    dtypes = sorted({str(r.config.get("dtype")) for r in runs})
    if len(dtypes) > 1:
        notes.append(f"The runs differ in dtype: {', '.join(dtypes)}.")
    return notes


def arms_of(runs) -> list[str]:
    return sorted({r.arm for r in runs}, key=report.arm_sort_key)


# ---------------------------------------------------------------------------------------------- numbers


def compare(runs: list[Run], baseline: str = "bpe_tied", allow_unfinished: bool = False) -> dict:
    """Everything that the tables, the figures and the page show, as one JSON-able dict."""
    left_out = [r for r in runs if r.state != "finished"]
    kept = [r for r in runs if r.state == "finished"]
    if allow_unfinished:
        left_out = [r for r in left_out if r.state.startswith(("diverged", "no evaluation"))]
        kept = [r for r in runs if r not in left_out]
    if not kept:
        listing = "; ".join(f"{r.name} ({r.state})" for r in left_out[:4]) or "none was found"
        hint = (
            "" if allow_unfinished else "; --allow-unfinished compares at the last step that all have reached"
        )
        raise CompareError(f"there is no finished run to compare: {listing}{hint}")
    check_match(kept)

    arms = arms_of(kept)
    if baseline not in arms:
        raise CompareError(
            f"no finished run of the baseline {baseline}; there are {', '.join(arms)} (--baseline=ARM)"
        )
    by = {(r.arm, r.seed): r for r in kept}
    seeds = sorted({r.seed for r in kept})
    shared_iters = sorted(set.intersection(*({v["iter"] for v in r.val} for r in kept)))
    if not shared_iters:
        raise CompareError(
            "the runs share no step at which all were evaluated; compare runs of one eval_interval"
        )
    at = shared_iters[-1]
    tokens_per_step = int(kept[0].info["tokens_per_step"])

    notes = config_notes(kept)
    if at < kept[0].max_iters:
        notes.append(
            f"Unfinished runs are in: everything is compared at iter {at:,} of {kept[0].max_iters:,}, "
            "before the learning rate has come down."
        )
    missing = [f"{arm} seed {s}" for arm in arms for s in seeds if (arm, s) not in by]
    if missing:
        notes.append(
            f"Not every arm has every seed (missing: {', '.join(missing)}); pairs use the seeds they share."
        )

    result = {
        "baseline": baseline,
        "arms": arms,
        "seeds": seeds,
        "at_iter": at,
        "max_iters": kept[0].max_iters,
        "tokens_per_step": tokens_per_step,
        "tokens": at * tokens_per_step,
        "final": {},
        "pairs": [],
        "left_out": [{"run": r.name, "arm": r.arm, "seed": r.seed, "state": r.state} for r in left_out],
    }
    for arm in arms:
        mine = [by[arm, s] for s in seeds if (arm, s) in by]
        entry = {"val_loss": {str(r.seed): r.val_at(at) for r in mine}}
        entry.update(stats.interval(entry["val_loss"].values()))
        bpb = {str(r.seed): r.val_at(at, "val/bpb") for r in mine}
        if all(v is not None for v in bpb.values()):
            entry["val_bpb"] = {**stats.interval(bpb.values()), "by_seed": bpb}
        params = mine[0].info.get("params") or {}
        if params:
            entry["params"] = dict(params)
            if params.get("stock_table"):
                entry["params"]["input_percent_of_stock"] = 100 * params["input"] / params["stock_table"]
        result["final"][arm] = entry
        result["final"][arm]["rms"] = rms_drift(mine, at)

    # every pair of arms, those against the baseline first
    order = [(arm, baseline) for arm in arms if arm != baseline]
    order += [(b, a) for a, b in combinations([a for a in arms if a != baseline], 2)]
    for arm, over in order:
        common = [s for s in seeds if (arm, s) in by and (over, s) in by]
        if common:
            pair = compare_pair([by[arm, s] for s in common], [by[over, s] for s in common], at, shared_iters)
            result["pairs"].append(pair)
        else:
            notes.append(f"{arm} and {over} share no seed, so they are not compared.")
    result["speed"] = speeds(by, arms, seeds, baseline)
    result["decomposition"] = decomposition(result["pairs"])
    result["codec"] = next((r.info["codec"] for r in kept if r.info.get("codec")), None)
    result["paper"] = PAPER
    result["claims"] = claims(result, kept)
    result["notes"] = notes
    result["runs"] = [
        {"run": r.name, "arm": r.arm, "seed": r.seed, "state": r.state}
        | {
            k: r.info.get(k)
            for k in ("device", "torch", "commit", "started", "command", *MATCH_PER_SEED, *MATCH_ALL)
        }
        for r in kept
    ]
    return result


def compare_pair(mine: list[Run], theirs: list[Run], at: int, iters: list[int]) -> dict:
    """One arm over another, paired by seed. All gains: the other's minus mine, positive = mine is better."""
    a = np.array([r.val_at(at) for r in mine])
    b = np.array([r.val_at(at) for r in theirs])
    gain = stats.interval(b - a)
    pair = {
        "arm": mine[0].arm,
        "over": theirs[0].arm,
        "seeds": [r.seed for r in mine],
        "gain_nats": gain | {"by_seed": {str(r.seed): float(d) for r, d in zip(mine, b - a, strict=True)}},
        "gain_percent": stats.interval(100 * (b - a) / b),
        # the ratio of perplexities is exp of the loss difference; its interval is the gain's, mapped
        "perplexity_ratio": {
            "mean": math.exp(-gain["mean"]),
            "low": None if gain["high"] is None else math.exp(-gain["high"]),
            "high": None if gain["low"] is None else math.exp(-gain["low"]),
        },
    }
    bits = [(r.val_at(at, "val/bpb"), t.val_at(at, "val/bpb")) for r, t in zip(mine, theirs, strict=True)]
    if all(x is not None and y is not None for x, y in bits):
        pair["gain_bpb"] = stats.interval(y - x for x, y in bits)
    pair["reaches"] = {
        "arm": reach(mine, theirs, at, iters),  # arm comes down to over's last loss
        "over": reach(theirs, mine, at, iters),
    }
    return pair


def reach(mine: list[Run], theirs: list[Run], at: int, iters: list[int]) -> dict:
    """Where my curve comes down to their last loss: on the mean curve, and by seed. None: it never does."""
    curve = [float(np.mean([r.val_at(i) for r in mine])) for i in iters]
    target = float(np.mean([r.val_at(at) for r in theirs]))
    step = stats.first_crossing(iters, curve, target)
    by_seed = {}
    for r, t in zip(mine, theirs, strict=True):
        its, losses = r.val_curve(at)
        by_seed[str(r.seed)] = stats.first_crossing(its, losses, t.val_at(at))
    ratios = [at / s for s in by_seed.values() if s]
    return {
        "step": step,
        "ratio": at / step if step else None,
        "step_by_seed": by_seed,
        "ratio_over_seeds": stats.interval(ratios) if ratios and len(ratios) == len(by_seed) else None,
    }


def rms_drift(mine: list[Run], at: int) -> dict | None:
    """RMS of the embedding table over the vocabulary, first and last evaluation, per seed."""
    first, last = {}, {}
    for run in mine:
        rows = [r for r in run.val if r["iter"] <= at and isinstance(r.get("wte/rms"), (int, float))]
        if not rows:
            return None
        first[str(run.seed)], last[str(run.seed)] = rows[0]["wte/rms"], rows[-1]["wte/rms"]
    ratio = [last[s] / first[s] for s in first if first[s]]
    return {"first": first, "last": last, "ratio": stats.interval(ratio) if ratio else None}


def speeds(by: dict, arms, seeds, baseline: str) -> dict:
    """Median tokens/s of each run past its first tenth (warm-up, compile), and the ratio to the baseline."""
    speed = {}
    for (arm, seed), run in by.items():
        rows = [r["tok_per_sec"] for r in run.train if isinstance(r.get("tok_per_sec"), (int, float))]
        rows = rows[max(1, len(rows) // 10) :]
        if rows:
            speed[arm, seed] = float(np.median(rows))
    result = {}
    for arm in arms:
        mine = {str(s): speed[arm, s] for s in seeds if (arm, s) in speed}
        ratios = [
            speed[arm, s] / speed[baseline, s] for s in seeds if (arm, s) in speed and (baseline, s) in speed
        ]
        if mine:
            result[arm] = {"tok_per_sec": mine, "ratio": stats.interval(ratios) if ratios else None}
    return result


def decomposition(pairs: list[dict]) -> dict | None:
    """Split the gain over the tied baseline: first the head is untied, then the table becomes the codec."""
    find = {(p["arm"], p["over"]): p for p in pairs}
    head, codec = find.get(("bpe_untied", "bpe_tied")), find.get(("kronecker", "bpe_untied"))
    total = find.get(("kronecker", "bpe_tied"))
    if not (head and codec and total) or not head["seeds"] == codec["seeds"] == total["seeds"]:
        return None
    return {
        "head": {"step": "bpe_tied -> bpe_untied", **head["gain_nats"]},
        "codec": {"step": "bpe_untied -> kronecker", **codec["gain_nats"]},
        "total": {"step": "bpe_tied -> kronecker", **total["gain_nats"]},
    }


def claims(result: dict, kept: list[Run]) -> list[str]:
    """What these runs can and cannot say, in sentences that stand beside the table."""
    body = (kept[0].info.get("params") or {}).get("body")
    seeds = len(result["seeds"])
    says = []
    if (body is not None and body < 50e6) or result["tokens"] < 1e9:
        size = f"{count(body)} parameters in the body, " if body is not None else ""
        scale = "Toy scale" if body is None or body < 50e6 else "Short runs"
        says.append(
            f"{scale} ({size}{count(result['tokens'])} tokens). It shows that the arms are matched, that "
            "the method trains, and which arm is ahead here. It cannot confirm or refute the paper's "
            "figures: at this size the vocabulary, the head and the length of training weigh differently, "
            "and the order of the arms may change with scale."
        )
    else:
        says.append(
            f"Scale: {count(body)} parameters in the body, {count(result['tokens'])} tokens. "
            "The result holds for this data, this schedule and this size."
        )
    params = (result["final"].get("kronecker") or {}).get("params") or {}
    if params.get("input_percent_of_stock", 0) >= 100:
        says.append(
            "At this small vocabulary the projection is no smaller than the table it replaces; the saving "
            "grows with the vocabulary."
        )
    if seeds == 1:
        says.append("One seed: no interval can be given, and a small gain may be chance.")
    else:
        says.append(
            f"The intervals are paired t intervals over {seeds} seeds: they cover chance in initialisation "
            "and data order, not the choice of data, of hyper-parameters or of size."
        )
    if "bpe_untied" in result["arms"] and "kronecker" in result["arms"]:
        says.append(
            "The paper compares kronecker (head of its own) with bpe_tied (head tied to the table), so two "
            "things change at once; bpe_untied takes them apart."
        )
    return says


def count(n) -> str:
    if n is None:
        return "?"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


# ---------------------------------------------------------------------------------------------- words


def signed(x, digits=4) -> str:
    return "-" if x is None else f"{x:+.{digits}f}"


def span(i: dict | None, digits=4) -> str:
    return "-" if not i or i["low"] is None else f"{i['low']:+.{digits}f} to {i['high']:+.{digits}f}"


def tables(c: dict) -> list[dict]:
    """The tables as {"title", "header", "rows", "left", "note"}, for terminal, Markdown and page."""
    seeds = c["seeds"]
    show_seeds = seeds if len(seeds) <= 5 else []
    has_bpb = all("val_bpb" in c["final"][a] for a in c["arms"])
    rows = []
    for arm in c["arms"]:
        f = c["final"][arm]
        losses = [f["val_loss"].get(str(s)) for s in show_seeds]
        row = [arm, *("-" if x is None else f"{x:.4f}" for x in losses)]
        if len(seeds) > 1:
            row += [f"{f['mean']:.4f}", "-" if f["sd"] is None else f"{f['sd']:.4f}"]
        if has_bpb:
            row.append(f"{f['val_bpb']['mean']:.4f}")
        rows.append(row)
    header = ["arm", *(f"seed {s}" for s in show_seeds)]
    header += ["mean", "SD"] if len(seeds) > 1 else []
    header += ["bits/byte"] if has_bpb else []
    when = f"after {c['at_iter']:,} steps, {count(c['tokens'])} tokens"
    out = [
        {
            "title": f"Validation loss (nats/token) {when}",
            "header": header,
            "rows": rows,
            "left": 1,
            "note": "",
        }
    ]

    rows = []
    for p in c["pairs"]:
        g = p["gain_nats"]
        row = [p["arm"], p["over"], signed(g["mean"]), "-" if g["sd"] is None else f"{g['sd']:.4f}", span(g)]
        row += [f"{p['gain_percent']['mean']:+.2f}%", f"{p['perplexity_ratio']['mean']:.3f}"]
        row += [signed(p["gain_bpb"]["mean"])] if has_bpb else []
        rows.append(row)
    header = ["arm", "over", "gain, nats", "SD", "95% interval", "loss", "perplexity", "bits/byte"]
    out.append(
        {
            "title": "Gain of one arm over another, paired by seed (positive: the arm is better)",
            "header": header if has_bpb else header[:-1],
            "rows": rows,
            "left": 2,
            "note": "loss: gain in per cent of the other's loss; perplexity: the arm's over the other's.",
        }
    )

    rows = []
    for p in c["pairs"]:
        for who, other, r in (("arm", "over", p["reaches"]["arm"]), ("over", "arm", p["reaches"]["over"])):
            ahead = p["gain_nats"]["mean"] > 0 if who == "arm" else p["gain_nats"]["mean"] < 0
            if ahead and r["step"]:
                ratios = [f"{c['at_iter'] / s:.2f}x" if s else "never" for s in r["step_by_seed"].values()]
                each = " ".join(ratios[:6]) if len(ratios) > 1 else "-"
                rows.append([p[who], p[other], f"{r['step']:,.0f}", f"{r['ratio']:.2f}x", each])
    if rows:
        out.append(
            {
                "title": f"Steps to reach another arm's last loss (of {c['at_iter']:,})",
                "header": ["arm", "reaches", "at step", "fewer", "by seed"],
                "rows": rows,
                "left": 2,
                "note": "Linear between evaluations. The learning rate has not come down at that step, "
                "so a schedule cut to it would do better.",
            }
        )

    rows = []
    for arm in c["arms"]:
        f, speed = c["final"][arm], c["speed"].get(arm)
        params, rms = f.get("params") or {}, f["rms"]
        row = [arm, *(f"{params[k]:,}" if k in params else "-" for k in ("input", "total"))]
        row.append(f"{params['input_percent_of_stock']:.1f}%" if "input_percent_of_stock" in params else "-")
        row.append(f"{speed['ratio']['mean']:.2f}x" if speed and speed["ratio"] else "-")
        if rms:
            row += [
                f"{np.mean(list(rms['first'].values())):.4f}",
                f"{np.mean(list(rms['last'].values())):.4f}",
            ]
            row.append(f"{rms['ratio']['mean']:.2f}x" if rms["ratio"] else "-")
        else:
            row += ["-"] * 3
        rows.append(row)
    out.append(
        {
            "title": "Parameters, speed, drift of the table's RMS",
            "header": ["arm", "input side", "total", "of stock", "tokens/s", "rms first", "last", "drift"],
            "rows": rows,
            "left": 1,
            "note": f"of stock: input side against a learned table; tokens/s: against {c['baseline']}, "
            "medians of the runs themselves (a benchmark pairs its sides more tightly).",
        }
    )
    return out


def sentences(c: dict) -> list[str]:
    """The decomposition and the paper's figures as sentences."""
    says = []
    d = c["decomposition"]
    if d:
        parts = [f"{signed(d[k]['mean'])} ({span(d[k])})" for k in ("head", "codec", "total")]
        says.append(
            f"Where kronecker's gain over bpe_tied comes from: untying the head {parts[0]} nats, "
            f"then the codec for the table {parts[1]}; together {parts[2]}."
        )
    if c["codec"]:
        says.append("The codec: " + audit_line(c["codec"]).removeprefix("kronecker: ") + ".")
    p = c["paper"]
    says.append(
        f"The paper ({p['scale']}; {p['pair']}): gain {p['gain_nats'][0]} ± {p['gain_nats'][1]} nats, "
        f"{p['gain_percent'][0]} ± {p['gain_percent'][1]}% of the loss, {p['steps_ratio']}x fewer steps."
    )
    return says


def as_text(c: dict) -> str:
    parts = []
    for t in tables(c):
        parts.append(t["title"] + "\n\n" + report.text_table(t["header"], t["rows"], t["left"]))
        if t["note"]:
            parts[-1] += "\n" + textwrap.fill(t["note"], 108)
    parts += [textwrap.fill(s, 108) for s in sentences(c)]
    parts.append("What this can say\n" + "\n".join(bullet(s) for s in c["claims"]))
    told = c["notes"] + [f"Left out: {x['run']} ({x['state']})." for x in c["left_out"]]
    if told:
        parts.append("Notes\n" + "\n".join(bullet(s) for s in told))
    return "\n\n".join(parts)


def bullet(s: str) -> str:
    return textwrap.fill(s, 108, initial_indent="- ", subsequent_indent="  ", break_long_words=False)


def as_markdown(c: dict, provenance: list[str]) -> str:
    parts = ["# The arms compared"]
    for t in tables(c):
        parts.append(f"## {t['title']}\n\n" + report.md_table(t["header"], t["rows"], t["left"]))
        if t["note"]:
            parts.append(t["note"])
    parts += sentences(c)
    parts.append("![Validation loss, gain and training loss](curves.svg)")
    parts.append("## What this can say\n\n" + "\n".join(f"- {s}" for s in c["claims"]))
    told = c["notes"] + [f"Left out: {x['run']} ({x['state']})." for x in c["left_out"]]
    if told:
        parts.append("## Notes\n\n" + "\n".join(f"- {s}" for s in told))
    parts.append("## Provenance\n\n" + "\n".join(f"- {s}" for s in provenance))
    return "\n\n".join(parts) + "\n"


def provenance(c: dict, command: str) -> list[str]:
    def distinct(key):
        return ", ".join(sorted({str(r[key]) for r in c["runs"] if r.get(key)})) or "not recorded"

    first = c["runs"][0]
    return [
        f"Compared by `{command}` on {datetime.date.today().isoformat()}.",
        f"{len(c['runs'])} runs, made at commit {distinct('commit')} with torch {distinct('torch')} "
        f"on {distinct('device')}.",
        f"Validation windows {short(first['val_sha256'])}, schedule {short(first['schedule_sha256'])}; "
        "training data and order, and bodies at step 0, are equal across arms for every seed.",
    ]


# ---------------------------------------------------------------------------------------------- figures


def draw_val(ax, c: dict, runs: list[Run]) -> None:
    ends = []
    for arm in c["arms"]:
        mine = [r for r in runs if r.arm == arm]
        iters = sorted(set.intersection(*({v["iter"] for v in r.val} for r in mine)))
        iters = [i for i in iters if i <= c["at_iter"]]
        y = np.array([[r.val_at(i) for i in iters] for r in mine])
        x = np.array(iters) * c["tokens_per_step"]
        style = report.arm_style(arm, c["arms"])
        ax.plot(x, y.mean(0), label=arm, linewidth=1.8, **style)
        if len(mine) > 1:
            ax.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
        late = y[:, x >= 0.15 * c["tokens"]]  # the first plunge would flatten all that differs
        if late.size:
            ends += [late.min(), late.max()]
    if ends and max(ends) > min(ends):
        pad = 0.05 * (max(ends) - min(ends))
        ax.set_ylim(min(ends) - pad, max(ends) + pad)
    ax.set_title("Validation loss (nats/token)")
    ax.legend()


def draw_gain(ax, c: dict, runs: list[Run]) -> None:
    by = {(r.arm, r.seed): r for r in runs}
    base, late_values = c["baseline"], [0.0]
    ax.axhline(0, linewidth=1.2, **report.arm_style(base, c["arms"]))
    for arm in (a for a in c["arms"] if a != base):
        shared = [s for s in c["seeds"] if (arm, s) in by and (base, s) in by]
        if not shared:
            continue
        pairs = [(by[arm, s], by[base, s]) for s in shared]
        iters = sorted(set.intersection(*({v["iter"] for v in r.val} for pair in pairs for r in pair)))
        iters = [i for i in iters if i <= c["at_iter"]]
        y = np.array([[b.val_at(i) - a.val_at(i) for i in iters] for a, b in pairs])
        x = np.array(iters) * c["tokens_per_step"]
        style = report.arm_style(arm, c["arms"])
        ax.plot(x, y.mean(0), label=arm, linewidth=1.8, **style)
        if len(pairs) > 1:
            ax.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
        late = y[:, x >= 0.1 * c["tokens"]]
        late_values += [late.min(), late.max()] if late.size else []
    pad = 0.08 * (max(late_values) - min(late_values)) or 0.01
    ax.set_ylim(min(late_values) - pad, max(late_values) + pad)
    ax.set_title(f"Gain over {base} (nats, up is better)")
    if len(c["arms"]) > 1:
        ax.legend()


def draw_train(ax, c: dict, runs: list[Run]) -> None:
    late_values = []
    for arm in c["arms"]:
        mine = [r for r in runs if r.arm == arm and r.train]
        if not mine:
            continue
        iters = sorted(set.intersection(*({v["iter"] for v in r.train} for r in mine)))
        y = []
        for r in mine:
            at = {v["iter"]: v["train/loss"] for v in r.train}
            y.append(stats.smooth([at[i] for i in iters], max(3, len(iters) // 25)))
        y, x = np.array(y), np.array(iters) * c["tokens_per_step"]
        if not y.size:
            continue
        style = report.arm_style(arm, c["arms"])
        ax.plot(x, y.mean(0), label=arm, linewidth=1.4, **style)
        if len(mine) > 1:
            ax.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)
        late = y[:, x >= 0.15 * c["tokens"]]
        late = late[np.isfinite(late)]
        late_values += [late.min(), late.max()] if late.size else []
    if late_values and max(late_values) > min(late_values):
        pad = 0.05 * (max(late_values) - min(late_values))
        ax.set_ylim(min(late_values) - pad, max(late_values) + pad)
    ax.set_title("Training loss, running mean (nats/token)")


def draw(c: dict, runs: list[Run], folder: Path) -> str:
    """curves.png and curves.svg with the three panels, and the page's HTML with each panel on its own."""
    panels = {"val": draw_val, "gain": draw_gain, "train": draw_train}
    caption = "Line: mean over seeds; band: lowest to highest seed." if len(c["seeds"]) > 1 else "One seed."
    with report.plt.rc_context(report.FIGURE_STYLE):
        figure, axes = report.plt.subplots(1, 3, figsize=(13.5, 4.0))
        for ax, panel in zip(axes, panels.values(), strict=True):
            panel(ax, c, runs)
            token_axis(ax, c)
        report.save_figure(figure, folder / "curves")
        pieces = []
        for name, panel in panels.items():
            figure, ax = report.plt.subplots(figsize=(5.4, 3.7))
            panel(ax, c, runs)
            token_axis(ax, c)
            pieces.append(f"<figure>{report.save_figure(figure, folder / 'panels' / name)}</figure>")
    return f"<div class=grid>{''.join(pieces)}</div><p class=soft>{html.escape(caption)}</p>"


def token_axis(ax, c: dict) -> None:
    ax.set_xlim(0, max(1, c["tokens"]))
    ax.xaxis.set_major_locator(report.matplotlib.ticker.MaxNLocator(5))
    ax.xaxis.set_major_formatter(lambda v, _: count(v) if v else "0")
    ax.set_xlabel("training tokens")


# ---------------------------------------------------------------------------------------------- command


def section_html(c: dict, curves: str, told: list[str]) -> str:
    blocks = []
    for i, t in enumerate(tables(c)):
        blocks.append(
            f"<h3>{html.escape(t['title'])}</h3>" + report.html_table(t["header"], t["rows"], t["left"])
        )
        if t["note"]:
            blocks.append(f"<p class=soft>{html.escape(t['note'])}</p>")
        if i == 0:  # the claim stands beside the first table, where a reader would quote from
            blocks.append(f"<div class=claim>{report.paragraphs(*c['claims'])}</div>")
        if i == 1:
            blocks.append(report.paragraphs(*sentences(c)) + curves)
    left_out = [f"Left out: {x['run']} ({x['state']})." for x in c["left_out"]]
    blocks.append(report.paragraphs(*c["notes"], *left_out))
    rows = [
        [r["arm"], r["seed"], r["state"], short(r["data_sha256"]), short(r["body_sha256"]), r["run"]]
        for r in c["runs"]
    ]
    runs = report.html_table(["arm", "seed", "state", "data", "body at step 0", "run"], rows, 6)
    plain = report.paragraphs(*(s.replace("`", "") for s in told))
    return "".join(blocks) + f"<details><summary>Runs and provenance</summary>{runs}{plain}</details>"


def default_out(paths) -> Path:
    """Where the comparison goes: the folder given, or the parent of a run given by itself."""
    first = Path(paths[0])
    return first.parent if (first / "run.json").exists() else first


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="run folders, or folders that hold runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a wandb project instead")
    parser.add_argument("--wandb-group", metavar="GROUP", help="only the runs of this wandb group")
    parser.add_argument(
        "--baseline", default="bpe_tied", help="arm that the others are compared with (%(default)s)"
    )
    parser.add_argument(
        "--allow-unfinished", action="store_true", help="compare at the last step that all have reached"
    )
    parser.add_argument("--out", help="folder that gets compare/ (default: the first path)")
    args = parser.parse_args(argv)
    if bool(args.paths) == bool(args.wandb):
        parser.error("give run folders, or --wandb entity/project")
    try:
        if args.wandb:
            runs = load_wandb(args.wandb, args.wandb_group)
        else:
            folders = find_run_folders(args.paths)
            if not folders:
                raise CompareError(
                    f"no run.json at or below {', '.join(args.paths)}; train first (scripts/matched.py)"
                )
            runs = [load_folder(f) for f in folders]
        c = compare(runs, args.baseline, args.allow_unfinished)
        if args.out:
            out = Path(args.out)
        else:
            out = default_out(args.paths) if args.paths else Path("out") / args.wandb.replace("/", "_")
        kept = [r for r in runs if not any(x["run"] == r.name for x in c["left_out"])]
        folder = out / "compare"
        told = provenance(
            c, " ".join(["python scripts/compare.py", *(argv if argv is not None else sys.argv[1:])])
        )
        report.write_json(folder / "comparison.json", c | {"provenance": told})
        curves = draw(c, kept, folder)
        report.write_atomic(folder / "comparison.md", as_markdown(c, told))
        page = report.write_section(out, "comparison", "Comparison", 10, section_html(c, curves, told))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    report.say(as_text(c))
    report.say(f"\ncurves  {folder / 'curves.png'}\n        {folder / 'curves.svg'}\nreport  {page}")


if __name__ == "__main__":
    main()
