"""Trade-off: words alike in bytes but not in meaning, and where the network pulls them apart.

    python scripts/probes/tradeoff.py --runs out/demo

A byte codec puts compute next to commute and nation next to notion. For such pairs, for synonyms, for
morphological kin and for random pairs: cosine at the embedding and after each block. A word goes through the
model by itself (or after --prefix); its vector at a level is the mean over its tokens, centred over all the
probe's words. `separation` is the cosine of kin less that of the byte-alike: above 0, kin are nearer.
"""

import sys
from pathlib import Path
from typing import Annotated

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import torch
from pydantic import Field

from data.records import Record, read_record
from engine.errors import RunError, sentences
from scripts.analysis import figures, report
from scripts.analysis.report import Table
from scripts.probes import common

KINDS = {"byte_similar": "alike in bytes", "kin": "kin", "synonyms": "synonyms", "random": "random"}
EXAMPLES = ("compute/commute", "nation/notion")


Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class WordPairs(Record):
    byte_similar: list[Pair]
    kin: list[Pair]
    synonyms: list[Pair]


def read_pairs(path: Path, seed: int) -> dict[str, list]:
    """Pairs of words by kind, and 300 random pairs of the same words."""
    kinds = read_record(path, WordPairs, "word pairs").model_dump(include=set(WordPairs.model_fields))
    if not all(kinds.values()):
        raise RunError(f"{path} must hold pairs of words under {', '.join(WordPairs.model_fields)}")
    words = sorted({w for pairs in kinds.values() for p in pairs for w in p})
    rng = np.random.default_rng(seed)
    random = [tuple(rng.choice(words, 2, replace=False).tolist()) for _ in range(300)]
    return kinds | {"random": random}


def word_states(model, tokenizer, words: list[str], prefix: str) -> tuple[torch.Tensor, set[str]]:
    """((levels, words, n_embd), centred over the words; words that are one token)."""
    before = tokenizer.encode(prefix) if prefix else []
    ids = [before + tokenizer.encode(" " + w) for w in words]
    longest = max(map(len, ids))
    if longest > model.config.block_size:
        raise RunError(f"--prefix and a word make {longest} tokens, the context is {model.config.block_size}")
    rows = [None] * len(words)
    for batch in common.by_length(ids, len(words)):
        states = common.block_states(model, torch.tensor([ids[i] for i in batch]))
        means = torch.stack([s[:, len(before) :].mean(1) for s in states])
        for k, i in enumerate(batch):
            rows[i] = means[:, k]
    levels = torch.stack(rows, dim=1)
    return levels - levels.mean(1, keepdim=True), {
        w for w, x in zip(words, ids, strict=True) if len(x) == len(before) + 1
    }


def measure(model, tokenizer, pairs: dict, prefix: str) -> dict:
    """Cosines of one run by kind of pair and level, of all pairs and of those that are single tokens."""
    words = sorted({w for p in pairs.values() for pair in p for w in pair})
    at = {w: i for i, w in enumerate(words)}
    levels, single = word_states(model, tokenizer, words, prefix)
    cosine, of_single, n, each = {}, {}, {}, {}
    for kind, members in pairs.items():
        i, j = torch.tensor([[at[w] for w in pair] for pair in members]).T
        cosines = torch.nn.functional.cosine_similarity(levels[:, i], levels[:, j], dim=-1).T.contiguous()
        one = torch.tensor([set(pair) <= single for pair in members])
        cosine[kind] = cosines.mean(0).tolist()
        of_single[kind] = cosines[one].mean(0).tolist() if one.any() else None
        n[kind] = {"pairs": len(members), "single_token": int(one.sum())}
        if kind != "random":
            rounded = [[round(c, 4) for c in row] for row in cosines.tolist()]
            each[kind] = {"/".join(pair): row for pair, row in zip(members, rounded, strict=True)}
    return {
        "levels": ["embedding", *(f"block {k}" for k in range(len(levels) - 1))],
        "cosine": cosine,
        "cosine_single_token": of_single,
        "n": n,
        "pairs": each,
        "separation": [k - a for k, a in zip(cosine["kin"], cosine["byte_similar"], strict=True)],
    }


def make_tables(by_run: dict, arms: list[str]) -> list[Table]:
    """Cosines by kind and level, and the paper's two examples."""
    levels = min((r["levels"] for r in by_run.values()), key=len)

    def at_level(k: int) -> list[dict]:
        """{run: figure} of every kind of pair, and of the separation."""
        kinds = [{run: r["cosine"][kind][k] for run, r in by_run.items()} for kind in KINDS]
        return [*kinds, {run: r["separation"][k] for run, r in by_run.items()}]

    rows = [
        [arm if k == 0 else "", level, *(common.arm_cell(of, arm) for of in at_level(k))]
        for arm in arms
        for k, level in enumerate(levels)
    ]
    n = next(iter(by_run.values()))["n"]
    counted = ", ".join(
        f"{n[k]['pairs']} pairs {KINDS[k]} ({n[k]['single_token']} of single tokens)" for k in KINDS
    )
    note = f"Mean ± SD over seeds; {counted}. separation: kin less alike in bytes."
    header = ["arm", "level", *KINDS.values(), "separation"]
    tables = [Table("Cosine of word pairs, centred, by level", header, rows, left=2, note=note)]
    rows = []
    for pair in EXAMPLES:
        found = {run: r["pairs"]["byte_similar"].get(pair, [None] * len(levels)) for run, r in by_run.items()}
        for arm in arms:
            cells = [
                common.arm_cell({run: x[k] for run, x in found.items()}, arm) for k in range(len(levels))
            ]
            rows.append([pair if arm == arms[0] else "", arm, *cells])
    return [*tables, Table("The paper's two examples", ["pair", "arm", *levels], rows, left=2)]


def draw(by_run: dict, arms: list[str]):
    """Mean cosine of every kind of pair by level, an arm a panel."""
    colours = {"byte_similar": "#D55E00", "kin": "#009E73", "synonyms": "#0072B2", "random": "#7F7F7F"}
    levels = min((r["levels"] for r in by_run.values()), key=len)
    short = ["emb", *(str(k) for k in range(len(levels) - 1))]
    with figures.plt.rc_context(figures.STYLE):
        size = (2.9 * len(arms) + 1.6, 3.5)
        figure, axes = figures.plt.subplots(1, len(arms), figsize=size, sharey=True, squeeze=False)
        for ax, arm in zip(axes[0], arms, strict=True):
            for kind, words in KINDS.items():
                y = [r["cosine"][kind][: len(levels)] for (a, _), r in by_run.items() if a == arm]
                figures.band(ax, short, y, words, color=colours[kind], marker="o", markersize=4)
            ax.set_title(report.visible(arm))
            ax.set_xlabel("after block")
            ax.margins(x=0.08)
        axes[0][0].set_ylabel("cosine, centred")
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def main(argv=None) -> None:
    parser = common.parser(__doc__)
    add, ours = parser.add_argument, str(common.DATA / "tradeoff_pairs.json")
    add("--pairs", default=ours, help="word pairs (default: ours)")
    add("--prefix", default="", help="text before the word, for instance 'The word'")
    args = parser.parse_args(argv)
    with sentences():
        pairs = read_pairs(Path(args.pairs), args.seed)

        def measure_one(run, model, tokenizer, _) -> dict:
            return measure(model, tokenizer, pairs, args.prefix)

        by_run, arms, _ = common.measure_runs(args, "trade-off", measure_one)
        common.finish(
            __file__, argv, args, "tradeoff", "Alike in bytes, not in meaning", 45,
            {"by_run": {f"{a}_s{s}": r for (a, s), r in by_run.items()}},
            {"seed": args.seed, "prefix": args.prefix}, make_tables(by_run, arms), draw(by_run, arms),
            "Line: mean over seeds; band: lowest to highest seed.",
            "A codec of bytes cannot know that compute and commute mean different things; the blocks have to pull "
            "such pairs apart. In the pictures the orange line should fall and the green one stay.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
