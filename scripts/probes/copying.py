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
from itertools import product

if not __package__:
    import by_path  # noqa: F401

import numpy as np

from engine.errors import RunError
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


def paired_words(tokenizer, n: int, seed: int) -> dict[str, list[tuple[str, str]]]:
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
    (arm, word), (over, over_word) = mine, other
    seeds = [s for s in by_run[arm] if s in by_run[over]]
    if not seeds:
        return None
    d = np.array([by_run[arm][s][word]["saved"] for s in seeds])
    d -= [by_run[over][s][over_word]["saved"] for s in seeds]
    names = {"arm": arm, "word": word, "over": over, "over_word": over_word, "seeds": seeds}
    return names | {"over_words": stats.interval(d.mean(0)), "over_seeds": stats.interval(d.mean(1))}


def make_tables(by_run: dict, comparisons: list[dict]) -> list[Table]:
    rows = []
    for (condition, name), arm in product(CONDITIONS.items(), by_run):
        if mine := [x[condition] for x in by_run[arm].values() if condition in x]:
            over = stats.interval(np.mean([x["saved"] for x in mine], axis=0))
            means = [[np.mean(x[k]) for x in mine] for k in ("control", "again", "saved")]
            cells = [*(common.mean_cell(of, 4) for of in means), common.interval_cell(over, 4)]
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


def draw(by_run: dict):
    panels = []
    for key, what in (("saved", "Saved by the first mention"), ("again", "Second mention")):
        of = {
            arm: [[float(np.mean(x[c][key])) for x in mine.values() if c in x] for c in CONDITIONS]
            for arm, mine in by_run.items()
        }
        panels.append((f"{what} (bits per byte)", of))
    return figures.dot_figure(list(CONDITIONS.values()), panels)


def arguments(add) -> None:
    add("--words", type=whole(2, 5000), default=300, help="pairs of words of each kind (%(default)s)")
    add("--sentences", type=whole(1, len(SENTENCES)), default=4, help="sentences a pair (%(default)s)")


def probe(args) -> common.Finding:
    drawn = {}

    def measure_run(run, model, tokenizer) -> dict:
        words = paired_words(tokenizer, args.words, args.seed)
        if drawn.setdefault("words", words) != words:
            raise RunError(f"{run.name} has another tokenizer than the runs before it: compare runs of one")
        return measure(model, tokenizer, words, args.sentences)

    by_run, baseline = common.measure_runs(args, "copying", measure_run)
    wanted = [((a, c), (baseline, c)) for c in ("ordinary", "pieces") for a in by_run if a != baseline]
    for arm in [a for a, mine in by_run.items() if "slot" in next(iter(mine.values()))]:
        wanted += [((arm, "slot"), (over, "pieces")) for over in dict.fromkeys((arm, baseline))]
    comparisons = [c for mine, other in wanted if (c := compare(by_run, mine, other))]
    runs = [{"arm": a, "seed": s, "bits_per_byte": x} for a, mine in by_run.items() for s, x in mine.items()]
    return common.Finding(
        "copying", "Copying", 35, {"runs": runs, "comparisons": comparisons} | drawn,
        {"words": args.words, "sentences": args.sentences, "seed": args.seed},
        make_tables(by_run, comparisons), draw(by_run), common.POINTS,
        "Is a word that came before cheaper when it comes again, even one that the tokenizer has never seen?",
    )  # fmt: skip


main = common.command(__doc__, __file__, probe, arguments)

if __name__ == "__main__":
    main()
