"""Any number of ranks gives the same training: splits, resumes, two nodes, a worker killed in the middle.

    python scripts/trust/ranks.py --report results/trust/ranks
    python scripts/trust/ranks.py --parts nodes        some of: splits, resumes, evaluation, nodes

Everything runs here on the CPU in fp32 over gloo, through torchrun as on a cluster; the two nodes are two
torchrun agents that meet on loopback through the c10d rendezvous. Losses are compared row by row with one
process that takes the whole global batch at once.
"""

import atexit
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import psutil

from data.files import expanded, write_json
from engine import checkpoint
from engine.errors import RunError, sentences
from engine.metrics import read_metrics
from scripts.analysis.report import Table
from scripts.arguments import Parser, some_of
from scripts.pool import last_words
from scripts.provenance import ROOT, commit, today
from scripts.trust import twin

ARMS = sorted(path.stem for path in (ROOT / "config" / "arms").glob("*.py"))
KEYS = twin.SMALL | {
    "n_embd": 64, "block_size": 64, "global_batch_size": 8, "max_iters": 40, "eval_interval": 10, "ckpt_interval": 10,
    "eval_tokens": 4096, "warmup_iters": 4, "pos_dim": 16, "keep": 1000,
}  # fmt: skip
LONGER = {"batch_size": 4, "max_iters": 200, "eval_interval": 50, "keep": 2}  # enough steps to kill in
SPLITS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1)]  # (ranks, batch_size); first (1, 8)
RESUMES = [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]  # (ranks before, ranks after)
LARGEST = {1: 8, 2: 4, 4: 2}  # batch_size of one micro-step
PARTS = ("splits", "resumes", "evaluation", "nodes")
ALLOWED = 1e-5  # relative difference of a loss: sums in another order
PATIENCE = 600  # seconds after which anything here counts as hung


# ---- launching

LAUNCHED: list[subprocess.Popen] = []


def agent(ranks: int, *options: str) -> list[str]:
    """torchrun's command for one node with so many ranks."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *options]


def two_nodes(*options: str) -> list[str]:
    """The same for one of two nodes that meet on a free port of loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=two --local-addr=127.0.0.1"
    return agent(1, *meet.split(), *options)


# The agents look for each other's names otherwise, and a machine may not know its own. A store that torchrun shares
# with the workers is not announced to a node that comes later: without the last one, a lost node is never replaced.
VARIABLES = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def launch(command: list[str], log: Path) -> subprocess.Popen:
    LAUNCHED.append(twin.launch(command, log, **VARIABLES))
    return LAUNCHED[-1]


def finish(processes: list[subprocess.Popen], log: Path, expected: int | None = 0) -> None:
    """Wait until they have ended, with this status (None: any); else RunError with what the log says."""
    end = time.monotonic() + PATIENCE
    try:
        statuses = {p.wait(max(0.1, end - time.monotonic())) for p in processes}
    except subprocess.TimeoutExpired:
        raise RunError(f"a launch hung for {PATIENCE} s: see {log}") from None
    if expected is not None and statuses != {expected}:
        raise RunError(
            f"a launch ended with {sorted(statuses)}, not {expected}: {last_words(log)} (see {log})"
        )


def stop(process: subprocess.Popen) -> None:
    """SIGKILL to an agent and then to its workers: it would start others."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for worker in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    process.wait()


def clear() -> None:
    """End whatever is still running of what was launched."""
    for process in LAUNCHED:
        if process.poll() is None:
            stop(process)


def workers(agent: subprocess.Popen) -> dict[int, psutil.Process]:
    """{rank: process} of what a torchrun agent has started."""
    found = [(p.environ().get("RANK"), p) for p in psutil.Process(agent.pid).children()]
    return {int(rank): p for rank, p in found if rank is not None}


def listens(pid: int, port: int) -> bool:
    """Whether a process listens at this TCP port: of the agents, the one with the rendezvous store does."""
    there = psutil.Process(pid).net_connections("tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in there)


def await_sign(sign, agents: list[subprocess.Popen], what: str) -> None:
    """Wait until sign() is true; RunError if it is not before the agents end or patience does."""
    end = time.monotonic() + PATIENCE
    while not sign():
        if time.monotonic() > end or any(a.poll() is not None for a in agents):
            raise RunError(f"{what} never came: see the log beside its folder")
        time.sleep(0.01)


def await_step(out_dir: Path, step: int, agents: list[subprocess.Popen]) -> None:
    def there() -> bool:
        return any(r["iter"] >= step for r in read_metrics(out_dir) if "train/loss" in r)

    await_sign(there, agents, f"step {step} of {out_dir}")


# ---- the parts


def cut(source: Path, target: Path, step: int) -> None:
    """A copy of a run as it was right after the checkpoint at `step`: what a kill of all ranks leaves."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for folder in checkpoint.steps(target):
        if folder > checkpoint.path_of(target, step):
            shutil.rmtree(folder)


def matrix(args, arm: str) -> list[dict]:
    """Splits over ranks and micro-steps, resumes on another number of ranks, evaluation of one checkpoint."""
    folder, rows = args.out / arm, []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def go(name: str, ranks: int, batch_size: int, **changes) -> Path:
        out_dir, log = folder / name, folder / f"{name}.log"
        head = [sys.executable] if ranks == 1 else agent(ranks, "--standalone")
        keys = args.keys | {"batch_size": batch_size} | changes
        finish([launch([*head, *twin.train_command(arm, out_dir, keys)], log)], log)
        return out_dir

    def add(kind: str, what: str, figures: dict) -> None:
        rows.append({"kind": kind, "arm": arm, "what": what} | figures)
        print(f"{arm:<10} {what:<46} " + "  ".join(f"{k} {v:.1e}" for k, v in figures.items()), flush=True)

    whole = {1: go("whole_1", 1, 8)}
    for ranks, batch_size in SPLITS if "splits" in args.parts else [(2, 4), (4, 2)]:
        out_dir = go(f"whole_{ranks}_{batch_size}", ranks, batch_size)
        if batch_size == LARGEST[ranks]:
            whole[ranks] = out_dir
        what = f"{ranks} rank{'s' * (ranks > 1)} x {8 // ranks // batch_size} micro-steps of {batch_size}"
        add("splits", what, twin.furthest(out_dir, whole[1]))
    for before, after in RESUMES if "resumes" in args.parts else []:
        name = f"resume_{before}_{after}"
        cut(whole[before], folder / name, 20)
        out_dir = go(name, after, LARGEST[after])
        add("resumes", f"{before} rank(s) to step 20, then {after}", twin.furthest(out_dir, whole[1]))
    if "evaluation" in args.parts:
        losses = {}
        for ranks in (1, 2, 4):
            cut(whole[1], folder / f"evaluate_{ranks}", 20)
            out_dir = go(f"evaluate_{ranks}", ranks, 2, eval_only=True)
            losses[ranks] = twin.losses(out_dir)[20, "val/loss"]
        for ranks in (2, 4):
            difference = abs(losses[ranks] / losses[1] - 1)
            add("evaluation", f"one checkpoint evaluated on {ranks} ranks", {"val": difference})
    return [row for row in rows if row["kind"] in args.parts]


def nodes(args) -> list[dict]:
    """Two ranks as two nodes; then with one worker killed, with SIGTERM, and with a node lost and replaced."""
    rows, folder = [], args.out / "nodes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def begin(name: str, count: int, *options: str) -> list[subprocess.Popen]:
        """The agents of so many nodes, of two ranks in all, that train into FOLDER/NAME."""
        head = two_nodes(*options) if count == 2 else agent(2, "--standalone", *options)
        command = [*head, *twin.train_command("kronecker", folder / name, args.keys | LONGER)]
        return [launch(command, folder / f"{name}.log") for _ in range(count)]

    def end(agents: list[subprocess.Popen], name: str, what: str = "", **seconds: float) -> None:
        finish(agents, folder / f"{name}.log")
        if what:
            ours, theirs = folder / name, folder / "undisturbed"
            row = {"kind": "nodes", "arm": "kronecker", "what": what} | twin.furthest(ours, theirs)
            row |= {"bit_identical": twin.losses(ours) == twin.losses(theirs)} | seconds
            rows.append(row)
            print(json.dumps(row), flush=True)

    end(begin("undisturbed", 1), "undisturbed")
    end(begin("two_nodes", 2), "two_nodes", "two nodes of one rank, c10d on loopback")
    for name, count, restarts, kills, what in (
        ("killed", 2, 3, [(95, 1)], "two nodes, a worker killed by SIGKILL, --max-restarts=3"),
        ("killed_twice", 2, 3, [(45, 1), (125, 0)], "the same, killed twice"),
        ("one_node", 1, 1, [(95, 1)], "one node of two ranks, a worker killed"),
    ):
        agents = begin(name, count, f"--max-restarts={restarts}")
        for step, rank in kills:
            seconds = kill_a_worker(folder / name, agents, step, rank)
        end(agents, name, what, **seconds)

    agents = begin("terminated", 2)
    await_step(folder / "terminated", 95, agents)
    asked = time.monotonic()
    for a in agents:
        a.send_signal(signal.SIGTERM)
    finish(agents, folder / "terminated.log", None)
    gone = round(time.monotonic() - asked, 1)
    what = "two nodes, SIGTERM to both agents, the same command again"
    end(begin("terminated", 2), "terminated", what, all_gone_s=gone)

    agents = begin("replaced", 2, "--max-restarts=3")
    await_step(folder / "replaced", 95, agents)
    # the agent that was first holds the rendezvous; the other one's machine goes away (rank 0's agent listens, too)
    endpoint = next(word for word in agents[0].args if word.startswith("--rdzv-endpoint="))
    lost = 1 if listens(agents[0].pid, int(endpoint.rpartition(":")[2])) else 0
    stop(agents[lost])
    agents[lost] = launch(agents[lost].args, folder / "replaced.log")
    end(agents, "replaced", "two nodes, one of them lost whole and replaced")
    return rows


def kill_a_worker(out_dir: Path, agents: list[subprocess.Popen], step: int, rank: int) -> dict:
    """SIGKILL to the worker of a rank after `step` is logged; what the job did then, in seconds."""
    await_step(out_dir, step, agents)
    there = {k: p for a in agents for k, p in workers(a).items()}
    resumed = twin.renewed(out_dir / "metrics.jsonl")  # without the rows after its checkpoint
    resumed()
    killed = time.monotonic()
    there.pop(rank).kill()
    if psutil.wait_procs(there.values(), PATIENCE)[1]:
        raise RunError(f"{out_dir}: the other ranks never left")
    seconds = {"peers_gone_s": round(time.monotonic() - killed, 1)}
    await_sign(resumed, agents, f"a resume of {out_dir}")
    await_step(out_dir, step, agents)
    return seconds | {"back_at_that_step_s": round(time.monotonic() - killed, 1)}


# ---- the report


def tables(rows: list[dict]) -> list:
    """The report's paragraphs and tables."""

    def figures(row: dict, *names: str) -> list[str]:
        return ["" if k not in row else f"{twin.largest([row[k]]):.1e}" for k in names]

    def seconds(row: dict, *names: str) -> list[str]:
        return [f"{row[k]} s" if k in row else "" for k in names]

    def same(row: dict) -> str:
        return "yes" if row["bit_identical"] else f"no, {twin.largest([row['train'], row['val']]):.1e}"

    jobs = [
        [r["what"], same(r), *seconds(r, "peers_gone_s", "back_at_that_step_s", "all_gone_s")]
        for r in rows
        if r["kind"] == "nodes"
    ]
    return [
        f"fp32, CPU, gloo; {KEYS['max_iters']} steps of {KEYS['global_batch_size']} sequences of "
        f"{KEYS['block_size']} tokens. Largest relative differences over all logged rows to one process that takes the "
        "global batch at once.",
        Table(
            "Splits, resumes, evaluation",
            ["arm", "run", "train loss", "val loss", "gradient norm"],
            [
                [r["arm"], r["what"], *figures(r, "train", "val", "norm")]
                for r in rows
                if r["kind"] != "nodes"
            ],
            left=2,
        ),
        f"{LONGER['max_iters']} steps on two ranks, against an undisturbed torchrun of two ranks on one node. Seconds "
        "count from the signal; `back` is when the step that was interrupted is logged again.",
        Table("Nodes", ["job", "every loss bit-identical", "peers gone", "back", "all gone"], jobs, left=2),
    ]


def main(argv=None) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--parts", type=some_of(PARTS), default=",".join(PARTS), help="with commas")
    add("--arms", type=some_of(ARMS), default="bpe_tied,kronecker", help="with commas")
    add("--data_dir", type=expanded, default=ROOT / "data" / "pydocs", help="prepared if empty")
    add("--out", type=expanded, default=Path("out/check_ranks"), help="folder of the runs")
    add("--report", type=expanded, help="write REPORT.json and REPORT.md")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    atexit.register(clear)
    with sentences():
        args.keys = KEYS | {"data_dir": twin.prepared(args.data_dir)}
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        now = {"commit": commit(), "date": today()}
        # each part's rows are kept, so that the parts can be run one by one and reported together
        rows = twin.kept(args.out / "rows.json")
        for arm in [*(args.arms if set(args.parts) - {"nodes"} else []), *({"nodes"} & set(args.parts))]:
            new = [r | now for r in (nodes(args) if arm == "nodes" else matrix(args, arm))]
            made = {(n["kind"], n["arm"]) for n in new}
            rows = [r for r in rows if (r["kind"], r["arm"]) not in made] + new
            write_json(args.out / "rows.json", rows)
        if args.report:
            title = "Any number of ranks, the same training"
            twin.report(args.report, twin.made_by(__file__, argv, rows), {"rows": rows}, title, *tables(rows))
        worst = twin.largest(r[name] for r in rows for name in ("train", "val") if name in r)
        print(f"largest relative difference of a loss: {worst:.1e} (allowed: {ALLOWED:.0e})")
        return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
