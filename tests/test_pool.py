"""scripts/pool.py: jobs side by side, watched, and how each of them ends."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

from scripts import pool

# A training in miniature: a row a step, goes on from the last one, saves when it is asked to stop. What else it
# does is said by its arguments.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path

out_dir, n, *how = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
tries = out_dir / "tries"
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
first_try = tries.read_text() == "x"
(out_dir / "given.json").write_text(json.dumps({
    k: os.environ.get(k) for k in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
} | {"nice": os.nice(0)}))
asked = []
signal.signal(signal.SIGTERM, lambda *a: asked.append(1))
path = out_dir / "metrics.jsonl"
step = len(path.read_text().splitlines()) if path.exists() else 0
file = open(path, "a", buffering=1)
while step < n:
    if asked:
        (out_dir / "saved").write_text(str(step))
        sys.exit(143)
    if step == 3 and "fails" in how or step == 3 and "fails_once" in how and first_try:
        sys.exit("error: no luck today")
    if step == 3 and "diverges" in how:
        (out_dir / "run.json").write_text(json.dumps({"diverged": 3}))
        sys.exit("error: loss or gradient was not finite")
    if step == 3 and "is_killed" in how and first_try:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3 and "hangs" in how and first_try:
        time.sleep(600)
    file.write(json.dumps({"iter": step, "train/loss": None if "null" in how else 5.0, "tok_per_sec": 10.0}) + "\\n")
    step += 1
    time.sleep(0.05 if "slow" in how else 0.001)
file.write(json.dumps({"iter": n, "val/loss": None if "null" in how else 4.5}) + "\\n")
"""


@pytest.fixture
def job(tmp_path):
    """job("name", "how", ...) is a job of a child that behaves so."""
    (tmp_path / "child.py").write_text(CHILD)

    def make(name: str, *how: str, n: int = 6) -> pool.Job:
        out_dir = tmp_path / name
        command = (sys.executable, str(tmp_path / "child.py"), str(out_dir), str(n), *how)
        return pool.Job(name, command, out_dir, n)

    return make


def given(job: pool.Job) -> dict:
    return json.loads((job.out_dir / "given.json").read_text())


def tries(job: pool.Job) -> int:
    return len((job.out_dir / "tries").read_text())


def wait_for(path: Path, text: str = "", seconds: float = 20) -> None:
    deadline = time.time() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.time() < deadline, f"{path} has not come"
        time.sleep(0.02)


def test_each_job_gets_devices_of_its_own_and_none_starts_without(job, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    jobs = [job(name, "slow") for name in "abcde"]
    slots = [("0", "1"), ("MIG-7f1a", "GPU-11")]
    assert pool.run(jobs, pool.Local(slots, threads=3, nice=7)) == 0
    seen = [given(j)["CUDA_VISIBLE_DEVICES"] for j in jobs]
    assert sorted(set(seen)) == ["0,1", "MIG-7f1a,GPU-11"]
    assert {given(j)["OMP_NUM_THREADS"] for j in jobs} == {"3"}
    # torchrun leaves its ranks time to save, and the pool more than that to torchrun
    assert {int(given(j)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) for j in jobs} == {pool.GRACE // 2}
    assert {given(j)["nice"] for j in jobs} == {os.nice(0) + 7}
    # never two at a time on the same devices: by the times of their first and last words
    span = {j: [(j.out_dir / f).stat().st_mtime for f in ("given.json", "metrics.jsonl")] for j in jobs}
    for one, two in itertools.combinations(jobs, 2):
        if given(one) == given(two):
            assert span[one][1] <= span[two][0] or span[two][1] <= span[one][0]
    assert "run 5 of 5 e: val loss 4.5000" in capsys.readouterr().out
    # what is finished is left alone
    assert pool.run(jobs, pool.Local(slots)) == 0
    assert [tries(j) for j in jobs] == [1] * 5
    # a number of threads that the user has set stands
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert pool.run([job("f")], pool.Local(slots, threads=3)) == 0
    assert given(job("f"))["OMP_NUM_THREADS"] == "2"


def test_lost_hung_failed_and_diverged_are_kept_apart_and_the_others_go_on(job, capsys, monkeypatch):
    monkeypatch.setattr(pool, "GRACE", 1)  # the hung one does not even hear SIGTERM
    jobs = [job("fine"), job("killed", "is_killed"), job("stuck", "hangs"), job("flaky", "fails_once"),
            job("broken", "fails"), job("nan", "diverges"), job("null", "null"), job("last")]  # fmt: skip
    assert pool.run(jobs, pool.Local([()] * 4), retries=2, patience=1.5) == 1
    out, err = capsys.readouterr()
    assert "killed: lost (ended by SIGKILL at step 2); started again" in out
    assert "stuck: hung (no new step after 2); started again" in out
    assert "flaky: failed (no luck today); started again" in out
    assert "last: val loss 4.5" in out
    assert {j.name: tries(j) for j in jobs} == {
        "fine": 1, "killed": 2, "stuck": 2, "flaky": 2, "broken": 3, "nan": 1, "null": 1, "last": 1}  # fmt: skip
    errors = err.strip().splitlines()
    assert len(errors) == 3
    assert errors[0].startswith("error: broken failed: no luck today (all of it: ")
    assert errors[1].startswith("error: nan diverged at step 2 (all of it: ")
    assert "the loss was not finite" in errors[1]
    assert errors[2].startswith("error: null diverged at step 6")
    # on a second call only the broken one is tried again
    assert pool.run(jobs, pool.Local([()]), retries=0) == 1
    assert tries(jobs[4]) == 4 and tries(jobs[5]) == 1
    assert pool.run([j for j in jobs if j.name != "broken"], pool.Local([()])) == pool.DIVERGED


def test_when_the_time_is_up_every_job_saves(job, capsys):
    jobs = [job(name, "slow", n=100_000) for name in "ab"]
    assert pool.run(jobs, pool.Local([()]), minutes=1.5 / 60) == pool.TIME_IS_UP
    assert (jobs[0].out_dir / "saved").exists()
    assert not jobs[1].out_dir.exists()  # nothing begins any more
    assert "the same command goes on from there" in capsys.readouterr().out


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from data.console import sentences
from scripts import pool
jobs = [pool.Job(n, [sys.executable, {child!r}, str(Path({out!r}) / n), "100000", "slow"], Path({out!r}) / n, 100000)
        for n in ("a", "b")]
with sentences():
    sys.exit(pool.run(jobs, pool.Local([(), ()])))
"""


def test_sigkill_reaches_the_ranks_that_torchrun_has_started(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(600)"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    job = pool.Job("x", (*command, str(tmp_path / "rank.py"), str(tmp_path / "pid")), tmp_path / "run", 1)
    engine = pool.Local([()])
    child = engine.start(job)
    deadline = time.time() + 60
    while not (pid := (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.time() < deadline and child.poll() is None
        time.sleep(0.1)
    engine.stop(child, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    gone = psutil.wait_procs([p for p in psutil.process_iter() if p.pid == int(pid)], timeout=10)
    assert not gone[1] and engine.poll(child) == -signal.SIGKILL and engine.has_room()


def test_sigkill_leaves_a_tracker_to_its_work(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(p.pid) + ' ')\ntime.sleep(600)"
    )
    engine = pool.Local([()])
    child = engine.start(
        pool.Job("x", (sys.executable, "-c", code, str(tmp_path / "pid")), tmp_path / "run", 1)
    )
    wait_for(tmp_path / "pid", " ")
    engine.stop(child, signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    tracker = psutil.Process(int((tmp_path / "pid").read_text()))
    assert tracker.is_running() and tracker.status() != psutil.STATUS_ZOMBIE
    tracker.kill()


@pytest.fixture
def parent(tmp_path, job):
    """A pool of two long jobs in a process of its own, and their folders."""
    job("unused")
    code = PARENT.format(root=str(ROOT), child=str(tmp_path / "child.py"), out=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    folders = [tmp_path / n for n in ("a", "b")]
    for folder in folders:
        wait_for(folder / "metrics.jsonl", '"iter": 2', seconds=180)
    yield process, folders
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent has died")
def test_children_of_a_killed_parent_save_and_end(parent):
    process, folders = parent
    process.kill()
    for folder in folders:
        wait_for(folder / "saved")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_hang_up_stops_the_jobs_in_order(parent, number):
    process, folders = parent
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "the same command goes on from there" in out and not err
    assert all((folder / "saved").exists() for folder in folders)


def test_a_reader_that_goes_away_costs_the_printing_only(parent):
    process, folders = parent
    process.stdout.close()
    process.send_signal(signal.SIGTERM)  # it says that it stops, to nobody
    assert process.wait(30) == 128 + signal.SIGTERM
    assert process.stderr.read() == ""
    assert all((folder / "saved").exists() for folder in folders)


def test_a_folder_that_cannot_be_made_is_one_sentence(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    bad = pool.Job("bad", ["true"], tmp_path / "file" / "run", 6)
    assert pool.run([bad, job("good")], pool.Local([()])) == 1
    out, err = capsys.readouterr()
    assert "good: val loss" in out
    why = "a part of this path is a file, not a folder: choose another path"
    assert err == f"error: bad failed: {bad.out_dir}: {why}\n"


def test_a_full_disk_costs_the_runs_on_it_alone(job, small_disk, capsys):
    disk = small_disk("64k")
    with pytest.raises(OSError), open(disk / "full", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    on_it = pool.Job("on it", job("x").command, disk / "run", 6)
    assert pool.run([on_it, job("elsewhere")], pool.Local([()])) == 1
    out, err = capsys.readouterr()
    assert "elsewhere: val loss" in out
    assert err.startswith(f"error: on it failed: {disk / 'run'}: the disk is full: free some space")
    assert err.count("\n") == 1
