"""What the commands of this room share: a twin that nothing disturbs, how a run is held against it, and records.

Each of them disturbs runs in its own way. A run has come through if what it left and what it became are its twin's:
losses, weights and moments, rows and record. All but `furthest` compare bits. A command is a list of jobs; what it has
found of each is kept in OUT/records.json, so that the same command goes on where it stopped.
"""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from data.files import expanded, write_json
from data.records import read_record
from engine import checkpoint, contract, runs
from engine.errors import RunError
from engine.metrics import read_metrics
from scripts.analysis.report import Table
from scripts.arguments import Parser, number
from scripts.experiment import arm_file
from scripts.pool import Job, start_child
from scripts.provenance import ROOT, commit, provenance, today, write_page

# Runs that a CPU trains in seconds and to the same bits each time; every command adds its own sizes.
SMALL = {
    "n_layer": 2, "n_head": 2, "log_interval": 1, "learning_rate": 3e-3, "dtype": "float32", "device": "cpu",
    "keep": 2, "init_from": "auto",
}  # fmt: skip
PYDOCS = ROOT / "data" / "pydocs"
ALL = 10**6  # as `keep`: a twin keeps every checkpoint
MEASURED = ("tok_per_sec", "mem_gb", "mfu")  # what differs between two runs of the same thing
FIGURES = {"train": "train/loss", "val": "val/loss", "norm": "grad_norm"}


# ---- running


def parser(doc: str, out: str) -> Parser:
    """The arguments that the commands share."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--minutes", type=number(0), default=0, help="begin nothing more after so many (0: no limit)")
    add("--out", type=expanded, default=Path(out), help="folder of runs and records; delete it to begin anew")
    add("--report", type=expanded, help="write REPORT.json and REPORT.md")
    return parser


def prepared(data_dir: Path) -> Path:
    """The folder, absolute, into which pydocs is prepared if it holds no training shards."""
    if not list(data_dir.glob("*_train_*.bin")):
        subprocess.run([sys.executable, PYDOCS / "prepare.py", f"--out_dir={data_dir}"], check=True)
    return data_dir.resolve()


def train_command(arm: str, out_dir: Path, keys: dict) -> list[str]:
    """train.py's words for an arm of config/arms/; whatever starts Python goes before them."""
    flags = [f"--{k}={v}" for k, v in (keys | {"out_dir": out_dir}).items()]
    return [str(ROOT / "train.py"), str(arm_file(arm)), *flags]


def launch(command: list, folder: Path) -> subprocess.Popen:
    """Start a command with one thread, which does not outlive this process; it writes to FOLDER/train.log."""
    return start_child(Job(folder.name, list(map(str, command)), folder, 0))


def side_by_side(function, jobs: list, count: int):
    """function(job) of each in its order, so many at a time, each in a fork of this process (1: in it)."""
    if count == 1:
        yield from map(function, jobs)
        return
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until a fork can end by it
    try:
        pool = multiprocessing.get_context("fork").Pool(count, leave_signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    with pool:
        yield from pool.imap(function, jobs)


def leave_signals() -> None:
    """Ctrl-C is for the process that forked to tell, which ends its forks by SIGTERM, whatever it does with its own."""
    # not SIG_IGN, which what a fork starts would inherit
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def comes(sign, processes: list[subprocess.Popen], seconds: float) -> bool:
    """Whether sign() is true before one of the processes ends or the seconds are over; returns when it is known."""
    end = time.monotonic() + seconds
    while not sign():
        if time.monotonic() > end or any(p.poll() is not None for p in processes):
            return False
        time.sleep(0.0002)
    return True


def renewed(path: Path):
    """A function that is true once another file is at `path` than now."""

    def mark():
        there = path.exists() and path.stat()
        return there and (there.st_ino, there.st_mtime_ns)

    first = mark()
    return lambda: mark() != first


# ---- comparing bits


def same_bits(a, b) -> bool:
    """Equal values of equal type and every tensor equal in its bytes (so 0.0 is not -0.0, and NaN equals itself)."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and a == b


def rows_of(out_dir: Path) -> list[dict]:
    """Rows without what measures the machine; all losses, norms, rates and counters stay."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(out_dir)]


def record_of(out_dir: Path) -> tuple[dict, dict]:
    """What config.json and run.json say of the training itself, not of where and how often it was started."""
    config, run = runs.read_run(out_dir)
    config = {k: v for k, v in config.items() if k not in ("out_dir", "keep")}
    return config, {k: run[k] for k in ("arm", "seed", "segments", "diverged", *contract.IDENTITY)}


def contents(folder: Path) -> tuple[dict, dict | None, dict]:
    """(weights, moments, state) of a checkpoint, all empty where it is not whole; how its files are cut is no matter."""
    if checkpoint.fault(folder) is not None:
        return {}, None, {}
    weights, moments, state = checkpoint.load(folder)
    return weights, moments, {k: v for k, v in state.items() if k != "sha256"}


def half_written(out_dir: Path) -> list[Path]:
    return list(out_dir.glob("ckpt/.writing_*"))


def left(out_dir: Path, twin: Path) -> dict:
    """What a kill has left, and whether its newest whole checkpoint and its rows so far are the twin's."""
    half, metrics, rows = half_written(out_dir), out_dir / "metrics.jsonl", rows_of(out_dir)
    newest = next((f for f in reversed(checkpoint.steps(out_dir)) if checkpoint.fault(f) is None), None)
    equal = newest is None or same_bits(contents(newest), contents(twin / "ckpt" / newest.name))
    return {
        "in_write": bool(half),
        "files_there": sorted(p.name for p in half[0].iterdir()) if half else [],
        "between_rename_and_pointer": not half
        and newest not in (None, checkpoint.pointed(out_dir, "latest")),
        "torn_row": metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n"),
        "newest": newest and newest.name,
        "rows_equal": rows == rows_of(twin)[: len(rows)],
        "checkpoint_equal": equal,
    }


def compare(out_dir: Path, twin: Path, keep: int) -> dict:
    """Whether a finished run is its twin in each respect; `keep`: how many checkpoints it should have kept."""

    def pointers(folder: Path) -> list:
        return [p and p.name for p in (checkpoint.pointed(folder, name) for name in ("latest", "best"))]

    saved = [folder.name for folder in checkpoint.steps(twin)]
    ours, theirs = (contents(folder / "ckpt" / saved[-1]) for folder in (out_dir, twin))
    rows = rows_of(out_dir)
    kept = {*saved[-keep:], *pointers(twin)} - {None}
    return {
        "weights_equal": same_bits(ours[0], theirs[0]),
        "optimizer_equal": same_bits(ours[1], theirs[1]),
        "state_equal": same_bits(ours[2], theirs[2]),
        "rows_equal": rows == rows_of(twin),
        "losses": sum("train/loss" in r or "val/loss" in r for r in rows),
        "record_equal": record_of(out_dir) == record_of(twin),
        "pointers_equal": pointers(out_dir) == pointers(twin),
        "kept_equal": {folder.name for folder in checkpoint.steps(out_dir)} == kept,
        "nothing_left_equal": not [*out_dir.rglob("*.tmp"), *half_written(out_dir)],
    }


def differences(found: dict) -> list[str]:
    """The respects in which `left` or `compare` found no equality."""
    return [k for k, v in found.items() if k.endswith("_equal") and not v]


# ---- comparing figures


def losses(out_dir: Path) -> dict:
    """{(iter, name): value} of all losses and gradient norms that were logged."""
    names, rows = (*FIGURES.values(), "val/bpb"), read_metrics(out_dir)
    return {(r["iter"], k): np.nan if r[k] is None else r[k] for r in rows for k in names if k in r}


def furthest(out_dir: Path, twin: Path) -> dict:
    """{"train", "val", "norm"}: the largest relative difference of any row's figure; the rows must be the same ones."""
    ours, theirs = losses(out_dir), losses(twin)
    if ours.keys() != theirs.keys():
        raise RunError(f"these rows are in one run only: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    return {
        short: largest(abs(theirs[k] - ours[k]) / abs(theirs[k]) for k in theirs if k[1] == name)
        for short, name in FIGURES.items()
    }


def largest(values) -> float:
    """The largest of some numbers, NaN if one is or is not there: `max` would pass over it."""
    return float(np.max([np.nan if v is None else v for v in values]))


# ---- records


def kept(args, jobs: list[dict]) -> tuple[list[dict], list[dict]]:
    """(records that earlier starts have kept of the jobs, the jobs that are still to do); a record holds its job."""
    path = args.out / "records.json"
    args.out.mkdir(parents=True, exist_ok=True)
    args.kept = read_record(path, list[dict], "the record of an earlier start") if path.exists() else []
    names = jobs[0].keys() if jobs else ()
    known = {tuple(record.get(k) for k in names): record for record in args.kept}
    found = [known.get(tuple(job.values())) for job in jobs]
    todo = [job for job, record in zip(jobs, found, strict=True) if record is None]
    print(
        f"{len(jobs) - len(todo)} of {len(jobs)} jobs are on record in {args.out}, {len(todo)} to do",
        flush=True,
    )
    return list(filter(None, found)), todo


def go_on(args, records: list[dict], jobs: list[dict], measure, count: int = 1) -> None:
    """Add job | measure(job) to the records, here and on disk, until all are done or no minutes are left."""
    end = time.monotonic() + 60 * args.minutes
    for job, found in zip(jobs, side_by_side(measure, jobs, count), strict=True):
        records.append(job | found | {"commit": commit(), "date": today()})
        args.kept.append(records[-1])
        write_json(args.out / "records.json", args.kept)
        print(json.dumps(job | {k: v for k, v in found.items() if not isinstance(v, list)}), flush=True)
        if args.minutes and time.monotonic() > end and job is not jobs[-1]:
            print("no minutes are left: the same command goes on from here")
            return


def tally(title: str, what: str, records: list[dict], name_of, columns: dict) -> Table:
    """How many records there are of each name that name_of gives them, and of how many each column's function is true."""
    groups = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    groups = dict(sorted(groups.items())) | {"all": records}
    rows = [
        [name, len(part), *(sum(map(of, part)) for of in columns.values())] for name, part in groups.items()
    ]
    return Table(title, [what, "killed", *columns], rows)


def report(args, script: str, argv, records: list[dict], data: dict, title: str, parts) -> None:
    """Write REPORT.json and .md, where they are asked for, of records that may come from several commits and days.

    script, argv: what ran (see provenance); parts: paragraphs and Tables.
    """
    if args.report is None:
        return
    made = provenance(script, argv)
    made["machine"] += f", torch {torch.__version__}"
    made["commit"] = ", ".join(sorted({str(r["commit"]) for r in records})) or made["commit"]
    made["date"] = max((r["date"] for r in records), default=made["date"])
    write_page(args.report, title, made, data, parts)
