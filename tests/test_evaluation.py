"""engine/evaluation.py against a loop over single tokens."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.loader import ValWindows, token_counts
from data.shards import write_shard
from engine import evaluation
from engine.ranks import Ranks
from model import GPT, GPTConfig

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16), seed=3)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    write_shard(tmp_path / "x_val_000000.bin", rng.integers(0, 40, 200).astype(np.uint16))
    skewed = np.minimum(rng.geometric(0.15, 3000) - 1, 35)
    write_shard(tmp_path / "x_train_000001.bin", skewed[:1000].astype(np.uint16))
    write_shard(tmp_path / "x_train_000002.bin", skewed[1000:].astype(np.uint16))
    return tmp_path


def test_every_figure_against_a_loop_over_tokens(model, folder):
    windows = ValWindows(folder, 8, 100)
    byte_lengths = np.arange(40) % 4  # some tokens have no bytes, ids above 39 neither
    counts = token_counts(folder, 64)
    figures = evaluation.evaluate(model, windows, byte_lengths, 5, ALONE, torch.enable_grad(), counts)

    x, y = windows.rows(0, windows.n_windows)
    losses = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(len(x)):
        for t in range(8):
            logits, _ = model(x[i : i + 1, : t + 1])  # the last position's
            losses[i, t] = F.cross_entropy(logits[0], y[i, t : t + 1]).item()
    assert figures["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert figures["val/sem"] == pytest.approx(losses.mean(1).std().item() / math.sqrt(len(x)), rel=1e-4)
    has_bytes = torch.tensor([[int(t) % 4 > 0 for t in row] for row in y])
    n_bytes = sum(int(t) % 4 for t in y.flatten())
    assert figures["val/bpb"] == pytest.approx(
        (losses * has_bytes).sum().item() / math.log(2) / n_bytes, rel=1e-5
    )

    for side, ids in (("input", x), ("target", y)):
        mine: dict = {}
        for token, loss in zip(ids.flatten().tolist(), losses.flatten().tolist(), strict=True):
            count = int(counts[token])
            low = 0 if count == 0 else 4 ** int(math.log(count, 4) + 1e-9)
            mine.setdefault(low, []).append(loss)
        found = {int(k.split("/")[2]): v for k, v in figures.items() if k.startswith(f"val/by_{side}/")}
        assert found == {low: pytest.approx(np.mean(v), rel=1e-5) for low, v in mine.items()}
        assert {low: figures[f"val/n_{side}/{low}"] for low in mine} == {k: len(v) for k, v in mine.items()}
        assert len(mine) > 3 and 0 in mine


def test_counts_of_the_first_tokens(folder):
    train = np.concatenate([np.fromfile(p, "<u2", offset=1024) for p in sorted(folder.glob("*_train_*"))])
    assert np.array_equal(token_counts(folder, 64), np.bincount(train, minlength=64))
    assert np.array_equal(token_counts(folder, 64, limit=1500), np.bincount(train[:1500], minlength=64))


def test_buckets_are_powers_of_four():
    counts = np.array([0, 1, 3, 4, 15, 16, 64, 255, 256])
    bucket, lowest = evaluation.frequency_buckets(counts)
    assert [lowest[k] for k in bucket.tolist()] == [0, 1, 1, 4, 4, 16, 64, 64, 256]


def test_windows_after_a_skip_share_no_token_with_those_before(folder):
    first, second = ValWindows(folder, 8, 80), ValWindows(folder, 8, 10**6, skip_tokens=80)
    tokens = np.fromfile(folder / "x_val_000000.bin", "<u2", offset=1024)
    x, y = second.rows(0, second.n_windows)
    assert x.flatten().tolist() == tokens[81 : 81 + x.numel()].tolist() and y[0, 0] == tokens[82]
    last_of_first = int(first.rows(9, 10)[1][0, -1])
    assert last_of_first == tokens[80]
    assert len({first.sha256(), second.sha256(), ValWindows(folder, 8, 80, 8).sha256()}) == 3


def test_the_last_row_of_a_run_has_the_buckets(train_tiny, tmp_path):
    val = [r for r in train_tiny(tmp_path) if "val/loss" in r]
    assert not [k for r in val[:-1] for k in r if k.startswith("val/by_")]
    last = val[-1]
    targets = [k.rpartition("/")[2] for k in last if k.startswith("val/by_target/")]
    total = sum(last[f"val/n_target/{k}"] for k in targets)
    mean = sum(last[f"val/by_target/{k}"] * last[f"val/n_target/{k}"] for k in targets) / total
    assert mean == pytest.approx(last["val/loss"], rel=1e-5) and total == 512
