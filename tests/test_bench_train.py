"""scripts/bench/train.py: a toy in full, tables by hand."""

import json
import time
from unittest import mock

import pytest
from conftest import TINY

import configurator
from engine import checkpoint
from scripts.bench import train as bench


def test_a_toy_is_measured(tmp_path, capsys):
    bench.main(
        ["--setting=toy", "--arms=kronecker", "--rounds=1", "--steps=4", "--shares", f"--out={tmp_path}"]
    )
    assert "kronecker" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench_train.json").read_text())
    (figures,) = record["settings"]["toy"]["rounds"]["kronecker"]
    assert figures["tokens"] == 4 * 32 and len(figures["all_ms"]) == 4 and figures["gb"] > 0
    assert record["command"].startswith("python scripts/bench/train.py --setting=toy") and record["date"]
    assert "tokens/s over kronecker" in (tmp_path / "bench_train.md").read_text()
    assert record["settings"]["toy"]["shares"]["kronecker"]["backward"] > 0


def test_the_table_has_each_sides_ratios_with_their_spread():
    def side(*speeds):
        same = {"tokens": 1, "gb": 2.0, "mfu": None}
        return [{"tokens_per_s": s, "ms": 1e3 / s} | same if s else None for s in speeds]

    rounds = {
        "bpe_untied": side(100, 110),
        "kronecker": side(101, 121),
        "nanoGPT": side(80, 80),
        "bpe_tied": side(0, 160),
        "broken": side(0, 0),
    }
    rows = bench.side_table("toy", rounds).rows
    assert [row[6] for row in rows] == [
        "1.31x (1.25 to 1.38)", "1.39x (1.26 to 1.51)", "1.00x (1.00 to 1.00)", "2.00x", "-"
    ]  # fmt: skip
    assert rows[1][7] == "1.06x (1.01 to 1.10)" and rows[0][4] == "-"
    assert rows[-1][1:] == ["-"] * 8 + [0] and [row[-1] for row in rows[:4]] == [2, 2, 2, 1]


def test_where_a_trainings_time_goes(tiny_data, tmp_path):
    """All of it, once; a checkpoint that takes longer has a larger share. What train.py calls is itself again after."""
    keys = TINY | {"data_dir": tiny_data, "out_dir": tmp_path / "run", "max_iters": 4, "eval_interval": 2}
    before, save = checkpoint.save, checkpoint.save

    def slow(*args):
        time.sleep(0.5)
        return save(*args)

    with mock.patch.object(checkpoint, "save", slow):
        found = bench.shares(configurator.load(bench.flags(keys)))
    together = found.pop("evaluation, checkpoints, logging")
    assert checkpoint.save is before
    assert sum(found.values()) == pytest.approx(1) and all(share > 0 for share in found.values())
    assert together == pytest.approx(sum(found[part] for part in bench.BESIDE))
    assert found["checkpoints"] > 0.2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms=bpe_teid"], "there is no arm 'bpe_teid'"),
        (["--setting=huge"], "there is no setting 'huge'"),
        (["--steps=3"], "argument --steps"),
        (["--rounds=0"], "argument --rounds"),
        (["--device=cuda:77"], "argument --device"),
        (["--nanogpt-dir=/nowhere"], "is no checkout of nanoGPT"),
        (["--nonsense"], "unrecognized argument --nonsense"),
    ],
)
def test_arguments_that_make_no_sense_are_one_sentence(flags, sentence):
    with pytest.raises(SystemExit, match=sentence) as e:
        bench.main(flags)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
