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
import sys
from itertools import combinations
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist
from scipy.stats import spearmanr

from data.records import read_record
from engine.errors import RunError, sentences
from kronecker import token_bytes
from scripts.analysis import figures
from scripts.analysis.report import Table
from scripts.arguments import Parser
from scripts.probes import common, tables
from scripts.probes.generation import Prompts
from scripts.probes.layers import Families
from scripts.probes.spaces import POS_DIM, CodecSpace, TableSpace

SPACES = ("trained", "codec", "random")


# ---------------------------------------------------------------------------------------------- measures


def canonical(token: bytes) -> str:
    """What is left of a token without case, spaces and marks: ' Run', 'RUN' and '.run' are all 'run'."""
    text = token.decode("utf-8", errors="replace").replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    return "".join(c for c in text.casefold() if c.isalnum())


def find_word(word: str, row_of: dict) -> int | None:
    """Row of a word that is one token, with a space before it or without."""
    for form in (b" " + word.encode(), word.encode()):
        if form in row_of:
            return row_of[form]
    return None


def edit_distances(words: list[str], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Levenshtein distances of the pairs words[i], words[j]."""
    first, second = ([words[k] for k in which] for which in (i, j))
    return cpdist(first, second, scorer=Levenshtein.distance, dtype=np.int16)


def measure_space(space, tokens: list[bytes], row_of: dict, families: list[dict], rng) -> dict:
    """Cosines inside families and of random pairs, and what the 5 nearest tokens of every probe are."""
    n = len(tokens)
    i, j = rng.integers(0, n, 5000), rng.integers(0, n, 5000)
    i, j = i[i != j], j[i != j]
    result = {"random_pair_cosine": float(space.pairs(i, j).mean())}

    inside, near, examples = [], {"typographic": [], "kin": [], "other": []}, {}
    for family in families:
        rows = sorted({r for w in family["exact_family"] if (r := find_word(w, row_of)) is not None})
        if len(rows) > 1:
            pairs = np.array(list(combinations(rows, 2)))
            inside.append(float(space.pairs(pairs[:, 0], pairs[:, 1]).mean()))
        probes = [(w, r) for w in family["probes"] if (r := find_word(w, row_of)) is not None]
        if not probes:
            continue
        cosines = space.against_all(np.array([r for _, r in probes]))
        for (word, row), line in zip(probes, cosines, strict=True):
            line = line.copy()
            line[row] = -2.0
            top = np.argsort(-line, kind="stable")[:5]
            forms = [canonical(tokens[t]) for t in top]
            kin = set(family["exact_family"])
            near["typographic"].append(sum(f == canonical(tokens[row]) for f in forms) / 5)
            near["kin"].append(sum(f in kin and f != canonical(tokens[row]) for f in forms) / 5)
            near["other"].append(1 - near["typographic"][-1] - near["kin"][-1])
            examples[word] = [[show(tokens[t]), round(float(line[t]), 4)] for t in top]
    result["in_family_cosine"] = float(np.mean(inside)) if inside else None
    result["families_used"] = len(inside)
    result["probes_used"] = len(examples)
    result["neighbours_at_5"] = {k: float(np.mean(v)) if v else None for k, v in near.items()}
    result["examples"] = examples
    return result


def falloff(space, rows: np.ndarray, i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> dict:
    """Mean cosine of word pairs by edit distance (7 stands for 7 and more)."""
    result = {}
    for d in range(1, 8):
        which = np.nonzero(distance == d if d < 7 else distance >= 7)[0][:20000]
        if len(which):
            cosines = space.pairs(rows[i[which]], rows[j[which]])
            result[str(d)] = {"mean": float(cosines.mean()), "n": len(which)}
    return result


def show(token: bytes) -> str:
    """A token as text, bytes that are none as escapes."""
    return token.decode("utf-8", errors="backslashreplace")


def plain_words(tokens: list[bytes]) -> dict[str, int]:
    """Lower-case words of 3 to 12 letters that are one token after a space: word -> row."""
    found = {}
    for row, token in enumerate(tokens):
        if re.fullmatch(rb" [a-z]{3,12}", token):
            found[token[1:].decode()] = row
    return found


def oov_neighbours(tokens: list[bytes], strings: list[str]) -> dict:
    """Nearest tokens of strings without a token, in codec space: what a forced-OOV slot would lie next to."""
    space = CodecSpace([*tokens, *(s.encode() for s in strings)])
    cosines = space.against_all(np.arange(len(tokens), len(tokens) + len(strings)))[:, : len(tokens)]
    top = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    return {
        s: [[show(tokens[t]), round(float(cosines[k, t]), 4)] for t in top[k]] for k, s in enumerate(strings)
    }


def measure_model(name: str, table: torch.Tensor, tokens: list[bytes], families, strings, seed: int) -> dict:
    """Everything about one model, JSON-able but for the keys that start with "_" (kept for agreement())."""
    ids = np.array([i for i in range(min(len(tokens), table.shape[0])) if tokens[i]])
    kept = [tokens[i] for i in ids]
    if len(set(kept)) < 100:
        raise RunError(f"{name}: only {len(set(kept))} tokens match rows of the table; wrong tokenizer?")
    row_of = {}
    for row, token in enumerate(kept):
        row_of.setdefault(token, row)
    generator = torch.Generator().manual_seed(seed)
    spaces = {
        "trained": TableSpace(table, ids),
        "codec": CodecSpace(kept),
        "random": TableSpace(
            torch.randn(len(ids), min(table.shape[1], 768), generator=generator), np.arange(len(ids))
        ),
    }
    words = plain_words(kept)
    rng = np.random.default_rng(seed)
    sample = sorted(words)
    if len(sample) > 1500:
        sample = sorted(rng.choice(sample, 1500, replace=False).tolist())
    i, j = np.triu_indices(len(sample), 1)
    if len(i) > 400_000:  # near pairs are rare: keep all that are close in length, thin the rest
        pick = rng.choice(len(i), 400_000, replace=False)
        i, j = i[pick], j[pick]
    distance = edit_distances(sample, i, j) if len(sample) > 1 else np.zeros(0)
    rows = np.array([words[w] for w in sample])
    return {
        "model": name,
        "vocab": len(ids),
        "width": table.shape[1],
        "words": len(words),
        "spaces": {
            k: measure_space(s, kept, row_of, families, np.random.default_rng(seed))
            for k, s in spaces.items()
        },
        "falloff": {k: falloff(s, rows, i, j, distance) for k, s in spaces.items()}
        if len(sample) > 1
        else {},
        "oov": oov_neighbours(kept, strings),
        "_words": words,
        "_spaces": spaces,
        "_tokens": kept,
        "_row_of": row_of,
    }


def agreement(results: list[dict], families, seed: int) -> list[dict]:
    """For every two models: do the same words lie alike? Over the words that are one token in both.

    "rsa": Spearman correlation of the two cosine matrices over up to 400 shared words.
    "jaccard": overlap of the forms of the 5 nearest tokens of the probe words, each in its own vocabulary.
    """
    found = []
    for a, b in combinations(results, 2):
        shared = sorted(a["_words"].keys() & b["_words"].keys())
        rng = np.random.default_rng(seed)
        if len(shared) > 400:
            shared = sorted(rng.choice(shared, 400, replace=False).tolist())
        entry = {"models": [a["model"], b["model"]], "shared_words": len(shared)}
        if len(shared) >= 10:
            i, j = np.triu_indices(len(shared), 1)
            ra, rb = np.array([a["_words"][w] for w in shared]), np.array([b["_words"][w] for w in shared])
            entry["rsa"] = {
                k: float(
                    spearmanr(
                        a["_spaces"][k].pairs(ra[i], ra[j]), b["_spaces"][k].pairs(rb[i], rb[j])
                    ).statistic
                )
                for k in SPACES
            }
        probes = [w for f in families for w in f["probes"]]
        probes = [
            w
            for w in probes
            if find_word(w, a["_row_of"]) is not None and find_word(w, b["_row_of"]) is not None
        ]
        if probes:
            entry["jaccard"] = {
                k: float(np.mean([jaccard(nearest_forms(a, k, w), nearest_forms(b, k, w)) for w in probes]))
                for k in SPACES
            }
            entry["probes"] = len(probes)
        found.append(entry)
    return found


def nearest_forms(result: dict, kind: str, word: str) -> set[str]:
    """Canonical forms of the 5 tokens nearest to a word in one space of a model."""
    cache = result.setdefault("_near", {})
    if (kind, word) not in cache:
        row = find_word(word, result["_row_of"])
        line = result["_spaces"][kind].against_all(np.array([row]))[0].copy()
        line[row] = -2.0
        cache[kind, word] = {canonical(result["_tokens"][t]) for t in np.argsort(-line, kind="stable")[:5]}
    return cache[kind, word]


def jaccard(a: set, b: set) -> float:
    """Shared members over all members; 1 of two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


# ---------------------------------------------------------------------------------------------- output


def mean(values) -> float | None:
    """Mean of what is not None."""
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def figure_cell(value: float | None, form: str = "{:+.3f}") -> str:
    return "-" if value is None else form.format(value)


def make_tables(results: list[dict], pairs: list[dict], groups: dict) -> list[Table]:
    """Families and neighbours, fall-off with edit distance, agreement of models, strings without a token."""
    near, by_distance = [], []
    for name, members in groups.items():
        for kind in SPACES:
            label = name if kind == SPACES[0] else ""
            spaces = [m["spaces"][kind] for m in members]
            cosines = [mean(s[key] for s in spaces) for key in ("in_family_cosine", "random_pair_cosine")]
            shares = [mean(s["neighbours_at_5"][k] for s in spaces) for k in ("typographic", "kin", "other")]
            shares = ["-" if x is None else f"{100 * x:.0f}%" for x in shares]
            near.append([label, kind, *map(figure_cell, cosines), *shares, str(spaces[0]["probes_used"])])
            means = [
                mean((m["falloff"].get(kind, {}).get(str(d)) or {}).get("mean") for m in members)
                for d in range(1, 8)
            ]
            by_distance.append([label, kind, *map(figure_cell, means)])
    found = [
        Table(
            "Word families and nearest neighbours",
            ["model", "table", "in family", "random pair", "typographic", "kin", "other", "probes"],
            near,
            left=2,
            note="Cosines are centred. typographic, kin, other: share of the 5 nearest tokens that are "
            "the probe in another case or spacing, a word of its family, or neither (the paper counts all "
            "that is not typographic as morphological).",
        ),
        Table(
            "Cosine of two words by their edit distance",
            ["model", "table", *map(str, range(1, 7)), "7+"],
            by_distance,
            left=2,
        ),
    ]
    if pairs:
        rows = []
        for p in pairs[:30]:
            values = [p.get(key, {}).get(k) for key in ("rsa", "jaccard") for k in SPACES]
            cells = [figure_cell(x, "{:.2f}") for x in values]
            rows.append([" / ".join(p["models"]), str(p["shared_words"]), *cells])
        found.append(
            Table(
                "Agreement of two models",
                ["models", "words", *(f"rsa {k}" for k in SPACES), *(f"nn {k}" for k in SPACES)],
                rows,
                note="rsa: rank correlation of the cosines of shared words; nn: Jaccard overlap of the 5 "
                "nearest tokens' forms, each in its own vocabulary.",
            )
        )
    strings = list(results[0]["oov"].items())[:8]
    rows = [[s, ", ".join(repr(t) for t, _ in tokens[:4])] for s, tokens in strings]
    title = f"Strings without a token: nearest in codec space ({results[0]['model']})"
    return [*found, Table(title, ["string", "nearest tokens"], rows, left=2)]


def draw(groups: dict):
    """What lies nearest, and the fall-off with edit distance."""
    with figures.plt.rc_context(figures.STYLE):
        figure, (left, right) = figures.plt.subplots(
            1, 2, figsize=(10.5, 0.5 * len(groups) + 3.4), width_ratios=[1.1, 1]
        )
        names = list(groups)
        colours = {"trained": "#0072B2", "codec": "#D55E00", "random": "#7F7F7F"}
        shades = {"typographic": 1.0, "kin": 0.55}
        for k, kind in enumerate(SPACES):
            y = np.arange(len(names)) + (k - 1) * 0.27
            start = np.zeros(len(names))
            for what, alpha in shades.items():
                share = np.array(
                    [
                        np.mean([m["spaces"][kind]["neighbours_at_5"][what] or 0 for m in groups[n]]) * 100
                        for n in names
                    ]
                )
                left.barh(
                    y,
                    share,
                    0.25,
                    left=start,
                    color=colours[kind],
                    alpha=alpha,
                    linewidth=0,
                    label=f"{kind}: {what}",
                )
                start += share
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.grid(axis="y", visible=False)
        left.set_xlabel("per cent of the 5 nearest tokens")
        left.set_title("What lies nearest")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles[:6], labels[:6], fontsize=8, loc="outside lower center", ncols=3)

        def fall(members, kind):
            means = [
                [m["falloff"].get(kind, {}).get(str(d), {}).get("mean", np.nan) for d in range(1, 8)]
                for m in members
            ]
            return np.nanmean(np.array(means), axis=0)

        everyone = [m for members in groups.values() for m in members]
        for kind in ("codec", "random"):  # nearly the same for every vocabulary: one line
            right.plot(
                range(1, 8), fall(everyone, kind), color=colours[kind], linewidth=2, label=f"{kind}, all"
            )
        blues = figures.plt.get_cmap("Blues")(np.linspace(0.9, 0.4, len(groups)))
        for (name, members), shade in zip(groups.items(), blues, strict=True):
            right.plot(
                range(1, 8), fall(members, "trained"), color=shade, marker=".", linewidth=1.4, label=name
            )
        right.set_xticks(range(1, 8), [*map(str, range(1, 7)), "7+"])
        right.set_xlabel("edit distance of two words")
        right.set_title("Centred cosine")
        right.legend()
    return figure


def run_tables(args):
    """Tables of our own runs, as if they were models: (name, arm, table, token bytes)."""
    for run, model, tokenizer, _ in common.each_model(common.finished_runs(args), args, "table"):
        wte = model.transformer.wte
        with torch.no_grad():
            table = (wte.table() if hasattr(wte, "table") else wte.weight).detach().float().cpu()
        yield f"{run.arm}_s{run.seed}", run.arm, table, token_bytes(tokenizer.backend)


def main(argv=None) -> None:
    parser = Parser(__doc__)
    common.add_arguments(parser, need_runs=False)
    add = parser.add_argument
    add("--models", nargs="+", default=[], help="model folders, or names on the hub (owner/name)")
    add("--tensor", help="the table's name, where it is an unusual one (for all --models)")
    add("--revision", default="main", help="branch, tag or commit on the hub (%(default)s)")
    add("--cache", default="out/embeddings", help="where downloaded tables are kept (%(default)s)")
    args = parser.parse_args(argv)
    if not args.models and not args.runs:
        parser.error("give --models or --runs")
    with sentences():
        families = read_record(common.DATA / "word_families.json", Families, "word families").model_dump()[
            "families"
        ]
        prompts = read_record(common.DATA / "generation_prompts.json", Prompts, "prompts").prompts
        strings = [p.forced_oov.split("{{")[1].split("}}")[0] for p in prompts]
        results, groups = [], {}
        for name in args.models:
            source = tables.open_model(name, args.revision, Path(args.cache))
            info = tables.find_table(source, args.tensor)
            tokens = tables.load_tokens(source)
            result = measure_model(
                source.name, tables.load_table(source, info), tokens, families, strings, args.seed
            )
            result["source"] = {"name": name, **info, "bytes_read": source.bytes_read}
            results.append(result)
            groups.setdefault(result["model"], []).append(result)
            common.progress(
                f"{name}: {info['tensor']} {info['shape']}, {source.bytes_read / 2**20:,.1f} MiB read"
            )
        for name, arm, table, tokens in run_tables(args) if args.runs else ():
            result = measure_model(name, table, tokens, families, strings, args.seed)
            results.append(result)
            groups.setdefault(arm, []).append(result)
        pairs = agreement(results, families, args.seed)
        record = {
            "models": [{k: v for k, v in r.items() if not k.startswith("_")} for r in results],
            "agreement": pairs,
        }
        common.finish(
            __file__, argv, common.out_folder(args, "out/probe_models"),
            "models", "Across models", 50, record, {"seed": args.seed, "pos_dim": POS_DIM},
            make_tables(results, pairs if args.models else [], groups), draw(groups),
            "Left: share of the 5 nearest tokens that are typographic variants (full colour) or kin (pale). "
            "Right: mean centred cosine of word pairs by edit distance; blue: each trained table.",
            "What lies near what in the input embedding: the trained table, the untrained codec of the same "
            "vocabulary, and a random table of the same shape. Our own runs appear as arms, means over seeds.",
        )  # fmt: skip


if __name__ == "__main__":
    main()
