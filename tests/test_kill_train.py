"""scripts/trust/kill_train.py and kill_lines.py: small versions of both harnesses, and proof that they would notice."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from engine import checkpoint
from scripts.trust import kill_train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are not here")


def test_five_kills_leave_no_trace(tiny_data, tmp_path, capsys):
    """The 100 of results/trust/kill_train.md in small: real processes, SIGKILL from outside, the same command again."""
    report = tmp_path / "report"
    argv = ["--kills=5", "--per_run=3", "--seed=5", "--recipes=kronecker", f"--data_dir={tiny_data}"]
    assert kill_train.main([*argv, f"--out={tmp_path / 'out'}", f"--report={report}"]) == 0
    assert "5 of 5 kills passed" in capsys.readouterr().out
    told = json.loads(report.with_suffix(".json").read_text())
    assert (told["summary"]["kills"], told["summary"]["passed"]) == (5, 5)
    assert told["summary"]["in_a_write"] >= 1
    assert "**5 of 5** kills" in report.with_suffix(".md").read_text()
    # the same command again has nothing left to do
    assert kill_train.main([*argv, f"--out={tmp_path / 'out'}"]) == 0


def test_a_kill_at_any_line_leaves_no_trace(tmp_path):
    """A sample of the lines; results/trust/kill_lines.md has them all."""
    command = [sys.executable, "scripts/trust/kill_lines.py", "--stride=83", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) > 20
    assert all(r["trouble"] is None for r in records)
    assert {r["line"].split(":")[0] for r in records} >= {"train.py", "engine/checkpoint.py"}


def test_bits_are_compared_and_not_values():
    same = kill_train.same_bits
    assert same({"a": [torch.tensor([float("nan")]), 1]}, {"a": [torch.tensor([float("nan")]), 1]})
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same(torch.zeros(2), torch.zeros(1, 2))
    assert not same({"a": 1}, {"a": 1.0})
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert same(torch.zeros(3, 2).t(), torch.zeros(2, 3))


def spoil_weight(run):
    folder = run / "ckpt" / "step_000012"
    weights, optimizer, state = checkpoint.load(folder)
    weights["transformer.ln_f.weight"][0] += 1e-7
    shutil.rmtree(folder)
    checkpoint.save(run, 12, weights, optimizer, state)


def spoil_moment(run):
    folder = run / "ckpt" / "step_000012"
    weights, optimizer, state = checkpoint.load(folder)
    optimizer["state"][0]["exp_avg"].view(-1)[3] += 1e-9
    shutil.rmtree(folder)
    checkpoint.save(run, 12, weights, optimizer, state)


def spoil_loss(run):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["train/loss"] *= 1 + 1e-15
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def lose_a_row(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))


def half_a_checkpoint(run):
    (run / "ckpt" / ".writing_step_000012").mkdir()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (None, None),
        (spoil_weight, "weights_equal"),
        (spoil_moment, "optimizer_equal"),
        (spoil_loss, "rows_equal"),
        (lose_a_row, "rows_equal"),
        (lambda run: checkpoint.point(run, "best", "step_000010"), "pointers_equal"),
        (lambda run: shutil.rmtree(run / "ckpt" / "step_000010"), "kept_equal"),
        (half_a_checkpoint, "nothing_left_equal"),
    ],
)
def test_the_comparison_notices(spoil, told, train_tiny, tmp_path):
    train_tiny(tmp_path / "twin", keep=100)
    shutil.copytree(tmp_path / "twin", tmp_path / "run")
    if spoil:
        spoil(tmp_path / "run")
    end = kill_train.compare_end(tmp_path / "run", kill_train.Twin(tmp_path / "twin", keep=100))
    assert [k for k, v in end.items() if k.endswith("_equal") and not v] == ([told] if told else [])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipes=kroneker"], "there is no recipe 'kroneker'"),
        (["--kills=0"], "must all be at least 1"),
        (["--kils", "5"], "is unknown here"),
    ],
)
def test_bad_arguments(argv, words, tmp_path):
    with pytest.raises(SystemExit, match=words) as leaving:
        kill_train.main([*argv, f"--out={tmp_path / 'out'}"])
    assert str(leaving.value).startswith("error: ")
    assert not (tmp_path / "out").exists()
