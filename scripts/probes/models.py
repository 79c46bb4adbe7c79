"""Across models: what lies near what in the embedding tables of public language models.

    python scripts/probes/models.py --models ~/models/SmolLM2-135M HuggingFaceTB/SmolLM2-135M
    python scripts/probes/models.py --runs out/demo

Only the embedding matrix is read, never the model: its place comes from the safetensors index and header,
its bytes from a local folder or by range requests from the hub, so that a model of 671B parameters costs one
tensor. Beside each trained table stand the codec of the same vocabulary (no training at all) and a random table
of the same shape.

The paper's six, 135M to 671B: HuggingFaceTB/SmolLM2-135M, meta-llama/Llama-3.2-1B (gated),
google/gemma-3-1b-pt (gated), Qwen/Qwen3-32B, openai/gpt-oss-120b, deepseek-ai/DeepSeek-V3-Base. Gated ones
need HF_TOKEN.

Shown: cosine inside word families against random pairs (centred); of the 5 nearest neighbours, how many are
typographic variants of the probe (Run, run, RUN), morphological kin (runs, runner) or neither; the fall-off
of cosine with edit distance; nearest tokens of strings without a token in codec space; agreement across
tokenizers.
"""

import re
import zlib
from itertools import combinations, product

if not __package__:
    import by_path  # noqa: F401

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist
from scipy.stats import spearmanr

from engine.errors import RunError
from engine.prompts import SLOT
from kronecker import token_bytes
from scripts.analysis import figures
from scripts.analysis.report import Table, progress
from scripts.probes import common, tables
from scripts.probes.spaces import POS_DIM, CodecSpace, TableSpace

SPACES = {"trained": "#0072B2", "codec": "#D55E00", "random": "#7F7F7F"}  # with their colours
KINDS = ("typographic", "kin", "other")
DISTANCES = [*"123456", "7+"]  # of two words, in edits


def canonical(token: bytes) -> str:
    """What is left of a token without case, spaces and marks: ' Run', 'RUN' and '.run' are all 'run'."""
    text = token.decode("utf-8", errors="replace").replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    return "".join(c for c in text.casefold() if c.isalnum())


def find_words(words: list[str], row_of: dict) -> dict[str, int]:
    """{word: row} of those that are one token, with a space before it or without."""
    rows = {w: row_of.get(b" " + w.encode(), row_of.get(w.encode())) for w in words}
    return {w: row for w, row in rows.items() if row is not None}


def nearest(cosines: np.ndarray, tokens: list[bytes]) -> list[list[bytes]]:
    """The 5 tokens of the highest cosines of each row."""
    return [[tokens[t] for t in row] for row in np.argsort(-cosines, axis=1, kind="stable")[:, :5]]


def measure_space(
    space, tokens: list[bytes], row_of: dict, families: list[dict], pairs: tuple, seed: int
) -> dict[str, float | None]:
    """Mean cosines inside families, of random pairs and of pairs of words by edit distance, and shares of KINDS.

    pairs: (rows, rows, their edit distances) of pairs of words.
    """
    i, j = np.random.default_rng(seed).integers(0, len(tokens), (2, 5000))
    found = {"in family": [], "random pair": space.pairs(i[i != j], j[i != j])} | {kind: [] for kind in KINDS}
    for family in families:
        kin = set(family["exact_family"])
        rows = sorted(set(find_words(family["exact_family"], row_of).values()))
        if len(rows) > 1:
            found["in family"].append(space.pairs(*np.array(list(combinations(rows, 2))).T).mean())
        probes = find_words(family["probes"], row_of)
        at = np.array(list(probes.values()), dtype=int)
        cosines = space.against_all(at)
        cosines[np.arange(len(at)), at] = -2.0
        for word, near in zip(probes, nearest(cosines, tokens), strict=True):
            forms = list(map(canonical, near))
            typographic, related = forms.count(word) / 5, sum(f in kin and f != word for f in forms) / 5
            for kind, share in zip(KINDS, (typographic, related, 1 - typographic - related), strict=True):
                found[kind].append(share)
    one, other, distance = pairs
    for d, name in enumerate(DISTANCES, 1):
        which = np.nonzero(np.minimum(distance, len(DISTANCES)) == d)[0][:20000]
        found[name] = space.pairs(one[which], other[which])
    return {name: float(np.mean(x)) if len(x) else None for name, x in found.items()}


def thinned(words, most: int, rng) -> list[str]:
    """The words in their order, or so many of them drawn at random."""
    words = sorted(words)
    return words if len(words) <= most else sorted(rng.choice(words, most, replace=False).tolist())


def word_pairs(words: dict[str, int], rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, rows, edit distances) of all pairs of up to 900 of the words {word: row}."""
    sample = thinned(words, 900, rng)
    i, j = np.triu_indices(len(sample), 1)
    first, second = ([sample[k] for k in which] for which in (i, j))
    distance = cpdist(first, second, scorer=Levenshtein.distance, dtype=np.int16)
    rows = np.array([words[w] for w in sample], dtype=int)
    return rows[i], rows[j], distance


def oov_neighbours(tokens: list[bytes], strings: list[str]) -> dict[str, list[str]]:
    """Nearest tokens of strings without a token, in codec space: what a forced-OOV slot would lie next to."""
    space = CodecSpace([*tokens, *(s.encode() for s in strings)])
    cosines = space.against_all(np.arange(len(tokens), len(tokens) + len(strings)))[:, : len(tokens)]
    near = [[t.decode("utf-8", errors="backslashreplace") for t in row] for row in nearest(cosines, tokens)]
    return dict(zip(strings, near, strict=True))


def measure_model(name: str, table: torch.Tensor, tokens: list[bytes], families, strings, seed: int):
    """(all figures of one model, its spaces, {word: row} of its words that are one token after a space)."""
    ids = np.array([i for i in range(min(len(tokens), table.shape[0])) if tokens[i]])
    kept = [tokens[i] for i in ids]
    row_of = {token: row for row, token in reversed(list(enumerate(kept)))}
    if len(row_of) < 100:
        raise RunError(f"{name}: only {len(row_of)} tokens match rows of the table; wrong tokenizer?")
    # another for each model: where vocabularies are alike, nothing random may agree
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    random = torch.randn(len(ids), min(table.shape[1], 768), generator=generator)
    random = TableSpace(random, np.arange(len(ids)))
    spaces = {"trained": TableSpace(table, ids), "codec": CodecSpace(kept), "random": random}
    words = {t[1:].decode(): r for r, t in enumerate(kept) if re.fullmatch(rb" [a-z]{3,12}", t)}
    asked = kept, row_of, families, word_pairs(words, np.random.default_rng(seed)), seed
    found = {
        "model": name,
        "vocab": len(ids),
        "width": table.shape[1],
        "words": len(words),
        "probes": sum(len(find_words(family["probes"], row_of)) for family in families),
        "spaces": {kind: measure_space(space, *asked) for kind, space in spaces.items()},
        "oov": oov_neighbours(kept, strings),
    }
    return found, spaces, words


def agreement(one: tuple, other: tuple, seed: int) -> dict:
    """Do the same words lie alike in two models (see measure_model)? Over up to 400 words that are one token in both.

    {kind of table: Spearman correlation of the words' cosines}; empty below 10 words.
    """
    (mine, my_spaces, my_words), (theirs, their_spaces, their_words) = one, other
    shared = thinned(my_words.keys() & their_words.keys(), 400, np.random.default_rng(seed))
    found = {"models": [mine["model"], theirs["model"]], "shared_words": len(shared)}
    if len(shared) < 10:
        return found
    i, j = np.triu_indices(len(shared), 1)
    here, there = (np.array([words[w] for w in shared]) for words in (my_words, their_words))
    for kind in SPACES:
        cosines = my_spaces[kind].pairs(here[i], here[j]), their_spaces[kind].pairs(there[i], there[j])
        found[kind] = float(spearmanr(*cosines).statistic)
    return found


def values(members: list[dict], kind: str, figure: str) -> list[float]:
    """One figure of one kind of table, of the models that have it."""
    return [x for m in members if (x := m["spaces"][kind][figure]) is not None]


def make_tables(results: list[dict], pairs: list[dict], groups: dict) -> list[Table]:
    near, by_distance = [], []
    for (name, members), kind in product(groups.items(), SPACES):
        start = [name if kind == "trained" else "", kind]
        cosines = [common.mean_cell(values(members, kind, k)) for k in ("in family", "random pair")]
        shares = [common.mean_cell(values(members, kind, k), 0, 100) for k in KINDS]
        near.append([*start, *cosines, *shares, str(members[0]["probes"])])
        by_distance.append([*start, *(common.mean_cell(values(members, kind, d), 2) for d in DISTANCES)])
    note = (
        "Cosines are centred. typographic, kin, other: per cent of the 5 nearest tokens that are the probe in another "
        "case or spacing, a word of its family, or neither (the paper counts all that is not typographic as "
        "morphological)."
    )
    header = ["model", "table", "in family", "random pair", *KINDS, "probes"]
    found = [Table("Word families and nearest neighbours", header, near, left=2, note=note)]
    header = ["model", "table", *DISTANCES]
    found.append(Table("Cosine of two words by their edit distance", header, by_distance, left=2))
    rows = []
    for p in pairs:
        cells = [f"{p[kind]:.2f}" if kind in p else "-" for kind in SPACES]
        rows.append([" / ".join(p["models"]), str(p["shared_words"]), *cells])
    if rows:
        note = "Rank correlation of the cosines of all pairs of the words that both have."
        found.append(Table("Agreement of two models", ["models", "words", *SPACES], rows, note=note))
    rows = [[s, ", ".join(map(repr, near[:4]))] for s, near in list(results[0]["oov"].items())[:8]]
    title = f"Strings without a token: nearest in codec space ({results[0]['model']})"
    return [*found, Table(title, ["string", "nearest tokens"], rows, left=2)]


def draw(results: list[dict], groups: dict):
    size = (10.5, 0.5 * len(groups) + 3.4)
    figure, (left, right) = figures.plt.subplots(1, 2, figsize=size, width_ratios=[1.1, 1])

    def mean(members: list[dict], kind: str, figure: str) -> float:
        return np.mean(values(members, kind, figure) or np.nan)

    def line(members: list[dict], kind: str, **style) -> None:
        right.plot(DISTANCES, [mean(members, kind, d) for d in DISTANCES], **style)

    for k, (kind, colour) in enumerate(SPACES.items()):
        y, start = np.arange(len(groups)) + (k - 1) * 0.27, 0
        for what, alpha in (("typographic", 1.0), ("kin", 0.55)):
            share = np.nan_to_num([100 * mean(members, kind, what) for members in groups.values()])
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
    right.set_xlabel("edit distance of two words")
    right.set_title("Centred cosine")
    right.legend()
    return figure


def arguments(add) -> None:
    add("--models", nargs="+", default=[], help="model folders, or names on the hub (owner/name)")
    add("--tensor", help="the table's name, where it is an unusual one (for all --models)")
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")


def probe(args) -> common.Finding:
    if not args.models and not args.runs:
        raise RunError("there is nothing to look at: give --models or --runs")
    args.out = args.out or (None if args.runs else "out/probe_models")
    families = common.own("word_families")["families"]
    made_up = [SLOT.search(p["forced_oov"])[1] for p in common.own("generation_prompts")["prompts"]]
    asked = families, made_up, args.seed
    measured = []  # (model or arm, see measure_model)
    for name in args.models:
        source = tables.open_model(name, args.revision)
        info = tables.find_table(source, args.tensor)
        tokens = tables.load_tokens(source)
        found, *more = measure_model(source.name, tables.load_table(source, info), tokens, *asked)
        found["source"] = {"name": name, **info, "bytes_read": source.bytes_read}
        measured.append((source.name, (found, *more)))
        progress(f"{name}: {info['tensor']} {info['shape']}, {source.bytes_read / 2**20:,.1f} MiB read")

    def measure_run(run, model, tokenizer):
        """Our own run as if it were a model."""
        table, tokens = model.wte_table().detach().float().cpu(), token_bytes(tokenizer.backend)
        return measure_model(f"{run.arm}_s{run.seed}", table, tokens, *asked)

    if args.runs:
        by_run = common.measure_runs(args, "table", measure_run)[0]
        measured += [(arm, found) for arm, mine in by_run.items() for found in mine.values()]
    groups = {}
    for name, (found, *_) in measured:
        groups.setdefault(name, []).append(found)
    results = [found for _, (found, *_) in measured]
    # runs of one vocabulary alone have nothing to agree on across tokenizers
    couples = combinations([found for _, found in measured], 2) if args.models else ()
    pairs = [agreement(one, other, args.seed) for one, other in couples]
    return common.Finding(
        "models", "Across models", 50, {"models": results, "agreement": pairs},
        {"seed": args.seed, "pos_dim": POS_DIM}, make_tables(results, pairs, groups), draw(results, groups),
        "Left: share of the 5 nearest tokens that are typographic variants (full colour) or kin (pale). "
        "Right: mean centred cosine of word pairs by edit distance; blue: each trained table.",
        "What lies near what in the input embedding: the trained table, the untrained codec of the same "
        "vocabulary, and a random table of the same shape. Our own runs appear as arms, mean ± SD over seeds.",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments, needs_runs=False)

if __name__ == "__main__":
    main()
