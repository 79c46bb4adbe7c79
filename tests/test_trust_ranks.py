"""scripts/trust/ranks.py: its hands on processes, its cut runs and its tables; the runs themselves take an hour."""

import functools
import json
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
    """What torchrun's agent is to this module: a process with two children that know their ranks."""
    code = f"""
import os, subprocess, sys
children = [subprocess.Popen([sys.executable, "-c", {WAITS!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env=os.environ | {{"RANK": rank}}) for rank in "01"]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.children = dict(enumerate(map(int, process.stdout.readline().split())))
    yield process
    if process.poll() is None:
        ranks.stop(process)


def test_workers_are_found_by_rank(agent):
    assert {rank: p.pid for rank, p in ranks.workers(agent).items()} == agent.children


def test_an_agent_is_stopped_with_its_workers(agent):
    found = list(ranks.workers(agent).values())
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


def test_kept_rows_are_reported_and_a_nan_fails(tmp_path, tiny_data, monkeypatch, capsys):
    """What an earlier start measured is not measured again, and null, a NaN in a file, is no small difference."""
    measured = []

    def measure(number):
        measured.append(number)
        return {"val": number * 1e-7}

    found = {("evaluation", "bpe_tied", f"{n} ranks"): functools.partial(measure, n) for n in (2, 4)}
    found["splits", "bpe_tied", "of no chosen part"] = functools.partial(measure, 8)
    found["nodes", "kronecker", "two nodes"] = functools.partial(measure, 9)
    monkeypatch.setattr(ranks, "measures", lambda args: found)
    node = {"kind": "nodes", "arm": "kronecker", "what": "two nodes", "train": 0.0, "val": 0.0, "norm": 0.0}
    argv = [f"--data_dir={tiny_data}", f"--out={tmp_path}", f"--report={tmp_path / 'r'}"]
    argv.append("--parts=evaluation,nodes")
    for val, status in ((0.0, 0), (None, 1)):
        known = {"kind": "evaluation", "arm": "bpe_tied", "what": "2 ranks", "val": 2e-7}
        made = {"commit": "abc", "date": "2026-01-02"}
        kept = [node | made | {"bit_identical": val == 0, "val": val, "peers_gone_s": 1.5}, known | made]
        (tmp_path / "records.json").write_text(json.dumps(kept))
        assert ranks.main(argv) == status and measured == [4]
        assert ranks.main(argv) == status and measured == [4]
        measured.clear()
        text = (tmp_path / "r.md").read_text()
        assert "| bpe_tied | 2 ranks |  | 2.0e-07 |  |\n| bpe_tied | 4 ranks |  | 4.0e-07 |  |" in text
        assert f"| two nodes | {'yes' if val == 0 else 'no, nan'} | 1.5 s |  |  |" in text
        worst = math.nan if val is None else 4e-7
        assert f"difference of a loss: {worst:.1e}" in capsys.readouterr().out


def test_every_job_has_a_name_of_its_own_and_is_counted():
    """8 splits, 6 resumes and 2 evaluations of each of two arms, and 6 jobs on nodes."""
    assert len(ranks.measures(None)) == 2 * (8 + 6 + 2) + 6


def test_bad_arguments():
    with pytest.raises(SystemExit, match="error: argument --parts: there is no 'node': choose from splits"):
        ranks.main(["--parts=splits,node"])
