"""What the comparison says in figures: one JSON-able dict, from which tables, sentences and curves are made.

Signs: a gain is the other arm's loss minus this arm's, paired by seed; positive means this arm is better.
"""

import math
from itertools import combinations

import numpy as np

from engine.errors import RunError
from scripts.analysis import stats
from scripts.analysis.arms import arm_keys, distinguish
from scripts.analysis.report import arms_of
from scripts.analysis.runs import Run, check_match, machine_notes, shared_iters

# The facts by which runs match, in the order in which comparison.json has always told them.
MATCHED = ("data_sha256", "body_sha256", "val_sha256", "schedule_sha256", "tokens_per_step")

PAPER = {
    "pair": "kronecker over bpe_tied",
    "scale": "GPT-2 124M, 2.5B tokens of FineWeb-Edu, three seeds",
    "gain_nats": [0.083, 0.007],
    "gain_percent": [2.5, 0.2],
    "perplexity_ratio": 0.91,
    "steps_ratio": 1.43,
}


def compare(runs: list[Run], baseline: str = "bpe_tied", allow_unfinished: bool = False) -> dict:
    """Everything that the tables, the figures and the page show, as one JSON-able dict.

    Raises RunError where no run is finished, where runs do not match, and where there is no baseline.
    """
    kept, left_out = finished(runs, allow_unfinished)
    distinguish(kept)
    check_match(kept)
    arms = arms_of(kept)
    if baseline not in arms:
        raise RunError(
            f"no finished run of the baseline {baseline}; there are {', '.join(arms)} (--baseline=ARM)"
        )
    by = {(r.arm, r.seed): r for r in kept}
    seeds = sorted({r.seed for r in kept})
    first, iters = kept[0], shared_iters(kept)
    if not iters:
        raise RunError(
            "the runs share no step at which all were evaluated; compare runs of one eval_interval"
        )
    at, tokens_per_step = iters[-1], int(first.info["tokens_per_step"])

    def paired(arm: str, over: str) -> list[tuple[Run, Run]]:
        """Runs of both arms, by the seeds that they share."""
        return [(by[arm, s], by[over, s]) for s in seeds if (arm, s) in by and (over, s) in by]

    notes = machine_notes(kept)
    if at < first.max_iters:
        notes.append(
            f"Unfinished runs are in: everything is compared at iter {at:,} of {first.max_iters:,}, "
            "before the learning rate has come down."
        )
    if missing := [f"{arm} seed {s}" for arm in arms for s in seeds if (arm, s) not in by]:
        notes.append(
            f"Not every arm has every seed (missing: {', '.join(missing)}); pairs use the seeds they share."
        )
    pairs = []
    for arm, over in pair_order(arms, baseline):
        if shared := paired(arm, over):
            pairs.append(compare_pair(*zip(*shared, strict=True), at, iters))
        else:
            notes.append(f"{arm} and {over} share no seed, so they are not compared.")
    others = {arm: shared for arm in arms if arm != baseline and (shared := paired(arm, baseline))}
    rows = {arm: [(a.last_row(at), b.last_row(at)) for a, b in shared] for arm, shared in others.items()}
    result = {
        "baseline": baseline,
        "arms": arms,
        "seeds": seeds,
        "at_iter": at,
        "max_iters": first.max_iters,
        "tokens_per_step": tokens_per_step,
        "tokens": at * tokens_per_step,
        "final": {arm: final([by[arm, s] for s in seeds if (arm, s) in by], at) for arm in arms},
        "arm_keys": {arm: arm_keys(next(r for r in kept if r.arm == arm).config) for arm in arms},
        "pairs": pairs,
        "left_out": [{"run": r.name, "arm": r.arm, "seed": r.seed, "state": r.state} for r in left_out],
        "frequency": {
            side: {arm: gain_by_frequency(mine, side) for arm, mine in rows.items()}
            for side in ("input", "target")
        },
        "speed": speeds(by, arms, seeds, baseline),
        "decomposition": decomposition(pairs),
        "codec": next((r.info["codec"] for r in kept if r.info.get("codec")), None),
        "paper": PAPER,
    }
    made = ("device", "torch", "commit", "started", "command", *MATCHED)
    return result | {
        "claims": claims(result, kept),
        "notes": notes,
        "runs": [
            {"run": r.name, "arm": r.arm, "seed": r.seed, "state": r.state} | {k: r.info.get(k) for k in made}
            for r in kept
        ],
    }


def finished(runs: list[Run], allow_unfinished: bool = False) -> tuple[list[Run], list[Run]]:
    """(runs to compare, runs left out); a RunError where none is to be compared.

    With allow_unfinished only those without an evaluation and those that diverged are left out.
    """

    takes_part = ("finished", "unfinished") if allow_unfinished else ("finished",)
    kept = [r for r in runs if r.state.startswith(takes_part)]
    left_out = [r for r in runs if not r.state.startswith(takes_part)]
    if not kept:
        listing = "; ".join(f"{r.name} ({r.state})" for r in left_out[:4]) or "none was found"
        hint = (
            "" if allow_unfinished else "; --allow-unfinished compares at the last step that all have reached"
        )
        raise RunError(f"there is no finished run to compare: {listing}{hint}")
    return kept, left_out


def final(mine: list[Run], at: int) -> dict:
    """One arm's losses at an iter, by seed and over seeds, with its parameters and its table's drift."""
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
    entry["rms"] = rms_drift(mine, at)
    return entry


def pair_order(arms: list[str], baseline: str) -> list[tuple[str, str]]:
    """Every pair of arms as (arm, over), those against the baseline first."""
    others = [a for a in arms if a != baseline]
    return [(a, baseline) for a in others] + [(b, a) for a, b in combinations(others, 2)]


def compare_pair(mine: list[Run], theirs: list[Run], at: int, iters: list[int]) -> dict:
    """One arm over another, the runs paired one by one (by seed). All gains: positive = mine is better."""
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
        seen = {i: loss for i, loss in r.series().items() if i <= at}
        by_seed[str(r.seed)] = stats.first_crossing(list(seen), list(seen.values()), t.val_at(at))
    ratios = [at / s for s in by_seed.values() if s]
    return {
        "step": step,
        "ratio": at / step if step else None,
        "step_by_seed": by_seed,
        "ratio_over_seeds": stats.interval(ratios) if ratios and len(ratios) == len(by_seed) else None,
    }


def gain_by_frequency(pairs: list[tuple[dict, dict]], side: str) -> list[dict]:
    """Gain by training count of the token read (side "input") or predicted ("target"), in buckets of powers of 4.

    pairs: the last evaluation's rows of both arms, paired by seed. [{"count": lowest of the bucket, "tokens": validation
    tokens in it, and the interval of the gain}]; empty where the rows do not have it.
    """
    named = {k for rows in pairs for row in rows for k in row if k.startswith(f"val/by_{side}/")}
    return [
        {"count": low, "tokens": pairs[0][0][f"val/n_{side}/{low}"]}
        | stats.interval(b[f"val/by_{side}/{low}"] - a[f"val/by_{side}/{low}"] for a, b in pairs)
        for low in sorted(int(k.rpartition("/")[2]) for k in named)
    ]


def rms_drift(mine: list[Run], at: int) -> dict | None:
    """RMS of the embedding table over the vocabulary, first and last evaluation, by seed."""
    first, last = {}, {}
    for run in mine:
        values = [x for i, x in run.series("wte/rms").items() if i <= at]
        if not values:
            return None
        first[str(run.seed)], last[str(run.seed)] = values[0], values[-1]
    ratio = [last[s] / first[s] for s in first if first[s]]
    return {"first": first, "last": last, "ratio": stats.interval(ratio) if ratio else None}


def speeds(by: dict, arms: list[str], seeds: list[int], baseline: str) -> dict:
    """Median tokens/s of each run past its first tenth (warm-up, compile), and the ratio to the baseline."""
    speed = {}
    for key, run in by.items():
        rows = list(run.series("tok_per_sec").values())
        if rows := rows[max(1, len(rows) // 10) :]:
            speed[key] = float(np.median(rows))
    result = {}
    for arm in arms:
        mine = {s: speed[arm, s] for s in seeds if (arm, s) in speed}
        ratios = [x / speed[baseline, s] for s, x in mine.items() if (baseline, s) in speed]
        if mine:
            by_seed = {str(s): x for s, x in mine.items()}
            result[arm] = {"tok_per_sec": by_seed, "ratio": stats.interval(ratios) if ratios else None}
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


def count(n: float | None) -> str:
    """A number in three digits and a unit: 104857600 is 105M."""
    if n is None:
        return "?"
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
