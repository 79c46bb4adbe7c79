"""scripts/bench/rounds.py: sides take turns, a side that fails costs its figure alone."""

import sys

import pytest

from engine.errors import RunError
from scripts.analysis.report import Table
from scripts.bench import rounds as bench


def test_a_side_that_fails_costs_its_figure_and_no_more(capsys):
    order = []

    def works():
        order.append("a")
        return {"ms": len(order)}

    def broken():
        order.append("b")
        raise RunError("no memory")

    rounds = bench.alternate({"a": works, "b": broken}, 2, left=lambda: 100.0)
    assert rounds == {"a": [{"ms": 1}, {"ms": 4}], "b": [None, None]} and order == ["a", "b", "b", "a"]
    assert "b: no memory" in capsys.readouterr().err
    with pytest.raises(RunError):
        bench.alternate({"b": broken}, 1)
    # no time for a second round
    assert len(bench.alternate({"a": works}, 5, left=lambda: -1.0)["a"]) == 1


def test_a_process_is_ended_at_its_limit_and_its_error_is_said(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(RunError, match="ended after 1 s"):
        bench.run([sys.executable, script], limit=1)
    script.write_text("print('error: no room'); raise SystemExit(1)")
    with pytest.raises(RunError, match=r"slow\.py failed: no room"):
        bench.run([sys.executable, script])


def test_the_memory_of_a_process_is_that_of_all_that_it_starts(tmp_path):
    script, fork = tmp_path / "s.py", "import os; pid = os.fork(); "
    grow = "import time; b = bytearray(100_000_000); time.sleep(0.4); print('end')"
    script.write_text(grow)
    text, seconds, gb = bench.run([sys.executable, script], tmp_path)
    assert text == "end\n" and 0.4 < seconds < 30 and 0.1 < gb < 0.15
    script.write_text(f"{fork}{grow}; pid and os.wait()")
    assert 0.2 < bench.run([sys.executable, script], tmp_path)[2] < 0.25


def test_ratios_are_those_of_the_rounds_that_both_have():
    """Both sides of a round were slow together: that is no spread of the ratio."""
    rounds = {
        "a": [{"ms": 6.0}, {"ms": 9.0}, None, {"ms": 50.0}],
        "b": [{"ms": 2.0}, None, {"ms": 1.0}, {"ms": 40.0}],
    }
    a, b = (bench.column(rounds, side, "ms") for side in "ab")
    assert bench.ratio(a, b) == "2.12x (1.25 to 3.00)" and bench.median(a) == "9.00"
    absent = bench.column(rounds, "absent", "ms")
    assert bench.ratio(a, absent) == bench.median(absent) == "-"
    assert (
        bench.ratio([15.0], [10.0]) == "1.50x"
        and bench.ratio([151.9, 3000], [10, 3]) == "508x (15.2 to 1000)"
    )


def test_one_call_is_timed_with_what_it_gives():
    ms, given = bench.timed(lambda: sum(range(100_000)))
    assert given == 4999950000 and 0.01 < ms < 1000


def test_a_page_names_its_source(tmp_path, capsys):
    made = {"command": "python x.py", "commit": "abc", "machine": "M", "date": "2026-01-02"}
    bench.publish(tmp_path / "new", "x", "Title", made, {"n": 1}, ["Words.", Table("T", ["a"], [["b"]])])
    page = (tmp_path / "new" / "x.md").read_text()
    assert page.startswith(
        "# Title\n\n`python x.py` at commit abc, M, 2026-01-02.\n\nWords.\n\n## T\n\n| a |"
    )
    assert (tmp_path / "new" / "x.json").read_text().index(
        '"date"'
    ) and "Words.\n\nT\n" in capsys.readouterr().out
