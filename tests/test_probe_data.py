"""The probes' own words: the rules that make a typo a typo and a pair a pair."""

import json
from collections import Counter
from pathlib import Path

import pytest
from rapidfuzz.distance import Levenshtein

DATA = Path(__file__).resolve().parent.parent / "scripts" / "probes" / "data"
# a typo must fall on a content word, not on one of these
FUNCTION_WORDS = """
a an the and or of to in on at by for with from is are was were be been has have had do does not no when if as
than that this it its they we you he she who all your our their her his i up out into one
"""


def load(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def test_spelling_pairs_obey_the_rules():
    pairs = load("spelling_pairs.json")["prompt_pairs"]
    categories = (
        "geography,arithmetic,time,colours,idioms,body,animals,counting,syntax,general knowledge,professions"
    )
    assert Counter(p["category"] for p in pairs) == dict.fromkeys(categories.split(","), 10)
    assert len({p["clean"] for p in pairs}) == len({p["typo"] for p in pairs}) == 110
    for p in pairs:
        clean, typo = p["clean"].split(), p["typo"].split()
        assert p["clean"] != p["typo"] and len(clean) == len(typo), p
        changed = [(a.strip(",."), b.strip(",.")) for a, b in zip(clean, typo, strict=True) if a != b]
        assert len(changed) == 1, p
        a, b = changed[0]
        assert a.lower() not in FUNCTION_WORDS.split() and len(a) > 2, p
        assert 1 <= Levenshtein.distance(a.lower(), b.lower()) <= 2, p
        assert not p["clean"].endswith(" "), p  # the last position must predict the next word


def test_no_pair_is_a_published_one(shared_dir):
    path = shared_dir / "reference" / "robustness_results.json"
    if not path.exists():
        pytest.skip("the published results are not here")
    published = json.loads(path.read_text(encoding="utf-8"))["prompt_pairs"]
    theirs = {x.strip().lower() for p in published for x in (p["clean"], p["typo"])}
    for p in load("spelling_pairs.json")["prompt_pairs"]:
        assert p["clean"].lower() not in theirs and p["typo"].lower() not in theirs, p


def test_generation_prompts():
    prompts = load("generation_prompts.json")["prompts"]
    assert [p["prompt_id"] for p in prompts] == list(range(20))
    for p in prompts:
        assert p["normal"] != p["misspelled"] and len(p["normal"].split()) == len(p["misspelled"].split())
        assert p["forced_oov"].count("{{") == p["forced_oov"].count("}}") == 1
        assert "{{" not in p["normal"] + p["misspelled"]
        slot = p["forced_oov"].split("{{")[1].split("}}")[0]
        assert slot and slot.lower() not in p["normal"].lower()


def test_families_and_tradeoff_pairs():
    families = load("word_families.json")["families"]
    assert len(families) == 6
    for f in families:
        assert len(f["probes"]) == 8 and set(f["probes"]) <= set(f["exact_family"])
    pairs = load("tradeoff_pairs.json")
    assert {("compute", "commute"), ("nation", "notion")} <= {tuple(p) for p in pairs["byte_similar"]}
    for kind in ("byte_similar", "synonyms", "kin"):
        words = [tuple(sorted(p)) for p in pairs[kind]]
        assert len(set(words)) == len(words) >= 52 and all(a != b for a, b in words), kind

    def apart(kind):  # edits per letter
        return [Levenshtein.distance(a, b) / max(len(a), len(b)) for a, b in pairs[kind]]

    assert max(apart("byte_similar")) <= 0.5 < sorted(apart("synonyms"))[len(pairs["synonyms"]) // 5]
