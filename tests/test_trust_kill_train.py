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
    argv = ["--kills=3", "--per_run=3", "--seed=11", "--recipes=kronecker", f"--data_dir={tiny_data}"]
    assert kill_train.main([*argv, f"--out={tmp_path / 'out'}", f"--report={report}"]) == 0
    assert "3 of 3 kills passed" in capsys.readouterr().out
    found = json.loads(report.with_suffix(".json").read_text())
    assert (found["summary"]["kills"], found["summary"]["passed"]) == (3, 3)
    assert found["summary"]["in_a_write"] >= 1
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
    record = {"trouble": None, "end": {"weights_equal": True, "losses": 0}}
    assert kill_train.passed(record, equal)
    assert not kill_train.passed(record, equal | {"checkpoint_equal": False})
    assert not kill_train.passed(record | {"end": {"weights_equal": False}}, equal)
    assert not kill_train.passed({"trouble": "a start hung"}, equal)


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


def test_runs_are_begun_until_there_are_enough_kills_or_trouble(tmp_path, monkeypatch):
    """Runs that bring fewer kills than planned are made up for; a run with trouble is the last one."""
    of_kill = {"in_write": True, "between_rename_and_pointer": False, "torn_row": False, "newest": None}

    def run(job):
        args, count, wanted, _ = job
        assert wanted <= 4
        trouble = "it hung" if count == args.trouble_at else None
        kills = [of_kill] * min(wanted, 2)
        return {
            "run": count,
            "recipe": "bpe_tied",
            "trouble": trouble,
            "missed": 0,
            "kills": kills,
            "end": {"losses": 0},
        }

    monkeypatch.setattr(kill_train, "killed_run", run)
    monkeypatch.setattr(kill_train, "make_twin", lambda job: {})
    monkeypatch.setattr(kill_train.twin, "side_by_side", lambda function, jobs, count: map(function, jobs))
    monkeypatch.setattr(kill_train.twin, "prepared", lambda data_dir: data_dir)
    argv = [f"--out={tmp_path}", "--kills=9", "--per_run=4", "--recipes=bpe_tied"]
    for jobs, trouble_at, numbers in (
        (1, None, [4, 5, 6, 7, 8]),
        (1, 6, [4, 5, 6]),
        (2, None, [4, 5, 6, 7, 8]),
        (2, 4, [4, 5]),
    ):
        args = kill_train.arguments([*argv, f"--jobs={jobs}"])
        args.trouble_at = trouble_at
        records = [run((args, 3, 0, {}))]
        kill_train.kill_runs(args, records)
        assert [r["run"] for r in records[1:]] == numbers
    assert json.loads((tmp_path / "records.json").read_text()) == records
