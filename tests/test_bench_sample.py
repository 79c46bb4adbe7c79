"""scripts/bench/sample.py at toy size, against a stand-in that generates as nanoGPT does: without a cache."""

import json

import numpy as np
import pytest

from scripts.bench import sample as bench

NANOGPT = """
import torch, model
GPTConfig = model.GPTConfig

class GPT(model.GPT):
    def load_state_dict(self, state):
        return super().load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"})

    @torch.no_grad()
    def generate(self, idx, n, temperature=1.0, top_k=None):
        for _ in range(n):
            logits, _ = self(idx[:, -self.config.block_size :])
            idx = torch.cat((idx, model.pick(logits[:, -1], temperature, top_k, None, None)), dim=1)
        return idx
"""
TOY = ["--shape=toy", "--tokens=16", "--rounds=2"]


def checkout(folder, model=NANOGPT) -> str:
    for name in ("train.py", "configurator.py"):
        (folder / name).touch()
    (folder / "model.py").write_text(model)
    return f"--nanogpt-dir={folder}"


def test_both_sides_at_toy_size(tmp_path, capsys):
    bench.main([*TOY, checkout(tmp_path), f"--out={tmp_path}"])
    record = json.loads((tmp_path / "bench_sample_toy.json").read_text())
    assert (
        record["differ"] == [] and record["check"]["same_tokens"] and record["check"]["distinct_tokens"] > 1
    )
    assert [len(found) for found in record["rounds"].values()] == [2, 2]
    for first in (found[0] for found in record["rounds"].values()):
        assert first["eight"] > 0 and first["sliding"] > 0
    page = (tmp_path / "bench_sample_toy.md").read_text()
    assert "| eight | 128 |" in page and "Greedy tokens are the same" in page
    assert f"at commit {record['commit']}, {record['machine']}, {record['date']}" in page


def test_tokens_that_differ_are_said(tmp_path, capsys):
    wrong = NANOGPT.replace("return idx", "idx[:, -1] += 1; return idx")
    bench.main([*TOY[:-1], "--rounds=1", checkout(tmp_path, wrong), f"--out={tmp_path}"])
    said = " ".join(capsys.readouterr().out.split())
    assert "other ones at the lengths [" in said and "the tokens NOT the same" in said


def test_without_nanogpt_ours_is_measured_alone(tmp_path, capsys):
    bench.main([*TOY[:-1], "--rounds=1", f"--out={tmp_path}"])
    told = capsys.readouterr()
    assert "nanoGPT is left out" in told.err and "faster" in told.out
    with pytest.raises(SystemExit, match=r"error: .* is no checkout of nanoGPT"):
        bench.main([*TOY, "--nanogpt-dir=/nowhere"])


def test_costs_are_added_up_along_the_line_between_them():
    """Costs of 2 ms a token of context: 2 * (8 + 9 + 10), and 2 * (12 + 13) beyond the last length but one."""
    lengths = [1, 10, 20]
    costs = [2.0, 20.0, 40.0]
    assert bench.added_up(lengths, costs, 8, 3) == pytest.approx(54)
    assert bench.added_up(lengths, costs, 12, 2) == pytest.approx(50)
    assert np.isclose(bench.added_up([1, 3], [5.0, 5.0], 1, 3), 15)
