"""What an experiment's records say: every arm at one shared setting and at its own best, and the gap over tokens and size.

Everything is paired by seed: a gain is the other arm's final validation loss minus this arm's, in nats, of two runs that
share body, data and validation windows; positive means this arm is better. `numbers` gives one JSON-able dict, from
which the tables, the findings and the figures of results/NAME/ are made.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import groupby

import numpy as np

from engine import contract
from scripts import experiment
from scripts.analysis.numbers import gains_by_frequency, interval, paired_gain

# One question each: (arm, over, what the gain of the one over the other says).
QUESTIONS = (
    ("bpe_untied", "bpe_tied", "untying the head"),
    ("kronecker", "bpe_untied", "the codec for the table"),
    ("kronecker", "bpe_tied", "both, as the paper compares"),
    ("kronecker", "kronecker_permuted", "the bytes, against the same code without meaning"),
    ("kronecker", "bpe_lowrank", "the codec against a factorised table of its size"),
    ("kronecker", "bpe_hash", "the codec against hash embeddings of its size"),
)


def numbers(exp: experiment.Experiment, records: dict[str, experiment.RunRecord], resamples=100_000) -> dict:
    """Everything that the report shows. RunError where a record differs from the file or runs do not match."""
    plan = experiment.plan_of(exp, records)
    known = [(run, records[run.name]) for run in plan.runs if run.name in records]
    places = [(final, which) for final in exp.final for which in final.settings]
    asked = [(place_of(exp, *place), plan.final_runs(*place)) for place in places]
    cells = [x for place, runs in asked if (x := cell(exp, records, place, runs))]
    finals = sum(run.stage == "final" for run, _ in known)
    return {
        "experiment": exp.name,
        "data": exp.data,
        "smallest_difference": exp.smallest_difference,
        "arms": exp.arms,
        "about": {arm: experiment.about(arm) for arm in exp.arms},
        "rungs": rungs(exp, known),
        "validation": validation(known),
        "shared": exp.shared,
        "tuning": {
            "tokens": experiment.tokens_of(exp, exp.tuning),
            "seeds": len(exp.tuning.seeds),
            "again": bool(exp.tuning.again),
        },
        "complete": plan.complete,
        "untuned": [r.name for r in plan.runs if r.stage != "final" and r.name not in records],
        "edges": plan.edges,
        "settings": [
            {"rung": rung, "length": length, "arm": arm, "keys": dict(keys)}
            for (rung, length, arm), keys in plan.best.items()
        ],
        "curves": tuning_curves(plan),
        "beside": beside_the_lines(plan, records),
        "cells": cells,
        "missing": [x for place, runs in asked if (x := missing(records, place, runs))],
        "diverged": [
            vars(run) | {"setting": dict(run.setting)} for run, record in known if record.state != "finished"
        ],
        "gap": gap(exp, cells, resamples),
        "runs": {
            "tuning": len(known) - finals,
            "final": finals,
            "unasked": len(records) - len(known),
            **{
                key: dict(sorted(Counter(v for _, r in known for v in made_with(r, key)).items()))
                for key in ("commit", "torch", "device")
            },
            "days": sorted({r.run["started"][:10] for _, r in known if r.run.get("started")}),
        },
    }


def made_with(record: experiment.RunRecord, key: str) -> set[str]:
    """The commits, torch versions or machines ("device") of a run: that of its last start, and of those before it."""
    return {start.get(key) or "not recorded" for start in (record.run, *record.run.get("starts", []))}


def place_of(exp, final: experiment.Final, which: str) -> dict:
    """A rung, a length and a way of setting the arms, of final runs; and where their best settings were chosen."""
    tokens, tuned = experiment.tokens_of(exp, final), experiment.tuned_at(exp, final)
    place = {"rung": final.rung, "length": final.length, "which": which, "tokens": tokens}
    return place | {"tuned_at": {"rung": tuned.rung, "tokens": experiment.tokens_of(exp, tuned)}}


def rungs(exp: experiment.Experiment, known: list[tuple]) -> dict:
    """{rung: its shape and sizes, and the longest of its planned lengths in tokens}, of rungs that have a record."""
    result = {}
    first = {run.rung: record for run, record in reversed(known)}
    for rung in (rung for rung in exp.rungs if rung in first):
        config, params = first[rung].config, first[rung].run["params"]
        shape = {k: config[k] for k in ("n_layer", "n_embd", "block_size") if k in config}
        sizes = {"body": params["body"], "table": params["stock_table"]}
        planned = [experiment.tokens_of(exp, f) for f in exp.final if f.rung == rung and "best" in f.settings]
        result[rung] = shape | sizes | {"planned": max(planned, default=0)}
    return result


def validation(known: list[tuple]) -> dict:
    """{stage: the data set, and the tokens of its validation shard that were read: so many after those skipped}."""
    keys, result = ("dataset", "eval_skip_tokens", "eval_tokens"), {}
    for run, record in known:
        result.setdefault(run.stage, {k: record.config.get(k) for k in keys})
    return result


def tuning_curves(plan: experiment.Plan) -> list[dict]:
    """Points of the tuning: {stage, rung, length, arm, learning_rate, wte_lr_mult, wte_init_rms, loss (None: diverged)}."""

    def point(run):
        return run.stage, run.rung, run.length, run.arm, run.setting

    points = []
    tuned = [run for run in plan.runs if run.stage != "final" and run.name in plan.losses]
    for (stage, rung, length, arm, setting), runs in groupby(sorted(tuned, key=point), point):
        losses = [plan.losses[run.name] for run in runs]
        mean = sum(losses) / len(losses)
        keys = {k: v for k, v in experiment.own_keys(arm).items() if k in ("wte_lr_mult", "wte_init_rms")}
        where = {"stage": stage, "rung": rung, "length": length, "arm": arm}
        points.append(where | keys | dict(setting) | {"loss": mean if math.isfinite(mean) else None})
    return points


def beside_the_lines(plan: experiment.Plan, records: dict[str, experiment.RunRecord]) -> list[dict]:
    """Settings at the tuning's place that it did not ask for: {arm, seed, setting, loss, gain: over the arm's best one}.

    Only runs that are matched with one of the best setting, apart from what a setting may say.
    """
    t, found = plan.exp.tuning, []
    asked = {run.name for run in plan.runs}
    for name, record in records.items():
        arm, seed = record.run["arm"], record.run["seed"]
        best = plan.best.get((t.rung, t.length, arm))
        if not name.startswith(f"tune/{t.rung}_{t.length}/") or name in asked or best is None:
            continue
        chosen = records.get(experiment.Run("tune", t.rung, t.length, arm, best, seed).name)
        if chosen is None or {record.state, chosen.state} != {"finished"}:
            continue
        pair = [contract.Member(r.name, r.name, seed, r.config, r.run) for r in (record, chosen)]
        if any(contract.differences(pair, swept=("learning_rate", "min_lr"))):
            continue
        loss, least = (experiment.last_row(r)["val/loss"] for r in (record, chosen))
        said = {k: record.config[k] for k in experiment.SHORT if k in record.config}
        keys = experiment.setting_of(arm, said)
        found.append({"arm": arm, "seed": seed, "setting": dict(keys), "loss": loss, "gain": least - loss})
    return found


def cell(exp, records: dict, place: dict, runs: list[tuple]) -> dict | None:
    """One place's losses by arm and seed, gains over the reference, questions. runs: see Plan.final_runs."""
    found: dict[str, dict[int, experiment.RunRecord]] = {}
    settings, diverged = {}, Counter()
    for arm, seed, run in runs:
        record = run and records.get(run.name)
        if record and record.state == "finished":
            found.setdefault(arm, {})[seed] = record
            settings[arm] = dict(run.setting)
        elif record:
            diverged[arm] += 1
    if not found:
        return None
    params = {arm: next(iter(by_seed.values())).run["params"] for arm, by_seed in found.items()}
    last = {arm: {str(s): experiment.last_row(r) for s, r in mine.items()} for arm, mine in found.items()}
    loss = {arm: {s: row["val/loss"] for s, row in rows.items()} for arm, rows in last.items()}
    bpb = {arm: interval(row.get("val/bpb") for row in rows.values()) for arm, rows in last.items()}
    over = exp.gap.over
    others = [arm for arm in last if arm != over and over in last]
    asked = [(arm, other, what, gain(exp, loss, arm, other, diverged)) for arm, other, what in QUESTIONS]
    paired = {frozenset((arm, over)) for arm in others}
    paired |= {frozenset((arm, other)) for arm, other, _, g in asked if g}
    return place | {
        "body": params[next(iter(found))]["body"],
        "settings": settings,
        "loss": loss,
        "diverged": dict(diverged),
        "bpb": {arm: bits["mean"] if bits else None for arm, bits in bpb.items()},
        "input_share": {arm: p["input"] / p["stock_table"] for arm, p in params.items()},
        "gains": {arm: gain(exp, loss, arm, over, diverged) for arm in others},
        "questions": [{"arm": arm, "over": other, "what": what} | g for arm, other, what, g in asked if g],
        "frequency": gains_by_frequency(last, over),
        "pairs": count_pairs(found, paired),
    }


def count_pairs(found: dict, paired: set[frozenset[str]]) -> dict:
    """How many pairs of runs the gains of these arms rest on, and in how many the two differ in machine or commit.

    found: {arm: {seed: record}}.
    """
    pairs = [(found[a][s], found[b][s]) for a, b in paired for s in found[a].keys() & found[b].keys()]
    mixed = {k: sum(made_with(x, k) != made_with(y, k) for x, y in pairs) for k in ("device", "commit")}
    return {"all": len(pairs)} | mixed


def gain(exp, loss: dict, arm: str, over: str, diverged: Iterable[str] = ()) -> dict | None:
    """The gain of an arm over another by shared seeds: its interval, and whether the rule calls it a difference.

    An arm of which a run has diverged there is never called the better one: its seeds that are left are the lucky ones.
    """
    result = paired_gain(loss.get(arm, {}), loss.get(over, {}))
    if not result:
        return None
    sure = result["low"] is not None and (result["low"] > 0 or result["high"] < 0)
    fair = (arm if result["mean"] > 0 else over) not in diverged
    return result | {"called": bool(sure and fair and abs(result["mean"]) >= exp.smallest_difference)}


def missing(records: dict, place: dict, runs: list[tuple]) -> dict | None:
    """How many and which of a place's final runs have no record, and which arms have no setting there yet; None where
    every run has a record."""
    lacking: dict[str, list[int]] = {}
    for arm, seed, run in runs:
        if run is None or run.name not in records:
            lacking.setdefault(arm, []).append(seed)
    if not lacking:
        return None
    counts = {"arms": len({arm for arm, *_ in runs}), "runs": len(runs)}
    counts["missing"] = sum(map(len, lacking.values()))
    return place | counts | {"seeds": lacking, "unset": sorted({arm for arm, _, run in runs if run is None})}


# ---- the gap as a function of tokens and size


def gap(exp: experiment.Experiment, cells: list[dict], resamples: int) -> dict:
    """The gap of the experiment's pair at each arm's own best, fitted as a + b ln(tokens) + c ln(body parameters).

    A parametric bootstrap over seeds (redrawn_means) gives the intervals, so cells of one seed take no part. Nor does
    the held-out cell, which is held against its prediction. The fit says nothing of a rung that it has not seen, nor of
    tokens or a size that none of its terms follows. Every rung that it has seen at several lengths says where its fitted
    gap is zero between these, with the fitted gap at both ends.
    """
    arm, out = exp.gap.arm, exp.held_out
    points = [
        {k: c[k] for k in ("rung", "length", "tokens", "body")} | c["gains"][arm]
        for c in cells
        if c["which"] == "best" and c["gains"].get(arm)
    ]
    held = [p for p in points if out is not None and (p["rung"], p["length"]) == (out.rung, out.length)]
    known = [p for p in points if p not in held and len(p["by_seed"]) > 1]
    result = {"arm": arm, "over": exp.gap.over, "points": points}
    result |= {"fit": None, "held_out": None, "crossings": []}  # until there are enough cells
    terms = [key for key in ("tokens", "body") if len({p[key] for p in known}) > 1]

    def design(of: dict) -> np.ndarray:
        return np.array([1.0, *(math.log(of[key]) for key in terms)])

    x = np.array([design(p) for p in known])
    if not terms or np.linalg.matrix_rank(x) <= len(terms):
        result["reason"] = f"too few cells of several seeds ({len(known)}) for a fit over tokens and size"
        return result
    rng = np.random.default_rng(0)
    means = [p["mean"] for p in known]
    best = np.linalg.lstsq(x, means, rcond=None)[0]
    draws = np.linalg.lstsq(x, [redrawn_means(p, resamples, rng) for p in known], rcond=None)[0].T

    def fitted(of: dict) -> dict:
        return {"mean": float(design(of) @ best)} | quantiles(draws @ design(of))

    result["fit"] = {
        name: {"mean": float(best[i])} | quantiles(draws[:, i])
        for i, name in enumerate(["intercept", *(f"ln_{key}" for key in terms)])
    } | {
        "cells": len(known),
        "terms": 1 + len(terms),
        "largest_miss": float(np.abs(x @ best - means).max()),
        "resamples": resamples,
    }
    for p in held:
        where = {k: p[k] for k in ("rung", "length", "tokens")}
        result["held_out"] = where | {"measured": {k: p[k] for k in ("mean", "low", "high")}}
        untold = [key for key in ("tokens", "body") if key not in terms and p[key] != known[0][key]]
        if untold:
            result["held_out"] |= {"untold": untold}
            continue
        predicted = fitted(p)
        off = {"mean": p["mean"] - predicted["mean"], "low": None, "high": None}
        if len(p["by_seed"]) > 1:
            off |= quantiles(redrawn_means(p, resamples, rng) - draws @ design(p))
        result["held_out"] |= {"predicted": predicted, "off": off}
    for rung in dict.fromkeys(p["rung"] for p in known):
        of_rung = sorted((p for p in known if p["rung"] == rung), key=lambda p: p["tokens"])
        low, high = of_rung[0], of_rung[-1]
        if low is high:
            continue
        # ln(tokens) where a + b ln(tokens) + c ln(body) is zero, of the fit and of every draw
        all_fits = np.vstack([best, draws])
        slopes = all_fits[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(slopes != 0, -(all_fits @ design(low | {"tokens": 1.0})) / slopes, np.inf)
        at = np.exp(np.clip(at, -700, 700))
        inside = low["tokens"] < at[0] < high["tokens"]
        ends = {"from": low["tokens"], "to": high["tokens"], "at_from": fitted(low), "at_to": fitted(high)}
        zero = {"tokens": float(at[0])} | quantiles(at[1:]) if inside else {"tokens": None}
        result["crossings"].append({"rung": rung} | ends | zero)
    return result


def redrawn_means(point: dict, size: int, rng) -> np.ndarray:
    """What the mean of a cell's gains by seed may be, `size` times: the mean, off by t(n - 1) standard errors.

    Drawing a handful of seeds anew would do worse: they spread less around their own mean than around the true one.
    """
    values = list(point["by_seed"].values())
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values) + error * rng.standard_t(len(values) - 1, size)


def quantiles(values) -> dict:
    """The middle 95% of a bootstrap's draws."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}
