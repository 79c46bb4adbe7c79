"""engine/costs.py: hours, bytes and packing, held against figures worked out by hand."""

import itertools

import pytest
import torch

import configurator
import train
from engine import costs, flops
from scripts import matched

# the paper's run: 4,623 steps of 528 x 1,024 tokens at 854,654,976 FLOPs a token
WORK = costs.Work(4623, 528, 854_654_976 * 528 * 1024, 4 * 124_373_760)


def test_hours_by_hand():
    # 2.136e18 FLOPs at 40% of 989e12
    assert costs.hours(WORK, 1, costs.GPUS["H100"]) == pytest.approx(
        2.1362e18 / (0.4 * 989e12) / 3600, rel=1e-4
    )
    # two thirds of nothing are sent by one GPU; eight send 7/8 of 497 MB twice over 450 GB/s
    assert costs.all_reduce_seconds(1e9, 1, costs.GPUS["H100"]) == 0
    assert costs.all_reduce_seconds(497.5e6, 8, costs.GPUS["H100"]) == pytest.approx(
        2 * 7 / 8 * 497.5e6 / 450e9
    )
    # and between nodes all goes through their eight adapters of 400 Gbit/s
    assert costs.all_reduce_seconds(497.5e6, 16, costs.GPUS["H100"]) == pytest.approx(
        2 * 15 / 16 * 497.5e6 / 400e9
    )
    assert costs.all_reduce_seconds(497.5e6, 16, costs.GPUS["A100"]) == pytest.approx(
        2 * 15 / 16 * 497.5e6 / 200e9
    )


def test_only_numbers_of_gpus_that_share_the_batch_are_shown():
    assert [costs.largest_divisor(528, n) for n in costs.NUMBERS] == [1, 8, 16, 24, 48]
    assert [costs.largest_divisor(8, n) for n in costs.NUMBERS] == [1, 8, 8, 8, 8]


def test_packing_by_hand_and_by_trying_every_way():
    assert costs.pack([3, 3, 3], 2) == 6
    assert costs.pack([4, 1, 1, 1, 1], 2) == 4
    assert costs.pack([1.5], 8) == 1.5
    # the first free slot is never worse than twice the best assignment (Graham 1966)
    durations = [5, 3, 8, 2, 7, 4]
    best = min(
        max(sum(d for d, s in zip(durations, where, strict=True) if s == slot) for slot in range(3))
        for where in itertools.product(range(3), repeat=len(durations))
    )
    assert best <= costs.pack(durations, 3) <= 2 * best


def test_the_split_that_ends_first():
    h100 = costs.GPUS["H100"]
    one = costs.hours(WORK, 1, h100)
    # nine runs on nine GPUs: one each, for more GPUs a run only add their all-reduces
    assert costs.best_split([WORK] * 9, 9, h100) == (pytest.approx(one), 1)
    # a single run takes all that there are
    ended, per_run = costs.best_split([WORK], 8, h100)
    assert per_run == 8 and ended == costs.hours(WORK, 8, h100)
    # nine runs on eight GPUs: one by one on eight beats one each, where the ninth runs alone
    ended, per_run = costs.best_split([WORK] * 9, 8, h100)
    assert per_run == 8 and ended == pytest.approx(9 * costs.hours(WORK, 8, h100)) and ended < 2 * one
    # a batch of odd size cannot be split in two
    odd = costs.Work(100, 527, 1e15, 10**9)
    assert costs.best_split([odd], 8, h100)[1] == 1


def dry_run(capsys, *keys) -> str:
    train.main(
        configurator.load(["config/gpt2_124m_fineweb_edu.py", *keys, "--dry_run=True", "--device=cpu"])
    )
    return capsys.readouterr().out


def test_a_dry_run_says_what_the_run_costs(capsys, monkeypatch):
    monkeypatch.setattr(costs, "matmul_rate", lambda: 100e9)
    out = dry_run(capsys, "config/arms/kronecker.py", "--price_per_gpu_hour=2")
    assert "510.1 MB of gradients (input side 12.6 MB, 92% fewer than a table's)" in out
    rows = {
        line.split()[0]: line for line in out.splitlines() if line.split()[0] in ("1", "8", "16", "24", "48")
    }
    assert len(rows) == 5
    assert "4.8 h, $9.51" in rows["1"] and "1.5 h, $3.00" in rows["1"]
    assert "  here      14,835 h on" in out and "100 GFLOP/s measured" in out  # 2.13623e18 / 40e9 / 3600
    # a table's gradient, untied: 38,633,472 more numbers of 4 bytes than the head alone
    table = dry_run(capsys, "config/arms/bpe_untied.py")
    assert "652.0 MB of gradients (input side 154.5 MB)" in table and "$" not in table.split("out_dir")[0]


def test_matched_says_what_its_runs_cost_and_trains_nothing(capsys, tmp_path):
    args = [
        "config/gpt2_124m_fineweb_edu.py",
        f"--out={tmp_path / 'out'}",
        "--arms=bpe_tied,kronecker",
        "--dry_run",
    ]
    assert matched.main([*args, "--price_per_gpu_hour=2"]) == 0
    out = capsys.readouterr().out
    assert "cost        6 runs, 1.28e+19 FLOPs at 40%" in out
    # six runs of 1.5 h one after another on one H100: 9 h, $18
    assert "9.0 h at 1 a run, $18.00" in out
    assert not (tmp_path / "out").exists()


def test_an_unknown_device_gets_no_hours(monkeypatch):
    monkeypatch.delenv("KNG_PEAK_TFLOPS", raising=False)
    assert "its peak is unknown" in costs.describe_here(WORK, torch.device("mps"))
    monkeypatch.setenv("KNG_PEAK_TFLOPS", "10")
    assert costs.describe_here(WORK, torch.device("mps")) == "148 h on one mps"
    assert flops.peak_flops(torch.device("mps"))[0] == 10e12
