"""Spelling robustness: what a typo in the prompt does to the next-token prediction.

    python scripts/probes/spelling.py --runs out/demo
    python scripts/probes/spelling.py --runs out/demo --generate 1000             synthetic typos in held-out text
    python scripts/probes/spelling.py --runs out/demo --pairs robustness_results.json   the paper's 110 pairs

Per clean/typo pair, at the last position: KL(clean || typo) in nats, cosine of the final hidden states (output
of ln_f), log-probability that the clean top-1 loses, and whether the top-1 stays. Arms are paired by prompt and
seed: McNemar's exact test on top-1, a paired bootstrap over prompts on KL, a t interval over seeds.
"""

import json
import lzma
import random
import re
import sys
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from data.records import Record, read_record, validated
from engine.errors import RunError, sentences
from scripts.analysis import figures, report, stats
from scripts.analysis.report import Table
from scripts.arguments import Parser, whole
from scripts.probes import common

KEYBOARD = ["qwertyuiop", "asdfghjkl", "zxcvbnm"]
OPERATIONS = ("swap", "drop", "double", "substitute")
METRICS = {  # name in agg: (heading, digits, scale)
    "top1_match_rate": ("top-1 kept, %", 1, 100.0),
    "mean_kl": ("KL, nats", 3, 1.0),
    "mean_cosine": ("cosine", 3, 1.0),
    "mean_logprob_drop": ("log-prob drop", 3, 1.0),
}


# ---------------------------------------------------------------------------------------------- pairs


class TypoPair(Record):
    category: str
    clean: str
    typo: str


class TypoPairs(Record):
    prompt_pairs: list[TypoPair]


class Aggregate(Record):
    overall: dict[str, float]
    by_category: dict[str, dict[str, float]]


class PublishedRecord(Record):
    category: str
    top1_matches: bool
    kl_clean_to_typo: float


class PublishedArm(Record):
    agg: Aggregate
    per_prompt: list[PublishedRecord]


def read_pairs(path: Path) -> tuple[list[dict], dict]:
    """(pairs, published figures or {}): our own file, or the paper's results, which hold both."""
    content = read_record(path, TypoPairs, "typo pairs").model_dump()
    published = {
        arm: x for arm, x in content.items() if isinstance(x, dict) and "agg" in x and "per_prompt" in x
    }
    for arm, x in published.items():
        validated(x, PublishedArm, f"{path}, {arm}", "published results")
    return content["prompt_pairs"], published


def make_typo(word: str, operation: str, rng: random.Random) -> str:
    """One slip of the fingers inside a word; may return the word itself (two equal letters swapped)."""
    k = rng.randrange(1, len(word) - 1)  # the first letter is seldom the one that goes wrong
    if operation == "swap":
        return word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    if operation == "drop":
        return word[:k] + word[k + 1 :]
    if operation == "double":
        return word[: k + 1] + word[k:]
    near = neighbours(word[k])
    return word[:k] + rng.choice(near) + word[k + 1 :] if near else word


def neighbours(letter: str) -> str:
    """Keys beside a letter: left and right in its row, and the two nearest in the rows above and below."""
    for r, row in enumerate(KEYBOARD):
        if letter in row:
            c = row.index(letter)
            near = row[max(0, c - 1) : c] + row[c + 1 : c + 2]
            for other in KEYBOARD[max(0, r - 1) : r] + KEYBOARD[r + 1 : r + 2]:
                shift = c if KEYBOARD.index(other) > r else c + 1
                near += other[max(0, shift - 1) : shift + 1]
            return near
    return ""


def generate_pairs(text: str, n: int, seed: int) -> list[dict]:
    """n pairs from running text: 8 to 16 words of it, of which one of the last five gets a typo."""
    words = text.split()
    rng = random.Random(seed)
    vocabulary = {w.lower() for w in words}
    pairs, fruitless = [], 0
    while len(pairs) < n and fruitless < 2000 and len(words) > 20:
        fruitless += 1
        length = rng.randrange(8, 17)
        start = rng.randrange(len(words) - length)
        window = words[start : start + length]
        places = [i for i in range(length - 5, length) if re.fullmatch(r"[a-z]{4,14}", window[i])]
        if not places:
            continue
        at, operation = rng.choice(places), OPERATIONS[len(pairs) % len(OPERATIONS)]
        typo = make_typo(window[at], operation, rng)
        if typo == window[at] or typo in vocabulary:  # no slip, or another word of the text
            continue
        clean = " ".join(window)
        wrong = " ".join([*window[:at], typo, *window[at + 1 :]])
        pairs.append({"category": operation, "clean": clean, "typo": wrong})
        fruitless = 0
    if len(pairs) < n:
        raise RunError(f"the text gave only {len(pairs)} typo pairs of {n}; give a longer --text")
    return pairs


def held_out_text(args, run) -> str:
    """--text, else the validation tokens the run was evaluated on, decoded."""
    if args.text:
        path = Path(args.text)
        try:
            opener = lzma.open if path.suffix == ".xz" else open
            with opener(path, "rt", encoding="utf-8") as f:
                text = f.read(20_000_000)
        except (OSError, UnicodeDecodeError, lzma.LZMAError) as e:
            raise RunError(f"cannot read {path} as text ({e})") from None
        if ".jsonl" in path.name:
            lines = text.splitlines()[:-1] or text.splitlines()
            text = "\n".join(json.loads(line)["text"] for line in lines if line.strip())
        return text
    from data.shards import find_shards, open_shard

    _, tokenizer, config = common.load(run.name, args)
    root = Path(__file__).resolve().parents[2]
    folder = Path(config.get("data_dir") or root / "data" / str(config.get("dataset")))
    try:
        shards = find_shards(folder, "val")
    except (ValueError, OSError):
        shards = []
    if not shards:
        raise RunError(f"no validation shard in {folder}; give held-out text with --text FILE")
    tokens = open_shard(shards[0]).tokens[:2_000_000]
    return tokenizer.decode(tokens.tolist())


# ---------------------------------------------------------------------------------------------- measuring


def measure(model, tokenizer, pairs: list[dict], batch_size: int = 64) -> list[dict]:
    """One record a pair, with the keys of the published results."""
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

    return {
        "n": len(records),
        "top1_match_rate": mean("top1_matches"),
        "mean_kl": mean("kl_clean_to_typo"),
        "mean_cosine": mean("cosine_hidden"),
        "mean_logprob_drop": mean("logprob_drop"),
        "median_kl": float(np.median([r["kl_clean_to_typo"] for r in records])),
        "mean_token_inflation": float(np.mean([r["n_tokens_typo"] - r["n_tokens_clean"] for r in records])),
    }


def aggregate(arm: str, records: list[dict]) -> dict:
    """The published aggregate of an arm's records, overall and by category."""
    categories = list(dict.fromkeys(r["category"] for r in records))
    return {
        "arm": arm,
        "overall": summarise(records),
        "by_category": {c: summarise([r for r in records if r["category"] == c]) for c in categories},
    }


def compare_arms(by_run: dict, arm: str, over: str, seed: int) -> dict | None:
    """arm over another on the same prompts: per seed McNemar, and over prompts a bootstrap of the KL difference."""
    seeds = [s for a, s in by_run if a == arm and (over, s) in by_run]
    if not seeds:
        return None
    kept = {a: np.array([[r["top1_matches"] for r in by_run[a, s]] for s in seeds]) for a in (arm, over)}
    kl = {a: np.array([[r["kl_clean_to_typo"] for r in by_run[a, s]] for s in seeds]) for a in (arm, over)}
    both = {a: kept[a].mean(0) > 0.5 for a in (arm, over)}  # most seeds keep it
    rates = {}
    for a in (arm, over):
        records = [r for s in seeds for r in by_run[a, s]]
        rates[a] = [e["top1_match_rate"] for e in aggregate(a, records)["by_category"].values()]
    won = sum(a >= b for a, b in zip(rates[arm], rates[over], strict=True))
    return {
        "arm": arm,
        "over": over,
        "seeds": seeds,
        "top1_difference": stats.interval((kept[arm].mean(1) - kept[over].mean(1)).tolist()),
        "mcnemar_by_seed": {str(s): stats.mcnemar(kept[arm][k], kept[over][k]) for k, s in enumerate(seeds)},
        "mcnemar_majority": stats.mcnemar(both[arm], both[over]),
        "kl_difference": stats.bootstrap_mean(kl[arm].mean(0) - kl[over].mean(0), seed=seed),
        "kl_difference_over_seeds": stats.interval((kl[arm].mean(1) - kl[over].mean(1)).tolist()),
        "kl_percent": 100 * (kl[arm].mean() / kl[over].mean() - 1) if kl[over].mean() else None,
        "categories_won_or_tied": [won, len(rates[arm])],
    }


# ---------------------------------------------------------------------------------------------- output


def make_tables(
    by_arm: dict, by_run: dict, untrained: dict, comparisons: list[dict], published: dict, what: str
) -> list[Table]:
    """Robustness of every arm, arms over one another, and categories."""
    arms = list(by_arm)
    note = (
        "Mean ± SD over seeds. KL(clean || typo) at the last position; lower is more robust. "
        "untrained: the same architecture before its first step, which knows no words: what an arm keeps "
        "there it owes to its embedding's scale, since the last token is nearly always the same in both prompts."
    )
    if not published:
        note += " The paper (124M, 110 other pairs): top-1 55.5% against 47.3%, KL -7.6%."
    rows = []
    for label, source in (("", by_run), (", untrained", untrained)):
        summary = {run: summarise(records) for run, records in source.items()}
        for arm in arms if source else ():
            values = {m: {run: s[m] for run, s in summary.items()} for m in METRICS}
            cells = [common.arm_cell(values[m], arm, d, scale) for m, (_, d, scale) in METRICS.items()]
            everything = summarise([r for (a, _), rs in source.items() if a == arm for r in rs])
            rows.append([arm + label, *cells, *last_cells(everything)])
    for arm, entry in published.items():
        overall = entry["agg"]["overall"]
        cells = [f"{overall[m] * scale:.{d}f}" for m, (_, d, scale) in METRICS.items()]
        rows.append([f"paper: {arm}", *cells, *last_cells(overall)])
    header = ["arm", *(h for h, _, _ in METRICS.values()), "median KL", "tokens added"]
    tables = [Table(f"Spelling robustness over {what}", header, rows, note=note)]
    if comparisons:
        tables.append(comparison_table(comparisons))
    rows = []
    for c in by_arm[arms[0]]["agg"]["by_category"]:
        entries = [by_arm[a]["agg"]["by_category"][c] for a in arms]
        entries += [x["agg"]["by_category"][c] for x in published.values()]
        rows.append([c, *(f"{100 * e['top1_match_rate']:.0f}%  {e['mean_kl']:.2f}" for e in entries)])
    header = ["category", *arms, *(f"paper: {a}" for a in published)]
    return [*tables, Table("By category: top-1 kept, KL", header, rows)]


def last_cells(overall: dict) -> list[str]:
    """Median KL and added tokens of an aggregate."""
    return [f"{overall['median_kl']:.3f}", f"{overall['mean_token_inflation']:+.2f}"]


def comparison_table(comparisons: list[dict]) -> Table:
    """One arm over another on the same prompts: top-1, McNemar's p of each seed, KL, categories."""
    rows = []
    for c in comparisons:
        p = [f"{m['p_value']:.2g}" for m in c["mcnemar_by_seed"].values()]
        won = c["categories_won_or_tied"]
        top1 = common.interval_cell(c["top1_difference"], 1, 100)
        kl = common.interval_cell(c["kl_difference"])
        percent = "-" if c["kl_percent"] is None else f"{c['kl_percent']:+.1f}%"
        rows.append([c["arm"], c["over"], top1, " ".join(p[:5]), kl, percent, f"{won[0]} of {won[1]}"])
    return Table(
        "One arm over another, on the same prompts",
        ["arm", "over", "top-1, points", "McNemar p", "KL, nats", "KL", "won or tied"],
        rows,
        left=2,
        note="top-1: t interval over seeds; McNemar: exact, one a seed; KL: bootstrap over prompts of the "
        "seeds' mean (95%); won or tied: categories, on top-1.",
    )


def draw(by_arm: dict):
    """Top-1 kept and KL, overall and by category, an arm a colour."""
    arms = list(by_arm)
    categories = list(by_arm[arms[0]]["agg"]["by_category"])
    names = ["overall", *categories]
    with figures.plt.rc_context(figures.STYLE):
        size = (10.0, 0.36 * len(names) + 1.5)
        figure, axes = figures.plt.subplots(1, 2, figsize=size, sharey=True)
        for ax, key, scale, title in (
            (axes[0], "top1_match_rate", 100, "Top-1 kept (%, right is better)"),
            (axes[1], "mean_kl", 1, "KL(clean || typo) (nats, left is better)"),
        ):
            for k, arm in enumerate(arms):
                agg = by_arm[arm]["agg"]
                values = [scale * e[key] for e in (agg["overall"], *agg["by_category"].values())]
                y = np.arange(len(names)) + 0.16 * (k - (len(arms) - 1) / 2)
                style = report.arm_style(arm, arms)
                ax.plot(
                    values,
                    y,
                    "o",
                    color=style["color"],
                    label=figures.label(arm),
                    markersize=6,
                    clip_on=False,
                )
            ax.axhline(0.5, color=report.INK, linewidth=0.8)
            ax.set_title(title)
            ax.grid(axis="y", visible=False)
            ax.set_xlim(left=0)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    return figure


TITLES = {  # in the order of their places on the page
    "spelling": "Spelling robustness",
    "spelling_generated": "Spelling robustness, synthetic typos",
    "spelling_published": "Spelling robustness, the paper's pairs",
}


def main(argv=None) -> None:
    parser = Parser(__doc__)
    common.add_arguments(parser)
    add = parser.add_argument
    add("--pairs", default=str(common.DATA / "spelling_pairs.json"), help="typo pairs (default: our 110)")
    add("--generate", type=whole(1, 100_000), metavar="N", help="N synthetic typos in held-out text instead")
    add("--text", metavar="FILE", help="held-out text for --generate: txt, jsonl, either .xz")
    add("--no-control", action="store_true", help="do not measure the untrained twins")
    add("--batch_size", type=whole(1), default=64, help="prompts at a time (%(default)s)")
    args = parser.parse_args(argv)
    with sentences():
        if args.generate:
            text = held_out_text(args, common.finished_runs(args)[0])
            pairs, published = generate_pairs(text, args.generate, args.seed), {}
            what, name = f"{len(pairs)} synthetic typos", "spelling_generated"
        else:
            pairs, published = read_pairs(Path(args.pairs))
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
        if {"bpe", "kron"} <= set(published):  # the same tests on the paper's own records, one seed
            theirs = {(f"paper: {a}", 1337): published[a]["per_prompt"] for a in ("bpe", "kron")}
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
            "published": {a: x["agg"] for a, x in published.items()},
        }
        common.finish(
            __file__, argv, common.out_folder(args), name, TITLES[name],
            20 + list(TITLES).index(name), result, {"seed": args.seed, "generate": args.generate},
            make_tables(by_arm, by_run, untrained, comparisons, published, what), draw(by_arm),
            "Mean over seeds and prompts.",
            "A word of the prompt is misspelled; how far does the prediction of the next token move? A model that "
            "predicts little is moved little, so the figures of weak models say less than they seem to.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
