"""scripts/trust/kill_train.py in small: real processes, SIGKILL from outside, the same command again."""

import json
import os
import random

import pytest

from scripts.trust import kill_train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is not here")


def test_three_kills_leave_no_trace(tiny_data, tmp_path, capsys):
    """The 100 of results/trust/kill_train.md in small."""
    report = tmp_path / "report"
    argv = ["--kills=3", "--seed=11", "--recipes=kronecker", f"--data_dir={tiny_data}"]
    assert kill_train.main([*argv, f"--out={tmp_path / 'out'}", f"--report={report}"]) == 0
    assert "3 of 3 kills passed" in capsys.readouterr().out
    found = json.loads(report.with_suffix(".json").read_text())
    assert (found["kills"], found["passed"]) == (3, 3) and found["in_a_write"] >= 1
    assert found["commit"] == found["runs"][0]["commit"]
    assert "**3 of 3** kills" in report.with_suffix(".md").read_text()
    # the same command again has nothing left to do
    assert kill_train.main([*argv, f"--out={tmp_path / 'out'}"]) == 0


def test_instants_follow_the_times_that_were_measured():
    """On a machine ten times slower the same seed strikes ten times later, and never after the twin's end."""
    fast = {"awake": 3.0, "write": 0.01, "total": 8.0}
    slow = {k: 10 * v for k, v in fast.items()}
    aims = [
        [kill_train.draw_aim(rng, t) for _ in range(300)] for t in (fast, slow) for rng in [random.Random(1)]
    ]
    latest = {"write": 0.012, "file": 0.0, "running": 5.0, "any": 8.0}
    for one, two in zip(*aims, strict=True):
        assert two["delay"] == pytest.approx(10 * one["delay"])
        assert 0 <= one["delay"] <= latest[one["kind"]]
    assert {a["kind"] for a in aims[0]} == set(latest)


def test_a_write_is_seen_when_its_turn_and_its_file_have_come(tmp_path):
    now = kill_train.writing(tmp_path, {"nth": 2, "file": "state.json"})
    first, second = (tmp_path / "ckpt" / f".writing_step_{i:06d}" for i in (1, 2))
    assert not now()
    first.mkdir(parents=True)
    (first / "state.json").touch()
    assert not now()  # the first write
    first.rename(tmp_path / "ckpt" / "step_000001")
    second.mkdir()
    assert not now()  # the second, which has not come to the file
    (second / "state.json").touch()
    assert now()


def test_a_kill_passes_only_with_its_run():
    equal = {"rows_equal": True, "checkpoint_equal": True}
    kills = [equal, equal | {"checkpoint_equal": False}]
    records = [
        {"recipe": "r", "trouble": None, "kills": kills},
        {"recipe": "r", "trouble": "it hung", "kills": kills},
    ]
    assert [k["passed"] for k in kill_train.kills_of(records)] == [True, False, False, False]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--recipes=kroneker"], "there is no 'kroneker': choose from kronecker, bpe_tied"),
        (["--kills=0"], "--kills: '0' is no whole number from 1"),
        (["--minutes=nan"], "--minutes: 'nan' is no number"),
        (["--kils", "5"], "--kils 5 is unknown here"),
    ],
)
def test_bad_arguments(argv, words, tmp_path):
    with pytest.raises(SystemExit, match=words) as leaving:
        kill_train.main([*argv, f"--out={tmp_path / 'out'}"])
    assert str(leaving.value).startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_twin_that_does_not_train_is_one_sentence(tiny_data, tmp_path):
    argv = ["--recipes=bpe_tied", f"--data_dir={tiny_data}", f"--out={tmp_path}", "--n_layres=2"]
    with pytest.raises(SystemExit, match="error: the unkilled twin does not train: unknown key n_layres"):
        kill_train.main(argv)


class Start:
    """A start that ends as it is said: at once with a status, or by its kill."""

    def __init__(self, status):
        self.status = status

    def kill(self):
        self.status = -9

    def wait(self, patience=None):
        return self.status


@pytest.mark.parametrize(
    ("starts", "ends", "trouble", "kills", "missed"),
    [
        ("kkc", ["equal"], None, 2, 0),
        ("kckc", ["equal", "equal"], None, 2, 1),  # through before its second kill: run anew
        ("ckkc", ["equal", "equal"], None, 2, 1),
        ("kkc", ["other"], "not weights_equal", 2, 0),
        ("kc", ["other"], "not weights_equal", 1, 1),
        ("kf", [], "a start ended with status 3: it printed nothing", 1, 1),
    ],
)
def test_a_run_suffers_its_kills_and_is_held_against_its_twin(
    starts, ends, trouble, kills, missed, tmp_path, monkeypatch
):
    """k: a start that is killed, c: one that comes through, f: one that fails."""
    begun, ends = [], iter(ends)

    def begin(args, recipe, out_dir):
        begun.append(starts[len(begun)])
        out_dir.mkdir(exist_ok=True)
        return Start({"k": 0, "c": 0, "f": 3}[begun[-1]])

    monkeypatch.setattr(kill_train, "begin", begin)
    monkeypatch.setattr(kill_train, "await_aim", lambda *a: begun[-1] == "k")
    monkeypatch.setattr(kill_train.twin, "left", lambda *a: {"rows_equal": True})
    compare = lambda *a: {"weights_equal": next(ends) == "equal", "losses": 7}  # noqa: E731
    monkeypatch.setattr(kill_train.twin, "compare", compare)
    args = kill_train.arguments([f"--out={tmp_path}"])
    times = {"dir": tmp_path, "total": 1.0, "awake": 0.5, "write": 0.1}
    job = {"run": 4, "recipe": "bpe_tied", "wanted": 2}
    found = kill_train.killed_run(args, {"bpe_tied": times}, job)
    assert "".join(begun) == starts and next(ends, None) is None
    assert (found["trouble"], len(found["kills"]), found["missed"]) == (trouble, kills, missed)
    assert found["losses"] == 7 * starts.count("c") and (tmp_path / "run_004").exists() == bool(trouble)


def test_kills_are_shared_out_among_runs_and_recipes(tmp_path, monkeypatch):
    def run(args, twins, job):
        left = {"in_write": True, "between_rename_and_pointer": False, "torn_row": False, "newest": None}
        kill = left | {"aim": {"kind": "any"}, "files_there": []}
        return {"trouble": None, "missed": 0, "losses": 1, "kills": [kill] * job["wanted"]}

    monkeypatch.setattr(kill_train, "killed_run", run)
    monkeypatch.setattr(kill_train, "make_twin", lambda args, recipe: {})
    monkeypatch.setattr(kill_train, "SIDE_BY_SIDE", 1)
    monkeypatch.setattr(kill_train.twin, "prepared", lambda data_dir: data_dir)
    assert kill_train.main([f"--out={tmp_path}", "--kills=12", "--recipes=bpe_tied,kronecker"]) == 0
    records = json.loads((tmp_path / "records.json").read_text())
    assert [(r["recipe"], r["wanted"]) for r in records] == [
        ("bpe_tied", 5),
        ("kronecker", 5),
        ("bpe_tied", 2),
    ]
