"""scripts/probes/tradeoff.py: cosines by hand."""

import pytest
import torch

from sample import load_run
from scripts.probes import tradeoff


def test_tradeoff_cosines(probed_runs):
    net, tokenizer = load_run(probed_runs / "kronecker_s1337")
    pairs = tradeoff.pairs_by_kind(0)
    result = tradeoff.measure(None, net, tokenizer, pairs)
    assert result["levels"] == ["embedding", "block 0", "block 1"]
    words = sorted({w for p in pairs.values() for pair in p for w in pair})
    table = net.wte_table().detach()
    means = torch.stack([table[tokenizer.encode(" " + w)].mean(0) for w in words])
    means -= means.mean(0)
    a, b = means[words.index("compute")], means[words.index("commute")]
    got = result["pairs"]["byte_similar"]["compute/commute"][0]
    assert got == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)
    assert result["cosine"]["kin"][0] > result["cosine"]["synonyms"][0] + 0.2
    assert abs(result["cosine"]["random"][0]) < 0.1
