"""scripts/trust/twin.py: proof that the comparison with a twin would notice whatever differs."""

import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import TINY

import configurator
import train
from engine import checkpoint
from scripts.trust import twin


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """A run of 12 steps with all of its checkpoints, which tests copy and spoil."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    keys = TINY | {"data_dir": tiny_data, "out_dir": folder, "keep": 100}
    train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
    return folder


def test_bits_are_compared_and_not_values():
    same = twin.same_bits
    assert same({"a": [torch.tensor([float("nan")]), 1]}, {"a": [torch.tensor([float("nan")]), 1]})
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same(torch.zeros(2), torch.zeros(1, 2))
    assert not same({"a": 1}, {"a": 1.0})
    assert not same({"a": 1}, {"a": 1, "b": 2})
    assert same(torch.zeros(3, 2).t(), torch.zeros(2, 3))


def rewrite(run, weights=None, moments=None, **state):
    """The last checkpoint, saved anew with other contents."""
    folder = run / "ckpt" / "step_000012"
    old = checkpoint.load(folder)
    shutil.rmtree(folder)
    checkpoint.save(run, 12, weights or old[0], moments or old[1], old[2] | state)


def spoil_weight(run):
    weights = checkpoint.load(run / "ckpt" / "step_000012")[0]
    weights["transformer.ln_f.weight"][0] += 1e-7
    rewrite(run, weights)


def spoil_moment(run):
    moments = checkpoint.load(run / "ckpt" / "step_000012")[1]
    moments["state"][0]["exp_avg"].view(-1)[3] += 1e-9
    rewrite(run, moments=moments)


def spoil_loss(run):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["train/loss"] *= 1 + 1e-15
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def lose_a_row(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))


def another_machine(run):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(r | {"tok_per_sec": 1.0} if "tok_per_sec" in r else r) + "\n" for r in rows)
    )


def edit(name, **changes):
    def spoil(run):
        (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))

    return spoil


def tear(run):
    path = run / "ckpt" / "step_000012" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (None, []),
        (another_machine, []),
        (rewrite, []),
        (spoil_weight, ["weights"]),
        (spoil_moment, ["moments"]),
        (lambda run: rewrite(run, skipped=1), ["state"]),
        (tear, ["weights", "moments", "state"]),
        (spoil_loss, ["rows"]),
        (lose_a_row, ["rows"]),
        (edit("run.json", data_sha256="of other batches"), ["record"]),
        (edit("config.json", weight_decay=5.0), ["record"]),
        (lambda run: checkpoint.point(run, "best", "step_000010"), ["pointers"]),
        (lambda run: (run / "latest").unlink(), ["pointers"]),
        (lambda run: shutil.rmtree(run / "ckpt" / "step_000010"), ["kept checkpoints"]),
        (lambda run: (run / "ckpt" / ".writing_step_000012").mkdir(), ["nothing left half-written"]),
        (lambda run: (run / "run.json.tmp").write_text("{"), ["nothing left half-written"]),
    ],
)
def test_the_comparison_notices(spoil, found, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    if spoil:
        spoil(tmp_path / "run")
    assert twin.differences(tmp_path / "run", trained, keep=100) == found


def test_what_is_kept_is_the_newest_and_the_best(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint.prune(tmp_path / "run", 1)
    assert twin.differences(tmp_path / "run", trained, keep=1) == []
    assert twin.differences(tmp_path / "run", trained, keep=2) == ["kept checkpoints"]


def metrics(folder, *rows):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("loss", "expected"), [(2.0, 0.0), (2.002, 1e-3), (None, math.nan)])
@pytest.mark.parametrize("last", [True, False])
def test_the_furthest_figures(loss, expected, last, tmp_path):
    """A figure that is no number is a difference, wherever it stands."""
    rest = {"val/loss": 3.0, "grad_norm": 1.0}
    equal, other = ({"iter": i, "train/loss": 2.0} | rest for i in (0, 1))
    whole = metrics(tmp_path / "whole", equal, other)
    changed = [equal, other | {"train/loss": loss}] if last else [equal | {"train/loss": loss}, other]
    figures = twin.furthest(metrics(tmp_path / "split", *changed), whole)
    assert figures == {"train": pytest.approx(expected, nan_ok=True), "val": 0, "norm": 0}
    worst = twin.largest([*figures.values(), 0.0])
    assert worst == pytest.approx(expected, nan_ok=True)
    assert (worst <= 1e-5) == (loss == 2.0)


def test_rows_that_one_run_lacks(tmp_path):
    row = {"iter": 0, "train/loss": 2.0, "val/loss": 3.0, "grad_norm": 1.0}
    whole = metrics(tmp_path / "whole", row, row | {"iter": 1})
    with pytest.raises(twin.RunError, match="in one run only"):
        twin.furthest(metrics(tmp_path / "split", row), whole)


def test_a_report_says_where_it_comes_from(tmp_path):
    argv, args = ["--report", "x"], Namespace(report=None)
    twin.report(args, twin.__file__, argv, "Title", {}, [])
    args.report = tmp_path / "new" / "x"
    twin.report(args, twin.__file__, argv, "Title", {"n": math.nan}, ["Words."])
    found = json.loads((tmp_path / "new" / "x.json").read_text())
    assert found["n"] is None and list(found) == ["command", "commit", "machine", "date", "n"]
    text = (tmp_path / "new" / "x.md").read_text()
    assert text.startswith("# Title\n\n`python scripts/trust/twin.py --report x` at commit ")
    assert "torch" in found["machine"] and "Words." in text


def test_records_are_counted_by_name():
    records = [{"of": "b", "ok": True}, {"of": "a", "ok": False}, {"of": "b", "ok": True}]
    table = twin.tally("T", "of what", records, lambda r: r["of"], {"fine": lambda r: r["ok"]})
    assert table.header == ["of what", "killed", "fine"]
    assert table.rows == [["a", 1, 0], ["b", 2, 2], ["all", 3, 2]]
