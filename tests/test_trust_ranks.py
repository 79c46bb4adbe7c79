"""scripts/trust/ranks.py: its hands on processes, its cut runs and its tables; the runs themselves take an hour."""

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


@pytest.mark.parametrize("listening", [True, False])
def test_who_listens_where(listening):
    code = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); "
    code += "s.listen(); " * listening + "print(s.getsockname()[1], flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        port = int(process.stdout.readline())
        assert ranks.listens(process.pid, port) == listening
        assert not ranks.listens(process.pid, port - 1)
    finally:
        process.kill()
        process.wait()


def test_a_launch_that_fails_says_why(tmp_path):
    log = tmp_path / "log"
    process = ranks.launch([sys.executable, "-c", "print('error: no such thing'); raise SystemExit(3)"], log)
    with pytest.raises(ranks.RunError, match=r"ended with \[3\], not 0: no such thing"):
        ranks.finish([process], log)
    ranks.finish([process], log, 3)
    ranks.finish([process], log, None)


def test_a_cut_run_ends_with_its_checkpoint(tmp_path):
    for step in (10, 20, 30):
        checkpoint.path_of(tmp_path / "run", step).mkdir(parents=True)
    ranks.cut(tmp_path / "run", tmp_path / "cut", 20)
    assert [f.name for f in checkpoint.steps(tmp_path / "cut")] == ["step_000010", "step_000020"]
    assert len(checkpoint.steps(tmp_path / "run")) == 3


def test_kept_rows_are_reported_and_a_nan_fails(tmp_path, tiny_data, monkeypatch, capsys):
    """Rows of earlier starts count, and null, which a NaN is in a file, is no small difference."""
    new = [{"kind": "evaluation", "arm": "bpe_tied", "what": "4 ranks", "val": 1e-7}]
    monkeypatch.setattr(ranks, "matrix", lambda args, arm: new)
    node = {"kind": "nodes", "arm": "kronecker", "what": "two nodes", "train": 0.0, "val": 0.0, "norm": 0.0}
    argv = ["--parts=evaluation", "--arms=bpe_tied", f"--data_dir={tiny_data}", f"--out={tmp_path}"]
    for val, status in ((0.0, 0), (None, 1)):
        kept = [node | {"bit_identical": val == 0, "val": val, "peers_gone_s": 1.5}, new[0] | {"val": 1.0}]
        (tmp_path / "rows.json").write_text(json.dumps(kept))
        assert ranks.main([*argv, f"--report={tmp_path / 'r'}"]) == status
        text = (tmp_path / "r.md").read_text()
        assert "| bpe_tied | 4 ranks |  | 1.0e-07 |  |" in text
        assert f"| two nodes | {'yes' if val == 0 else 'no, nan'} | 1.5 s |  |  |" in text
        worst = math.nan if val is None else 1e-7
        assert f"difference of a loss: {worst:.1e}" in capsys.readouterr().out


def test_bad_arguments():
    with pytest.raises(SystemExit, match="error: argument --parts: there is no 'node': choose from splits"):
        ranks.main(["--parts=splits,node"])
    with pytest.raises(SystemExit, match="error: argument --arms: there is no 'bpe'"):
        ranks.main(["--arms=bpe"])
