"""What an experiment's records say: every arm at one shared setting and at its own best, and the gap over tokens and size.

Everything is paired by seed: a gain is the other arm's final validation loss minus this arm's, in nats, of two runs that
share body, data and validation windows; positive means this arm is better. `numbers` gives one JSON-able dict, from
which the tables, the findings and the figures of results/NAME/ are made.
"""

import math
from itertools import groupby

import numpy as np

from engine import contract
from scripts import experiment
from scripts.analysis import stats
from scripts.analysis.numbers import gain_by_frequency

# One question each: (arm, over, what the gain of the one over the other says).
QUESTIONS = (
    ("bpe_untied", "bpe_tied", "untying the head"),
    ("kronecker", "bpe_untied", "the codec for the table"),
    ("kronecker", "bpe_tied", "both, as the paper compares"),
    ("kronecker", "kronecker_permuted", "the bytes, against the same code without meaning"),
    ("kronecker", "bpe_lowrank", "the codec against a factorised table of its size"),
    ("kronecker", "bpe_hash", "the codec against hash embeddings of its size"),
)
BUDGET = 0.15  # of the table's input parameters, for an arm that would win the prize


def numbers(
    exp: experiment.Experiment, records: dict[str, experiment.RunRecord], resamples: int = 2000
) -> dict:
    """Everything that the report shows. RunError where a record differs from the file or runs do not match."""
    plan = experiment.Plan(exp, experiment.losses_of(records))
    for run in plan.runs:
        if run.name in records:
            experiment.check_record(exp, run, records[run.name])
    cells = [
        c for final in exp.final for which in final.settings if (c := cell(exp, plan, records, final, which))
    ]
    finals = [run for run in plan.runs if run.stage == "final"]
    c = {
        "experiment": exp.name,
        "smallest_difference": exp.smallest_difference,
        "arms": exp.arms,
        "complete": plan.complete,
        "edges": plan.edges,
        "settings": settings(exp, plan),
        "curves": tuning_curves(plan),
        "cells": cells,
        "missing": missing(exp, plan, records),
        "diverged": sorted(name for name, record in records.items() if record.state != "finished"),
        "gap": gap(exp, cells, resamples),
        "runs": {
            "tuning": sum(run.name in records for run in plan.runs if run.stage != "final"),
            "final": sum(run.name in records for run in finals),
            **{
                key: sorted({str(r.run.get(key)) for r in records.values()})
                for key in ("commit", "torch", "device")
            },
        },
    }
    c["prize"] = prize(exp, cells)
    return c


def settings(exp: experiment.Experiment, plan: experiment.Plan) -> list[dict]:
    """The best setting of every arm on every rung where one was chosen."""
    return [{"rung": rung, "arm": arm, "keys": dict(keys)} for (rung, arm), keys in plan.best.items()]


def tuning_curves(plan: experiment.Plan) -> list[dict]:
    """Points of the tuning: {stage, rung, arm, learning_rate, wte_lr_mult, wte_init_rms, loss (None: diverged)}."""
    points = []
    tuned = [run for run in plan.runs if run.stage != "final" and run.name in plan.losses]
    for (stage, rung, arm, setting), runs in groupby(
        sorted(tuned, key=lambda r: (r.stage, r.rung, r.arm, r.setting)),
        lambda r: (r.stage, r.rung, r.arm, r.setting),
    ):
        losses = [plan.losses[run.name] for run in runs]
        keys = {k: v for k, v in experiment.own_keys(arm).items() if k in ("wte_lr_mult", "wte_init_rms")}
        mean = sum(losses) / len(losses)
        points.append(
            {"stage": stage, "rung": rung, "arm": arm}
            | keys
            | dict(setting)
            | {"loss": mean if math.isfinite(mean) else None}
        )
    return points


def cell(exp, plan: experiment.Plan, records: dict, final: experiment.Final, which: str) -> dict | None:
    """One rung, length and way of setting the arms: losses by arm and seed, gains over the reference, questions."""
    found: dict[str, dict[int, experiment.RunRecord]] = {}
    chosen = {}
    for arm in final.arms or exp.arms:
        setting = plan.setting(final, arm, which)
        if setting is None:
            continue
        chosen[arm] = dict(setting)
        for seed in final.seeds:
            record = records.get(experiment.Run("final", final.rung, final.length, arm, setting, seed).name)
            if record is not None and record.state == "finished":
                found.setdefault(arm, {})[seed] = record
    if not found:
        return None
    contract.check_match(
        [
            contract.Member(r.name, arm, seed, r.config, r.run)
            for arm in found
            for seed, r in found[arm].items()
        ],
        swept=("learning_rate", "min_lr"),
    )
    first = next(iter(next(iter(found.values())).values()))
    result = {
        "rung": final.rung,
        "length": final.length,
        "which": which,
        "tokens": int(first.run["tokens_per_step"]) * int(first.config["max_iters"]),
        "body": first.run["params"]["body"],
        "settings": {arm: chosen[arm] for arm in found},
        "loss": {
            arm: {str(s): last(r)["val/loss"] for s, r in by_seed.items()} for arm, by_seed in found.items()
        },
        "bpb": {
            arm: stats.interval(last(r).get("val/bpb", math.nan) for r in by_seed.values())["mean"]
            for arm, by_seed in found.items()
        },
        "input_share": {
            arm: r.run["params"]["input"] / r.run["params"]["stock_table"]
            for arm, by_seed in found.items()
            for r in [next(iter(by_seed.values()))]
        },
    }
    result["gains"] = {
        arm: gain(exp, result["loss"], arm, exp.gap.over)
        for arm in found
        if arm != exp.gap.over and exp.gap.over in found
    }
    result["questions"] = [
        {"arm": arm, "over": over, "what": what} | gain(exp, result["loss"], arm, over)
        for arm, over, what in QUESTIONS
        if arm in found and over in found and gain(exp, result["loss"], arm, over)
    ]
    result["frequency"] = {
        side: {
            arm: gain_by_frequency(
                [(last(found[arm][s]), last(found[exp.gap.over][s])) for s in shared], side
            )
            for arm in found
            if arm != exp.gap.over and (shared := [s for s in found[arm] if s in found[exp.gap.over]])
        }
        for side in ("input", "target")
        if exp.gap.over in found
    }
    return result


def last(record: experiment.RunRecord) -> dict:
    """The last evaluation's row."""
    return next(row for row in reversed(record.rows) if "val/loss" in row)


def gain(exp: experiment.Experiment, loss: dict, arm: str, over: str) -> dict | None:
    """The gain of an arm over another by shared seeds: its interval, and whether the rule calls it a difference."""
    seeds = [s for s in loss[arm] if s in loss[over]]
    if not seeds:
        return None
    by_seed = {s: loss[over][s] - loss[arm][s] for s in seeds}
    result = stats.interval(by_seed.values()) | {"by_seed": by_seed}
    sure = result["low"] is not None and (result["low"] > 0 or result["high"] < 0)
    result["called"] = bool(sure and abs(result["mean"]) >= exp.smallest_difference)
    return result


def missing(exp: experiment.Experiment, plan: experiment.Plan, records: dict) -> list[dict]:
    """Final runs that the file asks for and no record shows, by rung, length and setting."""
    result = []
    for final in exp.final:
        for which in final.settings:
            wanted = [(arm, seed) for arm in final.arms or exp.arms for seed in final.seeds]
            there = 0
            for arm, seed in wanted:
                setting = plan.setting(final, arm, which)
                run = setting and experiment.Run("final", final.rung, final.length, arm, setting, seed)
                there += bool(run and run.name in records)
            if there < len(wanted):
                result.append(
                    {
                        "rung": final.rung,
                        "length": final.length,
                        "which": which,
                        "runs": len(wanted),
                        "missing": len(wanted) - there,
                    }
                )
    return result


# ---- the gap as a function of tokens and size


def gap(exp: experiment.Experiment, cells: list[dict], resamples: int) -> dict:
    """The gap of the experiment's pair at each arm's own best, fitted as a + b ln(tokens) + c ln(body parameters).

    The bootstrap draws seeds anew within each cell (redrawn_mean). The held-out cell takes no part in the fit and is held against
    its prediction. A crossing is given where the fitted gap of a rung is zero within the tokens that were measured.
    """
    points = [
        {"rung": c["rung"], "length": c["length"], "tokens": c["tokens"], "body": c["body"]}
        | c["gains"][exp.gap.arm]
        for c in cells
        if c["which"] == "best" and c["gains"].get(exp.gap.arm)
    ]
    result = {
        "arm": exp.gap.arm,
        "over": exp.gap.over,
        "points": points,
        "fit": None,
        "held_out": None,
        "crossings": [],
    }
    out = exp.held_out
    known = [p for p in points if out is None or (p["rung"], p["length"]) != (out.rung, out.length)]
    terms = 1 + (len({p["tokens"] for p in known}) > 1) + (len({p["body"] for p in known}) > 1)
    if len(known) <= terms - 1 or terms < 2:
        result["reason"] = f"{len(known)} cells are too few for a fit over tokens and size"
        return result
    has_body = len({p["body"] for p in known}) > 1
    has_tokens = len({p["tokens"] for p in known}) > 1

    def design(tokens, body):
        return [1.0, *([math.log(tokens)] if has_tokens else []), *([math.log(body)] if has_body else [])]

    rng = np.random.default_rng(0)
    x = np.array([design(p["tokens"], p["body"]) for p in known])
    draws = [np.linalg.lstsq(x, [p["mean"] for p in known], rcond=None)[0]]
    for _ in range(resamples):
        draws.append(
            np.linalg.lstsq(x, [redrawn_mean(list(p["by_seed"].values()), rng) for p in known], rcond=None)[0]
        )
    best, draws = draws[0], np.array(draws[1:])
    names = ["intercept", *(["ln_tokens"] if has_tokens else []), *(["ln_body"] if has_body else [])]
    result["fit"] = {
        name: {"mean": float(best[i])} | quantiles(draws[:, i]) for i, name in enumerate(names)
    } | {"cells": len(known), "resamples": resamples}
    if out is not None:
        measured = next((p for p in points if (p["rung"], p["length"]) == (out.rung, out.length)), None)
        if measured is not None:
            row = np.array(design(measured["tokens"], measured["body"]))
            result["held_out"] = {
                "rung": out.rung,
                "length": out.length,
                "predicted": {"mean": float(row @ best)} | quantiles(draws @ row),
                "measured": {k: measured[k] for k in ("mean", "low", "high")},
            }
    if has_tokens:
        for rung in dict.fromkeys(p["rung"] for p in points):
            of_rung = [p for p in points if p["rung"] == rung]
            low, high = min(p["tokens"] for p in of_rung), max(p["tokens"] for p in of_rung)
            if low == high:
                continue
            body = math.log(of_rung[0]["body"])

            def zero(w, body=body):
                return (
                    math.exp(min(700.0, max(-700.0, -(w[0] + (w[2] * body if has_body else 0)) / w[1])))
                    if w[1]
                    else math.inf
                )

            at = zero(best)
            inside = low < at < high
            result["crossings"].append(
                {"rung": rung, "from": low, "to": high, "tokens": at if inside else None}
                | (quantiles(np.array([zero(w) for w in draws])) if inside else {"low": None, "high": None})
            )
    return result


def redrawn_mean(values: list[float], rng) -> float:
    """The mean of n values drawn anew from n; its way from their mean is widened by sqrt(n / (n - 1)), since a handful
    of values spread less around their own mean than around the true one."""
    n, mean = len(values), float(np.mean(values))
    widen = math.sqrt(n / (n - 1)) if n > 1 else 1.0
    return mean + widen * (float(np.mean(rng.choice(values, n))) - mean)


def quantiles(values) -> dict:
    """The middle 95% of a bootstrap's draws."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def prize(exp: experiment.Experiment, cells: list[dict]) -> list[dict]:
    """For the longest length of each rung: arms with at most 15% of the table's input parameters, at their own best,
    and whether the rule calls them better than the tuned untied table."""
    result = []
    best = [c for c in cells if c["which"] == "best" and exp.gap.over in c["loss"]]
    for rung in exp.rungs:
        of_rung = [c for c in best if c["rung"] == rung]
        if of_rung:
            c = max(of_rung, key=lambda c: c["tokens"])
            arms = {
                arm: {k: g[k] for k in ("mean", "low", "high", "called")} | {"share": c["input_share"][arm]}
                for arm, g in c["gains"].items()
                if g and c["input_share"][arm] <= BUDGET
            }
            winners = [arm for arm, g in arms.items() if g["called"] and g["mean"] > 0]
            result.append({"rung": rung, "length": c["length"], "arms": arms, "winners": winners})
    return result
