"""Across models: what lies near what in the embedding tables of public language models.

    python scripts/probes/models.py --models ~/models/SmolLM2-135M HuggingFaceTB/SmolLM2-135M
    python scripts/probes/models.py --runs out/demo

Only the embedding matrix is read, never the model: its place comes from the safetensors index and header,
its bytes from a local folder or by range requests from the hub (kept under --cache, resumed where a download
broke off), so that a model of 671B parameters costs one tensor. Beside each trained table stand the codec of
the same vocabulary (no training at all) and a random table of the same shape.

The paper's six, 135M to 671B: HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B (gated),
google/gemma-3-1b-pt (gated), Qwen/Qwen3-32B, openai/gpt-oss-120b, deepseek-ai/DeepSeek-V3-Base. Gated ones
need HF_TOKEN.

Shown: cosine inside word families against random pairs (centred); of the 5 nearest neighbours, how many are
typographic variants of the probe (Run, run, RUN), morphological kin (runs, runner) or neither; the fall-off
of cosine with edit distance; nearest tokens of strings without a token in codec space; agreement across
tokenizers.
"""

import re
from itertools import combinations
from pathlib import Path

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist
from scipy.stats import spearmanr

from engine.errors import RunError
from kronecker import token_bytes
from scripts.analysis import figures
from scripts.analysis.report import Table
from scripts.probes import common, tables
from scripts.probes.generation import read_prompts
from scripts.probes.spaces import POS_DIM, CodecSpace, TableSpace

SPACES = {"trained": "#0072B2", "codec": "#D55E00", "random": "#7F7F7F"}  # with their colours
KINDS = ("typographic", "kin", "other")
DISTANCES = [str(d) for d in range(1, 8)]  # of two words, in edits; 7 stands for 7 and more


def canonical(token: bytes) -> str:
    """What is left of a token without case, spaces and marks: ' Run', 'RUN' and '.run' are all 'run'."""
    text = token.decode("utf-8", errors="replace").replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    return "".join(c for c in text.casefold() if c.isalnum())


def find_words(words: list[str], row_of: dict) -> dict[str, int]:
    """{word: row} of those that are one token, with a space before it or without."""
    rows = {w: row_of.get(b" " + w.encode(), row_of.get(w.encode())) for w in words}
    return {w: row for w, row in rows.items() if row is not None}


def nearest(cosines: np.ndarray, tokens: list[bytes]) -> list[list]:
    """The 5 tokens of the highest cosines of each row, as [[token, cosine]]."""
    top = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    return [[[tokens[t], line[t]] for t in found] for line, found in zip(cosines, top, strict=True)]


def shown(found: list[list]) -> list[list]:
    """Nearest tokens as text, bytes that are none as escapes, with rounded cosines."""
    return [[t.decode("utf-8", errors="backslashreplace"), round(float(c), 4)] for t, c in found]


def measure_space(
    space, tokens: list[bytes], row_of: dict, families: list[dict], seed: int
) -> tuple[dict, dict]:
    """(cosines inside families and of random pairs, what the 5 nearest tokens of every probe are; {probe: their forms})."""
    i, j = np.random.default_rng(seed).integers(0, len(tokens), (2, 5000))
    inside, shares, examples, forms_of = [], [], {}, {}
    for family in families:
        kin = set(family["exact_family"])
        rows = sorted(set(find_words(family["exact_family"], row_of).values()))
        if len(rows) > 1:
            inside.append(float(space.pairs(*np.array(list(combinations(rows, 2))).T).mean()))
        probes = find_words(family["probes"], row_of)
        at = np.array(list(probes.values()), dtype=int)
        cosines = space.against_all(at)
        cosines[np.arange(len(at)), at] = -2.0
        for word, near in zip(probes, nearest(cosines, tokens), strict=True):
            own, forms = canonical(word.encode()), [canonical(t) for t, _ in near]
            typographic, related = forms.count(own) / 5, sum(f in kin and f != own for f in forms) / 5
            shares.append([typographic, related, 1 - typographic - related])
            examples[word], forms_of[word] = shown(near), set(forms)
    shares = np.mean(shares, 0).tolist() if shares else [None] * 3
    return {
        "random_pair_cosine": float(space.pairs(i[i != j], j[i != j]).mean()),
        "in_family_cosine": float(np.mean(inside)) if inside else None,
        "families_used": len(inside),
        "probes_used": len(examples),
        "neighbours_at_5": dict(zip(KINDS, shares, strict=True)),
        "examples": examples,
    }, forms_of


def falloff(space, rows: np.ndarray, i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> dict:
    """Mean cosine of word pairs by edit distance."""
    result = {}
    for d in DISTANCES:
        which = np.nonzero(np.minimum(distance, 7) == int(d))[0][:20000]
        if len(which):
            cosines = space.pairs(rows[i[which]], rows[j[which]])
            result[d] = {"mean": float(cosines.mean()), "n": len(which)}
    return result


def thinned(words, most: int, rng) -> list[str]:
    """The words in their order, or so many of them drawn at random."""
    words = sorted(words)
    return words if len(words) <= most else sorted(rng.choice(words, most, replace=False).tolist())


def oov_neighbours(tokens: list[bytes], strings: list[str]) -> dict:
    """Nearest tokens of strings without a token, in codec space: what a forced-OOV slot would lie next to."""
    space = CodecSpace([*tokens, *(s.encode() for s in strings)])
    cosines = space.against_all(np.arange(len(tokens), len(tokens) + len(strings)))[:, : len(tokens)]
    return {s: shown(near) for s, near in zip(strings, nearest(cosines, tokens), strict=True)}


def measure_model(name: str, table: torch.Tensor, tokens: list[bytes], families, strings, seed: int) -> dict:
    """Everything about one model, JSON-able but for the keys that start with "_" (kept for agreement())."""
    ids = np.array([i for i in range(min(len(tokens), table.shape[0])) if tokens[i]])
    kept = [tokens[i] for i in ids]
    row_of = {token: row for row, token in reversed(list(enumerate(kept)))}
    if len(row_of) < 100:
        raise RunError(f"{name}: only {len(row_of)} tokens match rows of the table; wrong tokenizer?")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(ids), min(table.shape[1], 768), generator=generator)
    random = TableSpace(random, np.arange(len(ids)))
    spaces = {"trained": TableSpace(table, ids), "codec": CodecSpace(kept), "random": random}
    # lower-case words of 3 to 12 letters that are one token after a space
    words = {t[1:].decode(): r for r, t in enumerate(kept) if re.fullmatch(rb" [a-z]{3,12}", t)}
    rng = np.random.default_rng(seed)
    sample = thinned(words, 1500, rng)
    i, j = np.triu_indices(len(sample), 1)
    if len(i) > 400_000:
        pick = rng.choice(len(i), 400_000, replace=False)
        i, j = i[pick], j[pick]
    first, second = ([sample[k] for k in which] for which in (i, j))
    distance = cpdist(first, second, scorer=Levenshtein.distance, dtype=np.int16)
    rows = np.array([words[w] for w in sample])
    measured = {k: measure_space(space, kept, row_of, families, seed) for k, space in spaces.items()}
    return {
        "model": name,
        "vocab": len(ids),
        "width": table.shape[1],
        "words": len(words),
        "spaces": {k: found for k, (found, _) in measured.items()},
        "falloff": {k: falloff(s, rows, i, j, distance) for k, s in spaces.items()} if len(i) else {},
        "oov": oov_neighbours(kept, strings),
        "_words": words,
        "_spaces": spaces,
        "_forms": {k: forms for k, (_, forms) in measured.items()},
    }


def agreement(one: dict, other: dict, seed: int) -> dict:
    """Do the same words lie alike in two models? Over the words that are one token in both.

    "rsa": Spearman correlation of the two cosine matrices over up to 400 shared words.
    "jaccard": overlap of the forms of the 5 nearest tokens of the probe words, each in its own vocabulary.
    """
    shared = thinned(one["_words"].keys() & other["_words"].keys(), 400, np.random.default_rng(seed))
    found = {"models": [one["model"], other["model"]], "shared_words": len(shared)}
    if len(shared) >= 10:
        i, j = np.triu_indices(len(shared), 1)
        rows = [np.array([m["_words"][w] for w in shared]) for m in (one, other)]
        found["rsa"] = {}
        for kind in SPACES:
            of = [m["_spaces"][kind].pairs(at[i], at[j]) for m, at in zip((one, other), rows, strict=True)]
            found["rsa"][kind] = float(spearmanr(*of).statistic)
    forms = {k: (one["_forms"][k], other["_forms"][k]) for k in SPACES}
    if probes := [w for w in forms["codec"][0] if w in forms["codec"][1]]:
        found["jaccard"] = {
            k: float(np.mean([len(a[w] & b[w]) / len(a[w] | b[w]) for w in probes]))
            for k, (a, b) in forms.items()
        }
        found["probes"] = len(probes)
    return found


def average(members: list[dict], kind: str) -> dict[str, float | None]:
    """The figures of one kind of table, means over the models that have them."""
    figures_of = []
    for m in members:
        space, by_distance = m["spaces"][kind], m["falloff"].get(kind, {})
        cosines = {"in family": space["in_family_cosine"], "random pair": space["random_pair_cosine"]}
        falls = {d: by_distance.get(d, {}).get("mean") for d in DISTANCES}
        figures_of.append(cosines | space["neighbours_at_5"] | falls)
    values = {key: [of[key] for of in figures_of if of[key] is not None] for key in figures_of[0]}
    return {key: float(np.mean(x)) if x else None for key, x in values.items()}


def figure_cell(value: float | None, form: str = "{:+.3f}") -> str:
    return "-" if value is None else form.format(value)


def make_tables(results: list[dict], pairs: list[dict], groups: dict) -> list[Table]:
    near, by_distance = [], []
    for name, members in groups.items():
        for kind in SPACES:
            mean, start = average(members, kind), [name if kind == "trained" else "", kind]
            cosines = [figure_cell(mean[k]) for k in ("in family", "random pair")]
            shares = [figure_cell(mean[k], "{:.0%}") for k in KINDS]
            near.append([*start, *cosines, *shares, str(members[0]["spaces"][kind]["probes_used"])])
            by_distance.append([*start, *(figure_cell(mean[d]) for d in DISTANCES)])
    note = (
        "Cosines are centred. typographic, kin, other: share of the 5 nearest tokens that are the probe in another "
        "case or spacing, a word of its family, or neither (the paper counts all that is not typographic as "
        "morphological)."
    )
    header = ["model", "table", "in family", "random pair", *KINDS, "probes"]
    found = [Table("Word families and nearest neighbours", header, near, left=2, note=note)]
    header = ["model", "table", *DISTANCES[:-1], "7+"]
    found.append(Table("Cosine of two words by their edit distance", header, by_distance, left=2))
    rows = []
    for p in pairs[:30]:
        values = [p.get(key, {}).get(k) for key in ("rsa", "jaccard") for k in SPACES]
        cells = [figure_cell(x, "{:.2f}") for x in values]
        rows.append([" / ".join(p["models"]), str(p["shared_words"]), *cells])
    if rows:
        note = (
            "rsa: rank correlation of the cosines of shared words; nn: Jaccard overlap of the 5 nearest tokens' "
            "forms, each in its own vocabulary."
        )
        header = ["models", "words", *(f"rsa {k}" for k in SPACES), *(f"nn {k}" for k in SPACES)]
        found.append(Table("Agreement of two models", header, rows, note=note))
    strings = list(results[0]["oov"].items())[:8]
    rows = [[s, ", ".join(repr(t) for t, _ in tokens[:4])] for s, tokens in strings]
    title = f"Strings without a token: nearest in codec space ({results[0]['model']})"
    return [*found, Table(title, ["string", "nearest tokens"], rows, left=2)]


def draw(results: list[dict], groups: dict):
    size = (10.5, 0.5 * len(groups) + 3.4)
    figure, (left, right) = figures.plt.subplots(1, 2, figsize=size, width_ratios=[1.1, 1])

    def line(members: list[dict], kind: str, **style) -> None:
        mean = average(members, kind)
        right.plot(range(1, 8), np.array([mean[d] for d in DISTANCES], dtype=float), **style)

    for k, (kind, colour) in enumerate(SPACES.items()):
        means = [average(members, kind) for members in groups.values()]
        y, start = np.arange(len(groups)) + (k - 1) * 0.27, 0
        for what, alpha in (("typographic", 1.0), ("kin", 0.55)):
            share = np.array([100 * (mean[what] or 0) for mean in means])
            style = {"color": colour, "alpha": alpha, "linewidth": 0, "label": f"{kind}: {what}"}
            left.barh(y, share, 0.25, left=start, **style)
            start = start + share
        if kind != "trained":  # nearly the same for every vocabulary: one line
            line(results, kind, color=colour, linewidth=2, label=f"{kind}, all")
    left.set_yticks(range(len(groups)), groups)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("per cent of the 5 nearest tokens")
    left.set_title("What lies nearest")
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    blues = figures.plt.get_cmap("Blues")(np.linspace(0.9, 0.4, len(groups)))
    for (name, members), shade in zip(groups.items(), blues, strict=True):
        line(members, "trained", color=shade, marker=".", linewidth=1.4, label=name)
    right.set_xticks(range(1, 8), [*DISTANCES[:-1], "7+"])
    right.set_xlabel("edit distance of two words")
    right.set_title("Centred cosine")
    right.legend()
    return figure


def arguments(add) -> None:
    add("--models", nargs="+", default=[], help="model folders, or names on the hub (owner/name)")
    add("--tensor", help="the table's name, where it is an unusual one (for all --models)")
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    add("--cache", default="out/embeddings", help="where downloaded tables are kept (%(default)s)")


def probe(args) -> common.Finding:
    if not args.models and not args.runs:
        raise RunError("there is nothing to look at: give --models or --runs")
    args.out = args.out or (None if args.runs else "out/probe_models")
    families = common.own("word_families")["families"]
    prompts, _ = read_prompts(common.DATA / "generation_prompts.json")
    asked = families, [p["oov_target"] for p in prompts if p["oov_target"]], args.seed
    groups = {}
    for name in args.models:
        source = tables.open_model(name, args.revision, Path(args.cache))
        info = tables.find_table(source, args.tensor)
        tokens = tables.load_tokens(source)
        result = measure_model(source.name, tables.load_table(source, info), tokens, *asked)
        result["source"] = {"name": name, **info, "bytes_read": source.bytes_read}
        groups.setdefault(result["model"], []).append(result)
        common.progress(
            f"{name}: {info['tensor']} {info['shape']}, {source.bytes_read / 2**20:,.1f} MiB read"
        )

    def measure_run(run, model, tokenizer) -> dict:
        """Our own run as if it were a model."""
        table, tokens = model.wte_table().detach().float().cpu(), token_bytes(tokenizer.backend)
        return measure_model(f"{run.arm}_s{run.seed}", table, tokens, *asked)

    for arm, mine in common.measure_runs(args, "table", measure_run)[0].items() if args.runs else ():
        groups.setdefault(arm, []).extend(mine.values())
    results = [m for members in groups.values() for m in members]
    pairs = [agreement(a, b, args.seed) for a, b in combinations(results, 2)]
    models = [{k: v for k, v in r.items() if not k.startswith("_")} for r in results]
    return common.Finding(
        "models", "Across models", 50, {"models": models, "agreement": pairs},
        {"seed": args.seed, "pos_dim": POS_DIM},
        make_tables(results, pairs if args.models else [], groups), draw(results, groups),
        "Left: share of the 5 nearest tokens that are typographic variants (full colour) or kin (pale). "
        "Right: mean centred cosine of word pairs by edit distance; blue: each trained table.",
        "What lies near what in the input embedding: the trained table, the untrained codec of the same "
        "vocabulary, and a random table of the same shape. Our own runs appear as arms, means over seeds.",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments, needs_runs=False)

if __name__ == "__main__":
    main()
