"""scripts/probes/layers.py: scores as published, neighbours against a plain search."""

import pytest
import torch
from probe_runs import args_for, published, word_families

from sample import load_run
from scripts.analysis.runs import Run
from scripts.probes import layers


def test_layer_scores_and_aggregates_as_published(shared_dir):
    content, _ = published(shared_dir, "layered_probe_results.json")
    for arm in ("bpe", "kron"):
        probes = content[arm]["probes"]
        for f in probes.values():
            for p in f["per_probe"]:
                for level in layers.LEVELS:
                    got = layers.scores(
                        p[level]["top10_strings"], p["probe"], f["family_root"], f["exact_family"]
                    )
                    assert got == pytest.approx({s: p[level][s] for s in "LMS"}), (p["probe"], level)
        ours = layers.aggregate(probes)
        for level, values in content[arm]["overall_aggregate"].items():
            assert ours["overall_aggregate"][level] == pytest.approx(values, abs=2e-4), level
        for family, levels in content[arm]["per_family_aggregate"].items():
            assert set(levels) == set(ours["per_family_aggregate"][family])
            for level, values in levels.items():
                assert ours["per_family_aggregate"][family][level] == pytest.approx(values, abs=2e-4)


def test_layer_neighbours_against_a_plain_search(probed_runs):
    net, tokenizer = load_run(probed_runs / "kronecker_s1337")
    families = word_families()
    run = Run("x", "kronecker", 1337, {}, {})
    result = layers.measure(run, net, tokenizer, families, args_for(batch_size=100))
    assert result["sanity_checks"]["self_retrieval_pass"] and result["sanity_checks"]["probe_in_vocab_pass"]
    n = tokenizer.n_vocab
    t = net.transformer
    x = (net.wte_table()[:n] + t.wpe.weight[0]).detach()
    after = t.h[0](x[:, None])[:, 0].detach()
    entry = result["probes"]["help"]["per_probe"][0]
    token = entry["first_token_id"]
    assert entry["whole"] and tokenizer.decode([token]).strip() == "help"
    for level, rows in (("E_raw", net.wte_table()[:n].detach()), ("L0", after)):
        rows = rows - rows.mean(0)
        cosines = torch.nn.functional.cosine_similarity(rows, rows[token][None], dim=1)
        cosines[token] = -2
        assert entry[level]["top10_ids"] == cosines.topk(10).indices.tolist()
    assert entry["E_raw"]["top10_ids"] == entry["E_post"]["top10_ids"]
    assert entry["E_raw"]["S"] > 0.3  # helper, helped, ... share their bytes with help
