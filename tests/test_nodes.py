"""Several nodes on loopback, a worker that dies, and the Slurm script."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, losses

from engine.metrics import read_metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*more) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *more, "train.py"]


def close(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], rel=1e-5) for k in one)


def test_two_nodes_on_loopback_give_the_run_of_one_process(tiny_flags, train_tiny, tmp_path):
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    command = torchrun("--nnodes=2", "--nproc_per_node=1", *rendezvous)
    both = [
        subprocess.Popen(
            [*command, *tiny_flags(tmp_path / "two")],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    said = [p.communicate(timeout=120)[0].decode() for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert close(losses(read_metrics(tmp_path / "two")), losses(train_tiny(tmp_path / "one")))


def workers_of(out_dir) -> list[int]:
    """Process ids of the train.py workers of a run (Linux)."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if f"--out_dir={out_dir}" in words and "torch.distributed.run" not in words:
                found.append(int(entry))
    return sorted(found)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the workers through /proc, which is not here")
def test_a_worker_killed_in_the_middle_comes_back_with_nothing_lost(tiny_flags, train_tiny, tmp_path):
    keys = {"max_iters": 300, "eval_interval": 100, "ckpt_interval": 10}
    flags = tiny_flags(tmp_path / "cut", init_from="auto", **keys)
    command = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2")
    process = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 90
    while len(read_metrics(tmp_path / "cut")) < 40:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(workers_of(tmp_path / "cut")[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said[-3000:]
    assert "resuming    at step" in said
    whole = losses(train_tiny(tmp_path / "whole", **keys))
    assert close(losses(read_metrics(tmp_path / "cut")), whole)


def test_the_slurm_script_is_sound_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    # without a recipe it says so before it touches Slurm
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: name a recipe")


def test_the_slurm_script_passes_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=os.path.dirname(sys.executable)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_starts_torchrun_and_requeues_a_stopped_run(tmp_path):
    """Stand-ins for srun and scontrol on the PATH record what the script asks of Slurm."""
    for name, body in {
        "srun": 'echo "srun $*" >> "$RECORD"; exit "$SRUN_STATUS"',
        "scontrol": 'echo "scontrol $*" >> "$RECORD"; if [ "$1" = show ]; then echo node7; echo node8; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for status, requeued in ((0, False), (1, False), (143, True)):
        record = tmp_path / f"record_{status}"
        environment = ENVIRONMENT | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "SRUN_STATUS": str(status),
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(tmp_path),
        }  # fmt: skip
        done = subprocess.run(["bash", str(SCRIPT), "config/demo.py", "--seed=3"], env=environment)
        assert done.returncode == status
        text = record.read_text()
        assert (
            "--rdzv-endpoint=node7:29500 --rdzv-id=42 train.py config/demo.py --seed=3 --init_from=auto"
            in text
        )
        assert "--nnodes=2 --nproc_per_node=8" in text
        assert ("scontrol requeue 42" in text) is requeued
