"""Copying: the probe's figures against the model asked token by token, and against a model that copies."""

import json
import math

import numpy as np
import pytest
import torch

from sample import load_run
from scripts.probes import copying


def bits_asked_plainly(
    model, before: list[int], mention: list[int], between: list[int], answer: list[int], slot
) -> float:
    """One forward pass a token of the answer, whole logits of the last position."""
    ids, bits = [*before, *mention, *between], 0.0
    overrides = {(0, len(before)): slot} if slot else None
    with torch.no_grad():
        for token in answer:
            logits, _ = model(torch.tensor([ids]), byte_overrides=overrides)
            bits -= logits[0, -1].double().log_softmax(-1)[token].item() / math.log(2)
            ids.append(token)
    return bits


@pytest.mark.parametrize("condition", copying.CONDITIONS)
def test_figures_against_the_model_asked_plainly(gpt2_runs, condition):
    model, tokenizer = load_run(gpt2_runs / "kronecker_s1")
    with torch.no_grad():  # after three steps attention does nearly nothing; make what was read count
        for name, p in model.named_parameters():
            if p.dim() == 2 and (".h." in name or name.startswith("lm_head.")):
                p.mul_(20)
    words = {"ordinary": [("house", "table")], "made-up": [("zorblik", "frambet")]}
    got = copying.measure(model, tokenizer, words, sentences_each=2)[condition]
    pair = words["ordinary" if condition == "ordinary" else "made-up"][0]
    again, control = [], []
    for before, between in copying.SENTENCES[:2]:
        for first in pair:
            for second in pair:
                slot = f" {first}".encode() if condition == "slot" else None
                bits = bits_asked_plainly(
                    model,
                    [50256, *tokenizer.encode(before)],
                    [50300] if slot else tokenizer.encode(" " + first),
                    tokenizer.encode(between),
                    tokenizer.encode(" " + second),
                    slot,
                )
                (again if first == second else control).append(bits / len(f" {second}"))
    assert got["again"] == pytest.approx([np.mean(again)], rel=1e-4)
    assert got["control"] == pytest.approx([np.mean(control)], rel=1e-4)
    assert abs(got["saved"][0]) > 1e-3
    assert got["saved"] == pytest.approx([np.mean(control) - np.mean(again)], abs=1e-4)


def test_a_model_that_copies_saves_and_one_that_does_not_saves_nothing(gpt2_runs):
    """The output is made the mean of the embeddings read so far: what was read is likelier to come."""
    model, tokenizer = load_run(gpt2_runs / "bpe_tied_s1")
    words = copying.paired_words(tokenizer, 6, seed=1)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer.wpe.weight.zero_()
    blind = copying.measure(model, tokenizer, words, 2)  # each position sees itself alone
    assert np.abs(blind["ordinary"]["saved"]).max() < 1e-6 and np.abs(blind["pieces"]["saved"]).max() < 1e-6
    with torch.no_grad():
        width, first = model.config.n_embd, model.transformer.h[0]
        first.attn.c_attn.weight.zero_()
        first.attn.c_attn.weight[2 * width :] = torch.eye(width)  # attention is the mean of what was read
        first.attn.c_proj.weight.copy_(50 * torch.eye(width))
        model.transformer.wte.weight.mul_(20)
    copied = copying.measure(model, tokenizer, words, 2)
    assert np.min(copied["ordinary"]["saved"]) > 0.05 and np.min(copied["pieces"]["saved"]) > 0.01
    assert set(copied) == {"ordinary", "pieces"}  # a learned table has no slot


def test_words(gpt2_runs):
    _, tokenizer = load_run(gpt2_runs / "bpe_tied_s1")
    words = copying.paired_words(tokenizer, 200, seed=5)
    assert (
        words == copying.paired_words(tokenizer, 200, seed=5) != copying.paired_words(tokenizer, 200, seed=6)
    )
    for kind, pairs in words.items():
        assert len(pairs) == 200 and len({w for pair in pairs for w in pair}) == 400
        assert all(len(a) == len(b) <= 12 for a, b in pairs)
        assert {len(tokenizer.encode(" " + w)) == 1 for pair in pairs for w in pair} == {kind == "ordinary"}


def test_the_command(gpt2_runs, tmp_path, capsys):
    copying.main(["--runs", str(gpt2_runs), "--words", "5", "--sentences", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "made-up word, slot" in printed and max(map(len, printed.splitlines())) <= 120
    result = json.loads((tmp_path / "compare" / "probes" / "copying.json").read_text())
    saved = {
        (r["arm"], r["seed"], c): np.array(x["saved"])
        for r in result["runs"]
        for c, x in r["bits_per_byte"].items()
    }
    found = {(c["arm"], c["word"], c["over"], c["over_word"]): c for c in result["comparisons"]}
    assert set(found) == {
        ("kronecker", "ordinary", "bpe_tied", "ordinary"),
        ("kronecker", "pieces", "bpe_tied", "pieces"),
        ("kronecker", "slot", "kronecker", "pieces"),
        ("kronecker", "slot", "bpe_tied", "pieces"),
    }
    c = found["kronecker", "slot", "bpe_tied", "pieces"]
    d = np.array([saved["kronecker", s, "slot"] - saved["bpe_tied", s, "pieces"] for s in (1, 2)])
    assert c["over_words"]["mean"] == pytest.approx(d.mean()) and c["over_words"]["n"] == 5
    assert c["over_seeds"]["sd"] == pytest.approx(d.mean(1).std(ddof=1))
