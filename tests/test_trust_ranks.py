"""scripts/trust/ranks.py: its hands on processes, its cut runs and its tables; the runs themselves take an hour."""

import math
import os
import subprocess
import sys

import psutil
import pytest

from engine import checkpoint
from scripts.trust import ranks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are handled otherwise here")
WAITS = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def agent():
    """What torchrun's agent is to this module: a process with two children that know their ranks, each in a session of
    its own. (tests/test_pool.py has the real one.)"""
    code = f"""
import os, subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", {WAITS!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | {{"RANK": rank}}, start_new_session=True) for rank in "01"]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
sys.stdin.read()
"""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **streams)
    process.children = dict(enumerate(map(int, process.stdout.readline().split())))
    yield process
    if process.poll() is None:
        ranks.stop(process)


def test_workers_are_found_by_rank(agent):
    assert {rank: p.pid for rank, p in ranks.ranks_of(agent).items()} == agent.children


def test_an_agent_is_stopped_with_its_workers(agent):
    found = list(ranks.ranks_of(agent).values())
    found[0].kill()  # gone before: the others must go all the same
    ranks.stop(agent)
    assert agent.returncode == -9
    gone, alive = psutil.wait_procs(found, 5)
    assert len(gone) == 2 and not alive


def test_a_launch_that_fails_says_why(tmp_path):
    code = "print('error: no such thing'); raise SystemExit(3)"
    process = ranks.twin.launch([sys.executable, "-c", code], tmp_path / "run")
    with pytest.raises(ranks.RunError, match=r"ended with \[3\], not 0: no such thing"):
        ranks.finish([process], tmp_path / "run")
    ranks.finish([process], tmp_path / "run", 3)
    ranks.finish([process], tmp_path / "run", None)


def test_a_cut_run_ends_with_its_checkpoint(tmp_path):
    for step in (10, 20, 30):
        checkpoint.path_of(tmp_path / "run", step).mkdir(parents=True)
    ranks.cut(tmp_path / "run", tmp_path / "cut", 20)
    assert [f.name for f in checkpoint.steps(tmp_path / "cut")] == ["step_000010", "step_000020"]
    assert len(checkpoint.steps(tmp_path / "run")) == 3


@pytest.mark.parametrize(("val", "status"), [(2e-7, 0), (2e-5, 1), (math.nan, 1)])
def test_rows_are_reported_and_a_nan_fails(val, status, tmp_path, monkeypatch, capsys):
    """A NaN is no small difference."""
    monkeypatch.setattr(ranks, "comparisons", lambda keys, arm, work: [("2 ranks", {"val": 1e-7})])
    node = {"train": 0.0, "val": val, "norm": 0.0, "bit_identical": val < 1e-6, "peers_gone_s": 1.5}
    monkeypatch.setattr(ranks, "nodes", lambda keys, work: [("two nodes", node)])
    assert ranks.main([f"--report={tmp_path / 'r'}"]) == status
    text = (tmp_path / "r.md").read_text()
    assert "| bpe_tied | 2 ranks |  | 1.0e-07 |  |\n| kronecker | 2 ranks |  | 1.0e-07 |  |" in text
    assert f"| two nodes | {f'no, {val:.1e}' if status else 'yes'} | 1.5 s |  |  |" in text
    assert f"difference of a loss: {val:.1e}" in capsys.readouterr().out


def test_a_step_is_awaited_in_the_file_that_has_it(tmp_path):
    """Not in the one that a start before has written, nor for ever."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iter": 9, "train/loss": 2.0}\n')
    waits = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ranks.await_step(tmp_path, 9, [waits])
    waits.communicate()
    for step, since in ((10, 0), (9, path.stat().st_ino)):
        with pytest.raises(ranks.RunError, match="never came"):
            ranks.await_step(tmp_path, step, [waits], since)


def test_what_is_compared_with_one_process(tmp_path, monkeypatch):
    """8 splits, 6 resumes and 2 evaluations, with each run made once."""
    made = []

    def train(keys, arm, out_dir, count, size):
        made.append(out_dir)
        checkpoint.path_of(out_dir, 20).mkdir(parents=True, exist_ok=True)
        return out_dir

    monkeypatch.setattr(ranks, "train", train)
    monkeypatch.setattr(ranks.twin, "furthest", lambda ours, theirs: {"val": 0.0})
    monkeypatch.setattr(ranks.twin, "losses", lambda out_dir: {(20, "val/loss"): 2.0})
    found = dict(ranks.comparisons({}, "kronecker", tmp_path))
    assert len(found) == 8 + 6 + 2 and set(map(str, found.values())) == {"{'val': 0.0}"}
    assert len(made) == len(set(made)) == 3 + 6 + 6 + 3
