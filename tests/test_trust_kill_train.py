"""scripts/trust/kill_train.py in small: real kills, the same start again; results/trust/ has more of them."""

import json
import os
import random
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from scripts.trust import kill_train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are not here")


def killed(report, *argv) -> tuple[dict, str]:
    """What a command has written, as its own process: it forks, which this one, where torch has run, should not."""
    command = [sys.executable, "scripts/trust/kill_train.py", *argv, f"--report={report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.with_suffix(".json").read_text()), report.with_suffix(".md").read_text()


def test_kills_at_random_instants_leave_no_trace(tmp_path):
    found, page = killed(tmp_path / "report", "--kills=7", "--seed=11")
    assert [(r["arm"], len(r["kills"]), r["trouble"]) for r in found["runs"]] == [
        ("kronecker", 5, ""),
        ("bpe_tied", 2, ""),
    ]
    # whether a kill fell into a write is chance; that half of them are aimed at one is tested below
    assert all(kill["in_write"] or not kill["files"] for run in found["runs"] for kill in run["kills"])
    assert "**7 of 7** kills" in page and found["command"].startswith("python scripts/trust/kill_train.py")


def test_a_kill_at_any_line_leaves_no_trace(tmp_path):
    found, page = killed(tmp_path / "report", "--lines=199")
    records = found["runs"]
    assert len(records) > 10 and not any(r["trouble"] for r in records)
    assert {r["line"].split(":")[0] for r in records} >= {"train.py", "engine/checkpoint.py"}
    assert {r["scene"] for r in records} == {"fresh", "resumed"}
    assert f"**{len(records)} of {len(records)}**" in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kills=0"], "--kills: '0' is no whole number from 1"),
        (["--kils", "5"], "--kils 5 is unknown here"),
    ],
)
def test_bad_arguments(argv, words):
    with pytest.raises(SystemExit, match=words) as leaving:
        kill_train.main(argv)
    assert str(leaving.value).startswith("error: ")


class Start:
    """A start that comes to the end that is said at once: its kill, or a status of its own."""

    def __init__(self, status):
        self.exitcode = status

    def join(self, seconds=None):
        pass

    def kill(self):
        pass

    def is_alive(self):
        return False


@pytest.mark.parametrize(
    ("starts", "differs", "trouble", "kills", "missed"),
    [
        ("kkc", [], "", 2, 0),
        ("kckkc", [], "", 3, 1),  # through before its second kill: run anew
        ("kkc", ["rows"], "not the twin's: rows", 2, 0),
        ("kc", ["rows"], "not the twin's: rows", 1, 1),  # what came through early counts, too
        ("kf", [], "a start failed: it printed nothing", 1, 0),
        ("kkf", [], "a start ended with status 3: it printed nothing", 2, 0),
    ],
)
def test_a_run_suffers_its_kills_and_is_held_against_its_twin(
    starts, differs, trouble, kills, missed, tmp_path, monkeypatch
):
    """k: a start that is killed, c: one that comes through, f: one that fails."""
    left = list(starts)

    def begin(arm, keys, out_dir):
        out_dir.mkdir(exist_ok=True)
        return Start({"k": -9, "c": 0, "f": 3}[left.pop(0)])

    monkeypatch.setattr(kill_train, "begin", begin)
    monkeypatch.setattr(kill_train.twin, "differences", lambda *a: differs)
    wanted = max(kills, 2)
    found = kill_train.killed_run(
        "bpe_tied", kill_train.KEYS, tmp_path / "run", None, 0.0, wanted, random.Random(0)
    )
    assert left == [] and (found["trouble"], len(found["kills"])) == (trouble, kills)
    assert found["missed"] == missed


def test_half_of_the_kills_wait_for_a_write(tmp_path):
    """Those come with the write's folder, the others with the time."""

    def write_later(folder):
        time.sleep(0.3)
        folder.mkdir(parents=True)
        time.sleep(60)

    waited = set()
    for seed in range(8):
        folder = tmp_path / str(seed) / "ckpt" / ".writing_step_000001"
        process = kill_train.FORK.Process(target=write_later, args=(folder,))
        process.start()
        assert kill_train.strike(process, tmp_path / str(seed), random.Random(seed), 0.001, 30)
        waited.add(folder.is_dir())
    assert waited == {True, False}
