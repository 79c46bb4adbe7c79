"""What the commands of this room share: how a run that was disturbed is held against a twin that nothing disturbs.

`compare` holds all that a run became against its twin in every bit, `furthest` its logged figures by their values.
"""

import subprocess
from pathlib import Path

import numpy as np
import torch

from data.files import expanded
from engine import checkpoint, contract, runs
from engine.errors import RunError
from engine.metrics import read_metrics
from scripts.analysis.report import Table
from scripts.arguments import Parser
from scripts.pool import Job, start_child
from scripts.provenance import provenance, write_page

# Runs that a CPU trains in seconds and to the same bits each time; every command adds its own sizes.
SMALL = {
    "n_layer": 2, "n_head": 2, "log_interval": 1, "learning_rate": 3e-3, "dtype": "float32", "device": "cpu",
    "keep": 2, "init_from": "auto",
}  # fmt: skip
VOCABULARY = 256  # of the made-up text that they train on
MEASURED = ("tok_per_sec", "mem_gb", "mfu")  # what differs between two runs of the same thing
FIGURES = {"train": "train/loss", "val": "val/loss", "norm": "grad_norm"}


def parser(doc: str) -> Parser:
    """The argument that the commands share."""
    parser = Parser(doc)
    parser.add_argument("--report", type=expanded, help="write REPORT.json and REPORT.md")
    return parser


def launch(command: list, folder: Path) -> subprocess.Popen:
    """Start a command with one thread, which does not outlive this process; it writes to FOLDER/train.log."""
    return start_child(Job(folder.name, list(map(str, command)), folder, 0))


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


def differences(out_dir: Path, twin: Path, keep: int) -> list[str]:
    """In what a finished run is not its twin, which keeps all checkpoints; keep: how many the run should have kept."""

    def pointers(folder: Path) -> list:
        return [p and p.name for p in (checkpoint.pointed(folder, name) for name in ("latest", "best"))]

    saved = [folder.name for folder in checkpoint.steps(twin)]
    (weights, moments, state), theirs = (contents(d / "ckpt" / saved[-1]) for d in (out_dir, twin))
    equal = {
        "weights": same_bits(weights, theirs[0]),
        "moments": same_bits(moments, theirs[1]),
        "state": same_bits(state, theirs[2]),
        "rows": rows_of(out_dir) == rows_of(twin),
        "record": record_of(out_dir) == record_of(twin),
        "pointers": pointers(out_dir) == pointers(twin),
        "kept checkpoints": {f.name for f in checkpoint.steps(out_dir)}
        == {*saved[-keep:], *pointers(twin)} - {None},
        "nothing left half-written": not [*out_dir.rglob("*.tmp"), *half_written(out_dir)],
    }
    return [name for name, same in equal.items() if not same]


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
    """The largest of some numbers, NaN if one is: `max` would pass over it."""
    return float(np.max(list(values)))


def tally(title: str, what: str, records: list[dict], name_of, columns: dict) -> Table:
    """How many records there are of each name that name_of gives them, and of how many each column's function is true."""
    groups = {}
    for record in records:
        groups.setdefault(name_of(record), []).append(record)
    groups = dict(sorted(groups.items())) | {"all": records}
    rows = [[name, len(of), *(sum(map(yes, of)) for yes in columns.values())] for name, of in groups.items()]
    return Table(title, [what, "killed", *columns], rows)


def report(args, script: str, argv, title: str, data: dict, parts: list) -> None:
    """Write REPORT.json and .md, where they are asked for; script, argv: what ran (see provenance)."""
    if args.report:
        made = provenance(script, argv)
        made["machine"] += f", torch {torch.__version__}"
        write_page(args.report, title, made, data, parts)
