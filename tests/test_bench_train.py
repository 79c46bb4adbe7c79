"""scripts/bench/train.py: sides take turns, a side that fails costs its figure alone, tables by hand."""

import json
import sys

import pytest

from engine.errors import RunError
from scripts.bench import train as bench


def test_a_toy_of_two_arms_is_measured(tmp_path, capsys):
    bench.main(
        ["--setting=toy", "--arms=bpe_untied,kronecker", "--rounds=1", "--steps=4", f"--out={tmp_path}"]
    )
    assert "kronecker" in capsys.readouterr().out
    record = json.loads((tmp_path / "bench_train.json").read_text())
    (figures,) = record["settings"]["toy"]["rounds"]["kronecker"]
    assert figures["tokens"] == 4 * 32 and len(figures["all_ms"]) == 2 and figures["gb"] > 0
    assert record["command"].startswith("python scripts/bench/train.py --setting=toy") and record["date"]
    assert "tokens/s over bpe_untied" in (tmp_path / "bench_train.md").read_text()


def test_a_side_that_fails_costs_its_figure_and_no_more(capsys):
    def broken(number):
        raise RunError("no memory")

    sides = {"a": lambda n: {"ms": n}, "b": broken}
    rounds = bench.alternate(sides, 2, left=lambda: 100.0)
    assert rounds == {"a": [{"round": 0, "ms": 0}, {"round": 1, "ms": 1}], "b": []}
    assert "b: no memory" in capsys.readouterr().out
    with pytest.raises(RunError):
        bench.alternate(sides, 1)
    assert (
        len(bench.alternate({"a": sides["a"]}, 5, left=lambda: -1.0)["a"]) == 1
    )  # no time for a second round


def test_a_process_is_ended_at_its_limit(tmp_path):
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(RunError, match="ended after 1 s"):
        bench.timed([sys.executable, str(tmp_path / "slow.py")], tmp_path, {}, limit=1)


def test_ratios_are_medians_of_the_rounds_that_both_have():
    def side(*speeds):
        same = {"tokens": 1, "gb": 2.0, "mfu": None}
        return [{"round": n, "tokens_per_s": s, "ms": 1e3 / s} | same for n, s in enumerate(speeds) if s]

    rounds = {
        "bpe_untied": side(100, 110),
        "kronecker": side(101, 121),
        "nanoGPT": side(80, 80),
        "bpe_tied": side(0, 160),
    }
    table = bench.side_table("toy", rounds)
    assert [row[6] for row in table.rows] == ["1.312x", "1.387x", "1.000x", "2.000x"]
    assert table.rows[1][7] == "1.055x" and table.rows[0][4] == "-"
    rounds["broken"] = []
    assert bench.side_table("toy", rounds).rows[-1][1:] == ["-"] * 8 + [0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms=bpe_teid"], "there is no arm 'bpe_teid'"),
        (["--setting=huge"], "there is no setting 'huge'"),
        (["--steps=3"], "leaves too few"),
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
