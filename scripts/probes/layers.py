"""Layers: what lies near a word in the embedding and after the first blocks.

    python scripts/probes/layers.py --runs out/demo

Every token of the vocabulary goes through the model alone, at position 0. At each level (E_raw: the embedding;
E_post: with its position, what enters block 0; L0, L1: after block 0 and 1) the vectors are centred over the
vocabulary, and of the 10 nearest tokens of a probe word one counts

    L (loose)          those that are not the probe itself in another case or spacing
    M (root-substring) those that contain the family's root
    S (strict)         those that are words of the family

The published results take the first token of a word that is several; here a word counts as whole where it is one
token (with or without a space before it), and the summary over whole words stands beside the one over all.
"""

from itertools import product

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch

from scripts.analysis import figures, report
from scripts.analysis.report import Table
from scripts.arguments import whole
from scripts.probes import common

LEVELS = ("E_raw", "E_post", "L0", "L1")
NEIGHBOURS = 10
NOTE = (
    "Mean ± SD over seeds. loose: not the probe in another case or spacing; root: contains the "
    "family's root; strict: a word of the family."
)


def scores(strings: list[str], probe: str, root: str, family) -> dict:
    """The three counts of a list of neighbours, as shares."""
    forms = [s.strip().lower() for s in strings]
    tests = {"L": lambda f: f != probe.lower(), "M": lambda f: root in f, "S": set(family).__contains__}
    return {score: sum(map(test, forms)) / len(forms) for score, test in tests.items()}


def probe_token(word: str, tokenizer) -> tuple[int, bool]:
    """(token id that stands for a word, whether it is the whole word)."""
    for form in (" " + word, word):
        ids = tokenizer.encode(form)
        if len(ids) == 1:
            return ids[0], True
    return tokenizer.encode(word)[0], False


def vocabulary_states(model, ids: np.ndarray, batch_size: int) -> dict[str, torch.Tensor]:
    """Every token by itself at position 0: {level: rows (n, n_embd), centred}."""
    parts = []
    position = model.transformer.wpe.weight[0].detach().float().cpu()
    for batch in torch.from_numpy(ids)[:, None].split(batch_size):
        raw, *after = [s[:, 0] for s in common.block_states(model, batch, blocks=2)]
        parts.append([raw, raw + position, *after])
    rows = dict(zip(LEVELS, map(torch.cat, zip(*parts, strict=True)), strict=False))  # one block gives no L1
    return {level: x - x.mean(0) for level, x in rows.items()}


def measure(run, model, tokenizer, families: list[dict], args) -> dict:
    """One run in the published schema; `whole` on each probe and the *_whole aggregates are ours."""
    ids = np.nonzero(tokenizer.byte_lengths()[: model.config.vocab_size])[0].astype(np.int64)
    centred = vocabulary_states(model, ids, args.batch_size)
    states = {level: torch.nn.functional.normalize(x, dim=1) for level, x in centred.items()}
    i, j = np.random.default_rng(args.seed).integers(0, len(ids), (2, 4000))
    i, j = i[i != j], j[i != j]
    random = {level: (x[i] * x[j]).sum(1).mean().item() for level, x in states.items()}
    probes, self_found, in_vocab = {}, True, True
    for family in families:
        entries = []
        for word in family["probes"]:
            token, whole = probe_token(word, tokenizer)
            if token not in ids:
                in_vocab = False
                continue
            row, text = int(np.searchsorted(ids, token)), tokenizer.decode([token])
            entry = {"probe": word, "first_token_id": token, "first_token_decoded": text, "whole": whole}
            for level, x in states.items():
                cosines = x @ x[row]
                self_found &= bool(cosines[row] >= cosines.max() - 1e-4)
                cosines[row] = -2
                top = cosines.topk(min(NEIGHBOURS, len(ids) - 1))
                near = ids[top.indices.numpy()].tolist()
                strings = [tokenizer.decode([t]) for t in near]
                entry[level] = {
                    "top10_ids": near,
                    "top10_strings": strings,
                    "top10_cosines": [round(c, 4) for c in top.values.tolist()],
                    **scores(strings, word, family["family_root"], family["exact_family"]),
                }
            entries.append(entry)
        kept = {k: family[k] for k in ("family_root", "exact_family")}
        probes[family["family"]] = kept | {"per_probe": entries}
    return {
        "model_info": {
            "checkpoint_path": run.name,
            "vocab_size": model.config.vocab_size,
            "d_model": model.config.n_embd,
            "num_layers": model.config.n_layer,
            "embed_type": "kronecker" if model.config.wte == "kronecker" else "bpe",
            "architecture_notes": "GPT-2 as in nanoGPT: pre-norm blocks, learned positions",
            "preprocessing_before_layer_0": "x = wte(id) + wpe(0)",
            "stream_collapse_used": "n/a (single-stream)",
            **{f"centered_norm_{level}": x.norm(dim=1).mean().item() for level, x in centred.items()},
        },
        "sanity_checks": {
            "self_retrieval_pass": self_found,
            "probe_in_vocab_pass": in_vocab,
            **{f"centered_random_pair_cos_{level}": x for level, x in random.items()},
        },
        "probes": probes,
        **aggregate(probes),
    }


def means(entries: list[dict], suffix: str = "", of_change: str = "") -> dict:
    """{level: {score: mean}} of some probes, and by how much a level has more than the one before it."""
    levels = [level for level in LEVELS if any(level in e for e in entries)]
    found = {x: {s: round(float(np.mean([e[x][s] for e in entries])), 4) for s in "LMS"} for x in levels}
    changes = {}
    for low, high in (("E_raw", "L0"), ("L0", "L1")):
        if high in levels:
            name = f"delta_{high}_minus_{low.replace('_', '')}{of_change}"
            changes[name] = {s: round(found[high][s] - found[low][s], 4) for s in "LMS"}
    return {x: {s + suffix: v for s, v in of.items()} for x, of in found.items()} | changes


def aggregate(probes: dict) -> dict:
    """per_family_aggregate and overall_aggregate as published, and the overall one over whole words only."""
    by_family = {name: f["per_probe"] for name, f in probes.items() if f["per_probe"]}
    everything = [p for entries in by_family.values() for p in entries]
    whole = [p for p in everything if p.get("whole", True)]
    return {
        "per_family_aggregate": {name: means(entries, "_mean") for name, entries in by_family.items()},
        "overall_aggregate": means(everything, of_change="_overall"),
        "overall_whole": {level: x for level, x in means(whole).items() if level in LEVELS},
        "whole_probes": len(whole),
        "all_probes": len(everything),
    }


def make_tables(by_run: dict, levels: list[str], baseline: str) -> list[Table]:
    runs = [r for mine in by_run.values() for r in mine.values()]
    n, n_whole = (runs[0][k] for k in ("all_probes", "whole_probes"))
    kinds = {"overall_aggregate": f"all {n} probes"}
    if n_whole < n and all(r["overall_whole"] for r in runs):
        kinds["overall_whole"] = f"the {n_whole} probes that are one token"
    header = ["arm", "level", "loose", "root", "strict", f"strict less {baseline}'s (95%)"]
    tables = []
    for kind, words in kinds.items():
        found = {}  # {(level, score): {arm: over seeds}}
        for level, s in product(levels, "LMS"):
            values = common.each(by_run, lambda r, where=(kind, level, s): r[where[0]][where[1]][where[2]])
            found[level, s] = common.over_seeds(values, baseline)
        rows = []
        for arm, level in product(by_run, levels):
            cells = [common.cell(found[level, s][arm], 1, 100) for s in "LMS"]
            less = common.interval_cell(found[level, "S"][arm]["difference"], 1, 100)
            rows.append([arm if level == "E_raw" else "", level, *cells, less])
        tables.append(Table(f"Of the 10 nearest tokens, per cent: {words}", header, rows, left=2, note=NOTE))
    return [*tables, sanity_table(by_run, levels)]


def sanity_table(by_run: dict, levels: list[str]) -> Table:
    """Does every token find itself, and are random pairs at right angles? An arm a row."""
    rows = []
    for arm, mine in by_run.items():
        checks, about = zip(*((r["sanity_checks"], r["model_info"]) for r in mine.values()), strict=True)
        found = "yes" if all(c["self_retrieval_pass"] for c in checks) else "NO"
        cosines = [max(abs(c[f"centered_random_pair_cos_{x}"]) for c in checks) for x in levels]
        norms = [np.mean([i[f"centered_norm_{x}"] for i in about]) for x in levels]
        rows.append([arm, found, *(f"{x:.4f}" for x in cosines), *(f"{x:.2f}" for x in norms)])
    title = "Sanity: each token finds itself, random pairs are at right angles"
    header = ["arm", "finds itself", *(f"cos {x}" for x in levels), *(f"norm {x}" for x in levels)]
    note = (
        "cos: largest absolute mean cosine of random pairs over the seeds, centred; norm: mean centred norm."
    )
    return Table(title, header, rows, note=note)


def draw(by_run: dict, levels: list[str]):
    titles = {"L": "Loose (%)", "M": "Root-substring (%)", "S": "Strict (%)"}
    figure, axes = figures.plt.subplots(1, 3, figsize=(11.0, 3.4), sharey=False)
    for ax, (score, title) in zip(axes, titles.items(), strict=True):
        for arm, mine in by_run.items():
            y = [[100 * r["overall_aggregate"][x][score] for x in levels] for r in mine.values()]
            figures.band(ax, levels, y, arm, marker="o", **report.arm_style(arm, by_run))
        ax.set_title(title)
        ax.margins(x=0.08)
        low, high = ax.get_ylim()  # a flat line is no reason to show a hundredth of a per cent
        ax.set_ylim((max(-3, low - 5), min(101, high + 5)) if score == "L" else (-0.5, max(10, high)))
    axes[0].legend(fontsize=9)
    return figure


def arguments(add) -> None:
    add("--batch_size", type=whole(1), default=4096, help="tokens at a time (%(default)s)")


def probe(args) -> common.Finding:
    families = common.own("word_families")["families"]
    by_run, baseline = common.measure_runs(args, "layers", measure, families, args)
    runs = common.by_name(by_run)
    # centred, E_post is E_raw; a model of one block has no L1
    levels = [x for x in LEVELS if x != "E_post" and all(x in r["overall_aggregate"] for r in runs.values())]
    keep = ("sanity_checks", "per_family_aggregate", "overall_aggregate", "overall_whole", "whole_probes")
    # in the published place: the first seed of each arm, neighbours and all
    result = {arm: mine[min(mine)] for arm, mine in by_run.items()}
    result["by_run"] = {name: {k: r[k] for k in keep} for name, r in runs.items()}
    tables, figure = make_tables(by_run, levels, baseline), draw(by_run, levels)
    return common.Finding(
        "layers", "Nearest neighbours by layer", 40, result, {"seed": args.seed}, tables, figure, common.BANDS,
        "Which tokens lie nearest to a word, in the embedding and after the first two blocks? Strict kin near a "
        "word means morphology in the geometry; variants of case and spacing mean typography.",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments)


if __name__ == "__main__":
    main()
