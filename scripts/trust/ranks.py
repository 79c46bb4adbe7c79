"""Any number of ranks gives the same training: splits, resumes, two nodes, a worker killed in the middle.

    python scripts/trust/ranks.py --report results/trust/ranks
    python scripts/trust/ranks.py --parts nodes        some of: splits, resumes, evaluation, nodes

Everything runs here on the CPU in fp32 over gloo, through torchrun as on a cluster; the two nodes are two
torchrun agents that meet on loopback through the c10d rendezvous. Losses are compared row by row with one
process that takes the whole global batch at once.
"""

import argparse
import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

import numpy as np
import torch

from engine import checkpoint, runs
from engine.metrics import read_metrics

KEYS = {
    "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "global_batch_size": 8, "max_iters": 40,
    "eval_interval": 10, "ckpt_interval": 10, "eval_tokens": 4096, "log_interval": 1, "warmup_iters": 4,
    "learning_rate": 3e-3, "dtype": "float32", "device": "cpu", "pos_dim": 16, "keep": 1000, "init_from": "auto",
}  # fmt: skip
SPLITS = [(1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1), (4, 2), (4, 1)]  # (ranks, batch_size); first (1, 8)
RESUMES = [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]  # (ranks before, ranks after)
LARGEST = {1: 8, 2: 4, 4: 2}  # batch_size of one micro-step
PARTS = ("splits", "resumes", "evaluation", "nodes")
PATIENCE = 240  # seconds that any launch may take


# ---- launching

LAUNCHED: list[subprocess.Popen] = []


def train_command(arm: str, out_dir, keys: dict) -> list[str]:
    flags = [f"--{k}={v}" for k, v in (keys | {"out_dir": out_dir}).items()]
    return [str(ROOT / "train.py"), str(ROOT / "config" / "arms" / f"{arm}.py"), *flags]


def environment() -> dict:
    # the agents look for each other's names otherwise, and a machine may not know its own
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}


def agent(ranks: int, *options: str) -> list[str]:
    """torchrun's command for one node with so many ranks."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *options]


def two_nodes(port: int, *options: str) -> list[str]:
    """The same for one of two nodes that meet on loopback."""
    meet = [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=two",
        "--local-addr=127.0.0.1",
    ]
    return agent(1, *meet, *options)


def launch(command: list[str], log: Path) -> subprocess.Popen:
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=environment(), start_new_session=True)  # fmt: skip
    LAUNCHED.append(process)
    return process


def run(command: list[str], log: Path) -> None:
    process = launch(command, log)
    if wait([process]) != [0]:
        sys.exit(f"error: {' '.join(command)} failed: see {log}")


def clear() -> None:
    """End whatever is still running of what was launched."""
    for process in LAUNCHED:
        if process.poll() is None:
            stop_all(process)


def wait(processes: list[subprocess.Popen], seconds: float = PATIENCE) -> list[int]:
    """Exit statuses; whoever is still there after so many seconds is killed with all of its children."""
    end = time.monotonic() + seconds
    try:
        return [p.wait(max(0.1, end - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        clear()
        raise


def stop_all(process: subprocess.Popen) -> None:
    for pid in [process.pid, *workers(process.pid).values()]:  # the agent first: it would start others
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def workers(agent_pid: int) -> dict[int, int]:
    """{rank: pid} of the training processes that a torchrun agent has started (Linux: from /proc)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == agent_pid:
                variables = dict(
                    v.split("=", 1) for v in (stat.parent / "environ").read_text().split("\0") if "=" in v
                )
                found[int(variables["RANK"])] = int(stat.parent.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def steps_logged(out_dir) -> int:
    return max((r["iter"] for r in read_metrics(out_dir) if "train/loss" in r), default=-1)


def await_step(out_dir, step: int, processes=(), seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while steps_logged(out_dir) < step:
        if time.monotonic() > end or any(p.poll() is not None for p in processes):
            raise RuntimeError(f"{out_dir} never came to step {step}")
        time.sleep(0.01)


# ---- comparing


def losses(out_dir) -> dict:
    """{(iter, name): value} of all losses and gradient norms that were logged."""
    names = ("train/loss", "val/loss", "val/bpb", "grad_norm")
    rows = read_metrics(out_dir)
    return {(r["iter"], k): np.nan if r[k] is None else r[k] for r in rows for k in names if k in r}


def difference(one: dict, two: dict, name: str) -> float:
    """Largest relative difference of the rows of that name; the rows must be the same ones."""
    if one.keys() != two.keys():
        raise RuntimeError(f"these rows are in one run only: {sorted(one.keys() ^ two.keys())[:4]}")
    return largest(abs(one[k] - two[k]) / abs(one[k]) for k in one if k[1] == name)


def largest(values) -> float:
    """The largest of some numbers, NaN if one is: `max` would pass over it."""
    return float(np.max([*values]))


def compare(out_dir, reference) -> dict:
    ours, theirs = losses(out_dir), losses(reference)
    names = {"train/loss": "train", "val/loss": "val", "grad_norm": "norm"}
    return {short: difference(theirs, ours, name) for name, short in names.items()}


def cut(source: Path, target: Path, step: int) -> None:
    """A copy of a run as it was right after the checkpoint at `step`: what a kill of all ranks leaves."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    for folder in checkpoint.steps(target):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


# ---- the parts


def matrix(args, arm: str) -> list[dict]:
    """Splits over ranks and micro-steps, resumes on another number of ranks, evaluation of one checkpoint."""
    folder, rows = args.out / arm, []
    folder.mkdir(parents=True, exist_ok=True)

    def go(name: str, ranks: int, batch_size: int, **changes) -> Path:
        out_dir = folder / name
        command = train_command(arm, out_dir, args.keys | {"batch_size": batch_size} | changes)
        head = [sys.executable] if ranks == 1 else agent(ranks, "--standalone")
        run([*head, *command], folder / f"{name}.log")
        return out_dir

    def add(kind: str, what: str, figures: dict) -> None:
        rows.append({"kind": kind, "arm": arm, "what": what} | figures)
        print(f"{arm:<10} {what:<46} " + "  ".join(f"{k} {v:.1e}" for k, v in figures.items()), flush=True)

    whole = {1: go("whole_1", 1, 8)}
    splits = SPLITS if "splits" in args.parts else [(2, 4), (4, 2)]
    for ranks, batch_size in splits:
        out_dir = go(f"whole_{ranks}_{batch_size}", ranks, batch_size)
        if batch_size == LARGEST[ranks]:
            whole[ranks] = out_dir
        micro = 8 // ranks // batch_size
        add(
            "splits",
            f"{ranks} rank{'s' * (ranks > 1)} x {micro} micro-steps of {batch_size}",
            compare(out_dir, whole[1]),
        )
    if "resumes" in args.parts:
        for before, after in RESUMES:
            name = f"resume_{before}_{after}"
            cut(whole[before], folder / name, 20)
            go(name, after, LARGEST[after])
            add("resumes", f"{before} rank(s) to step 20, then {after}", compare(folder / name, whole[1]))
    if "evaluation" in args.parts:
        figures = {}
        for ranks in (1, 2, 4):
            name = f"evaluate_{ranks}"
            cut(whole[1], folder / name, 20)
            go(name, ranks, 2, eval_only=True)
            figures[ranks] = [r["val/loss"] for r in read_metrics(folder / name) if "val/loss" in r][-1]
        for ranks in (2, 4):
            add(
                "evaluation",
                f"one checkpoint evaluated on {ranks} ranks",
                {"val": abs(figures[ranks] / figures[1] - 1)},
            )
    return rows


def nodes(args) -> list[dict]:
    """Two ranks as two nodes; then with one worker killed, with SIGTERM, and with a node lost and replaced."""
    arm, rows = "kronecker", []
    folder = args.out / "nodes"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    keys = args.keys | {
        "batch_size": 4,
        "max_iters": 200,
        "eval_interval": 50,
        "ckpt_interval": 10,
        "keep": 2,
    }

    def add(what: str, out_dir: Path, **seconds) -> None:
        figures = compare(out_dir, folder / "undisturbed")
        row = {"kind": "nodes", "arm": arm, "what": what} | figures
        row |= {"bit_identical": losses(out_dir) == losses(folder / "undisturbed")} | seconds
        rows.append(row)
        print(
            f"{what}: {json.dumps({k: v for k, v in row.items() if k not in ('kind', 'arm', 'what')})}",
            flush=True,
        )

    run(
        [*agent(2, "--standalone"), *train_command(arm, folder / "undisturbed", keys)],
        folder / "undisturbed.log",
    )

    def begin(name: str, *options: str) -> tuple[Path, list[subprocess.Popen], list[list[str]]]:
        port = free_port()
        commands = [[*two_nodes(port, *options), *train_command(arm, folder / name, keys)] for _ in range(2)]
        agents = [launch(c, folder / f"{name}_{i}.log") for i, c in enumerate(commands)]
        return folder / name, agents, commands

    out_dir, agents, _ = begin("two_nodes")
    check(wait(agents), [0, 0], out_dir)
    add("two nodes of one rank, c10d on loopback", out_dir)

    out_dir, agents, _ = begin("killed", "--max-restarts=3")
    add(
        "two nodes, a worker killed by SIGKILL, --max-restarts=3",
        out_dir,
        **kill_a_worker(out_dir, agents, 95),
    )
    out_dir, agents, _ = begin("killed_twice", "--max-restarts=3")
    kill_a_worker(out_dir, agents, 45, finish=False)
    add("the same, killed twice", out_dir, **kill_a_worker(out_dir, agents, 125, wanted=0))

    out_dir = folder / "one_node"
    agents = [
        launch(
            [*agent(2, "--standalone", "--max-restarts=1"), *train_command(arm, out_dir, keys)],
            folder / "one_node.log",
        )
    ]
    add("one node of two ranks, a worker killed", out_dir, **kill_a_worker(out_dir, agents, 95))

    out_dir, agents, commands = begin("terminated")
    await_step(out_dir, 95, agents)
    asked = time.monotonic()
    for a in agents:
        a.send_signal(signal.SIGTERM)
    wait(agents)
    left = time.monotonic() - asked
    port = free_port()
    again = [[*two_nodes(port), *start_anew(c)] for c in commands]
    check(wait([launch(c, folder / f"again_{i}.log") for i, c in enumerate(again)]), [0, 0], out_dir)
    add("two nodes, SIGTERM to both agents, the same command again", out_dir, all_gone_s=round(left, 1))

    out_dir, agents, commands = begin("replaced", "--max-restarts=3")
    await_step(out_dir, 95, agents)
    # the agent that was first holds the rendezvous; the other one's machine goes away (rank 0's agent listens, too)
    endpoint = next(word for word in commands[0] if word.startswith("--rdzv-endpoint="))
    host = 0 if listens(agents[0].pid, int(endpoint.rpartition(":")[2])) else 1
    stop_all(agents[1 - host])
    agents[1 - host] = launch(commands[1 - host], folder / "replaced_new.log")
    # torch 2.13 tells the new node the address of rank 0 only where that is not the one that has stayed (the stayed one
    # keeps its RendezvousStoreInfo); then both give up after a minute
    how = "by the same command again"
    if wait(agents) != [0, 0]:
        port = free_port()
        again = [[*two_nodes(port), *start_anew(c)] for c in commands]
        check(wait([launch(c, folder / f"anew_{i}.log") for i, c in enumerate(again)]), [0, 0], out_dir)
        how = "both given up within minutes and started anew"
    add(f"two nodes, one of them lost whole, {how}", out_dir)
    return rows


def start_anew(command: list[str]) -> list[str]:
    """train.py and its arguments out of an agent's command."""
    return command[command.index(str(ROOT / "train.py")) :]


def kill_a_worker(out_dir: Path, agents: list, step: int, wanted: int = 1, finish: bool = True) -> dict:
    """SIGKILL to the worker of rank `wanted` after `step` is logged; what the job did then, in seconds."""
    await_step(out_dir, step, agents)
    there = {rank: pid for a in agents for rank, pid in workers(a.pid).items()}
    metrics = out_dir / "metrics.jsonl"
    before = metrics.stat().st_ino
    os.kill(there[wanted], signal.SIGKILL)
    killed = time.monotonic()
    peers = [pid for rank, pid in there.items() if rank != wanted]
    while any(map(alive, peers)):
        if time.monotonic() - killed > PATIENCE:
            raise RuntimeError(f"{out_dir}: the other ranks never left")
        time.sleep(0.01)
    out = {"peers_gone_s": round(time.monotonic() - killed, 1)}
    while metrics.stat().st_ino == before:  # a resume writes it anew, without the rows after its checkpoint
        if time.monotonic() - killed > PATIENCE:
            raise RuntimeError(f"{out_dir}: nothing came back")
        time.sleep(0.01)
    await_step(out_dir, step, agents)
    out["back_at_that_step_s"] = round(time.monotonic() - killed, 1)
    if finish:
        check(wait(agents), [0] * len(agents), out_dir)
    return out


def listens(pid: int, port: int) -> bool:
    """Whether a process listens at this TCP port: of the agents, the one with the rendezvous store does."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(fd).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue
    lines = [
        line.split()
        for f in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{f}").read_text().splitlines()[1:]
    ]
    return any(
        line[3] == "0A" and line[9] in inodes and int(line[1].rpartition(":")[2], 16) == port
        for line in lines
    )


def check(statuses: list[int], expected: list[int], out_dir: Path) -> None:
    if statuses != expected:
        raise RuntimeError(f"{out_dir} ended with {statuses}, not {expected}: see the logs beside it")


# ---- the report


def table(rows: list[dict], provenance: dict) -> str:
    text = ["# Any number of ranks, the same training", ""]
    text += [
        f"fp32, CPU, gloo; {KEYS['max_iters']} steps of {KEYS['global_batch_size']} sequences of {KEYS['block_size']} "
        "tokens. Largest relative differences over all logged rows to one process that takes the global batch at once.",
        "",
        "| arm | run | train loss | val loss | gradient norm |",
        "|---|---|---:|---:|---:|",
    ]
    for r in rows:
        if r["kind"] != "nodes":
            cells = [f"{r[k]:.1e}" if k in r else "" for k in ("train", "val", "norm")]
            text.append(f"| {r['arm']} | {r['what']} | {' | '.join(cells)} |")
    text += [
        "",
        "200 steps on two ranks, against an undisturbed torchrun of two ranks on one node. Seconds count from the "
        "signal; `back` is when the step that was interrupted is logged again.",
        "",
        "| job | every loss bit-identical | peers gone | back | all gone |",
        "|---|---|---:|---:|---:|",
    ]
    for r in rows:
        if r["kind"] == "nodes":
            cells = [
                f"{r[k]} s" if k in r else "" for k in ("peers_gone_s", "back_at_that_step_s", "all_gone_s")
            ]
            same = "yes" if r["bit_identical"] else f"no, {largest([r['train'], r['val']]):.1e}"
            text.append(f"| {r['what']} | {same} | {' | '.join(cells)} |")
    text += [""] + [f"- {k}: " + (f"`{v}`" if k == "command" else str(v)) for k, v in provenance.items()]
    return "\n".join([*text, ""])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--arms", default="bpe_tied,kronecker", help="with commas")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data" / "pydocs", help="prepared if empty")
    parser.add_argument("--out", type=Path, default=Path("out/check_ranks"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json and REPORT.md")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    for part in args.parts:
        if part not in PARTS:
            sys.exit(f"error: there is no part {part!r}: choose from {', '.join(PARTS)}")
    if not list(args.data_dir.glob("*_train_*.bin")):
        subprocess.run(
            [sys.executable, str(ROOT / "data/pydocs/prepare.py"), f"--out_dir={args.data_dir}"], check=True
        )
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    atexit.register(clear)
    args.keys = KEYS | {"data_dir": args.data_dir.resolve()}
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # each part's rows are kept, so that the parts can be run one by one and reported together
    kept = args.out / "rows.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    for arm in args.arms.split(",") if set(args.parts) - {"nodes"} else []:
        shutil.rmtree(args.out / arm, ignore_errors=True)
        new = [r | {"commit": runs.commit()} for r in matrix(args, arm) if r["kind"] in args.parts]
        rows = [r for r in rows if (r["kind"], r["arm"]) not in {(n["kind"], n["arm"]) for n in new}] + new
        runs.write_json(kept, rows)
    if "nodes" in args.parts:
        rows = [r for r in rows if r["kind"] != "nodes"] + [
            r | {"commit": runs.commit()} for r in nodes(args)
        ]
        runs.write_json(kept, rows)
    if args.report:
        provenance = {
            "command": " ".join(["python", "scripts/trust/ranks.py", *argv]),
            "commit": ", ".join(
                dict.fromkeys(str(r["commit"]) for r in rows)
            ),  # parts may come from several calls
            "machine": f"{runs.machine()}, torch {torch.__version__}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.with_suffix(".json").write_text(json.dumps(provenance | {"rows": rows}, indent=1) + "\n")
        args.report.with_suffix(".md").write_text(table(rows, provenance))
    worst = largest(r[name] for r in rows for name in ("train", "val") if name in r)
    print(f"largest relative difference of a loss: {worst:.1e} (allowed: 1e-5)")
    return 0 if worst <= 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
