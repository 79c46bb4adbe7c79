"""Trade-off: words alike in bytes but not in meaning, and where the network pulls them apart.

    python scripts/probes/tradeoff.py --runs out/demo

A byte codec puts compute next to commute and nation next to notion. For such pairs, for synonyms, for
morphological kin and for random pairs: cosine at the embedding and after each block. A word goes through the
model by itself; its vector at a level is the mean over its tokens, centred over all the probe's words.
`separation` is the cosine of kin less that of the byte-alike: above 0, kin are nearer.
"""

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch

from engine.errors import RunError
from scripts.analysis import figures, report
from scripts.analysis.report import Table
from scripts.probes import common

KINDS = {"byte_similar": "alike in bytes", "kin": "kin", "synonyms": "synonyms", "random": "random"}
COLOURS = ("#D55E00", "#009E73", "#0072B2", "#7F7F7F")


def pairs_by_kind(seed: int) -> dict[str, list]:
    """Our pairs of words by kind, and 300 random pairs of the same words."""
    found = common.own("tradeoff_pairs")
    kinds = {kind: found[kind] for kind in list(KINDS)[:-1]}
    words = sorted({w for pairs in kinds.values() for p in pairs for w in p})
    rng = np.random.default_rng(seed)
    return kinds | {"random": [rng.choice(words, 2, replace=False).tolist() for _ in range(300)]}


def word_states(model, tokenizer, words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """((levels, words, n_embd), centred over the words; (words,), whether a word is one token)."""
    ids = [tokenizer.encode(" " + w) for w in words]
    if max(map(len, ids)) > model.config.block_size:
        raise RunError(f"a word is longer than the context, which is {model.config.block_size} tokens")
    rows = [None] * len(words)
    for batch in common.by_length(ids, len(words)):
        states = common.block_states(model, torch.tensor([ids[i] for i in batch]))
        means = torch.stack([s.mean(1) for s in states])
        for k, i in enumerate(batch):
            rows[i] = means[:, k]
    levels = torch.stack(rows, dim=1)
    return levels - levels.mean(1, keepdim=True), torch.tensor([len(x) == 1 for x in ids])


def measure(run, model, tokenizer, pairs: dict) -> dict:
    """Cosines of one run: means by kind and level, and of each pair by level."""
    words = sorted({w for members in pairs.values() for pair in members for w in pair})
    levels, single = word_states(model, tokenizer, words)
    cosine, n, each = {}, {}, {}
    for kind, members in pairs.items():
        i, j = torch.tensor([[words.index(w) for w in pair] for pair in members]).T
        cosines = torch.nn.functional.cosine_similarity(levels[:, i], levels[:, j], dim=-1).T
        cosine[kind] = cosines.mean(0).tolist()
        n[kind] = {"pairs": len(members), "single_token": int((single[i] & single[j]).sum())}
        each[kind] = dict(zip(map("/".join, members), cosines.tolist(), strict=True))
    return {
        "levels": ["embedding", *(f"block {k}" for k in range(len(levels) - 1))],
        "cosine": cosine,
        "n": n,
        "pairs": each,
        "separation": [k - a for k, a in zip(cosine["kin"], cosine["byte_similar"], strict=True)],
    }


def make_table(by_run: dict, levels: list[str]) -> Table:
    rows = []
    for arm, mine in by_run.items():
        for k, level in enumerate(levels):
            found = [[r["cosine"][kind][k] for r in mine.values()] for kind in KINDS]
            found.append([r["separation"][k] for r in mine.values()])
            rows.append([arm if k == 0 else "", level, *map(common.mean_cell, found)])
    counted = ", ".join(
        f"{n['pairs']} pairs {KINDS[kind]} ({n['single_token']} of single tokens)"
        for kind, n in next(iter(mine.values()))["n"].items()
    )
    note = f"Mean ± SD over seeds; {counted}. separation: kin less alike in bytes."
    header = ["arm", "level", *KINDS.values(), "separation"]
    return Table("Cosine of word pairs, centred, by level", header, rows, left=2, note=note)


def draw(by_run: dict, levels: list[str]):
    short, size = ["emb", *map(str, range(len(levels) - 1))], (2.9 * len(by_run) + 1.6, 3.5)
    figure, axes = figures.plt.subplots(1, len(by_run), figsize=size, sharey=True, squeeze=False)
    for ax, (arm, mine) in zip(axes[0], by_run.items(), strict=True):
        for (kind, words), colour in zip(KINDS.items(), COLOURS, strict=True):
            y = [r["cosine"][kind][: len(levels)] for r in mine.values()]
            figures.band(ax, short, y, words, color=colour, marker="o", markersize=4)
        ax.set_title(report.visible(arm))
        ax.set_xlabel("after block")
        ax.margins(x=0.08)
    axes[0][0].set_ylabel("cosine, centred")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def probe(args) -> common.Finding:
    by_run, _ = common.measure_runs(args, "trade-off", measure, pairs_by_kind(args.seed))
    runs = common.by_name(by_run)
    levels = min((r["levels"] for r in runs.values()), key=len)
    return common.Finding(
        "tradeoff", "Alike in bytes, not in meaning", 45, {"by_run": runs},
        {"seed": args.seed}, [make_table(by_run, levels)], draw(by_run, levels), common.BANDS,
        "A codec of bytes cannot know that compute and commute mean different things; the blocks have to pull "
        "such pairs apart. In the pictures the orange line should fall and the green one stay.",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe)


if __name__ == "__main__":
    main()
