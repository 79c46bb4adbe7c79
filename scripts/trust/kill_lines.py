"""Kill a run at every line that it executes, in turn, and let the next start finish it.

    python scripts/trust/kill_lines.py --report results/trust/kill_lines
    python scripts/trust/kill_lines.py --stride 10 --only engine/checkpoint.py

A kill from outside (scripts/trust/kill_train.py) seldom finds the few microseconds between two renames. Here a
forked child trains four steps under a trace function that sends it SIGKILL as the N-th line of train.py,
engine/ or data/files.py begins; a second child goes on undisturbed, and what it ends with is held against the twin that was
never killed, as kill_train.py does. First in a run that begins (`fresh`), then in one that goes on from what a
kill in the middle of a checkpoint write has left (`resumed`).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork must not inherit a thread pool
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

import numpy as np
import torch
import torch._dynamo  # the optimizer imports it: better once here than in every child

import configurator
import train
from data.meta import characters_meta, write_meta
from data.shards import write_shard
from engine import runs
from scripts.trust.kill_train import Twin, compare_end, half_written

KEYS = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "global_batch_size": 4,
    "max_iters": 4, "eval_interval": 2, "ckpt_interval": 1, "eval_tokens": 64, "log_interval": 1, "warmup_iters": 1,
    "learning_rate": 3e-3, "dropout": 0.1, "dtype": "float32", "device": "cpu", "keep": 2, "init_from": "auto",
}  # fmt: skip
TRACED = ["train.py", "data/files.py", *sorted(f"engine/{p.name}" for p in (ROOT / "engine").glob("*.py"))]
SCENES = ("fresh", "resumed")


def arguments(argv: list[str]):
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stride", type=int, default=1, help="kill at every so many-th line")
    parser.add_argument(
        "--only", default="", help="kill only at lines of this file, e.g. engine/checkpoint.py"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument(
        "--minutes", type=float, default=0, help="stop after so many; the same command goes on"
    )
    parser.add_argument("--out", type=Path, default=Path("out/kill_lines"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json and REPORT.md")
    args = parser.parse_args(argv)
    if args.only and args.only not in TRACED:
        sys.exit(f"error: --only={args.only} is no file that is traced: choose from {', '.join(TRACED)}")
    if min(args.stride, args.jobs) < 1:
        sys.exit("error: --stride and --jobs must both be at least 1")
    return args


def child(args, out_dir: Path, kill_at: int = 0, when=None, lines: list | None = None, **changes) -> int:
    """Train in a fork of this process; returns its exit status, negative for a signal.

    kill_at: number of the line (from 1) at which it kills itself. when: kills itself at the first line for
    which when() is true. lines: a list that gets "file:line" of all lines executed.
    """
    names = {str(ROOT / f): f for f in TRACED}
    listing = out_dir.with_suffix(".lines")
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if lines is not None and listing.exists():
            lines += listing.read_text().split()
        return status
    seen, status = [], 1

    def on_line(frame, event, arg):
        if event == "line":
            seen.append(f"{names[frame.f_code.co_filename]}:{frame.f_lineno}")
            if len(seen) == kill_at or (when is not None and when()):
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    try:
        with open(out_dir.with_suffix(".log"), "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        keys = KEYS | {"data_dir": args.out / "data", "out_dir": out_dir} | changes
        sys.settrace(lambda frame, event, arg: on_line if frame.f_code.co_filename in names else None)
        train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
        sys.settrace(None)
        if lines is not None:
            listing.write_text("\n".join(seen))
        status = 0
    except BaseException as e:
        sys.settrace(None)
        print(f"error: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def kill_and_go_on(job) -> dict:
    args, scene, number, line, twin = job
    out_dir = args.out / f"{scene}_{number}"
    shutil.rmtree(out_dir, ignore_errors=True)
    if scene == "resumed":
        shutil.copytree(args.out / "torn", out_dir)
    record = {"scene": scene, "number": number, "line": line}
    killed = child(args, out_dir, kill_at=number)
    went_on = child(args, out_dir)
    if killed != -signal.SIGKILL:
        record["trouble"] = f"it ended with status {killed} before its line came"
    elif went_on:
        record["trouble"] = f"the next start ended with status {went_on}"
    else:
        differs = [k for k, v in compare_end(out_dir, twin).items() if k.endswith("_equal") and not v]
        record["trouble"] = f"not {', '.join(differs)}" if differs else None
    if record["trouble"] is None:
        shutil.rmtree(out_dir)
        out_dir.with_suffix(".log").unlink()
    return record


def prepare(args) -> tuple[Twin, list[tuple]]:
    """The twin, the folder that a kill in a write has left, and (scene, number, line) of every line to kill at."""
    for name in ("twin", "torn", "data"):
        shutil.rmtree(args.out / name, ignore_errors=True)
    (args.out / "data").mkdir()
    tokens = np.random.default_rng(0).integers(0, 28, 3000).astype(np.uint16)
    write_shard(args.out / "data" / "noise_val_000000.bin", tokens[:500])
    write_shard(args.out / "data" / "noise_train_000001.bin", tokens[500:])
    write_meta(args.out / "data", characters_meta("noise", list("\n abcdefghijklmnopqrstuvwxyz")))
    if child(args, args.out / "twin", keep=10**6):
        sys.exit(f"error: the unkilled twin does not train: see {args.out / 'twin.log'}")

    def writing_third() -> bool:
        return any(
            f.name.endswith("3") and (f / "optimizer.pt").exists() for f in half_written(args.out / "torn")
        )

    if child(args, args.out / "torn", when=writing_third) != -signal.SIGKILL:
        sys.exit("error: no kill fell into the third checkpoint's write")
    todo = []
    for scene in SCENES:
        lines: list[str] = []
        out_dir = args.out / f"{scene}_all"
        shutil.rmtree(out_dir, ignore_errors=True)
        if scene == "resumed":
            shutil.copytree(args.out / "torn", out_dir)
        child(args, out_dir, lines=lines)
        todo += [(scene, i + 1, line) for i, line in enumerate(lines) if line.startswith(args.only)]
    return Twin(args.out / "twin", KEYS["keep"]), todo


def table(records: list[dict], executed: dict, provenance: dict) -> str:
    good = sum(r["trouble"] is None for r in records)
    text = ["# Killed at every line, against the unkilled twin", ""]
    text += [
        f"**{good} of {len(records)}** killed runs were finished by the next start and ended in the twin's bits.",
        "",
    ]
    text += [
        "| run | lines it executes | killed at | different lines of source | passed |",
        "|---|---:|---:|---:|---:|",
    ]
    for scene in SCENES:
        part = [r for r in records if r["scene"] == scene]
        text.append(
            f"| {scene} | {executed[scene]:,} | {len(part):,} | {len({r['line'] for r in part})} "
            f"| {sum(r['trouble'] is None for r in part):,} |"
        )
    text += ["", "| file | killed at | passed |", "|---|---:|---:|"]
    for file in TRACED:
        part = [r for r in records if r["line"].startswith(file + ":")]
        if part:
            text.append(f"| `{file}` | {len(part):,} | {sum(r['trouble'] is None for r in part):,} |")
    text += [
        "",
        "`fresh`: a run that begins. `resumed`: one that goes on from what a kill in the middle of a checkpoint "
        "write has left. Compared are weights and moments in every bit, all rows but speed and memory, the kept "
        "checkpoints, `latest` and `best`, and that nothing half-written stays.",
        "",
    ]
    text += [f"- {k}: " + (f"`{v}`" if k == "command" else str(v)) for k, v in provenance.items()]
    return "\n".join([*text, ""])


def main(argv: list[str]) -> int:
    args = arguments(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    twin, todo = prepare(args)
    executed = {scene: sum(t[0] == scene for t in todo) for scene in SCENES}
    path = args.out / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["scene"], r["number"], r["line"]) for r in records}
    # every stride-th, the last line too
    jobs = [(args, *t, twin) for t in reversed(todo[:: -args.stride]) if t not in done]
    print(f"{executed} lines are executed; {len(done)} kills are on record, {len(jobs)} to do", flush=True)
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool, open(path, "a") as f:
        for record in pool.imap_unordered(kill_and_go_on, jobs):
            records.append(record)
            f.write(json.dumps(record) + "\n")
            if record["trouble"]:
                print(f"{record['scene']} run killed at {record['line']}: {record['trouble']}", flush=True)
            if args.minutes and time.monotonic() - began > 60 * args.minutes:
                break
    bad = [r for r in records if r["trouble"]]
    if args.report:
        provenance = {
            "command": " ".join(["python", "scripts/trust/kill_lines.py", *argv]),
            "commit": runs.commit(),
            "machine": f"{runs.machine()}, torch {torch.__version__}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        args.report.parent.mkdir(parents=True, exist_ok=True)
        data = provenance | {
            "executed": executed,
            "kills": len(records),
            "passed": len(records) - len(bad),
            "failed": bad,
        }
        args.report.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        args.report.with_suffix(".md").write_text(table(records, executed, provenance))
    print(
        f"{len(records) - len(bad)} of {len(records)} killed runs ended in the twin's bits, {time.monotonic() - began:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
