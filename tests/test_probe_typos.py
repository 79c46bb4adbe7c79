"""Where typo pairs come from, and what the spelling probe makes of them."""

import importlib.util
import json
import math
import pydoc_data.topics
import random
from collections import Counter

import numpy as np
import pytest
import torch

from engine.errors import RunError
from sample import load_run
from scripts.probes import spelling, typos

LISTS = {"codespell": "codespell_lib", "nlpaug": "nlpaug"}
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in LISTS.values()),
    reason="pip install --no-deps -r requirements-eval.txt",
)
TEXT = "\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def pairs():
    return typos.draw_pairs(TEXT, 240, seed=3)


def test_lists_are_read_as_their_packages_wrote_them():
    codespell, nlpaug = map(typos.misspellings, ("codespell", "nlpaug"))
    assert "recieve" in codespell["receive"] and "seperate" in codespell["separate"]
    assert "whick" in nlpaug["which"] and len(codespell) > 12_000 and len(nlpaug) > 7_000
    for found in (codespell, nlpaug):
        wrong = {w for of in found.values() for w in of}
        assert not wrong & found.keys()  # "there" for "their" is no misspelling
        assert all(w.isalpha() and w.islower() for w in (wrong | found.keys()))


def test_slips_are_the_edit_they_are_called():
    rng = random.Random(0)
    for edit in typos.EDITS:
        made = {typos.slip("keyboard", edit, rng) for _ in range(200)}
        assert len(made) > 4 and {typos.edit_of("keyboard", wrong) for wrong in made} == {edit}
        assert {wrong[0] for wrong in made} == {"k"}
    assert set(typos.neighbours("g")) == set("fhtyvb") and set(typos.neighbours("q")) == set("wa")
    assert set(typos.neighbours("m")) == set("njk") and set(typos.neighbours("p")) == set("ol")


def test_every_single_edit_is_told_from_several():
    """All words one edit away, made one by one, and words two edits away that none of those is."""
    word, letters = "letter", "abcdefghijklmnopqrstuvwxyz"
    near = {
        "insert": {word[:k] + c + word[k:] for k in range(7) for c in letters},
        "delete": {word[:k] + word[k + 1 :] for k in range(6)},
        "substitute": {word[:k] + c + word[k + 1 :] for k in range(6) for c in letters} - {word},
        "transpose": {word[:k] + word[k + 1] + word[k] + word[k + 2 :] for k in range(5)} - {word},
    }
    for edit, made in near.items():
        assert {typos.edit_of(word, wrong) for wrong in made} == {edit}
    far = {"later", "leterr", "lettersx", "tetler", "xetteq"} - set.union(*near.values())
    assert len(far) > 3 and {typos.edit_of(word, wrong) for wrong in far} == {"several"}


def test_pairs_are_places_of_the_text(pairs):
    running, counts = " ".join(TEXT.split()), Counter(w.lower() for w in TEXT.split())
    lists = {name: typos.misspellings(name) for name in typos.LISTS}
    assert Counter(p["category"] for p in pairs) == {"codespell": 80, "nlpaug": 80, "keyboard": 80}
    for p in pairs:
        a, b = p["clean"].split(), p["typo"].split()
        (at,) = (k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        assert len(a) - 5 <= at < len(a) and 8 <= len(a) <= 16
        assert p["clean"] + p["continuation"] in running and len(p["continuation"].split()) == 8
        assert p["edit"] == typos.edit_of(a[at], b[at]) and b[at] not in counts
        assert p["category"] == "keyboard" or b[at] in lists[p["category"]][a[at]]
        least = typos.FREQUENCIES[p["frequency"]]
        assert least <= counts[a[at]] and (least == 256 or counts[a[at]] < 4 * least)
    assert len({(p["clean"], p["continuation"]) for p in pairs}) == len(pairs)
    classes = Counter(p["frequency"] for p in pairs)
    assert (
        set(classes) == set(typos.FREQUENCIES) and max(classes.values()) < 80
    )  # common words are no majority
    assert {p["edit"] for p in pairs if p["category"] == "keyboard"} == set(typos.EDITS)


def test_pairs_follow_from_the_seed(pairs):
    assert typos.draw_pairs(TEXT, 240, seed=3) == pairs != typos.draw_pairs(TEXT, 240, seed=4)
    with pytest.raises(RunError, match="longer --text"):
        typos.draw_pairs("too short a text " * 9, 5, seed=0)


def test_a_long_text_is_read_as_far_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(typos, "MOST_TEXT", 1_500_000)
    (tmp_path / "held_out.jsonl").write_text(('{"text": "' + "word " * 200 + '"}\n') * 5000)
    text = typos.held_out_text(str(tmp_path / "held_out.jsonl"), None)
    assert 1_500_000 < len(text) < 3_000_000


def test_costs_against_the_model_asked_plainly(gpt2_runs, pairs):
    model, tokenizer = load_run(gpt2_runs / "kronecker_s1")
    some = pairs[::60]
    for p, r in zip(some, spelling.measure(model, tokenizer, some), strict=True):
        for side in ("clean", "typo"):
            prompt, follows = tokenizer.encode(p[side]), tokenizer.encode(p["continuation"])
            ids = torch.tensor([prompt + follows])
            with torch.no_grad():
                _, loss = model(ids[:, :-1], ids[:, 1:], reduction="none")
            bits = loss.flatten()[-len(follows) :].double().sum().item() / math.log(2)
            assert r[f"bpb_{side}"] == pytest.approx(bits / len(p["continuation"].encode()), rel=1e-5)
        assert r["bpb_cost"] == r["bpb_typo"] - r["bpb_clean"]


def test_a_continuation_longer_than_a_context_is_scored_in_part(gpt2_runs):
    model, tokenizer = load_run(gpt2_runs / "kronecker_s1")
    words = {"clean": "It was then", "typo": "It was thne", "typo_word": "thne", "category": "swapped"}
    pair = words | {"continuation": " 7q" * 200}
    (record,) = spelling.measure(model, tokenizer, [pair], 8)
    half = {**pair, "continuation": tokenizer.decode(tokenizer.encode(pair["continuation"])[:64])}
    (same,) = spelling.measure(model, tokenizer, [half], 8)
    assert record["bpb_clean"] == pytest.approx(same["bpb_clean"]) and record["bpb_typo"] > 0


def test_the_command_with_drawn_pairs(gpt2_runs, tmp_path, capsys):
    text, out = tmp_path / "held_out.txt", tmp_path / "out"
    text.write_text(TEXT)
    spelling.main(["--runs", str(gpt2_runs), "--generate", "60", "--text", str(text), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "60 misspellings" in printed and "untrained" in printed
    assert max(len(line) for line in printed.splitlines() if str(out) not in line) <= 120
    folder = out / "compare" / "probes"
    result = json.loads((folder / "spelling_generated.json").read_text())
    items = json.loads((folder / "spelling_generated_items.json").read_text())
    # other people's text stays out of what is kept as a result
    page = (folder / "spelling_generated.json").read_text() + (folder / "spelling_generated.md").read_text()
    assert not any(p["clean"] in page or p["continuation"] in page for p in items["prompt_pairs"])
    (c,) = result["comparisons"]
    kept = {
        a: np.array([r["top1_matches"] for r in items["per_prompt"][a]]).reshape(2, 60)
        for a in ("bpe_tied", "kronecker")
    }
    cost = {a: np.array([r["bpb_cost"] for r in items["per_prompt"][a]]).reshape(2, 60) for a in kept}
    assert c["power"]["discordant"] == pytest.approx((kept["kronecker"] != kept["bpe_tied"]).mean())
    assert c["cost_difference"]["mean"] == pytest.approx((cost["kronecker"] - cost["bpe_tied"]).mean())
    assert c["cost_difference"]["n"] == 60 and c["cost_difference_over_seeds"]["n"] == 2
    everything, *strata = result["strata"]
    for stratum in spelling.STRATA:  # each divides the pairs, and its parts make up the whole
        parts = [r for r in strata if r["stratum"] == stratum]
        assert sum(r["pairs"] for r in parts) == 60
        for arm in kept:
            whole = sum(r["pairs"] * r["arms"][arm]["mean_bpb_cost"][0] for r in parts) / 60
            assert whole == pytest.approx(everything["arms"][arm]["mean_bpb_cost"][0], abs=1e-9)
