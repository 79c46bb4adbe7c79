"""Any number of ranks gives the same training: splits, resumes, two nodes, a worker killed in the middle.

    python scripts/trust/ranks.py --report results/trust/ranks

Everything runs here on the CPU in fp32 over gloo, through torchrun as on a cluster; the two nodes are two
torchrun agents that meet on loopback through the c10d rendezvous. Losses are compared row by row with one
process that takes the whole global batch at once.
"""

import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import psutil

from engine import checkpoint
from engine.errors import RunError, sentences
from engine.metrics import read_metrics
from scripts.analysis.report import Table
from scripts.arguments import flags
from scripts.experiment import arm_file
from scripts.made_up import write_data
from scripts.pool import last_words, ranks_of, stop_child
from scripts.provenance import ROOT
from scripts.trust import twin

KEYS = twin.SMALL | {
    "n_embd": 64, "block_size": 64, "global_batch_size": 8, "max_iters": 40, "eval_interval": 10, "ckpt_interval": 10,
    "eval_tokens": 4096, "warmup_iters": 4, "pos_dim": 16, "keep": 1000,
}  # fmt: skip
LONGER = {"batch_size": 4, "max_iters": 200, "eval_interval": 50, "keep": 2}  # enough steps to kill in
SPLITS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1)]  # (ranks, batch_size)
ARMS = ("bpe_tied", "kronecker")
ALLOWED = 1e-5  # relative difference of a loss: sums in another order
PATIENCE = 600  # seconds after which anything here counts as hung
# The agents look for each other's names otherwise, and a machine may not know its own. A store that torchrun shares
# with the workers is not announced to a node that comes later: without the last one, a lost node is never replaced.
VARIABLES = ("GLOO_SOCKET_IFNAME=lo", "PYTHONUNBUFFERED=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command of one node with so many ranks: its agent, which starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return ["env", *VARIABLES, *launcher, f"--nproc_per_node={ranks}", *options]


def train_command(arm: str, out_dir: Path, keys: dict) -> list[str]:
    """train.py's words; whatever starts Python goes before them."""
    return [str(ROOT / "train.py"), str(arm_file(arm)), *flags(keys | {"out_dir": out_dir})]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes: list[subprocess.Popen], out_dir: Path, expected: int | None = 0) -> None:
    """Wait until they have ended, with this status (None: any); else RunError with what the log says."""
    end, log = time.monotonic() + PATIENCE, out_dir / "train.log"
    try:
        statuses = {p.wait(max(0.1, end - time.monotonic())) for p in processes}
    except subprocess.TimeoutExpired:
        raise RunError(f"a launch hung for {PATIENCE} s: see {log}") from None
    if expected is not None and statuses != {expected}:
        found = f"{sorted(statuses)}, not {expected}"
        raise RunError(f"a launch ended with {found}: {last_words(log)} (see {log})")


def stop(agent: subprocess.Popen) -> None:
    """SIGKILL to an agent and then to its workers: it would start others."""
    stop_child(agent, signal.SIGKILL)
    agent.wait()


def await_step(out_dir: Path, step: int, agents: list[subprocess.Popen], since: int = 0) -> None:
    """Wait until metrics.jsonl, in a file of another number than `since`, has this step's row; RunError if it never has."""
    end, path = time.monotonic() + PATIENCE, out_dir / "metrics.jsonl"
    while not (path.exists() and path.stat().st_ino != since and logged(out_dir, step)):
        if time.monotonic() > end or any(a.poll() is not None for a in agents):
            raise RunError(f"step {step} of {out_dir} never came: see its train.log")
        time.sleep(0.01)


def logged(out_dir: Path, step: int) -> bool:
    return any(row["iter"] >= step for row in read_metrics(out_dir) if "train/loss" in row)


# ---- splits over ranks and micro-steps, resumes on another number of ranks, evaluation of one checkpoint


def train(keys: dict, arm: str, out_dir: Path, ranks: int, batch_size: int) -> Path:
    """Train to the end, from the checkpoint that the folder holds if any; the folder."""
    head = [sys.executable] if ranks == 1 else torchrun(ranks, "--standalone")
    command = [*head, *train_command(arm, out_dir, keys | {"batch_size": batch_size})]
    finish([twin.launch(command, out_dir)], out_dir)
    return out_dir


def cut(source: Path, target: Path, step: int) -> Path:
    """A copy of a run as it was right after the checkpoint at `step`: what a kill of all ranks leaves."""
    shutil.copytree(source, target)
    for folder in checkpoint.steps(target):
        if folder > checkpoint.path_of(target, step):
            shutil.rmtree(folder)
    return target


def comparisons(keys: dict, arm: str, work: Path):
    """(what it is, its figures) of all that is compared with one process."""
    whole = {n: train(keys, arm, work / f"{n}_ranks", n, 8 // n) for n in (1, 2, 4)}
    for n, size in SPLITS:
        out_dir = whole[n] if n * size == 8 else train(keys, arm, work / f"{n}_ranks_{size}", n, size)
        what = f"{n} rank{'s' * (n > 1)} x {8 // n // size} micro-steps of {size}"
        yield what, twin.furthest(out_dir, whole[1])
    for before, after in itertools.permutations(whole, 2):
        out_dir = cut(whole[before], work / f"{before}_then_{after}", 20)
        train(keys, arm, out_dir, after, 8 // after)
        yield f"{before} rank(s) to step 20, then {after}", twin.furthest(out_dir, whole[1])
    figure = {}
    for n in whole:
        out_dir = cut(whole[1], work / f"evaluated_on_{n}", 20)
        train(keys | {"eval_only": True}, arm, out_dir, n, 2)
        figure[n] = twin.losses(out_dir)[20, "val/loss"]
    for n in (2, 4):
        yield f"one checkpoint evaluated on {n} ranks", {"val": abs(figure[n] / figure[1] - 1)}


# ---- two ranks as two nodes; with a worker killed, with SIGTERM, with a node lost and replaced


def launch_nodes(keys: dict, out_dir: Path, count: int, restarts: int = 0) -> list[subprocess.Popen]:
    """The agents of so many nodes, of two ranks in all; the first has the rendezvous."""
    meet = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=two --local-addr=127.0.0.1"
    agents = []
    for node in range(count):
        place = [*meet.split(), f"--rdzv-conf=is_host={int(node == 0)}"] if count == 2 else ["--standalone"]
        head = torchrun(2 // count, f"--max-restarts={restarts}", *place)
        agents.append(twin.launch([*head, *train_command("kronecker", out_dir, keys)], out_dir))
    return agents


def kill_worker(out_dir: Path, agents: list[subprocess.Popen], step: int, rank: int) -> dict:
    """SIGKILL to the worker of a rank; what the job did then, in seconds."""
    there = {k: p for a in agents for k, p in ranks_of(a).items()}
    rows = (out_dir / "metrics.jsonl").stat().st_ino
    killed = time.monotonic()
    there.pop(rank).kill()
    if psutil.wait_procs(there.values(), PATIENCE)[1]:
        raise RunError(f"{out_dir}: the other ranks never left")
    gone = time.monotonic() - killed
    # at its start the next one writes the rows up to its checkpoint into a new file
    await_step(out_dir, step, agents, rows)
    return {"peers_gone_s": round(gone, 1), "back_at_that_step_s": round(time.monotonic() - killed, 1)}


def terminate(out_dir: Path, agents: list[subprocess.Popen], *_) -> dict:
    """SIGTERM to all agents, and the same commands again; seconds until all were gone."""
    asked = time.monotonic()
    for a in agents:
        a.terminate()
    finish(agents, out_dir, None)
    gone = time.monotonic() - asked
    agents[:] = [twin.launch(a.args, out_dir) for a in agents]
    return {"all_gone_s": round(gone, 1)}


def lose_node(out_dir: Path, agents: list[subprocess.Popen], *_) -> dict:
    """The machine of the node that does not hold the rendezvous goes away; another one takes its place."""
    stop(agents[1])
    agents[1] = twin.launch(agents[1].args, out_dir)
    return {}


def nodes(keys: dict, work: Path):
    """(what it is, its figures) of jobs of two ranks that suffer blows, each against one that suffers none."""
    keys, theirs = keys | LONGER, work / "undisturbed"
    finish(launch_nodes(keys, theirs, 1), theirs)
    for number, (what, count, restarts, blow, at) in enumerate((  # at: {step: rank that it hits}
        ("two nodes of one rank, c10d on loopback", 2, 0, None, {}),
        ("two nodes, a worker killed by SIGKILL, --max-restarts=3", 2, 3, kill_worker, {95: 1}),
        ("the same, killed twice", 2, 3, kill_worker, {45: 1, 125: 0}),
        ("one node of two ranks, a worker killed", 1, 1, kill_worker, {95: 1}),
        ("two nodes, SIGTERM to both agents, the same command again", 2, 0, terminate, {95: 1}),
        ("two nodes, one of them lost whole and replaced", 2, 3, lose_node, {95: 1}),
    )):  # fmt: skip
        ours, seconds = work / str(number), {}
        agents = launch_nodes(keys, ours, count, restarts)
        for step, rank in at.items():
            await_step(ours, step, agents)
            seconds = blow(ours, agents, step, rank)
        finish(agents, ours)
        same = twin.losses(ours) == twin.losses(theirs)
        yield what, twin.furthest(ours, theirs) | {"bit_identical": same} | seconds


def parts(rows: list[dict]) -> list:
    """The report's paragraphs and tables."""
    runs, jobs = [], []
    for row in rows:
        if "bit_identical" in row:
            same = "yes" if row["bit_identical"] else f"no, {twin.largest([row['train'], row['val']]):.1e}"
            seconds = (row.get(name) for name in ("peers_gone_s", "back_at_that_step_s", "all_gone_s"))
            jobs.append([row["what"], same, *("" if s is None else f"{s} s" for s in seconds)])
        else:
            figures = [f"{row[k]:.1e}" if k in row else "" for k in ("train", "val", "norm")]
            runs.append([row["arm"], row["what"], *figures])
    header = ["arm", "run", "train loss", "val loss", "gradient norm"]
    return [
        f"fp32, CPU, gloo; {KEYS['max_iters']} steps of {KEYS['global_batch_size']} sequences of "
        f"{KEYS['block_size']} tokens. Largest relative differences over all logged rows to one process that takes the "
        "global batch at once.",
        Table("Splits, resumes, evaluation", header, runs, left=2),
        f"{LONGER['max_iters']} steps on two ranks, against an undisturbed torchrun of two ranks on one node. Seconds "
        "count from the signal; `back` is when the step that was interrupted is logged again.",
        Table("Nodes", ["job", "every loss bit-identical", "peers gone", "back", "all gone"], jobs, left=1),
    ]


def main(argv=None) -> int:
    args = twin.parser(__doc__).parse_args(argv)
    with sentences():
        work, rows = Path(tempfile.mkdtemp(prefix="ranks_")), []
        keys = KEYS | {"data_dir": work / "data"}
        write_data(work / "data", twin.VOCABULARY)
        jobs = [("kronecker", nodes(keys, work / "nodes"))]
        jobs += [(arm, comparisons(keys, arm, work / arm)) for arm in ARMS]
        for arm, found in jobs:
            for what, figures in found:
                rows.append({"arm": arm, "what": what} | figures)
                print(json.dumps(rows[-1]), flush=True)
        title = "Any number of ranks, the same training"
        twin.report(args, __file__, argv, title, {"rows": rows}, parts(rows))
        worst = twin.largest(row[name] for row in rows for name in ("train", "val") if name in row)
        print(f"largest relative difference of a loss: {worst:.1e} (allowed: {ALLOWED:.0e})")
        if not worst <= ALLOWED:
            print(f"the runs stay in {work}")
            return 1
        shutil.rmtree(work)
        return 0


if __name__ == "__main__":
    sys.exit(main())
