"""Spelling robustness: what a typo in the prompt does to the prediction of what follows.

    python scripts/probes/spelling.py --runs out/demo
    python scripts/probes/spelling.py --runs out/demo --generate 6000             real typos in held-out text
    python scripts/probes/spelling.py --runs out/demo --pairs robustness_results.json   the paper's 110 pairs

Per clean/typo pair, at the last position: KL(clean || typo) in nats, cosine of the final hidden states (output
of ln_f), log-probability that the clean top-1 loses, and whether the top-1 stays. Arms are paired by prompt and
seed: McNemar's exact test on top-1, a paired bootstrap over prompts on KL, a t interval over seeds.

--generate draws words of the held-out text that stand in codespell's dictionary or nlpaug's list of real
misspellings, and slips of the keyboard beside them. Those pairs have the text's next words as a
continuation, whose bits per byte after either prompt tell robustness from ignorance: a model that predicts
nothing loses nothing by a typo, but has nothing to lose. The report says what difference so many pairs resolve.
"""

import math
from itertools import chain
from operator import itemgetter
from pathlib import Path

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch

from engine.errors import RunError
from kronecker import build_byte_buffer
from scripts.analysis import figures, stats
from scripts.analysis.likelihood import score
from scripts.analysis.report import Table
from scripts.arguments import whole
from scripts.probes import common, typos

METRICS = {  # name in agg: (key of a record, heading, digits, scale)
    "top1_match_rate": ("top1_matches", "top-1 kept, %", 1, 100.0),
    "mean_kl": ("kl_clean_to_typo", "KL, nats", 3, 1.0),
    "mean_cosine": ("cosine_hidden", "cosine", 3, 1.0),
    "mean_logprob_drop": ("logprob_drop", "log-prob drop", 3, 1.0),
    "mean_bpb_clean": ("bpb_clean", "bits per byte", 3, 1.0),
    "mean_bpb_cost": ("bpb_cost", "typo's cost", 4, 1.0),
}
PLAIN = list(METRICS)[:4]
CONTINUED = ["top1_match_rate", "mean_kl", "mean_bpb_clean", "mean_bpb_cost"]  # of pairs with a continuation
STRATA = {  # key of a pair or record: its values in their order
    "category": (),
    "edit": (*typos.EDITS, "several"),
    "inflation": ("none", "1", "2 and more"),
    "frequency": tuple(typos.FREQUENCIES),
}
PANELS = {"top1_match_rate": "Top-1 kept", "mean_kl": "KL (nats)", "mean_bpb_cost": "Cost (bits per byte)"}
TEXTS = ("clean", "typo", "top5_clean", "top5_typo", "top1_clean_str", "top1_typo_str")
TITLES = {  # in the order of their places on the page
    "spelling": "Spelling robustness",
    "spelling_generated": "Spelling robustness, misspellings in held-out text",
    "spelling_published": "Spelling robustness, the paper's pairs",
}


def measure(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> list[dict]:
    """One record a pair, with the keys of the published results; bits per byte where a pair has a continuation."""
    records = []
    for start in range(0, len(pairs), 256):  # logits of 256 pairs at a time bound the memory
        part = pairs[start : start + 256]
        ids = [tokenizer.encode(p[side]) for p in part for side in ("clean", "typo")]
        logits, hidden = common.last_states(model, ids, batch_size)
        logp = logits.log_softmax(-1)
        kl = (logp[0::2].exp() * (logp[0::2] - logp[1::2])).sum(-1)
        cosine = torch.nn.functional.cosine_similarity(hidden[0::2], hidden[1::2], dim=-1)
        top = logits.topk(5)
        for k, p in enumerate(part):
            r = {"prompt_id": start + k, "category": p["category"]}
            likeliest = top.indices[2 * k, 0].item()  # after the clean prompt
            for row, side in ((2 * k, "clean"), (2 * k + 1, "typo")):
                pairs_of = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
                five = [[i, tokenizer.decode([i]), v] for i, v in pairs_of]
                r |= {side: p[side], f"n_tokens_{side}": len(ids[row]), f"top5_{side}": five}
                r |= {f"top1_{side}_id": five[0][0], f"top1_{side}_str": five[0][1]}
                r[f"logp_top1_under_{side}"] = logp[row, likeliest].item()
            r["top1_matches"] = r["top1_clean_id"] == r["top1_typo_id"]
            r["logprob_drop"] = r["logp_top1_under_clean"] - r["logp_top1_under_typo"]
            r |= {"kl_clean_to_typo": max(kl[k].item(), 0.0), "cosine_hidden": cosine[k].item()}
            records.append(r)
    if pairs[0].get("continuation"):
        add_costs(model, tokenizer, pairs, records)
    return records


def add_costs(model, tokenizer, pairs: list[dict], records: list[dict]) -> None:
    """Bits per byte of the continuations after either prompt, and how many tokens the typo added."""
    # at most half a context of it: words that are no prose can take a hundred tokens of a small vocabulary
    longest, n_bytes_of = model.config.block_size // 2, tokenizer.byte_lengths()
    follows = [tokenizer.encode(p["continuation"])[:longest] for p in pairs]
    for side in ("clean", "typo"):
        texts = [(tokenizer.encode(p[side]), tokens) for p, tokens in zip(pairs, follows, strict=True)]
        for r, x, (_, tokens) in zip(records, score(model, texts)[0], texts, strict=True):
            r[f"bpb_{side}"] = float(x.sum() / math.log(2) / n_bytes_of[tokens].sum())
    for r in records:
        r["bpb_cost"] = r["bpb_typo"] - r["bpb_clean"]
        more = r["n_tokens_typo"] - r["n_tokens_clean"]
        r["inflation"] = "none" if more < 1 else "1" if more == 1 else "2 and more"


def untrained_twin(model, tokenizer, config: dict, seed: int):
    """The run's model as it was at step 0: the control that shows what robustness needs no knowledge."""
    buffers = None
    if model.config.wte == "kronecker":
        buffers = build_byte_buffer(tokenizer.backend, model.config.pos_dim, config["byte_extraction"])
    fresh = type(model)(model.config, buffers, seed=seed)
    return fresh.to(model.transformer.wpe.weight.device).eval()


def with_twin(run, model, tokenizer, *given) -> tuple[list[dict], list[dict]]:
    """(records of a run, of its untrained twin)."""
    twin = untrained_twin(model, tokenizer, run.config, run.seed)
    return measure(model, tokenizer, *given), measure(twin, tokenizer, *given)


def summarise(records: list[dict]) -> dict:
    """The published aggregate of some records."""
    of = {key: [r[key] for r in records] for key in records[0]}
    means = {m: float(np.mean(of[key])) for m, (key, *_) in METRICS.items() if key in of}
    added = np.subtract(of["n_tokens_typo"], of["n_tokens_clean"])
    kl = float(np.median(of["kl_clean_to_typo"]))
    return {"n": len(records)} | means | {"median_kl": kl, "mean_token_inflation": float(added.mean())}


def aggregate(arm: str, mine: dict[int, list[dict]]) -> dict:
    """The published aggregate of an arm's records, overall and by category, and that of each seed."""
    records = [*chain(*mine.values())]
    categories = dict.fromkeys(r["category"] for r in records)
    by_category = {c: summarise([r for r in records if r["category"] == c]) for c in categories}
    by_seed = {seed: summarise(of) for seed, of in mine.items()}
    return {"arm": arm, "overall": summarise(records), "by_category": by_category, "by_seed": by_seed}


def columns(by_run: dict, arm: str, seeds, key: str) -> np.ndarray:
    """(seeds, pairs) of one figure of an arm's records."""
    return np.array([[r[key] for r in by_run[arm][s]] for s in seeds], dtype=float)


def compare_arms(by_run: dict, arm: str, over: str, seed: int) -> dict | None:
    """arm over another on the same prompts, with what so many prompts could have shown at all."""
    seeds = [s for s in by_run[arm] if s in by_run[over]]
    if not seeds:
        return None

    def both(key: str) -> list[np.ndarray]:
        return [columns(by_run, a, seeds, key) for a in (arm, over)]

    (kept, other_kept), (kl, other_kl) = both("top1_matches"), both("kl_clean_to_typo")
    of = np.array([r["category"] for r in by_run[arm][seeds[0]]])
    won = [bool(kept[:, of == c].mean() >= other_kept[:, of == c].mean()) for c in dict.fromkeys(of)]
    n, discordant = kept.shape[1], float((kept != other_kept).mean())
    found = {
        "arm": arm,
        "over": over,
        "seeds": seeds,
        "top1_difference": stats.interval(kept.mean(1) - other_kept.mean(1)),
        "mcnemar_by_seed": {str(s): stats.mcnemar(kept[k], other_kept[k]) for k, s in enumerate(seeds)},
        "kl_difference": stats.bootstrap_mean(kl.mean(0) - other_kl.mean(0), seed=seed),
        "kl_percent": 100 * (kl.mean() / other_kl.mean() - 1) if other_kl.mean() else None,
        "categories_won_or_tied": [sum(won), len(won)],
        "power": {"pairs": n, "discordant": discordant, "top1": stats.detectable_rate(discordant, n)},
    }
    differences = {"kl": kl - other_kl}
    if "bpb_cost" in by_run[arm][seeds[0]][0]:
        cost = differences["bpb_cost"] = np.subtract(*both("bpb_cost"))
        found["cost_difference"] = stats.interval(cost.mean(0))
        found["cost_difference_over_seeds"] = stats.interval(cost.mean(1))
    for name, d in differences.items() if n > 1 else ():
        found["power"][name] = stats.detectable_mean(float(d.mean(0).std(ddof=1)), n)
    return found


def stratified(by_run: dict, pairs: list[dict], comparisons: list[dict]) -> list[dict]:
    """Rows {"stratum", "value", "pairs", "arms": {arm: {figure: [of each seed]}}, "over": {...}}, all pairs first.

    Pairs from a file have their categories, generated ones several strata, and the difference of costs in each.
    """
    first = next(iter(next(iter(by_run.values())).values()))
    seen = [p | r for p, r in zip(pairs, first, strict=True)]
    keys = {m: METRICS[m][0] for m in CONTINUED if METRICS[m][0] in first[0]}
    values = {a: {m: columns(by_run, a, mine, key) for m, key in keys.items()} for a, mine in by_run.items()}
    over = {}
    for c in comparisons if "bpb_cost" in first[0] else ():
        mine, other = (columns(by_run, a, c["seeds"], "bpb_cost") for a in (c["arm"], c["over"]))
        over[f"{c['arm']} over {c['over']}"] = (mine - other).mean(0)
    rows = []
    for stratum, order in ({"all": ("all",)} | STRATA).items():
        of = np.array([x.get(stratum, stratum) for x in seen])
        for value in [v for v in order or dict.fromkeys(of) if v in of]:
            here = of == value
            arms = {a: {m: x[:, here].mean(1).tolist() for m, x in own.items()} for a, own in values.items()}
            differences = {name: stats.interval(x[here]) for name, x in over.items()}
            row = {"stratum": stratum, "value": str(value), "pairs": int(here.sum())}
            rows.append(row | {"arms": arms, "over": differences})
    return rows


def main_table(by_run: dict, what: str, shown: list[str]) -> Table:
    """An arm a row; by_run holds untrained models and the paper's beside ours."""
    rows = []
    for arm, mine in by_run.items():
        found = [summarise(records) for records in mine.values()]
        cells = [common.mean_cell([x[m] for x in found], *METRICS[m][2:]) for m in shown]
        median = np.mean([x["median_kl"] for x in found])
        rows.append([arm, *cells, f"{median:.3f}", f"{found[0]['mean_token_inflation']:+.2f}"])
    note = (
        "Mean ± SD over seeds. KL(clean || typo) at the last position; lower is more robust. untrained: the same "
        "architecture before its first step, which knows no words: what an arm keeps there it owes to its "
        "embedding's scale, since the last token is nearly always the same in both prompts."
    )
    if shown is CONTINUED:
        note += (
            " bits per byte: of the text's next words after the clean prompt, which says what there is to lose; "
            "typo's cost: how much more after the misspelled one."
        )
    elif not any(arm.startswith("paper: ") for arm in by_run):
        note += " The paper (124M, 110 other pairs): top-1 55.5% against 47.3%, KL -7.6%."
    header = ["arm", *(METRICS[m][1] for m in shown), "median KL", "tokens added"]
    return Table(f"Spelling robustness over {what}", header, rows, note=note)


def comparison_tables(comparisons: list[dict]) -> list[Table]:
    if not comparisons:
        return []
    rows, power, continued = [], [], "cost_difference" in comparisons[0]
    for c in comparisons:
        start, p = [c["arm"], c["over"]], stats.p_cell(c["mcnemar_by_seed"])
        if continued:
            last = [common.interval_cell(c[k], 4) for k in ("cost_difference", "cost_difference_over_seeds")]
        else:
            percent = "-" if c["kl_percent"] is None else f"{c['kl_percent']:+.1f}%"
            won = "{} of {}".format(*c["categories_won_or_tied"])
            last = [common.interval_cell(c["kl_difference"]), percent, won]
        rows.append([*start, common.interval_cell(c["top1_difference"], 1, 100), p, *last])
        w, shown = c["power"], {"top1": (1, 100), "kl": (3, 1), "bpb_cost": (4, 1)}
        least = ["-" if (x := w.get(k)) is None else f"{x * f:.{d}f}" for k, (d, f) in shown.items()]
        power.append([*start, f"{w['pairs']:,}", f"{100 * w['discordant']:.1f}", *least])
    last = ["typo's cost, over pairs", "over seeds"] if continued else ["KL, nats", "KL", "won or tied"]
    how = "KL: bootstrap over prompts of the seeds' mean; won or tied: categories, on top-1."
    how = "typo's cost: t, in bits per byte." if continued else how
    note = "95% intervals. top-1: t over seeds; McNemar: exact, one a seed; " + how
    header = ["arm", "over", "top-1, points", "McNemar p", *last]
    table = Table("One arm over another, on the same prompts", header, rows, left=2, note=note)
    note = (
        "The smallest true difference that a test at 5% finds in 80 of 100 repetitions: McNemar's on the top-1 "
        "of one seed, given the share of pairs on which the two differ; the paired t test on the seeds' means. Other "
        "prompts only: what another training would give is in the intervals over seeds."
    )
    header = ["arm", "over", "pairs", "differ, %", "top-1, points", "KL, nats", "typo's cost"]
    return [table, Table("What so many pairs can show", header, power, left=2, note=note)]


def kind_tables(strata: list[dict]) -> list[Table]:
    arms, over = list(strata[0]["arms"]), list(strata[0]["over"])
    last, form, name = "mean_kl", ".2f", "KL"
    if "mean_bpb_cost" in strata[0]["arms"][arms[0]]:
        last, form, name = "mean_bpb_cost", "+.3f", "typo's cost in bits per byte"
    rows, differences = [], []
    for r in strata:
        start = [r["stratum"], r["value"], f"{r['pairs']:,}"]
        means = [{m: np.mean(x) for m, x in of.items()} for of in r["arms"].values()]
        rows.append([*start, *(f"{100 * m['top1_match_rate']:.0f}%  {m[last]:{form}}" for m in means)])
        differences.append([*start, *(common.interval_cell(r["over"][o], 4) for o in over)])
    tables = [Table(f"By kind: top-1 kept, {name}", ["", "", "pairs", *arms], rows, left=2)]
    if over:
        note = (
            "Bits per byte; t interval over pairs of the seeds' mean, 95%. inflation: tokens that the misspelling "
            "adds; frequency: of the word in the text that the pairs are drawn from."
        )
        header = ["", "", "pairs", *over]
        tables.append(Table("By kind: difference of the typo's cost", header, differences, left=2, note=note))
    return tables


def draw(strata: list[dict]):
    alone = ("all", "category")
    rows = [("" if r["stratum"] in alone else f"{r['stratum']}: ") + r["value"] for r in strata]
    arms = strata[0]["arms"]
    shown = {k: title for k, title in PANELS.items() if k in next(iter(arms.values()))}
    panels = [(title, {a: [r["arms"][a][k] for r in strata] for a in arms}) for k, title in shown.items()]
    return figures.dot_figure(rows, panels)


def arguments(add) -> None:
    add("--pairs", metavar="FILE", help="typo pairs (default: our 110)")
    add("--generate", type=whole(1, 100_000), metavar="N", help="N misspellings in held-out text instead")
    add("--text", metavar="FILE", help="held-out text for --generate: txt, jsonl or parquet, packed or not")
    add("--batch_size", type=whole(1), default=64, help="prompts at a time (%(default)s)")


def probe(args) -> common.Finding:
    if args.text and not args.generate:
        raise RunError("--text is read by --generate=N alone: give that too, or leave --text out")
    if args.pairs and args.generate:
        raise RunError("--pairs and --generate exclude each other: give one of them")
    args.pairs = args.pairs or str(common.DATA / "spelling_pairs.json")
    if args.generate:
        first = common.finished_runs(args.runs, args.allow_unfinished)[0]
        text = typos.held_out_text(args.text, first)
        pairs, published = typos.draw_pairs(text, args.generate, args.seed), {}
        what, name = f"{len(pairs):,} misspellings in held-out text", "spelling_generated"
    else:
        pairs, published = typos.read_pairs(Path(args.pairs))
        what, name = f"{len(pairs)} pairs", "spelling_published" if published else "spelling"
    measured, baseline = common.measure_runs(args, "spelling", with_twin, pairs, args.batch_size)
    by_run, untrained = (common.each(measured, itemgetter(k)) for k in (0, 1))
    wanted = common.pairs_to_compare(by_run, baseline)
    # the paper's own records, one seed, go through the same tests
    with_theirs = by_run | {f"paper: {arm}": {1337: records} for arm, records in published.items()}
    if {"bpe", "kron"} <= set(published):
        wanted.append(("paper: kron", "paper: bpe"))
    comparisons = [c for a, b in wanted if (c := compare_arms(with_theirs, a, b, args.seed))]
    strata = stratified(with_theirs, pairs, comparisons)
    records = {a: [r | {"seed": seed} for seed, of in mine.items() for r in of] for a, mine in by_run.items()}
    result = {
        "untrained": {arm: aggregate(arm, mine) for arm, mine in untrained.items()},
        "comparisons": comparisons,
        "strata": strata,
    }
    items = None
    if args.generate:  # other people's text, and very many records: kept beside the figures, not among them
        short = {arm: [{k: r[k] for k in r if k not in TEXTS} for r in of] for arm, of in records.items()}
        items = {"prompt_pairs": pairs, "per_prompt": short}
        result |= {arm: {"agg": aggregate(arm, mine)} for arm, mine in by_run.items()}
    else:
        result |= {"prompt_pairs": pairs}
        result |= {a: {"agg": aggregate(a, mine), "per_prompt": records[a]} for a, mine in by_run.items()}
    shown = CONTINUED if args.generate else PLAIN
    rows = with_theirs | {f"{arm}, untrained": mine for arm, mine in untrained.items()}
    tables = [main_table(rows, what, shown), *comparison_tables(comparisons)]
    return common.Finding(
        name, TITLES[name], 20 + list(TITLES).index(name), result,
        {"seed": args.seed, "generate": args.generate},
        [*tables, *kind_tables(strata)], draw(strata), common.POINTS,
        "A word of the prompt is misspelled; how far does the prediction of what follows move? A model that "
        "predicts little is moved little, so the figures of weak models say less than they seem to.",
        items=items,
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments)

if __name__ == "__main__":
    main()
