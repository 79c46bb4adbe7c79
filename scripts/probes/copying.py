"""Copying: is a word that came before cheaper when it comes again, even one that the tokenizer has never seen?

    python scripts/probes/copying.py --runs out/demo
    python scripts/probes/copying.py --runs out/gpt2_124m --words 1000 --device cuda

A sentence names a word, and a second one comes to the place where the word would be named again. Bits per byte of
the word there, once it has been mentioned, against those of a control word of the same length that has not: the
difference is what the model takes from the first mention. Each of a pair of words is the other's control, in the
same sentences, so neither the words' own difficulty nor the sentences' counts.

The first mention is an ordinary word of one token; a made-up one in pieces, as any tokenizer reads it; or the same
made-up word in a slot, one position made from its bytes (forced OOV), which only kronecker arms have. The second
mention is always in tokens, as the model writes it.
"""

import math
import random
import re
import sys
from itertools import product
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from engine.errors import RunError, sentences
from scripts.analysis import figures, stats
from scripts.analysis.likelihood import score
from scripts.analysis.report import Table
from scripts.arguments import whole
from scripts.probes import common

# What stands before the first mention, and between it and the second.
SENTENCES = [part.split("|") for part in (
    "They bought a new| last year. Nobody in the village had ever seen such a",
    "The old| stood behind the house. In the evening we sat down beside the",
    "My sister wrote a long letter about the| that she had found. I have never seen a",
    "First you have to clean the| with warm water. Then you can dry the",
    "A small| was lying on the floor. The children looked at the",
    "The museum shows a famous| from the north. Many visitors come only for the",
    "He asked for a| at the market. The man did not have a",
    "This chapter is about the| and its history. For a long time people used the",
)]  # fmt: skip
ONSETS = "b br d dr f fl g gl gr k kl m n p pl qu sk sl sn t tr v vr z".split()
VOWELS, CODAS = "aeiou", "bdgklmnprstvxz"
CONDITIONS = {"ordinary": "ordinary word", "pieces": "made-up word, pieces", "slot": "made-up word, slot"}


def made_up_word(rng: random.Random) -> str:
    """Two or three syllables that read like a word: 5 to 12 letters."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(part) for _ in range(syllables) for part in (ONSETS, VOWELS, CODAS))


def word_pairs(tokenizer, n: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """{"ordinary", "made-up": n pairs of words of the same length}; a word is in one pair alone."""
    rng = random.Random(seed)

    def pieces(word: str) -> int:
        return len(tokenizer.encode(" " + word))

    texts = [(b or b"").decode("utf-8", "replace") for b in tokenizer.token_bytes()]
    ordinary = [t[1:] for t in texts if re.fullmatch(" [a-z]{4,10}", t) and pieces(t[1:]) == 1]
    rng.shuffle(ordinary)
    made_up = dict.fromkeys(made_up_word(rng) for _ in range(20 * n))
    made_up = [w for w in made_up if 5 <= len(w) <= 12 and pieces(w) > 1]
    found = {"ordinary": [], "made-up": []}
    for name, words in (("ordinary", ordinary), ("made-up", made_up)):
        waiting = {}
        for word in words:
            if other := waiting.pop(len(word), None):
                found[name].append((other, word))
            else:
                waiting[len(word)] = word
        if len(found[name]) < n:
            raise RunError(f"there are only {len(found[name])} pairs of {name} words; lower --words")
    return {name: pairs[:n] for name, pairs in found.items()}


def measure(model, tokenizer, words: dict, sentences_each: int) -> dict:
    """{condition: {"again", "control", "saved": of each pair}}: bits per byte once mentioned, when not, and between."""
    start = [] if tokenizer.eot is None else [tokenizer.eot]
    slot = min(50300, model.config.vocab_size - 1)
    parts = [(start + tokenizer.encode(before), tokenizer.encode(between)) for before, between in SENTENCES]
    result = {}
    for condition in CONDITIONS if model.config.wte == "kronecker" else ("ordinary", "pieces"):
        pairs = words["ordinary" if condition == "ordinary" else "made-up"]
        asked, overrides = [], []
        for number, pair in enumerate(pairs):
            for k in range(number, number + sentences_each):
                before, between = parts[k % len(parts)]
                for first, second in product(pair, pair):
                    mention = [slot] if condition == "slot" else tokenizer.encode(" " + first)
                    asked.append((before + mention + between, tokenizer.encode(" " + second)))
                    overrides.append({len(before): f" {first}".encode()} if condition == "slot" else {})
        nats, _ = score(model, asked, overrides)
        nats = np.array([x.sum() for x in nats]).reshape(len(pairs), sentences_each, 2, 2).mean(1)
        n_bytes = np.array([[[1 + len(w) for w in pair]] for pair in pairs])
        bits = nats / n_bytes / math.log(2)  # of every pair: [first word, second word]
        again, control = (bits[:, 0, 0] + bits[:, 1, 1]) / 2, (bits[:, 0, 1] + bits[:, 1, 0]) / 2
        found = {"again": again, "control": control, "saved": control - again}
        result[condition] = {k: x.tolist() for k, x in found.items()}
    return result


def compare(by_run: dict, mine: tuple[str, str], other: tuple[str, str]) -> dict | None:
    """What (arm, condition) saves less what the other does, on the same pairs of words and seeds."""
    saved = [
        {s: np.array(x[condition]["saved"]) for (a, s), x in by_run.items() if a == arm and condition in x}
        for arm, condition in (mine, other)
    ]
    seeds = [s for s in saved[0] if s in saved[1]]
    if not seeds:
        return None
    d = np.array([saved[0][s] - saved[1][s] for s in seeds])
    names = {"arm": mine[0], "word": mine[1], "over": other[0], "over_word": other[1], "seeds": seeds}
    return names | {"over_words": stats.interval(d.mean(0)), "over_seeds": stats.interval(d.mean(1))}


def make_tables(by_run: dict, arms: list[str], comparisons: list[dict]) -> list[Table]:
    """What the first mention saves, and by how much more in one arm than in another."""
    rows = []
    for condition, name in CONDITIONS.items():
        for arm in arms:
            mine = {run: x[condition] for run, x in by_run.items() if run[0] == arm and condition in x}
            if mine:
                means = [
                    {run: np.mean(x[k]) for run, x in mine.items()} for k in ("control", "again", "saved")
                ]
                over = stats.interval(np.mean([x["saved"] for x in mine.values()], axis=0))
                cells = [*(common.arm_cell(of, arm, 4) for of in means), common.interval_cell(over, 4)]
                rows.append([name, arm, f"{over['n']:,}", *cells])
    note = (
        "Mean ± SD over seeds. mentioned: bits per byte of the second mention; not mentioned: of a word of the "
        "same length that another word's mention came before. A model that does not copy saves 0."
    )
    header = ["word", "arm", "pairs", "not mentioned", "mentioned", "saved", "95% over words"]
    tables = [Table("What a first mention saves, in bits per byte", header, rows, left=2, note=note)]
    rows = []
    for c in comparisons:
        over = c["over"] if c["word"] == c["over_word"] else f"{c['over']}, {c['over_word']}"
        cells = [common.interval_cell(c[k], 4) for k in ("over_words", "over_seeds")]
        rows.append([CONDITIONS[c["word"]], c["arm"], over, *cells])
    if rows:
        note = "Bits per byte that one saves more than the other: t intervals over pairs of words and over seeds, 95%."
        header = ["word", "arm", "over", "saved more, over words", "over seeds"]
        tables.append(Table("One over another, on the same words", header, rows, left=3, note=note))
    return tables


def draw(by_run: dict, arms: list[str]):
    """What is saved and what the second mention costs, by kind of word."""

    def means(arm: str, key: str) -> list[list[float]]:
        mine = [x for (a, _), x in by_run.items() if a == arm]
        return [[float(np.mean(x[c][key])) for x in mine if c in x] for c in CONDITIONS]

    titles = {
        "saved": "Saved by the first mention (bits per byte)",
        "again": "Second mention (bits per byte)",
    }
    panels = [(title, {arm: means(arm, key) for arm in arms}) for key, title in titles.items()]
    return figures.dot_figure(list(CONDITIONS.values()), panels)


def main(argv=None) -> None:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--words", type=whole(2, 5000), default=300, help="pairs of words of each kind (%(default)s)")
    add("--sentences", type=whole(1, len(SENTENCES)), default=4, help="sentences a pair (%(default)s)")
    args = parser.parse_args(argv)
    with sentences():
        drawn = {}

        def measure_one(run, model, tokenizer, _) -> dict:
            words = word_pairs(tokenizer, args.words, args.seed)
            if drawn.setdefault("words", words) != words:
                raise RunError(
                    f"{run.name} has another tokenizer than the runs before it: compare runs of one"
                )
            return measure(model, tokenizer, words, args.sentences)

        by_run, arms, baseline = common.measure_runs(args, "copying", measure_one)
        wanted = [((a, c), (baseline, c)) for c in ("ordinary", "pieces") for a in arms if a != baseline]
        slots = [a for a in arms if any(b == a and "slot" in x for (b, _), x in by_run.items())]
        wanted += [((a, "slot"), (b, "pieces")) for a in slots for b in dict.fromkeys((a, baseline))]
        comparisons = [c for mine, other in wanted if (c := compare(by_run, mine, other))]
        result = {
            "runs": [{"arm": a, "seed": s, "bits_per_byte": x} for (a, s), x in by_run.items()],
            "comparisons": comparisons,
            "words": drawn["words"],
        }
        common.finish(
            __file__, argv, args, "copying", "Copying", 35, result,
            {"words": args.words, "sentences": args.sentences, "seed": args.seed},
            make_tables(by_run, arms, comparisons), draw(by_run, arms),
            "Large points: means over seeds; small points: seeds.",
            "Is a word that came before cheaper when it comes again, even one that the tokenizer has never seen?",
        )  # fmt: skip


if __name__ == "__main__":
    main()
