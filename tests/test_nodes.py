"""Several nodes on loopback, a worker that dies, and the Slurm script."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest
from conftest import ROOT, free_port, losses, torchrun, two_ranks

from engine import checkpoint
from engine.metrics import read_metrics

SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
MATCHED = ROOT / "scripts" / "slurm" / "matched.sbatch"


def start(command: list[str]) -> subprocess.Popen:
    """What it prints comes with communicate()."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def close(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], rel=1e-5) for k in one)


def test_two_nodes_on_loopback_give_the_run_of_one_process(tiny_flags, train_tiny, tmp_path):
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    options = ["--nnodes=2", "--nproc_per_node=1", *rendezvous]
    both = [start(torchrun(*options, "train.py", *tiny_flags(tmp_path / "two"))) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
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
    process = start(torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2", "train.py", *flags))
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


@pytest.mark.parametrize("arm", [{}, {"wte": "kronecker", "tie_weights": False}], ids=["table", "kronecker"])
def test_four_ranks_resume_bit_for_bit(arm, tiny_flags, tmp_path):
    """Sums over more than two ranks hang on their order, which DDP changes after its first backward pass."""
    keys = arm | {
        "ckpt_interval": 6,
        "global_batch_size": 8,
        "batch_size": 1,
        "n_embd": 64,
        "init_from": "auto",
    }
    four = torchrun("--standalone", "--nproc_per_node=4", "train.py", *tiny_flags(tmp_path / "run", **keys))
    rows = []
    for _ in range(2):
        done = subprocess.run(four, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        rows.append(losses(read_metrics(tmp_path / "run")))
        shutil.rmtree(tmp_path / "run" / "ckpt" / "step_000012")  # as if it had been killed before
        checkpoint.point(tmp_path / "run", "latest", "step_000006")
    assert rows[0] == rows[1] and (11, "train/loss") in rows[0]


def test_sigterm_may_come_twice(tiny_flags, tmp_path):
    """Under Slurm every process gets it, and torchrun hands on its own: the second must not spoil the saving."""
    keys = {"max_iters": 100_000, "eval_interval": 100_000, "init_from": "auto"}
    process = start([sys.executable, "train.py", *tiny_flags(tmp_path / "run", **keys)])
    while len(read_metrics(tmp_path / "run")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    for _ in range(50):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert checkpoint.newest(tmp_path / "run") is not None


def test_a_rank_that_is_killed_makes_the_others_leave_with_a_sentence(tiny_flags, tmp_path):
    flags = tiny_flags(tmp_path / "run", max_iters=100_000, eval_interval=100_000, ckpt_interval=10)
    zero, one = two_ranks(flags, flags)
    while len(read_metrics(tmp_path / "run")) < 15:
        assert zero.poll() is None and one.poll() is None
        time.sleep(0.02)
    one.kill()
    killed = time.time()
    said = zero.communicate(timeout=60)[1]
    assert zero.returncode == 1
    assert time.time() - killed < 20
    assert said.strip().splitlines()[-1].startswith("error: another rank died"), said[-2000:]
    assert checkpoint.newest(tmp_path / "run") is not None


def test_ranks_with_different_data_are_refused(tiny_flags, tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "data")
    shard = tmp_path / "data" / "tiny_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x00")
    both = two_ranks(tiny_flags(tmp_path / "run"), tiny_flags(tmp_path / "run", data_dir=tmp_path / "data"))
    said = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [1, 1]
    assert all("but rank 0 has" in s for s in said), said
    assert not (tmp_path / "run").exists()


def test_the_slurm_script_is_sound_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    subprocess.run(["bash", "-n", str(MATCHED)], check=True)
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
    done = subprocess.run([shellcheck, str(SCRIPT), str(MATCHED)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_slurm_script_starts_torchrun_and_requeues_a_stopped_run(tmp_path):
    """Stand-ins for srun, scontrol and scancel on the PATH record what the script asks of Slurm.

    They behave as Slurm 22.05 was seen to: there SIGTERM makes srun kill its tasks at once.
    """
    waits = (
        'trap \'echo srun has killed its tasks >> "$RECORD"; exit 143\' TERM; echo srun waits >> "$RECORD"; '
        'until [ -e "$RECORD.term" ]; do sleep 0.05; done; sleep 0.3; echo all have saved >> "$RECORD"'
    )
    for name, body in {
        "srun": f'echo "srun $*" >> "$RECORD"; if [ "$ASKED" = 1 ]; then {waits}; fi; exit "$SRUN_STATUS"',
        "scontrol": 'echo "scontrol $*" >> "$RECORD"; if [ "$1" = show ]; then echo node7; echo node8; fi',
        # Slurm's own sends the signal to the job's steps, not to srun and not to the script
        "scancel": 'echo "scancel $*" >> "$RECORD"; [ "$*" = "--signal=TERM 42" ] && touch "$RECORD.term"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    # torchrun ends with status 1 when it is asked to stop; 0 when the run was through all the same
    for status, asked, requeued in ((0, False, False), (1, False, False), (1, True, True), (0, True, False)):
        record = tmp_path / f"record_{status}_{asked}"
        environment = os.environ | {
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
        assert ("all have saved" in text) is asked and "killed" not in text
        assert ("scontrol requeue 42" in text) is requeued


# Stand-ins that speak as Slurm 22.05 does. sbatch keeps what it is given in a queue of scripts; python answers for
# matched.py (its real answers: test_matched.py) and compare.py; srun trains a run by crossing it off.
STAND_INS = {
    "sbatch": """
        id=$(($(ls "$QUEUE" | wc -l) + 43)); script=() array= depends=
        for word in "$@"; do
          case $word in
            --array=*) array=${word#--array=0-} ;;
            --dependency=*) depends=${word#--dependency=} ;;
            --*) ;;
            *) script+=("$word") ;;
          esac
        done
        echo "sbatch $*" >> "$RECORD"
        { echo "${array:-none} ${depends:-none}"; printf 'export KNG_RUNS=%q KNG_RUNS_BEFORE=%q\\n' "${KNG_RUNS:-}" "${KNG_RUNS_BEFORE:-}"
          printf '%q ' bash "${script[@]}"; } > "$QUEUE/$id"
        echo "$id;cluster" """,
    "squeue": 'echo "2-00:00:00"',
    "scontrol": 'echo "scontrol $*" >> "$RECORD"; [ "$1" = show ] && echo node7',
    "srun": """
        run=$(printf '%s\\n' "$@" | sed -n 's/--out_dir=//p')
        echo "trains $run on $* " >> "$RECORD"
        grep -v -- "--out_dir=$run " "$LEFT" > "$LEFT.new"; [ "$run" = out/broken ] || mv "$LEFT.new" "$LEFT" """,
    "python": """
        case "$*" in
          *--print=runs) cat "$LEFT" ;;
          *--print=compare) echo out/here ;;
          *) echo "python $*" >> "$RECORD" ;;
        esac""",
}


@pytest.fixture
def slurm(tmp_path):
    """slurm.submit(*args) runs the script as the first job, slurm.step() the next of the queue; slurm.record is what was asked."""
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/bash\n" + textwrap.dedent(body) + "\n")
        path.chmod(0o755)
    (tmp_path / "queue").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node7", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "42",
        "SLURM_JOB_PARTITION": "gpu", "SLURM_GPUS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1",
        **{name.upper(): str(tmp_path / name) for name in ("record", "queue", "left")},
    }  # fmt: skip

    def bash(*command, **more):
        return subprocess.run(
            ["bash", *command],
            env=environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def submit(*args):
        return bash(str(MATCHED), *args)

    def step(number: int):
        """Run the job of this number: every task of an array, or the one script. What the last one said."""
        head, exports, command = (tmp_path / "queue" / str(number)).read_text().split("\n")
        array = head.split()[0]
        for task in range(int(array) + 1) if array != "none" else [None]:
            more = {} if task is None else {"SLURM_ARRAY_TASK_ID": str(task)}
            done = bash("-c", f"{exports}\n{command}", **more)
        return done

    return types.SimpleNamespace(submit=submit, step=step, record=tmp_path / "record", left=tmp_path / "left")


def test_matched_runs_are_one_array_job_and_then_compared(slurm):
    runs = [
        f"config/demo.py --out_dir={out} --init_from=auto" for out in ("out/a", "'out/b c'", "out/broken")
    ]
    slurm.left.write_text("\n".join(runs) + "\n")
    first = slurm.submit("config/demo.py", "--seeds=1")
    assert first.returncode == 0, first.stderr
    assert "3 run(s) queued as job 43" in first.stdout
    asked = slurm.record.read_text()
    assert "--array=0-2 " in asked and "--partition=gpu" in asked and "--time=2-00:00:00" in asked
    assert "--dependency=afterany:43 " in asked and asked.rstrip().endswith("config/demo.py --seeds=1")
    slurm.left.write_text(slurm.left.read_text().replace("'", ""))  # as the stand-in crosses them off
    assert slurm.step(43).returncode == 0
    trained = [line for line in slurm.record.read_text().splitlines() if line.startswith("trains")]
    assert [line.split(" on ")[0] for line in trained] == [
        "trains out/a",
        "trains out/b c",
        "trains out/broken",
    ]
    assert "--nproc_per_node=1 " in trained[0] and "train.py config/demo.py --out_dir=out/a" in trained[0]
    # the job behind them sees one that has not ended, and tries it once more, but not for ever
    second = slurm.step(44)
    assert "1 run(s) queued as job 45" in second.stdout, second.stderr
    slurm.step(45)
    third = slurm.step(46)
    assert third.returncode == 1
    assert "error: not one of these runs has ended" in third.stderr and "out/broken" in third.stderr
    slurm.left.write_text("")
    assert "all runs have ended" in slurm.submit("config/demo.py").stdout
    assert slurm.record.read_text().splitlines()[-1] == "python scripts/compare.py out/here"


def test_matched_on_slurm_says_what_is_missing(slurm, tmp_path):
    nothing = slurm.submit()
    assert nothing.returncode == 1 and nothing.stderr.startswith("error: name a recipe or an experiment")
    (tmp_path / "bin" / "sbatch").unlink()
    path = {"PATH": f"{tmp_path / 'bin'}:/none", "PYTHON": "python"}
    bash = shutil.which("bash")
    done = subprocess.run([bash, str(MATCHED), "x.py"], env=path, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "error: there is no sbatch here" in done.stderr
