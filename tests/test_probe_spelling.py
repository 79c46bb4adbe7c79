"""scripts/probes/spelling.py: records against a forward pass by hand, aggregates against the published ones."""

import json
import math

import numpy as np
import pytest
import torch
from probe_runs import ARMS, manual_forward, published

from engine.errors import RunError
from engine.runs import read_run
from sample import load_run
from scripts.probes import common, spelling, typos


@pytest.mark.parametrize("arm", ARMS)
def test_spelling_record_against_a_forward_by_hand(probed_runs, arm):
    net, tokenizer = load_run(probed_runs / f"{arm}_s1337")
    pairs = json.loads((common.DATA / "spelling_pairs.json").read_text())["prompt_pairs"][:12]
    records = spelling.measure(net, tokenizer, pairs, batch_size=3)
    for p, r in zip(pairs, records, strict=True):
        a, ha = manual_forward(net, tokenizer.encode(p["clean"]))
        b, hb = manual_forward(net, tokenizer.encode(p["typo"]))
        pa, pb = torch.softmax(a, 0).numpy(), torch.softmax(b, 0).numpy()
        assert r["kl_clean_to_typo"] == pytest.approx(float((pa * np.log(pa / pb)).sum()), abs=1e-5)
        assert r["cosine_hidden"] == pytest.approx(float(ha @ hb / ha.norm() / hb.norm()), abs=1e-5)
        assert (r["top1_clean_id"], r["top1_typo_id"]) == (pa.argmax(), pb.argmax())
        assert r["top1_matches"] == (pa.argmax() == pb.argmax())
        top = pa.argmax()
        assert r["logprob_drop"] == pytest.approx(math.log(pa[top]) - math.log(pb[top]), abs=1e-5)


def test_spelling_of_equal_prompts_is_zero(probed_runs):
    net, tokenizer = load_run(probed_runs / "kronecker_s1337")
    (r,) = spelling.measure(net, tokenizer, [{"category": "x", "clean": "The eye", "typo": "The eye"}])
    assert r["kl_clean_to_typo"] == pytest.approx(0, abs=1e-6) and r["cosine_hidden"] == pytest.approx(
        1, abs=1e-5
    )
    assert r["top1_matches"] and r["logprob_drop"] == pytest.approx(0, abs=1e-5)


def test_spelling_aggregates_as_published(shared_dir):
    content, path = published(shared_dir, "robustness_results.json")
    for arm in ("bpe", "kron"):
        ours = spelling.aggregate(arm, {1337: content[arm]["per_prompt"]})
        theirs = content[arm]["agg"]
        assert ours["overall"] == pytest.approx(theirs["overall"])
        assert set(ours["by_category"]) == set(theirs["by_category"])
        for c in theirs["by_category"]:
            assert ours["by_category"][c] == pytest.approx(theirs["by_category"][c])
    by_run = {a: {1: content[a]["per_prompt"]} for a in ("bpe", "kron")}
    c = spelling.compare_arms(by_run, "kron", "bpe", 0)
    assert c["kl_percent"] == pytest.approx(-7.56, abs=0.01)  # the paper's 7.6%
    assert c["top1_difference"]["mean"] == pytest.approx(0.0818, abs=1e-4)  # its 8.2 points
    assert c["categories_won_or_tied"] == [10, 11]
    pairs, arms = typos.read_pairs(path)
    assert len(pairs) == 110 and set(arms) == {"bpe", "kron"}


def test_untrained_twin_is_step_zero(probed_runs):
    for arm in ARMS:
        net, tokenizer = load_run(probed_runs / f"{arm}_s1338")
        config, _ = read_run(probed_runs / f"{arm}_s1338")
        twin = spelling.untrained_twin(net, tokenizer, config, 1338)
        body = dict(twin.body_parameters())
        for name, p in net.body_parameters():  # the fixture's body is step 0's, its matrices times 5
            factor = 5 if ".h." in name and p.dim() == 2 else 1
            assert torch.equal(p, body[name] * factor), name


def test_pairs_of_which_only_some_have_a_continuation_are_refused(tmp_path):
    pair = {"category": "x", "clean": "the cat", "typo": "teh cat"}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"prompt_pairs": [pair | {"continuation": " sat"}, pair]}))
    with pytest.raises(RunError, match="some pairs have a continuation and others none"):
        typos.read_pairs(path)
    path.write_text(json.dumps({"prompt_pairs": [pair, pair | {"continuation": ""}]}))
    assert typos.read_pairs(path) == ([pair, pair | {"continuation": ""}], {})
