"""Spelling robustness: what a typo in the prompt does to the prediction of what follows.

    python scripts/probes/spelling.py --runs out/demo
    python scripts/probes/spelling.py --runs out/demo --generate 6000             real typos in held-out text
    python scripts/probes/spelling.py --runs out/demo --pairs robustness_results.json   the paper's 110 pairs

Per clean/typo pair, at the last position: KL(clean || typo) in nats, cosine of the final hidden states (output
of ln_f), log-probability that the clean top-1 loses, and whether the top-1 stays. Arms are paired by prompt and
seed: McNemar's exact test on top-1, a paired bootstrap over prompts on KL, a t interval over seeds.

--generate draws words of the held-out text that stand in codespell's dictionary or nlpaug's list of real
misspellings, and slips of the keyboard beside them (--sources). Those pairs have the text's next words as a
continuation, whose bits per byte after either prompt tell robustness from ignorance: a model that predicts
nothing loses nothing by a typo, but has nothing to lose. The report says what difference so many pairs resolve.
"""

import math
import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from data.files import write_json
from engine.errors import sentences
from scripts.analysis import figures, stats
from scripts.analysis.likelihood import score
from scripts.analysis.report import Table
from scripts.arguments import Parser, names, whole
from scripts.probes import common, typos

METRICS = {  # name in agg: (heading, digits, scale)
    "top1_match_rate": ("top-1 kept, %", 1, 100.0),
    "mean_kl": ("KL, nats", 3, 1.0),
    "mean_cosine": ("cosine", 3, 1.0),
    "mean_logprob_drop": ("log-prob drop", 3, 1.0),
}
CONTINUED = {k: METRICS[k] for k in ("top1_match_rate", "mean_kl")} | {  # of pairs with a continuation
    "mean_bpb_clean": ("bits per byte", 3, 1.0),
    "mean_bpb_cost": ("typo's cost", 4, 1.0),
}
FIGURES = {  # name in agg: key of a record
    "top1_match_rate": "top1_matches",
    "mean_kl": "kl_clean_to_typo",
    "mean_bpb_clean": "bpb_clean",
    "mean_bpb_cost": "bpb_cost",
}
STRATA = {"source": "category", "edit": "edit", "tokens added": "added", "frequency": "frequency"}
ORDERED = {  # strata whose values have an order
    "edit": (*typos.EDITS, "several"),
    "added": ("none", "1", "2 and more"),
    "frequency": tuple(typos.FREQUENCIES),
}
TEXTS = ("clean", "typo", "top5_clean", "top5_typo", "top1_clean_str", "top1_typo_str")


# ---------------------------------------------------------------------------------------------- measuring


def measure(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> list[dict]:
    """One record a pair, with the keys of the published results; bits per byte where a pair has a continuation."""
    records = []
    for start in range(0, len(pairs), 256):  # logits of 256 pairs at a time bound the memory
        part = pairs[start : start + 256]
        ids = [tokenizer.encode(p[side]) for p in part for side in ("clean", "typo")]
        logits, hidden = common.last_states(model, ids, batch_size)
        logp = logits.log_softmax(-1)
        clean, typo = logp[0::2], logp[1::2]
        kl = (clean.exp() * (clean - typo)).sum(-1)
        cosine = torch.nn.functional.cosine_similarity(hidden[0::2], hidden[1::2], dim=-1)
        top_clean, top_typo = logits[0::2].topk(5), logits[1::2].topk(5)

        def five(top, k, tokenizer=tokenizer):
            rows = zip(top.indices[k].tolist(), top.values[k].tolist(), strict=True)
            return [[i, tokenizer.decode([i]), v] for i, v in rows]

        for k, p in enumerate(part):
            a, b = top_clean.indices[k, 0].item(), top_typo.indices[k, 0].item()
            under_clean, under_typo = clean[k, a].item(), typo[k, a].item()
            records.append(
                {
                    "prompt_id": start + k,
                    "category": p["category"],
                    "clean": p["clean"],
                    "typo": p["typo"],
                    "n_tokens_clean": len(ids[2 * k]),
                    "n_tokens_typo": len(ids[2 * k + 1]),
                    "top1_clean_id": a,
                    "top1_clean_str": tokenizer.decode([a]),
                    "top1_typo_id": b,
                    "top1_typo_str": tokenizer.decode([b]),
                    "top1_matches": a == b,
                    "top5_clean": five(top_clean, k),
                    "top5_typo": five(top_typo, k),
                    "logp_top1_under_clean": under_clean,
                    "logp_top1_under_typo": under_typo,
                    "logprob_drop": under_clean - under_typo,
                    "kl_clean_to_typo": max(kl[k].item(), 0.0),
                    "cosine_hidden": cosine[k].item(),
                }
            )
    if pairs and "continuation" in pairs[0]:
        # at most half a context of it: words that are no prose can take a hundred tokens of a small vocabulary
        longest, n_bytes_of = model.config.block_size // 2, tokenizer.byte_lengths()
        follows = [tokenizer.encode(p["continuation"])[:longest] for p in pairs]
        for side in ("clean", "typo"):
            texts = [(tokenizer.encode(p[side]), tokens) for p, tokens in zip(pairs, follows, strict=True)]
            nats, _ = score(model, texts)
            for r, x, tokens in zip(records, nats, follows, strict=True):
                r[f"bpb_{side}"] = float(x.sum() / math.log(2) / n_bytes_of[tokens].sum())
        for r in records:
            r["bpb_cost"] = r["bpb_typo"] - r["bpb_clean"]
            more = r["n_tokens_typo"] - r["n_tokens_clean"]
            r["added"] = "none" if more < 1 else "1" if more == 1 else "2 and more"
    return records


def untrained_twin(model, tokenizer, config: dict, seed: int):
    """The run's model as it was at step 0: the control that shows what robustness needs no knowledge."""
    buffers = None
    if model.config.wte == "kronecker":
        from kronecker import build_byte_buffer

        buffers = build_byte_buffer(tokenizer.backend, model.config.pos_dim, config["byte_extraction"])
    fresh = type(model)(model.config, buffers, seed=seed)
    return fresh.to(model.transformer.wpe.weight.device).eval()


def summarise(records: list[dict]) -> dict:
    """The published aggregate of some records."""

    def mean(key):
        return float(np.mean([r[key] for r in records]))

    continued = bool(records) and "bpb_cost" in records[0]
    return {
        "n": len(records),
        "top1_match_rate": mean("top1_matches"),
        "mean_kl": mean("kl_clean_to_typo"),
        "mean_cosine": mean("cosine_hidden"),
        "mean_logprob_drop": mean("logprob_drop"),
        "median_kl": float(np.median([r["kl_clean_to_typo"] for r in records])),
        "mean_token_inflation": float(np.mean([r["n_tokens_typo"] - r["n_tokens_clean"] for r in records])),
    } | ({f"mean_{k}": mean(k) for k in ("bpb_clean", "bpb_cost")} if continued else {})


def aggregate(arm: str, records: list[dict]) -> dict:
    """The published aggregate of an arm's records, overall and by category."""
    categories = list(dict.fromkeys(r["category"] for r in records))
    return {
        "arm": arm,
        "overall": summarise(records),
        "by_category": {c: summarise([r for r in records if r["category"] == c]) for c in categories},
    }


def columns(by_run: dict, arm: str, seeds: list, key: str) -> np.ndarray:
    """(seeds, pairs) of one figure of an arm's records."""
    return np.array([[r[key] for r in by_run[arm, s]] for s in seeds], dtype=float)


def compare_arms(by_run: dict, arm: str, over: str, seed: int) -> dict | None:
    """arm over another on the same prompts, with what so many prompts could have shown at all."""
    seeds = [s for a, s in by_run if a == arm and (over, s) in by_run]
    if not seeds:
        return None
    kept, other_kept = (columns(by_run, a, seeds, "top1_matches") for a in (arm, over))
    kl, other_kl = (columns(by_run, a, seeds, "kl_clean_to_typo") for a in (arm, over))
    rates = {}
    for a in (arm, over):
        records = [r for s in seeds for r in by_run[a, s]]
        rates[a] = [e["top1_match_rate"] for e in aggregate(a, records)["by_category"].values()]
    won = sum(a >= b for a, b in zip(rates[arm], rates[over], strict=True))
    n, discordant = kept.shape[1], float((kept != other_kept).mean())

    def detectable(differences):
        return stats.detectable_mean(float(differences.std(ddof=1)), n) if n > 1 else None

    found = {
        "arm": arm,
        "over": over,
        "seeds": seeds,
        "top1_difference": stats.interval((kept.mean(1) - other_kept.mean(1)).tolist()),
        "mcnemar_by_seed": {str(s): stats.mcnemar(kept[k], other_kept[k]) for k, s in enumerate(seeds)},
        "mcnemar_majority": stats.mcnemar(kept.mean(0) > 0.5, other_kept.mean(0) > 0.5),
        "kl_difference": stats.bootstrap_mean(kl.mean(0) - other_kl.mean(0), seed=seed),
        "kl_difference_over_seeds": stats.interval((kl.mean(1) - other_kl.mean(1)).tolist()),
        "kl_percent": 100 * (kl.mean() / other_kl.mean() - 1) if other_kl.mean() else None,
        "categories_won_or_tied": [won, len(rates[arm])],
        "power": {
            "pairs": n,
            "discordant": discordant,
            "top1": stats.detectable_rate(discordant, n),
            "top1_of_110": stats.detectable_rate(discordant, 110),
            "kl": detectable(kl.mean(0) - other_kl.mean(0)),
        },
    }
    if "bpb_cost" in by_run[arm, seeds[0]][0]:
        cost = columns(by_run, arm, seeds, "bpb_cost") - columns(by_run, over, seeds, "bpb_cost")
        found["cost_difference"] = stats.interval(cost.mean(0))
        found["cost_difference_over_seeds"] = stats.interval(cost.mean(1))
        found["power"]["bpb_cost"] = detectable(cost.mean(0))
    return found


def stratified(by_run: dict, pairs: list[dict], comparisons: list[dict]) -> list[dict]:
    """Rows {"stratum", "value", "pairs", "arms": {arm: {figure: [of each seed]}}, "over": {...}}, all pairs first.

    Pairs from a file have their categories, generated ones several strata, and the difference of costs in each.
    """
    first = next(iter(by_run.values()))
    cost = "bpb_cost" in first[0]
    keys = [k for k in FIGURES if FIGURES[k] in first[0]]
    rows = []
    for stratum, key in {"all": None, **(STRATA if cost else {"category": "category"})}.items():
        of = ["all" if key is None else (r | p)[key] for p, r in zip(pairs, first, strict=True)]
        for value in [v for v in ORDERED.get(key, dict.fromkeys(of)) if v in of]:
            inside = np.array(of) == value
            row = {"stratum": stratum, "value": value, "pairs": int(inside.sum()), "arms": {}, "over": {}}
            for arm in dict.fromkeys(a for a, _ in by_run):
                seeds = [s for a, s in by_run if a == arm]
                of_arm = {
                    k: columns(by_run, arm, seeds, FIGURES[k])[:, inside].mean(1).tolist() for k in keys
                }
                row["arms"][arm] = of_arm
            for c in comparisons if cost else ():
                sides = [columns(by_run, a, c["seeds"], "bpb_cost")[:, inside] for a in (c["arm"], c["over"])]
                row["over"][f"{c['arm']} over {c['over']}"] = stats.interval((sides[0] - sides[1]).mean(0))
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------- output


def main_table(by_run: dict, untrained: dict, published: dict, what: str, wanted: dict) -> Table:
    """Arms, their untrained twins and what was published, a row each."""

    def last(overall):
        return [f"{overall['median_kl']:.3f}", f"{overall['mean_token_inflation']:+.2f}"]

    rows = []
    for label, source in (("", by_run), (", untrained", untrained)):
        summary = {run: summarise(records) for run, records in source.items()}
        for arm in dict.fromkeys(a for a, _ in source):
            values = {m: {run: s[m] for run, s in summary.items()} for m in wanted}
            cells = [common.arm_cell(values[m], arm, d, scale) for m, (_, d, scale) in wanted.items()]
            rows.append(
                [
                    arm + label,
                    *cells,
                    *last(summarise([r for run in source if run[0] == arm for r in source[run]])),
                ]
            )
    for arm, entry in published.items():
        overall = entry["agg"]["overall"]
        rows.append(
            [f"paper: {arm}", *(f"{overall[m] * f:.{d}f}" for m, (_, d, f) in wanted.items()), *last(overall)]
        )
    note = (
        "Mean ± SD over seeds. KL(clean || typo) at the last position; lower is more robust. untrained: the same "
        "architecture before its first step, which knows no words: what an arm keeps there it owes to its "
        "embedding's scale, since the last token is nearly always the same in both prompts."
    )
    if wanted is CONTINUED:
        note += (
            " bits per byte: of the text's next words after the clean prompt, which says what there is to lose; "
            "typo's cost: how much more after the misspelled one."
        )
    elif not published:
        note += " The paper (124M, 110 other pairs): top-1 55.5% against 47.3%, KL -7.6%."
    header = ["arm", *(h for h, _, _ in wanted.values()), "median KL", "tokens added"]
    return Table(f"Spelling robustness over {what}", header, rows, note=note)


def comparison_tables(comparisons: list[dict]) -> list[Table]:
    """One arm over another on the same prompts, and what so many prompts could have shown."""
    rows, power = [], []
    for c in comparisons:
        p = " ".join([f"{m['p_value']:.2g}" for m in c["mcnemar_by_seed"].values()][:5])
        row = [c["arm"], c["over"], common.interval_cell(c["top1_difference"], 1, 100), p]
        if "cost_difference" in c:
            row += [common.interval_cell(c[k], 4) for k in ("cost_difference", "cost_difference_over_seeds")]
        else:
            percent = "-" if c["kl_percent"] is None else f"{c['kl_percent']:+.1f}%"
            row += [
                common.interval_cell(c["kl_difference"]),
                percent,
                "{} of {}".format(*c["categories_won_or_tied"]),
            ]
        rows.append(row)
        w = c["power"]
        shown = [("top1", 1, 100), ("top1_of_110", 1, 100), ("kl", 3, 1), ("bpb_cost", 4, 1)]
        least = ["-" if (x := w.get(k)) is None else f"{x * f:.{d}f}" for k, d, f in shown]
        power.append([c["arm"], c["over"], f"{w['pairs']:,}", f"{100 * w['discordant']:.1f}", *least])
    if not rows:
        return []
    if "cost_difference" in comparisons[0]:
        last, how = ["typo's cost, over pairs", "over seeds"], "typo's cost: t, in bits per byte."
    else:
        last = ["KL, nats", "KL", "won or tied"]
        how = "KL: bootstrap over prompts of the seeds' mean; won or tied: categories, on top-1."
    return [
        Table(
            "One arm over another, on the same prompts",
            ["arm", "over", "top-1, points", "McNemar p", *last],
            rows,
            left=2,
            note="95% intervals. top-1: t over seeds; McNemar: exact, one a seed; " + how,
        ),
        Table(
            "What so many pairs can show",
            ["arm", "over", "pairs", "differ, %", "top-1, points", "of 110 pairs", "KL, nats", "typo's cost"],
            power,
            left=2,
            note="The smallest true difference that a test at 5% finds in 80 of 100 repetitions: McNemar's on the top-1 "
            "of one seed, given the share of pairs on which the two differ; the paired t test on the seeds' means. Other "
            "prompts only: what another training would give is in the intervals over seeds.",
        ),
    ]


def kind_tables(strata: list[dict]) -> list[Table]:
    """Arms by category or stratum, and the differences of their costs."""
    arms, over = list(strata[0]["arms"]), list(strata[0]["over"])
    last, form, name = "mean_kl", ".2f", "KL"
    if "mean_bpb_cost" in strata[0]["arms"][arms[0]]:
        last, form, name = "mean_bpb_cost", "+.3f", "typo's cost in bits per byte"
    rows, differences = [], []
    for r in strata:
        start = [r["stratum"], r["value"], f"{r['pairs']:,}"]
        kept = [100 * np.mean(r["arms"][a]["top1_match_rate"]) for a in arms]
        others = [np.mean(r["arms"][a][last]) for a in arms]
        rows.append([*start, *(f"{k:.0f}%  {x:{form}}" for k, x in zip(kept, others, strict=True))])
        differences.append([*start, *(common.interval_cell(r["over"][o], 4) for o in over)])
    tables = [Table(f"By kind: top-1 kept, {name}", ["", "", "pairs", *arms], rows, left=2)]
    if over:
        note = (
            "Bits per byte; t interval over pairs of the seeds' mean, 95%. tokens added: by the misspelling; frequency: "
            "of the word in the text that the pairs are drawn from."
        )
        header = ["", "", "pairs", *over]
        tables.append(Table("By kind: difference of the typo's cost", header, differences, left=2, note=note))
    return tables


def draw(strata: list[dict]):
    """Top-1 kept, KL and cost, by category or stratum, an arm a colour."""
    titles = {
        "top1_match_rate": "Top-1 kept",
        "mean_kl": "KL (nats)",
        "mean_bpb_cost": "Cost (bits per byte)",
    }
    by_name = {
        r["value"] if r["stratum"] == "all" else f"{r['stratum']}: {r['value']}": r["arms"] for r in strata
    }
    arms = strata[0]["arms"]
    panels = [
        (title, {a: [of[a][k] for of in by_name.values()] for a in arms})
        for k, title in titles.items()
        if k in next(iter(arms.values()))
    ]
    return figures.dot_figure([name.removeprefix("category: ") for name in by_name], panels)


TITLES = {  # in the order of their places on the page
    "spelling": "Spelling robustness",
    "spelling_generated": "Spelling robustness, misspellings in held-out text",
    "spelling_published": "Spelling robustness, the paper's pairs",
}


def main(argv=None) -> None:
    parser = Parser(__doc__)
    common.add_arguments(parser)
    add = parser.add_argument
    add("--pairs", default=str(common.DATA / "spelling_pairs.json"), help="typo pairs (default: our 110)")
    add("--generate", type=whole(1, 100_000), metavar="N", help="N misspellings in held-out text instead")
    add(
        "--sources",
        type=names,
        default=",".join(typos.SOURCES),
        help="of --generate, in equal parts (%(default)s)",
    )
    add("--text", metavar="FILE", help="held-out text for --generate: txt, jsonl or parquet, packed or not")
    add("--no-control", action="store_true", help="do not measure the untrained twins")
    add("--batch_size", type=whole(1), default=64, help="prompts at a time (%(default)s)")
    args = parser.parse_args(argv)
    with sentences():
        if args.generate:
            text = typos.held_out_text(args, common.finished_runs(args)[0])
            pairs, published = typos.draw_pairs(text, args.generate, args.seed, args.sources), {}
            what, name = f"{len(pairs):,} misspellings in held-out text", "spelling_generated"
        else:
            pairs, published = typos.read_pairs(Path(args.pairs))
            what, name = f"{len(pairs)} pairs", "spelling_published" if published else "spelling"
        untrained = {}

        def measure_one(run, model, tokenizer, config) -> list[dict]:
            if not args.no_control:
                fresh = untrained_twin(model, tokenizer, config, run.seed)
                untrained[run.arm, run.seed] = measure(fresh, tokenizer, pairs, args.batch_size)
            return measure(model, tokenizer, pairs, args.batch_size)

        by_run, arms, baseline = common.measure_runs(args, "spelling", measure_one)
        by_arm = {}
        for arm in arms:
            records = [{**r, "seed": s} for (a, s), rs in by_run.items() if a == arm for r in rs]
            by_seed = {str(s): summarise(rs) for (a, s), rs in by_run.items() if a == arm}
            by_arm[arm] = {"per_prompt": records, "agg": aggregate(arm, records) | {"by_seed": by_seed}}
        wanted = [(a, baseline) for a in arms if a != baseline]
        if {"kronecker", "bpe_untied"} <= set(arms) and baseline != "bpe_untied":
            wanted.append(("kronecker", "bpe_untied"))
        comparisons = [c for a, b in wanted if (c := compare_arms(by_run, a, b, args.seed))]
        theirs = {(f"paper: {a}", 1337): x["per_prompt"] for a, x in published.items()}
        strata = stratified(by_run | theirs, pairs, comparisons)
        if {"bpe", "kron"} <= set(published):  # the same tests on the paper's own records, one seed
            comparisons.append(compare_arms(theirs, "paper: kron", "paper: bpe", args.seed))
        result = {
            **by_arm,
            "prompt_pairs": pairs,
            "untrained": {
                arm: aggregate(arm, [r for (a, _), rs in untrained.items() if a == arm for r in rs])
                for arm in arms
                if untrained
            },
            "comparisons": comparisons,
            "strata": strata,
            "published": {a: x["agg"] for a, x in published.items()},
        }
        tables = [
            main_table(by_run, untrained, published, what, CONTINUED if args.generate else METRICS),
            *comparison_tables(comparisons),
            *kind_tables(strata),
        ]
        out = common.out_folder(args)
        items = {}
        if (
            args.generate
        ):  # other people's text, and very many records: kept beside the figures, not among them
            per_prompt = {a: result[a].pop("per_prompt") for a in arms}
            lean = {
                a: [{k: v for k, v in r.items() if k not in TEXTS} for r in rs]
                for a, rs in per_prompt.items()
            }
            items = {"prompt_pairs": result.pop("prompt_pairs"), "per_prompt": lean}
        common.finish(
            __file__, argv, out, name, TITLES[name], 20 + list(TITLES).index(name), result,
            {"seed": args.seed, "generate": args.generate, "sources": args.sources if args.generate else None},
            tables, draw(strata), "Large points: means over seeds; small points: seeds.",
            "A word of the prompt is misspelled; how far does the prediction of what follows move? A model that "
            "predicts little is moved little, so the figures of weak models say less than they seem to.",
        )  # fmt: skip
        if items:
            write_json(out / "compare" / "probes" / f"{name}_items.json", items)


if __name__ == "__main__":
    main()
