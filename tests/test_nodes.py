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

from engine import checkpoint
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


def test_sigterm_may_come_twice(tiny_flags, tmp_path):
    """Under Slurm every process gets it, and torchrun hands on its own: the second must not spoil the saving."""
    keys = {"max_iters": 100_000, "eval_interval": 100_000, "init_from": "auto"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *tiny_flags(tmp_path / "run", **keys)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    while len(read_metrics(tmp_path / "run")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    for _ in range(50):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert checkpoint.newest(tmp_path / "run") is not None


def two_ranks(first: list[str], second: list[str]) -> list[subprocess.Popen]:
    """Ranks 0 and 1 without torchrun, each with arguments of its own."""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "train.py", *flags],
            cwd=ROOT,
            env=ENVIRONMENT | meet | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, flags in enumerate((first, second))
    ]


def test_a_rank_that_is_killed_makes_the_others_leave_with_a_sentence(tiny_flags, tmp_path):
    flags = tiny_flags(tmp_path / "run", max_iters=100_000, eval_interval=100_000, ckpt_interval=10)
    zero, one = two_ranks(flags, flags)
    while len(read_metrics(tmp_path / "run")) < 15:
        assert zero.poll() is None and one.poll() is None
        time.sleep(0.02)
    one.kill()
    killed = time.time()
    said = zero.communicate(timeout=60)[0]
    assert zero.returncode == 1
    assert time.time() - killed < 20
    assert said.strip().splitlines()[-1].startswith("error: another rank died"), said[-2000:]
    assert checkpoint.newest(tmp_path / "run") is not None


def test_ranks_with_different_data_are_refused(tiny_flags, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    shard = tmp_path / "data" / "tiny_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    both = two_ranks(tiny_flags(tmp_path / "run"), tiny_flags(tmp_path / "run", data_dir=tmp_path / "data"))
    said = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [1, 1]
    assert all("the ranks' data differ: give every node the same shards" in s for s in said), said
    assert not (tmp_path / "run").exists()


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
    waits = (
        'trap \'sleep 0.3; echo srun has saved >> "$RECORD"; exit "$SRUN_STATUS"\' TERM; '
        'echo srun waits >> "$RECORD"; while true; do sleep 0.05; done'
    )
    for name, body in {
        "srun": f'echo "srun $*" >> "$RECORD"; if [ "$ASKED" = 1 ]; then {waits}; fi; exit "$SRUN_STATUS"',
        "scontrol": 'echo "scontrol $*" >> "$RECORD"; if [ "$1" = show ]; then echo node7; echo node8; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    # torchrun ends with status 1 when it is asked to stop; 0 when the run was through all the same
    for status, asked, requeued in ((0, False, False), (1, False, False), (1, True, True), (0, True, False)):
        record = tmp_path / f"record_{status}_{asked}"
        environment = ENVIRONMENT | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record), "SRUN_STATUS": str(status),
            "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_RESTART_COUNT": "1", "ASKED": str(int(asked)),
        }  # fmt: skip
        process = subprocess.Popen(["bash", str(SCRIPT), "config/demo.py", "--seed=3"], env=environment)
        if asked:
            deadline = time.time() + 20
            while not record.exists() or "srun waits" not in record.read_text():
                assert time.time() < deadline and process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # once or twice, it is the same
        assert process.wait(20) == status
        text = record.read_text()
        assert "-m torch.distributed.run --nnodes=2 --nproc_per_node=8 " in text
        assert (
            "--rdzv-endpoint=node7:20042 --rdzv-id=42.1 train.py config/demo.py --seed=3 --init_from=auto"
            in text
        )
        assert ("srun has saved" in text) is asked
        assert ("scontrol requeue 42" in text) is requeued
