"""What the comparison says in figures: one JSON-able dict, from which tables, sentences and curves are made.

Signs: a gain is the other arm's loss minus this arm's, paired by seed; positive means this arm is better.
"""

import math
from itertools import combinations

import numpy as np

from engine import contract
from engine.errors import RunError
from scripts.analysis import stats
from scripts.analysis.report import arms_of
from scripts.analysis.runs import Run, arm_keys, distinguish, machine_notes, refuse_twins, shared_iters

# The facts by which runs match, in the order in which comparison.json has always told them.
MATCHED = ("data_sha256", "body_sha256", "val_sha256", "schedule_sha256", "tokens_per_step")

PAPER = {
    "pair": "kronecker over bpe_tied",
    "scale": "GPT-2 124M, 2.5B tokens of FineWeb-Edu, three seeds",
    "gain_nats": [0.083, 0.007],
    "gain_percent": [2.5, 0.2],
    "perplexity_ratio": 0.91,  # as the abstract says; 0.92 by its own gap
    "steps_ratio": 1.43,
}


def compare(runs: list[Run], baseline: str = "bpe_tied", allow_unfinished: bool = False) -> dict:
    """Everything that the tables, the figures and the page show, as one JSON-able dict.

    Left out: runs that are not finished; with allow_unfinished only those that diverged or have no evaluation yet.
    Raises RunError where no run is left, where runs do not match, and where there is no baseline.
    """
    takes_part = ("finished", "unfinished") if allow_unfinished else ("finished",)
    kept = [r for r in runs if r.state.startswith(takes_part)]
    left_out = [r for r in runs if not r.state.startswith(takes_part)]
    if not kept:
        listing = "; ".join(f"{r.name} ({r.state})" for r in left_out[:4]) or "none was found"
        hint = "; --allow-unfinished compares at the last step that all have reached" * (not allow_unfinished)
        raise RunError(f"there is no finished run to compare: {listing}{hint}")
    distinguish(kept)
    refuse_twins(kept)
    contract.check_match(kept)
    arms, seeds, first = arms_of(kept), sorted({r.seed for r in kept}), kept[0]
    if baseline not in arms:
        there = f"there are {', '.join(arms)} (--baseline=ARM)"
        raise RunError(f"no finished run of the baseline {baseline}; {there}")
    iters = shared_iters([r.series() for r in kept])
    if not iters:
        why = "share no step at which all were evaluated; compare runs of one eval_interval"
        raise RunError(f"the runs {why}")
    at, tokens_per_step = iters[-1], int(first.info["tokens_per_step"])
    by = {(r.arm, r.seed): r for r in kept}
    of_arm = {arm: [by[arm, s] for s in seeds if (arm, s) in by] for arm in arms}
    notes = machine_notes(kept)
    if at < first.max_iters:
        reached = f"everything is compared at iter {at:,} of {first.max_iters:,}"
        notes.append(f"Unfinished runs are in: {reached}, before the learning rate has come down.")
    if missing := [f"{arm} seed {s}" for arm in arms for s in seeds if (arm, s) not in by]:
        lacking = f"missing: {', '.join(missing)}"
        notes.append(f"Not every arm has every seed ({lacking}); pairs use the seeds they share.")
    others, pairs = [arm for arm in arms if arm != baseline], []
    for arm, over in [(a, baseline) for a in others] + [(b, a) for a, b in combinations(others, 2)]:
        if shared := [(mine, by[over, mine.seed]) for mine in of_arm[arm] if (over, mine.seed) in by]:
            pairs.append(compare_pair(*zip(*shared, strict=True), at, iters))
        else:
            notes.append(f"{arm} and {over} share no seed, so they are not compared.")
    rows = {arm: {r.seed: r.last_row(at) for r in mine} for arm, mine in of_arm.items()}
    result = {
        "baseline": baseline,
        "arms": arms,
        "seeds": seeds,
        "at_iter": at,
        "max_iters": first.max_iters,
        "tokens_per_step": tokens_per_step,
        "tokens": at * tokens_per_step,
        "final": {arm: final(mine, at) for arm, mine in of_arm.items()},
        "arm_keys": {arm: arm_keys(next(r for r in kept if r.arm == arm).config) for arm in arms},
        "pairs": pairs,
        "left_out": [who(r) for r in left_out],
        "frequency": gains_by_frequency(rows, baseline),
        "speed": speeds(of_arm, baseline),
        "decomposition": decomposition(pairs),
        "codec": next((r.info["codec"] for r in kept if r.info.get("codec")), None),
        "paper": PAPER,
    }
    made = ("device", "torch", "commit", "started", "command", *MATCHED)
    about = [who(r) | {k: r.info.get(k) for k in made} for r in kept]
    return result | {"claims": claims(result, kept), "notes": notes, "runs": about}


def who(run: Run) -> dict:
    return {"run": run.name, "arm": run.arm, "seed": run.seed, "state": run.state}


def interval(values) -> dict | None:
    """stats.interval; None where there is no value, or one is missing."""
    values = list(values)
    return stats.interval(values) if values and None not in values else None


def final(mine: list[Run], at: int) -> dict:
    """One arm's losses at an iter, by seed and over seeds, with its parameters and its table's drift."""
    losses, bits = ({str(r.seed): r.val_at(at, key) for r in mine} for key in ("val/loss", "val/bpb"))
    entry = {"val_loss": losses} | stats.interval(losses.values())
    if over_seeds := interval(bits.values()):
        entry["val_bpb"] = over_seeds | {"by_seed": bits}
    if params := mine[0].info.get("params"):
        entry["params"] = params | {"input_percent_of_stock": 100 * params["input"] / params["stock_table"]}
    return entry | {"rms": rms_drift(mine, at)}


def paired_gain(mine: dict, theirs: dict) -> dict:
    """The gain of one arm over another by the seeds that both have, as an interval and by seed. {seed: loss} each."""
    by_seed = {seed: float(theirs[seed] - loss) for seed, loss in mine.items() if seed in theirs}
    return stats.interval(by_seed.values()) | {"by_seed": by_seed} if by_seed else {}


def perplexity(nats: float) -> float:
    """exp(nats), infinite where no float holds it."""
    return math.exp(nats) if nats < 709 else math.inf


def compare_pair(mine: list[Run], theirs: list[Run], at: int, iters: list[int]) -> dict:
    """One arm over another, the runs paired one by one (by seed). All gains: positive = mine is better."""
    a, b = ({str(r.seed): r.val_at(at) for r in side} for side in (mine, theirs))
    gain = paired_gain(a, b)
    # the ratio of perplexities is exp of the loss difference; its interval is the gain's, mapped
    ratio = {"mean": gain["mean"], "low": gain["high"], "high": gain["low"]}
    ratio = {end: None if x is None else perplexity(-x) for end, x in ratio.items()}
    pair = {
        "arm": mine[0].arm,
        "over": theirs[0].arm,
        "seeds": [r.seed for r in mine],
        "gain_nats": gain,
        "gain_percent": interval(100 * (b[s] - a[s]) / b[s] if b[s] else None for s in a),
        "perplexity_ratio": ratio,
    }
    bits = [[r.val_at(at, "val/bpb") for r in side] for side in (mine, theirs)]
    if None not in bits[0] + bits[1]:
        pair["gain_bpb"] = stats.interval(y - x for x, y in zip(*bits, strict=True))
    # arm comes down to over's last loss, and the other way round
    return pair | {"reaches": {"arm": reach(mine, theirs, at, iters), "over": reach(theirs, mine, at, iters)}}


def reach(mine: list[Run], theirs: list[Run], at: int, iters: list[int]) -> dict:
    """Where my curve comes down to their last loss: on the mean curve, and by seed. None: it never does."""
    curve = [float(np.mean([r.val_at(i) for r in mine])) for i in iters]
    step = stats.first_crossing(iters, curve, float(np.mean([r.val_at(at) for r in theirs])))
    by_seed = {}
    for r, t in zip(mine, theirs, strict=True):
        seen = r.series(upto=at)
        by_seed[str(r.seed)] = stats.first_crossing(list(seen), list(seen.values()), t.val_at(at))
    return {
        "step": step,
        "ratio": at / step if step else None,
        "step_by_seed": by_seed,
        "ratio_over_seeds": interval(at / s if s else None for s in by_seed.values()),
    }


def gains_by_frequency(rows: dict[str, dict], over: str) -> dict:
    """{side: {arm: gain_by_frequency}} of the arms that share seeds with `over`. rows: {arm: {seed: last evaluation's}}."""
    base = rows.get(over, {})
    pairs = {arm: [(row, base[s]) for s, row in mine.items() if s in base] for arm, mine in rows.items()}
    found = {arm: of_arm for arm, of_arm in pairs.items() if of_arm and arm != over}
    return {side: {a: gain_by_frequency(p, side) for a, p in found.items()} for side in ("input", "target")}


def gain_by_frequency(pairs: list[tuple[dict, dict]], side: str) -> list[dict]:
    """Gain by training count of the token read (side "input") or predicted ("target"), in buckets of powers of 4.

    pairs: the last evaluation's rows of both arms, paired by seed. [{"count": lowest of the bucket, "tokens": validation
    tokens in it, and the interval of the gain}]; empty where a row does not have it.
    """
    by, n = f"val/by_{side}/", f"val/n_{side}/"
    there = [
        {k for k, x in row.items() if k.startswith(by) and x is not None and k.replace(by, n, 1) in row}
        for rows in pairs
        for row in rows
    ]
    buckets = {int(k.removeprefix(by)) for k in set.intersection(*there)}
    return [
        {"count": low, "tokens": pairs[0][0][f"{n}{low}"]}
        | stats.interval(b[f"{by}{low}"] - a[f"{by}{low}"] for a, b in pairs)
        for low in sorted(buckets)
    ]


def rms_drift(mine: list[Run], at: int) -> dict | None:
    """RMS of the embedding table over the vocabulary, first and last evaluation, by seed."""
    seen = {str(r.seed): list(r.series("wte/rms", at).values()) for r in mine}
    if not all(seen.values()):
        return None
    first, last = ({seed: values[end] for seed, values in seen.items()} for end in (0, -1))
    return {"first": first, "last": last, "ratio": interval(last[s] / first[s] for s in first if first[s])}


def speeds(of_arm: dict[str, list[Run]], baseline: str) -> dict:
    """Median tokens/s of each run past its first tenth (warm-up, compile), and the ratio to the baseline."""
    speed: dict[str, dict[str, float]] = {}
    for arm, mine in of_arm.items():
        for run in mine:
            rows = list(run.series("tok_per_sec").values())
            if rows := rows[max(1, len(rows) // 10) :]:
                speed.setdefault(arm, {})[str(run.seed)] = float(np.median(rows))
    base = speed.get(baseline, {})
    return {
        arm: {"tok_per_sec": mine, "ratio": interval(x / base[s] for s, x in mine.items() if base.get(s))}
        for arm, mine in speed.items()
    }


def decomposition(pairs: list[dict]) -> dict | None:
    """Split the gain over the tied baseline: first the head is untied, then the table becomes the codec."""
    tied, untied, codec = "bpe_tied", "bpe_untied", "kronecker"
    steps = {"head": (tied, untied), "codec": (untied, codec), "total": (tied, codec)}
    found = {(p["over"], p["arm"]): p for p in pairs}
    parts = {name: found.get(step) for name, step in steps.items()}
    if not all(parts.values()) or len({str(p["seeds"]) for p in parts.values()}) > 1:
        return None
    return {name: {"step": " -> ".join(steps[name])} | p["gain_nats"] for name, p in parts.items()}


def claims(result: dict, kept: list[Run]) -> list[str]:
    """What these runs can and cannot say, in sentences that stand beside the table."""
    body = (kept[0].info.get("params") or {}).get("body")
    seeds, small = len(result["seeds"]), body is None or body < 50e6
    size = "" if body is None else f"{count(body)} parameters in the body, "
    size += f"{count(result['tokens'])} tokens"
    if (small and body is not None) or result["tokens"] < 1e9:
        says = [
            f"{'Toy scale' if small else 'Short runs'} ({size}). It shows that the arms are matched, that the method trains, "
            "and which arm is ahead here. It cannot confirm or refute the paper's figures: at this size the vocabulary, the "
            "head and the length of training weigh differently, and the order of the arms may change with scale."
        ]
    else:
        says = [f"Scale: {size}. The result holds for this data, this schedule and this size."]
    params = (result["final"].get("kronecker") or {}).get("params") or {}
    if params.get("input_percent_of_stock", 0) >= 100:
        says.append(
            "At this small vocabulary the projection is no smaller than the table it replaces; the saving grows with the "
            "vocabulary."
        )
    if seeds == 1:
        says.append("One seed: no interval can be given, and a small gain may be chance.")
    else:
        says.append(
            f"The intervals are paired t intervals over {seeds} seeds: they cover chance in initialisation and data order, "
            "not the choice of data, of hyper-parameters or of size."
        )
    if {"bpe_untied", "kronecker"} <= set(result["arms"]):
        says.append(
            "The paper compares kronecker (head of its own) with bpe_tied (head tied to the table), so two things change at "
            "once; bpe_untied takes them apart."
        )
    return says


def count(n: float) -> str:
    """A number in three digits and a unit: 104857600 is 105M."""
    n = float(f"{n:.3g}") if abs(n) >= 100 else n
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
