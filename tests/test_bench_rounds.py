"""scripts/bench/rounds.py: sides take turns, a side that fails costs its figure alone."""

import sys

import pytest

from engine.errors import RunError
from scripts.bench import rounds as bench


def test_a_side_that_fails_costs_its_figure_and_no_more(capsys):
    def broken(number):
        raise RunError("no memory")

    sides = {"a": lambda n: {"ms": n}, "b": broken}
    rounds = bench.alternate(sides, 2, left=lambda: 100.0)
    assert rounds == {"a": [{"round": 0, "ms": 0}, {"round": 1, "ms": 1}], "b": []}
    assert "b: no memory" in capsys.readouterr().out
    with pytest.raises(RunError):
        bench.alternate(sides, 1)
    # no time for a second round
    assert len(bench.alternate({"a": sides["a"]}, 5, left=lambda: -1.0)["a"]) == 1


def test_a_process_is_ended_at_its_limit_and_its_error_is_said(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(RunError, match="ended after 1 s"):
        bench.timed([sys.executable, str(script)], tmp_path, limit=1)
    script.write_text("print('error: no room'); raise SystemExit(1)")
    with pytest.raises(RunError, match=r"slow\.py failed: no room"):
        bench.timed([sys.executable, str(script)], tmp_path)


def test_ratios_are_those_of_the_rounds_that_both_have():
    rounds = {
        "a": [{"round": 0, "ms": 6.0}, {"round": 1, "ms": 9.0}, {"round": 3, "ms": 5.0}],
        "b": [{"round": 0, "ms": 2.0}, {"round": 2, "ms": 1.0}, {"round": 3, "ms": 4.0}],
    }
    assert bench.ratios(rounds, "a", "b", "ms") == [3.0, 1.25]
    assert bench.ratios(rounds, "a", "absent", "ms") == []
    assert bench.times([3.0, 1.25, 2.0]) == "2.00x (1.25 to 3.00)"
    assert (bench.times([1.5]), bench.times([])) == ("1.50x", "-")
