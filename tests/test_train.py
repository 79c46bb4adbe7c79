"""train.py: the loop's promises, on runs of a dozen steps."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, all_logits, arm_keys, losses, torchrun

import configurator
import train
from data import DataError
from data.meta import characters_meta, write_meta
from data.shards import write_shard
from engine import checkpoint
from engine.errors import RunError
from engine.metrics import read_metrics
from model import GPT

ARMS = ["bpe_tied", "bpe_untied", "kronecker", "kronecker_tied"]


def on_ranks(n: int, flags: list[str]) -> subprocess.CompletedProcess:
    command = torchrun("--standalone", f"--nproc_per_node={n}", "train.py", *flags)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)


def assert_close(one: dict, two: dict, rel=1e-5):
    assert one.keys() == two.keys()
    assert len(one) > 12
    for k in one:
        assert one[k] == pytest.approx(two[k], rel=rel), k


@pytest.mark.parametrize("arm", ARMS)
def test_same_config_and_seed_give_identical_losses(arm, train_tiny, tmp_path):
    first = train_tiny(tmp_path / "a", **arm_keys(arm))
    second = train_tiny(tmp_path / "b", **arm_keys(arm))
    assert losses(first) == losses(second)
    assert losses(train_tiny(tmp_path / "c", **arm_keys(arm), seed=1)) != losses(first)
    val = [r["val/loss"] for r in first if "val/loss" in r]
    assert val[-1] < val[0] - 0.1  # it learns


def test_rows_bear_the_names_that_people_compare(train_tiny, tmp_path):
    rows = train_tiny(tmp_path)
    train_rows = [r for r in rows if "train/loss" in r]
    assert [r["iter"] for r in train_rows] == list(range(12))
    assert {
        "iter",
        "tokens",
        "train/loss",
        "lr",
        "grad_norm",
        "tok_per_sec",
        "skipped",
        "mem_gb",
    } <= train_rows[0].keys()
    val_rows = [r for r in rows if "val/loss" in r]
    assert [r["iter"] for r in val_rows] == [0, 5, 10, 12]
    assert {"val/sem", "val/bpb", "wte/rms", "wte/weight_norm"} <= val_rows[0].keys()
    assert val_rows[0]["wte/rms"] == pytest.approx(0.02, rel=0.1)
    assert val_rows[-1]["tokens"] == 12 * 8 * 16
    assert "mfu" not in train_rows[0]  # nobody knows this CPU's peak
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["tokens_per_step"] == 128
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 64


def test_learning_rate_schedule_by_hand():
    config = configurator.Config(learning_rate=1.0, min_lr=0.1, warmup_iters=4, max_iters=14)
    assert train.learning_rate(config, 0) == pytest.approx(0.2)
    assert train.learning_rate(config, 4) == pytest.approx(1.0)
    assert train.learning_rate(config, 9) == pytest.approx(0.55)
    assert train.learning_rate(config, 14) == pytest.approx(0.1)
    config.decay_lr = False
    assert train.learning_rate(config, 9) == 1.0


def test_one_step_against_a_loop_written_out_here(train_tiny, tmp_path, tiny_data):
    """AdamW, clipping and accumulation by torch's plain parts, from the same start and batch."""
    from data.loader import TrainBatches
    from model import GPT, GPTConfig

    train_tiny(tmp_path, max_iters=1, tie_weights=False, grad_clip=0.1, ckpt_interval=1)
    saved, _, _ = checkpoint.load(tmp_path / "ckpt" / "step_000001")
    shape = GPTConfig(16, 64, 2, 2, 32, bias=False, tie_weights=False)
    model = GPT(shape, seed=1337)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=3e-3 / 3, betas=(0.9, 0.95), fused=False, foreach=False,
    )  # fmt: skip
    x, y = TrainBatches(tiny_data, 16, 8, 1337).rows(0, 0, 8)
    torch.nn.functional.cross_entropy(all_logits(model, x).flatten(0, 1), y.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("arm", ["bpe_tied", "kronecker_tied"])
def test_a_resume_is_bit_identical(arm, dropout, train_tiny, tmp_path):
    keys = arm_keys(arm) | {"dropout": dropout, "ckpt_interval": 3}
    whole = train_tiny(tmp_path / "whole", **keys)
    train_tiny(tmp_path / "cut", **keys, init_from="auto")
    for step in (9, 12):  # as if it had died before these were written
        os.rename(tmp_path / f"cut/ckpt/step_{step:06d}", tmp_path / f"gone_{step}")
    cut = train_tiny(tmp_path / "cut", **keys, init_from="auto")
    assert losses(cut) == losses(whole)
    ours, theirs = (checkpoint.load(tmp_path / d / "ckpt/step_000012")[0] for d in ("whole", "cut"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_micro_batches_change_nothing_but_rounding(train_tiny, tmp_path):
    one = losses(train_tiny(tmp_path / "a", batch_size=8))
    assert_close(one, losses(train_tiny(tmp_path / "b", batch_size=3)))  # taken 2 at a time


@pytest.mark.parametrize(("ranks", "batch_size", "arm"), [(2, 8, "kronecker"), (4, 1, "bpe_tied")])
def test_ranks_change_nothing_but_rounding(ranks, batch_size, arm, train_tiny, tiny_flags, tmp_path):
    one = losses(train_tiny(tmp_path / "one", **arm_keys(arm)))
    done = on_ranks(ranks, tiny_flags(tmp_path / "many", batch_size=batch_size, **arm_keys(arm)))
    assert done.returncode == 0, done.stderr
    assert_close(one, losses(read_metrics(tmp_path / "many")))
    # a share of 4 or 2 of the global batch of 8, whatever batch_size would allow
    assert json.loads((tmp_path / "many" / "run.json").read_text())["micro_batch"] == min(
        batch_size, 8 // ranks
    )


def test_a_resume_on_another_number_of_ranks(train_tiny, tiny_flags, tmp_path):
    keys = {"ckpt_interval": 4, **arm_keys("kronecker")}
    whole = losses(train_tiny(tmp_path / "whole", **keys))
    done = on_ranks(2, tiny_flags(tmp_path / "cut", batch_size=2, **keys))
    assert done.returncode == 0, done.stderr
    for step in (8, 10, 12):
        folder = tmp_path / f"cut/ckpt/step_{step:06d}"
        if folder.exists():
            os.rename(folder, tmp_path / f"gone_{step}")
    assert_close(whole, losses(train_tiny(tmp_path / "cut", **keys, init_from="auto")))


def test_sigterm_finishes_the_step_saves_and_says_so(train_tiny, tiny_flags, tmp_path):
    keys = {"max_iters": 400, "eval_interval": 400, "ckpt_interval": 400, "log_interval": 1}
    command = [sys.executable, "train.py", *tiny_flags(tmp_path / "cut", **keys, init_from="auto")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step      5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in rest
    assert checkpoint.newest(tmp_path / "cut") is not None
    cut = losses(train_tiny(tmp_path / "cut", **keys, init_from="auto"))
    assert cut == losses(train_tiny(tmp_path / "whole", **keys))


def poison(monkeypatch, steps, value=float("nan")):
    """Make the loss of these optimiser steps non-finite."""
    import model

    plain, calls = model.GPT.forward, iter(range(10**6))

    def forward(self, idx, targets=None, reduction="mean", **kw):
        logits, loss = plain(self, idx, targets, reduction, **kw)
        if targets is not None and reduction == "mean" and next(calls) in steps:
            loss = loss * value
        return logits, loss

    monkeypatch.setattr(model.GPT, "forward", forward)


def test_a_non_finite_step_is_skipped_and_counted(train_tiny, tmp_path, monkeypatch):
    poison(monkeypatch, {3, 6}, value=float("inf"))
    rows = train_tiny(tmp_path, batch_size=8, ckpt_interval=1, keep=99)
    assert [r["skipped"] for r in rows if "train/loss" in r] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    saved = {folder.name for folder in checkpoint.steps(tmp_path)}  # none while steps are skipped
    assert saved == {f"step_{step:06d}" for step in (1, 2, 3, 5, 6, 8, 9, 10, 11, 12)}
    assert '"train/loss": null' in (tmp_path / "metrics.jsonl").read_text()


def test_too_many_bad_steps_in_a_row_stop_the_run(train_tiny, tmp_path, tiny_data, monkeypatch):
    from data.loader import TrainBatches

    poison(monkeypatch, set(range(6, 100)))
    with pytest.raises(RunError, match=r"not finite in 3 steps in a row up to step 8.*step_000005"):
        train_tiny(tmp_path, batch_size=8, max_skipped=3)
    written = json.loads((tmp_path / "nonfinite.json").read_text())
    assert written["steps"] == [6, 7, 8]
    assert written["window_ids"]["7"] == TrainBatches(tiny_data, 16, 8, 1337).window_ids(7).tolist()
    assert checkpoint.newest(tmp_path).name == "step_000005"
    assert json.loads((tmp_path / "run.json").read_text())["diverged"] == 8


def test_a_run_whose_last_loss_is_no_number_is_no_success(train_tiny, tmp_path):
    with pytest.raises(RunError, match="validation loss at step 2 is not finite: the run diverged"):
        train_tiny(tmp_path, max_iters=2, weight_decay=1e300)
    assert read_metrics(tmp_path)[-1]["val/loss"] is None


def test_a_dry_run_does_not_plan_what_cannot_start(train_tiny, tmp_path):
    with pytest.raises(DataError, match="was tokenized with 28 ids but the model's vocab_size is 10"):
        train_tiny(tmp_path, vocab_size=10, dry_run=True)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train_tiny, tmp_path, monkeypatch):
    """Also where checkpoints are more frequent than the steps it may skip, and only one is kept: whose own step gives the
    first bad loss, so nothing says that it is good."""
    keys = {"batch_size": 8, "max_skipped": 5, "ckpt_interval": 1, "keep": 1, "keep_best": False}
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        RunError, match=r"up to step 7, .*no checkpoint before step 3 is left, only .*step_000003$"
    ):
        train_tiny(tmp_path, **keys)
    assert [folder.name for folder in checkpoint.steps(tmp_path)] == ["step_000003"]
    monkeypatch.undo()
    rows = train_tiny(tmp_path, **keys, init_from="auto")  # a machine's fault, mended
    assert [r["iter"] for r in rows if "train/loss" in r] == list(range(12))
    assert json.loads((tmp_path / "run.json").read_text()).get("diverged") is None


def test_dry_run_reads_no_data_and_leaves_nothing(tmp_path, capsys):
    flags = ["config/gpt2_124m_fineweb_edu.py", "config/arms/kronecker.py", "--dry_run=True", "--device=cpu"]
    train.main(configurator.load([*flags, f"--out_dir={tmp_path / 'x'}", f"--data_dir={tmp_path}"]))
    out = capsys.readouterr().out
    assert "3,145,728 parameters, 91.9% fewer than a learned table" in out
    assert "2,499,526,656 tokens" in out
    assert not (tmp_path / "x").exists()


def test_learning_rate_and_decay_of_each_part(tiny_flags, tmp_path):
    from model import GPT, GPTConfig

    flags = tiny_flags(tmp_path, wte_lr_mult=8.0, head_lr_mult=2.0, wte_weight_decay=0.0, weight_decay=0.1)
    model = GPT(GPTConfig(16, 64, 2, 2, 32, tie_weights=False))
    optimizer = train.make_optimizer(model, configurator.load(flags), "cpu")
    found = {id(p): (g["lr_mult"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if name == "transformer.wte.weight":
            assert found[id(p)] == (8.0, 0.0)
        elif name == "lm_head.weight":
            assert found[id(p)] == (2.0, 0.1)
        else:
            assert found[id(p)] == (1.0, 0.1 if p.dim() >= 2 else 0.0)


def test_a_multiplier_multiplies_the_first_step(train_tiny, tmp_path):
    """AdamW's first step moves each number by its learning rate, so twice the rate is twice the way."""
    keys = {"max_iters": 1, "ckpt_interval": 1, "weight_decay": 0.0, "grad_clip": 0.0, "tie_weights": False}
    weights = {}
    for name, more in {"plain": {}, "table": {"wte_lr_mult": 2.0}, "head": {"head_lr_mult": 2.0}}.items():
        train_tiny(tmp_path / name, **keys, **more)
        weights[name] = checkpoint.load(tmp_path / name / "ckpt" / "step_000001")[0]
    from model import GPT, GPTConfig

    start = GPT(GPTConfig(16, 64, 2, 2, 32, bias=False, tie_weights=False), seed=1337).state_dict()
    for name, part in (("table", "transformer.wte.weight"), ("head", "lm_head.weight")):
        for key, value in weights[name].items():
            way, plain = value - start[key], weights["plain"][key] - start[key]
            torch.testing.assert_close(way, plain * (2.0 if key == part else 1.0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"head_lr_mult": 2.0}, "head_lr_mult means nothing with tie_weights=True"),
        ({"wte_entropy": 0.1}, "wte_entropy means nothing with wte='stock'"),
        ({"wte_rank": 4}, "wte_rank means nothing with wte='stock'"),
    ],
)
def test_a_knob_without_meaning_is_refused(keys, says, train_tiny, tmp_path):
    with pytest.raises(RunError, match=says):
        train_tiny(tmp_path / "run", **keys)
    assert not (tmp_path / "run").exists()


def test_flops_of_the_124m_run_by_hand():
    """6N + 12LCT with N = 12 * 12 * 768^2 + 50304 * 768: the 860 MFLOP a token that others quote."""
    from engine.flops import flops_per_token
    from model import GPTConfig

    n = 12 * 12 * 768**2 + 50304 * 768
    assert flops_per_token(GPTConfig()) == 6 * n + 12 * 12 * 768 * 1024
    assert flops_per_token(GPTConfig()) / 1e6 == pytest.approx(860, rel=0.01)


def test_bits_per_byte_by_hand(train_tiny, tmp_path):
    """Characters of one byte each: bits per byte is nats per token over ln 2."""
    rows = [r for r in train_tiny(tmp_path) if "val/loss" in r]
    for r in rows:
        assert r["val/bpb"] == pytest.approx(r["val/loss"] / math.log(2), rel=1e-6)


def test_every_training_token_is_an_input_once_an_epoch_and_a_target_once(train_tiny, tmp_path, monkeypatch):
    """Every character stands once in this text, so that a token says where it was; two epochs of 5 steps."""
    characters = [chr(0x4E00 + i) for i in range(40 * 16 + 1)]
    tokens = np.arange(len(characters), dtype=np.uint16)
    write_shard(tmp_path / "once_val_000000.bin", tokens)
    write_shard(tmp_path / "once_train_000001.bin", tokens)
    write_meta(tmp_path, characters_meta("once", characters))
    batches, plain = [], GPT.forward

    def forward(self, x, y=None, *more, **others):
        if self.training:
            batches.append((x.clone(), y.clone()))
        return plain(self, x, y, *more, **others)

    monkeypatch.setattr(GPT, "forward", forward)
    train_tiny(tmp_path / "run", data_dir=tmp_path, batch_size=2, max_iters=10)
    assert len(batches) == 10 * 4  # micro-steps of 2 sequences make a global batch of 8
    for epoch in (batches[:20], batches[20:]):
        x, y = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert x.flatten().sort().values.tolist() == list(range(640))
        assert torch.equal(y, x + 1)
    assert not torch.equal(torch.cat([x for x, _ in batches[:20]]), torch.cat([x for x, _ in batches[20:]]))
