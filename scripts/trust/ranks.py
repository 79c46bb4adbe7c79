"""Any number of ranks gives the same training: splits, resumes, two nodes, a worker killed in the middle.

    python scripts/trust/ranks.py --report results/trust/ranks
    python scripts/trust/ranks.py --minutes 4            a slice; the same command goes on
    python scripts/trust/ranks.py --parts nodes          some of: splits, resumes, evaluation, nodes

Everything runs here on the CPU in fp32 over gloo, through torchrun as on a cluster; the two nodes are two
torchrun agents that meet on loopback through the c10d rendezvous. Losses are compared row by row with one
process that takes the whole global batch at once.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import psutil

from data.files import expanded
from engine import checkpoint
from engine.errors import RunError, sentences
from engine.metrics import is_finished, read_metrics
from scripts.analysis.report import Table
from scripts.arguments import some_of
from scripts.pool import last_words
from scripts.trust import twin

KEYS = twin.SMALL | {
    "n_embd": 64, "block_size": 64, "global_batch_size": 8, "max_iters": 40, "eval_interval": 10, "ckpt_interval": 10,
    "eval_tokens": 4096, "warmup_iters": 4, "pos_dim": 16, "keep": 1000,
}  # fmt: skip
LONGER = {"batch_size": 4, "max_iters": 200, "eval_interval": 50, "keep": 2}  # enough steps to kill in
SPLITS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1)]  # (ranks, batch_size)
RESUMES = [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]  # (ranks before, ranks after)
ARMS = ("bpe_tied", "kronecker")
PARTS = ("splits", "resumes", "evaluation", "nodes")
ALLOWED = 1e-5  # relative difference of a loss: sums in another order
PATIENCE = 600  # seconds after which anything here counts as hung


# ---- processes

# The agents look for each other's names otherwise, and a machine may not know its own. A store that torchrun shares
# with the workers is not announced to a node that comes later: without the last one, a lost node is never replaced.
VARIABLES = ("GLOO_SOCKET_IFNAME=lo", "PYTHONUNBUFFERED=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command of one node with so many ranks: its agent, which starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return ["env", *VARIABLES, *launcher, f"--nproc_per_node={ranks}", *options]


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
    below = psutil.Process(agent.pid).children(recursive=True)
    agent.kill()
    for worker in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    agent.wait()


def workers(agent: subprocess.Popen) -> dict[int, psutil.Process]:
    """{rank: process} of what an agent has started."""
    found = [(p.environ().get("RANK"), p) for p in psutil.Process(agent.pid).children()]
    return {int(rank): p for rank, p in found if rank is not None}


def await_sign(sign, agents: list[subprocess.Popen], what: str) -> None:
    """Wait until sign() is true; RunError if it is not before the agents end or patience does."""
    if not twin.comes(sign, agents, PATIENCE):
        raise RunError(f"{what} never came: see the train.log in its folder")


def await_step(out_dir: Path, step: int, agents: list[subprocess.Popen]) -> None:
    def there() -> bool:
        time.sleep(0.01)
        return any(r["iter"] >= step for r in read_metrics(out_dir) if "train/loss" in r)

    await_sign(there, agents, f"step {step} of {out_dir}")


# ---- splits over ranks and micro-steps, resumes on another number of ranks, evaluation of one checkpoint


def train(args, arm: str, name: str, ranks: int, batch_size: int, **changes) -> Path:
    """Train OUT/ARM/NAME to its end, from the checkpoint that it holds if any; the folder."""
    out_dir = args.out / arm / name
    head = [sys.executable] if ranks == 1 else torchrun(ranks, "--standalone")
    keys = args.keys | {"batch_size": batch_size} | changes
    finish([twin.launch([*head, *twin.train_command(arm, out_dir, keys)], out_dir)], out_dir)
    return out_dir


def whole(args, arm: str, ranks: int, batch_size: int = 0) -> Path:
    """A run that nothing interrupts, in the fewest micro-steps unless batch_size says otherwise; made once."""
    batch_size = batch_size or 8 // ranks
    name = f"whole_{ranks}_{batch_size}"
    if not is_finished(args.out / arm / name, KEYS["max_iters"]):
        shutil.rmtree(args.out / arm / name, ignore_errors=True)
        train(args, arm, name, ranks, batch_size)
    return args.out / arm / name


def cut(source: Path, target: Path, step: int) -> None:
    """A copy of a run as it was right after the checkpoint at `step`: what a kill of all ranks leaves."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for folder in checkpoint.steps(target):
        if folder > checkpoint.path_of(target, step):
            shutil.rmtree(folder)


def split(args, arm: str, ranks: int, batch_size: int) -> dict:
    return twin.furthest(whole(args, arm, ranks, batch_size), whole(args, arm, 1))


def resume(args, arm: str, before: int, after: int) -> dict:
    name = f"resume_{before}_{after}"
    cut(whole(args, arm, before), args.out / arm / name, 20)
    return twin.furthest(train(args, arm, name, after, 8 // after), whole(args, arm, 1))


def evaluate(args, arm: str, ranks: int) -> dict:
    losses = []
    for n in (1, ranks):
        cut(whole(args, arm, 1), args.out / arm / f"evaluate_{n}", 20)
        out_dir = train(args, arm, f"evaluate_{n}", n, 2, eval_only=True)
        losses.append(twin.losses(out_dir)[20, "val/loss"])
    return {"val": abs(losses[1] / losses[0] - 1)}


# ---- two ranks as two nodes; with a worker killed, with SIGTERM, with a node lost and replaced


def launch_nodes(args, arm: str, name: str, count: int, restarts: int) -> list[subprocess.Popen]:
    """The agents of so many nodes, of two ranks in all, that train into OUT/nodes/NAME; the first has the rendezvous."""
    meet = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=two --local-addr=127.0.0.1"
    out_dir = args.out / "nodes" / name
    shutil.rmtree(out_dir, ignore_errors=True)
    train = twin.train_command(arm, out_dir, args.keys | LONGER)
    agents = []
    for node in range(count):
        place = [*meet.split(), f"--rdzv-conf=is_host={int(node == 0)}"] if count == 2 else ["--standalone"]
        command = [*torchrun(2 // count, f"--max-restarts={restarts}", *place), *train]
        agents.append(twin.launch(command, out_dir))
    return agents


def node_job(args, arm: str, name: str, count: int, restarts: int, *blows) -> dict:
    """Figures of a job that suffers some blows, each a function and its arguments, against one that suffers none."""
    theirs, ours, seconds = args.out / "nodes" / "undisturbed", args.out / "nodes" / name, {}
    if not is_finished(theirs, LONGER["max_iters"]):
        finish(launch_nodes(args, arm, theirs.name, 1, 0), theirs)
    agents = launch_nodes(args, arm, name, count, restarts)
    for blow, *details in blows:
        await_step(ours, details[0], agents)
        seconds = blow(ours, agents, *details)
    finish(agents, ours)
    return twin.furthest(ours, theirs) | {"bit_identical": twin.losses(ours) == twin.losses(theirs)} | seconds


def kill_worker(out_dir: Path, agents: list[subprocess.Popen], step: int, rank: int) -> dict:
    """SIGKILL to the worker of a rank; what the job did then, in seconds."""
    there = {k: p for a in agents for k, p in workers(a).items()}
    killed = time.monotonic()
    there.pop(rank).kill()
    if psutil.wait_procs(there.values(), PATIENCE)[1]:
        raise RunError(f"{out_dir}: the other ranks never left")
    gone = time.monotonic() - killed
    # at its start the next one writes the rows up to its checkpoint anew
    await_sign(twin.renewed(out_dir / "metrics.jsonl"), agents, f"a resume of {out_dir}")
    await_step(out_dir, step, agents)
    return {"peers_gone_s": round(gone, 1), "back_at_that_step_s": round(time.monotonic() - killed, 1)}


def terminate(out_dir: Path, agents: list[subprocess.Popen], step: int) -> dict:
    """SIGTERM to all agents, and the same commands again; seconds until all were gone."""
    asked = time.monotonic()
    for a in agents:
        a.terminate()
    finish(agents, out_dir, None)
    gone = time.monotonic() - asked
    agents[:] = [twin.launch(a.args, out_dir) for a in agents]
    return {"all_gone_s": round(gone, 1)}


def lose_node(out_dir: Path, agents: list[subprocess.Popen], step: int) -> dict:
    """The machine of the node that does not hold the rendezvous goes away; another one takes its place."""
    stop(agents[1])
    agents[1] = twin.launch(agents[1].args, out_dir)
    return {}


def measures(args) -> dict:
    """{(part, arm, what it is): the function that measures it} of everything there is to do."""
    found = {}
    for arm in ARMS:
        for ranks, size in SPLITS:
            what = f"{ranks} rank{'s' * (ranks > 1)} x {8 // ranks // size} micro-steps of {size}"
            found["splits", arm, what] = partial(split, args, arm, ranks, size)
        for before, after in RESUMES:
            what = f"{before} rank(s) to step 20, then {after}"
            found["resumes", arm, what] = partial(resume, args, arm, before, after)
        for ranks in (2, 4):
            what = f"one checkpoint evaluated on {ranks} ranks"
            found["evaluation", arm, what] = partial(evaluate, args, arm, ranks)
    for what, *job in (
        ("two nodes of one rank, c10d on loopback", "two_nodes", 2, 0),
        ("two nodes, a worker killed by SIGKILL, --max-restarts=3", "killed", 2, 3, (kill_worker, 95, 1)),
        ("the same, killed twice", "killed_twice", 2, 3, (kill_worker, 45, 1), (kill_worker, 125, 0)),
        ("one node of two ranks, a worker killed", "one_node", 1, 1, (kill_worker, 95, 1)),
        ("two nodes, SIGTERM to both agents, the same command again", "terminated", 2, 0, (terminate, 95)),
        ("two nodes, one of them lost whole and replaced", "replaced", 2, 3, (lose_node, 95)),
    ):
        found["nodes", "kronecker", what] = partial(node_job, args, "kronecker", *job)
    return found


# ---- the report


def parts(rows: list[dict]) -> list:
    """The report's paragraphs and tables."""
    runs, nodes = [], []
    for row in rows:
        if row["kind"] == "nodes":
            same = "yes" if row["bit_identical"] else f"no, {twin.largest([row['train'], row['val']]):.1e}"
            seconds = (row.get(name) for name in ("peers_gone_s", "back_at_that_step_s", "all_gone_s"))
            nodes.append([row["what"], same, *("" if s is None else f"{s} s" for s in seconds)])
        else:
            figures = [f"{twin.largest([row[k]]):.1e}" if k in row else "" for k in ("train", "val", "norm")]
            runs.append([row["arm"], row["what"], *figures])
    header = ["arm", "run", "train loss", "val loss", "gradient norm"]
    return [
        f"fp32, CPU, gloo; {KEYS['max_iters']} steps of {KEYS['global_batch_size']} sequences of "
        f"{KEYS['block_size']} tokens. Largest relative differences over all logged rows to one process that takes the "
        "global batch at once.",
        Table("Splits, resumes, evaluation", header, runs, left=2),
        f"{LONGER['max_iters']} steps on two ranks, against an undisturbed torchrun of two ranks on one node. Seconds "
        "count from the signal; `back` is when the step that was interrupted is logged again.",
        Table("Nodes", ["job", "every loss bit-identical", "peers gone", "back", "all gone"], nodes, left=2),
    ]


def main(argv=None) -> int:
    parser = twin.parser(__doc__, "out/check_ranks")
    add = parser.add_argument
    add("--parts", type=some_of(PARTS), default=",".join(PARTS), help="with commas")
    add("--data_dir", type=expanded, default=twin.PYDOCS, help="prepared if empty")
    args = parser.parse_args(argv)
    with sentences():
        args.out = args.out.resolve()
        args.keys = KEYS | {"data_dir": twin.prepared(args.data_dir)}
        names, found = ("kind", "arm", "what"), measures(args)
        jobs = [dict(zip(names, key, strict=True)) for key in found if key[0] in args.parts]
        rows, todo = twin.kept(args, jobs)
        twin.go_on(args, rows, todo, lambda job: found[tuple(job.values())]())
        title = "Any number of ranks, the same training"
        twin.report(args, __file__, argv, rows, {"rows": rows}, title, parts(rows))
        worst = twin.largest(r[name] for r in rows for name in ("train", "val") if name in r)
        print(f"largest relative difference of a loss: {worst:.1e} (allowed: {ALLOWED:.0e})")
        return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
