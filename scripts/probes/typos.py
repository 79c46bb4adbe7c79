"""Clean and misspelled prompts: from a file, or drawn from running text with real misspellings and slips of the keyboard."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field
from rapidfuzz.distance import OSA, Hamming

from data.records import Record, read_record, validated
from data.shards import find_shards, open_shard
from data.sources import check_files, local_blocks, read_block
from engine.errors import RunError
from engine.runs import read_tokenizer
from scripts.probes import common
from scripts.provenance import ROOT

LISTS = {  # package and file in it
    "codespell": ("codespell_lib", "data/dictionary.txt"),
    "nlpaug": ("nlpaug", "res/word/spelling/spelling_en.txt"),
}
SOURCES = (*LISTS, "keyboard")
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
EDITS = ("insert", "delete", "substitute", "transpose")
WORD = re.compile(r"[a-z]{4,14}")
FREQUENCIES = {"256 and more": 256, "64 to 255": 64, "16 to 63": 16, "4 to 15": 4, "1 to 3": 1}
AFTER = 8  # words of the continuation
MOST_TEXT = 20_000_000  # characters of --text


def misspellings(source: str) -> dict[str, list[str]]:
    """{word: how people misspell it} of a list, in small letters; what is itself a right word of it is left out."""
    lines = common.installed(*LISTS[source], source).read_text(encoding="utf-8").split("\n")
    if source == "codespell":  # WRONG->RIGHT, where only one word can be meant
        pairs = [(word, wrong) for wrong, _, word in (x.partition("->") for x in lines) if "," not in word]
    else:  # RIGHT WRONG WRONG ...
        rows = map(str.split, filter(str.strip, lines))
        pairs = [(word, wrong) for word, *others in rows for wrong in others]
    words, found = {word.strip().lower() for word, _ in pairs}, {}
    for word, wrong in dict.fromkeys((word.strip(), wrong.strip()) for word, wrong in pairs):
        if WORD.fullmatch(word) and re.fullmatch("[a-z]+", wrong) and wrong not in words:
            found.setdefault(word, []).append(wrong)
    return found


def slip(word: str, edit: str, rng: random.Random) -> str:
    """One slip of the fingers inside a word; it may give the word itself (two equal letters transposed)."""
    k = rng.randrange(1, len(word) - 1)  # the first letter is seldom the one that goes wrong
    if edit == "transpose":
        return word[:k] + word[k + 1] + word[k] + word[k + 2 :]
    if edit == "delete":
        return word[:k] + word[k + 1 :]
    near = neighbours(word[k]) + (word[k] if edit == "insert" else "")
    return word[:k] + rng.choice(near) + word[k + (edit == "substitute") :]


def neighbours(letter: str) -> str:
    """Keys beside a letter: left and right in its row, and the two nearest in the rows above and below."""
    r = next(r for r, row in enumerate(ROWS) if letter in row)
    c, near = ROWS[r].index(letter), ""
    for other, first, last in ((r - 1, c, c + 1), (r, c - 1, c + 1), (r + 1, c - 1, c)):
        if 0 <= other < len(ROWS):
            near += ROWS[other][max(0, first) : last + 1].replace(letter, "")
    return near


def edit_of(word: str, wrong: str) -> str:
    """insert, delete, substitute or transpose, of one letter; else several."""
    if OSA.distance(word, wrong) != 1:
        return "several"
    if len(wrong) != len(word):
        return "insert" if len(wrong) > len(word) else "delete"
    return "substitute" if Hamming.distance(word, wrong) == 1 else "transpose"


class TypoPair(Record):
    category: str
    clean: str
    typo: str
    continuation: str = ""


class TypoPairs(Record):
    prompt_pairs: Annotated[list[TypoPair], Field(min_length=1)]


class PublishedRecord(Record):
    category: str
    top1_matches: bool
    kl_clean_to_typo: float
    cosine_hidden: float
    logprob_drop: float
    n_tokens_clean: int
    n_tokens_typo: int


class PublishedArm(Record):
    per_prompt: list[PublishedRecord]


def read_pairs(path: Path) -> tuple[list[dict], dict]:
    """(pairs, {arm: its published records} or {}): our own file, or the paper's results, which hold both."""
    content = read_record(path, TypoPairs, "typo pairs").model_dump(exclude_unset=True)
    if len({bool(p.get("continuation")) for p in content["prompt_pairs"]}) > 1:
        raise RunError(f"{path}: some pairs have a continuation and others none: give each pair one, or none")
    arms = {a: x for a, x in content.items() if isinstance(x, dict) and "per_prompt" in x}
    for arm, found in arms.items():
        validated(found, PublishedArm, f"{path}, {arm}", "published results")
    return content["prompt_pairs"], {arm: found["per_prompt"] for arm, found in arms.items()}


def draw_pairs(text: str, n: int, seed: int) -> list[dict]:
    """n clean and misspelled prompts from running text, in equal parts from each of SOURCES.

    A prompt is 8 to 16 words of the text, of which one of the last five is misspelled; its continuation are the
    next 8. Words are drawn in equal parts from each class of frequency (counted in the text) as far as there are
    any, so that common words do not make up the sample; a place in the text serves once. Raises RunError where
    the text gives too few.
    """
    words = text.split()
    counts = Counter(w.lower() for w in words)
    rng = random.Random(seed)
    used: set[int] = set()
    pairs = []
    for number, source in enumerate(SOURCES):
        known = misspellings(source) if source in LISTS else None
        classes: dict[str, list[int]] = {name: [] for name in FREQUENCIES}
        for i in range(16, len(words) - AFTER - 5):
            if WORD.fullmatch(words[i]) and (known is None or words[i] in known):
                classes[frequency(counts[words[i]])].append(i)
        for places in classes.values():
            rng.shuffle(places)
        wanted = n * (number + 1) // len(SOURCES)
        while len(pairs) < wanted and any(classes.values()):
            for places in classes.values():
                if places and len(pairs) < wanted and (i := places.pop()) not in used:
                    edit = EDITS[len(pairs) % len(EDITS)]
                    wrong = rng.choice(known[words[i]]) if known else slip(words[i], edit, rng)
                    start, end = i - rng.randrange(7, 12), i + rng.randrange(1, 6)
                    window = words[start : end + AFTER]
                    if wrong in counts or any("<|endoftext|>" in w for w in window):
                        continue
                    used.add(i)
                    pairs.append(
                        {
                            "category": source,
                            "clean": " ".join(words[start:end]),
                            "typo": " ".join([*words[start:i], wrong, *words[i + 1 : end]]),
                            "continuation": " " + " ".join(words[end : end + AFTER]),
                            "edit": edit_of(words[i], wrong),
                            "frequency": frequency(counts[words[i]]),
                        }
                    )
        if len(pairs) < wanted:
            raise RunError(f"the text gave only {len(pairs)} pairs of {n}; give a longer --text")
    return pairs


def frequency(count: int) -> str:
    """The class of a word that the text has so often."""
    return next(name for name, least in FREQUENCIES.items() if count >= least)


def held_out_text(file: str | None, run) -> str:
    """A file's text, as far as MOST_TEXT of it, else the validation tokens that the run was evaluated on, decoded."""
    if file:
        files, texts, size = [Path(file)], [], 0
        check_files(files)
        for block in local_blocks(files, "text"):
            new = read_block(block, "text")[0]
            texts += new
            size += sum(map(len, new))
            if size > MOST_TEXT:
                break
        return "\n".join(texts)
    folder = Path(run.config.get("data_dir") or ROOT / "data" / str(run.config.get("dataset")))
    shards = find_shards(folder, "val") if folder.is_dir() else []
    if not shards:
        raise RunError(f"no validation shard in {folder}; give held-out text with --text FILE")
    return read_tokenizer(run.name).decode(open_shard(shards[0]).tokens[:2_000_000].tolist())
