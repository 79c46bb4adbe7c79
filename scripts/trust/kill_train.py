"""Kill a small training with SIGKILL at random instants, start it again, and compare it with an unkilled twin.

    python scripts/trust/kill_train.py --kills 100 --seed 1 --report results/trust/kill_train
    python scripts/trust/kill_train.py --kills 100 --seed 1 --minutes 4      a slice; the same command goes on

Each run is killed a few times and started again with the same command (--init_from=auto) until it is through.
Many kills are aimed at checkpoint writes: at a moment after a .writing_* folder appears, or at the appearance
of one of its files; others fall anywhere in the training, in a start or in a resume. Only a kill that ended a
living process counts. After each one, the newest whole checkpoint and the rows logged so far are held against
the twin's; at the end the final weights, the optimizer's moments, all rows, the kept checkpoints and the
pointers. Equal means every bit: a kill passes if what it left and what its run became are the twin's.
Further --key=value go to train.py (e.g. --device=cuda --deterministic=True).
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

import contextlib

import torch

from engine import checkpoint, runs
from engine.metrics import read_metrics

BASE = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "max_iters": 30,
    "eval_interval": 7, "eval_tokens": 512, "log_interval": 1, "warmup_iters": 3, "learning_rate": 3e-3,
    "dtype": "float32", "device": "cpu", "pos_dim": 8, "keep": 2, "init_from": "auto",
}  # fmt: skip
# Very frequent checkpoints, so that much of a run's life is writing; each recipe saves at another interval.
RECIPES = {
    "kronecker": {"ckpt_interval": 1, "global_batch_size": 4, "dropout": 0.1},
    "bpe_tied": {"ckpt_interval": 2, "global_batch_size": 8},
    "kronecker_tied": {"ckpt_interval": 3, "global_batch_size": 4, "keep": 1},
}
FILES = ("model.safetensors", "optimizer.pt", "state.json", "DONE")
AIMS = {"write": 45, "file": 20, "running": 20, "any": 15}
MEASURED = ("tok_per_sec", "mem_gb", "mfu")  # what differs between two runs of the same thing
PATIENCE = 180  # seconds a start may take before it counts as hung


def arguments(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Further --key=value go to train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--kills", type=int, default=100, help="kills that must land on a living process")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    parser.add_argument("--per_run", type=int, default=5, help="kills that one run suffers")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument(
        "--minutes", type=float, default=0, help="begin no further run after so many (0: no limit)"
    )
    parser.add_argument("--recipes", default=",".join(RECIPES), help="with commas")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data" / "pydocs", help="prepared if empty")
    parser.add_argument("--out", type=Path, default=Path("out/kill_train"), help="folder of the runs")
    parser.add_argument("--report", type=Path, default=None, help="write REPORT.json and REPORT.md")
    args, args.passed = parser.parse_known_args(argv)
    args.recipes = args.recipes.split(",")
    for name in args.recipes:
        if name not in RECIPES:
            sys.exit(f"error: there is no recipe {name!r}: choose from {', '.join(RECIPES)}")
    if min(args.kills, args.per_run, args.jobs) < 1:
        sys.exit("error: --kills, --per_run and --jobs must all be at least 1")
    if any(not p.startswith("--") or "=" not in p for p in args.passed):
        sys.exit(
            f"error: {' '.join(args.passed)} is unknown here: further keys of train.py are written --key=value"
        )
    return args


def keys_of(args, recipe: str) -> dict:
    keys = BASE | RECIPES[recipe] | {"data_dir": args.data_dir}
    return keys | dict(p[2:].split("=", 1) for p in args.passed)


def start(args, recipe: str, out_dir: Path, log, **changes) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "config" / "arms" / f"{recipe}.py")]
    command += [f"--{k}={v}" for k, v in (keys_of(args, recipe) | {"out_dir": out_dir} | changes).items()]
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


# ---- what is compared


def plain(rows: list[dict]) -> list[dict]:
    """Rows without what measures the machine; all losses, norms, rates and counters stay."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


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


def same_checkpoint(ours: Path, twin: Path) -> bool:
    (w1, o1, s1), (w2, o2, s2) = checkpoint.load(ours), checkpoint.load(twin)
    told = ("step", "best_val", "skipped", "streak", "good", "loss_scale")
    return same_bits(w1, w2) and same_bits(o1, o2) and all(s1[k] == s2[k] for k in told)


class Twin:
    """The run that nobody kills, all of whose checkpoints are kept; `keep` is what the killed ones keep."""

    def __init__(self, out_dir: Path, keep: int):
        self.dir = out_dir
        self.rows = plain(read_metrics(out_dir))
        saved = [p.name for p in checkpoint.steps(out_dir)]
        self.last = saved[-1]
        self.kept = sorted({*saved[-keep:], checkpoint.pointed(out_dir, "best").name})


def make_twin(args, recipe: str) -> Twin:
    """Train it, unless that is done, and measure how long its parts take: .times, in seconds."""
    out_dir = args.out / f"twin_{recipe}"
    if not (out_dir / "times.json").is_file():
        shutil.rmtree(out_dir, ignore_errors=True)
        out_dir.mkdir(parents=True)
        began, awake, since, writes = time.monotonic(), None, None, []
        with open(out_dir / "log.txt", "w") as log:
            process = start(args, recipe, out_dir, log, keep=10**6)
            while process.poll() is None:
                time.sleep(0.0005)
                now = time.monotonic()
                if awake is None and (out_dir / "metrics.jsonl").exists():
                    awake = now - began
                if half_written(out_dir):
                    since = since or now
                elif since is not None:
                    writes, since = [*writes, now - since], None
        if process.returncode:
            sys.exit(f"error: the unkilled twin does not train: {last_words(out_dir / 'log.txt')}")
        times = {"awake": awake, "total": time.monotonic() - began, "write": statistics.median(writes)}
        runs.write_json(out_dir / "times.json", times)
    twin = Twin(out_dir, int(keys_of(args, recipe)["keep"]))
    twin.times = json.loads((out_dir / "times.json").read_text())
    return twin


def half_written(out_dir: Path) -> list[Path]:
    try:
        return [Path(e.path) for e in os.scandir(out_dir / "ckpt") if e.name.startswith(".writing_")]
    except FileNotFoundError:
        return []


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])


# ---- one kill


def draw_aim(rng: random.Random, times: dict) -> dict:
    """What to wait for, and how long after it to strike."""
    kind = rng.choices(list(AIMS), AIMS.values())[0]
    aim = {"kind": kind, "nth": rng.randint(1, 5)}
    if kind == "write":
        aim["delay"] = rng.uniform(0, 1.2 * times["write"])
    elif kind == "file":
        aim |= {"file": rng.choice([*FILES, "latest"]), "delay": 0.0}
    elif kind == "running":
        aim["delay"] = rng.uniform(0, 0.9 * (times["total"] - times["awake"]))
    else:
        aim["delay"] = rng.uniform(0, 0.9 * times["total"])
    return aim


def await_aim(process, out_dir: Path, aim: dict, metrics_before) -> bool:
    """Wait until the moment to strike; False if the process ended by itself or hangs before it came."""
    began, seen, names = time.monotonic(), 0, set()
    latest = (out_dir / "latest").stat().st_mtime_ns if (out_dir / "latest").exists() else 0
    while aim["kind"] != "any":
        if process.poll() is not None or time.monotonic() - began > PATIENCE:
            return False
        if aim["kind"] == "running":
            # metrics.jsonl is made anew (another inode) right before the loop begins
            if metrics_id(out_dir) != metrics_before:
                break
        elif aim.get("file") == "latest":
            # the rename is behind it, pointing and pruning are being done
            if (out_dir / "latest").exists() and (out_dir / "latest").stat().st_mtime_ns != latest:
                break
        else:
            folders = half_written(out_dir)
            new = {f.name for f in folders} - names
            names |= new
            seen += len(new)
            if (
                seen >= aim["nth"]
                and folders
                and (aim["kind"] == "write" or (folders[0] / aim["file"]).exists())
            ):
                break
        time.sleep(0.0002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(aim["delay"]) if aim["delay"] else None
    return process.poll() is None


def metrics_id(out_dir: Path):
    path = out_dir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def post_mortem(out_dir: Path, twin: Twin) -> dict:
    """What a kill left behind, and whether it is the twin's."""
    half = half_written(out_dir)
    raw = (out_dir / "metrics.jsonl").read_text() if (out_dir / "metrics.jsonl").exists() else ""
    rows = plain(read_metrics(out_dir))
    newest = None
    for folder in reversed(checkpoint.steps(out_dir)):  # as a start will look for it
        if checkpoint.fault(folder) is None:
            newest = folder
            break
    pointed = checkpoint.pointed(out_dir, "latest")
    return {
        "in_write": bool(half),
        "files_there": sorted(p.name for p in half[0].iterdir()) if half else [],
        "between_rename_and_pointer": bool(newest and not half and pointed != newest),
        "torn_row": bool(raw and not raw.endswith("\n")),
        "newest": newest.name if newest else None,
        "rows": len(rows),
        "rows_equal": rows == twin.rows[: len(rows)],
        "checkpoint_equal": newest is None or same_checkpoint(newest, twin.dir / "ckpt" / newest.name),
    }


# ---- one run, killed a few times


def killed_run(args, number: int, wanted: int, twins: dict) -> dict:
    rng = random.Random(f"{args.seed}/{number}")
    recipe = args.recipes[number % len(args.recipes)]
    twin = twins[recipe]
    out_dir = args.out / f"run_{number:03d}"
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    kills, missed, trouble = [], 0, None
    with open(out_dir / "log.txt", "w") as log:
        while trouble is None:
            aim = draw_aim(rng, twin.times) if len(kills) < wanted else None
            before = metrics_id(out_dir)
            began = time.monotonic()
            process = start(args, recipe, out_dir, log)
            if aim and await_aim(process, out_dir, aim, before):
                process.send_signal(signal.SIGKILL)
                status = process.wait()
                if status == -signal.SIGKILL:
                    kills.append(
                        {"aim": aim, "after_s": round(time.monotonic() - began, 3)}
                        | post_mortem(out_dir, twin)
                    )
                    continue
            try:
                status = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                trouble = f"a start hung for {PATIENCE} s"
                break
            missed += aim is not None
            if status:
                trouble = f"a start ended with status {status}: {last_words(out_dir / 'log.txt')}"
            break
    record = {"run": number, "recipe": recipe, "missed": missed, "trouble": trouble, "kills": kills}
    record |= {"commit": runs.commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if trouble is None:
        record["end"] = compare_end(out_dir, twin)
    if trouble is None and all(v for k, v in record["end"].items() if k.endswith("equal")):
        shutil.rmtree(out_dir)  # a run that differs stays, to be looked into
    return record


def compare_end(out_dir: Path, twin: Twin) -> dict:
    rows = plain(read_metrics(out_dir))
    ours, theirs = (checkpoint.load(d / "ckpt" / twin.last) for d in (out_dir, twin.dir))
    rubbish = [p for p in [*out_dir.glob("*.tmp"), *out_dir.glob(".*.tmp"), *half_written(out_dir)]]
    return {
        "weights_equal": same_bits(ours[0], theirs[0]),
        "optimizer_equal": same_bits(ours[1], theirs[1]),
        "rows_equal": rows == twin.rows,
        "losses": sum("train/loss" in r or "val/loss" in r for r in rows),
        "pointers_equal": all(
            checkpoint.pointed(out_dir, n).name == checkpoint.pointed(twin.dir, n).name
            for n in ("latest", "best")
        ),
        "kept_equal": sorted(p.name for p in checkpoint.steps(out_dir)) == twin.kept,
        "nothing_left_equal": not rubbish,
    }


def passed(record: dict, kill: dict) -> bool:
    """Of one kill: what it left is the twin's, and so is what its run became."""
    return (
        record["trouble"] is None
        and kill["rows_equal"]
        and kill["checkpoint_equal"]
        and all(v for k, v in record["end"].items() if k.endswith("equal"))
    )


# ---- the report


def summary(records: list[dict]) -> dict:
    kills = [(r, k) for r in records for k in r["kills"]]
    ends = [r["end"] for r in records if "end" in r]
    return {
        "kills": len(kills),
        "passed": sum(passed(r, k) for r, k in kills),
        "runs": len(records),
        "in_a_write": sum(k["in_write"] for _, k in kills),
        "between_rename_and_pointer": sum(k["between_rename_and_pointer"] for _, k in kills),
        "with_a_torn_row": sum(k["torn_row"] for _, k in kills),
        "before_the_first_checkpoint": sum(k["newest"] is None for _, k in kills),
        "ended_before_the_kill": sum(r["missed"] for r in records),
        "losses_compared": sum(e["losses"] for e in ends),
        "trouble": [r["trouble"] for r in records if r["trouble"]],
    }


def table(records: list[dict], command: str) -> str:
    kills = [(r, k) for r in records for k in r["kills"]]
    s = summary(records)
    lines = ["# Killed at random instants, against the unkilled twin", ""]
    lines += [
        f"**{s['passed']} of {s['kills']}** kills left the twin's bits behind and ended in the twin's bits.",
        "",
    ]
    lines += ["| aimed at | kills | fell into a checkpoint write | passed |", "|---|---:|---:|---:|"]
    names = {
        "write": "a moment after a `.writing_*` folder appears",
        "file": "the appearance of one of its files, or of a new `latest`",
        "running": "any moment from the loop's start to its end",
        "any": "any moment from the process's start to its end",
    }
    for kind, name in [*names.items(), (None, "all")]:
        part = [(r, k) for r, k in kills if kind in (None, k["aim"]["kind"])]
        hits = sum(k["in_write"] for _, k in part)
        lines.append(f"| {name} | {len(part)} | {hits} | {sum(passed(r, k) for r, k in part)} |")
    lines += ["", "| what the writes had finished when they were killed | kills |", "|---|---:|"]
    stages = Counter(
        ", ".join(f"`{f}`" for f in FILES if f in k["files_there"]) for _, k in kills if k["in_write"]
    )
    lines += [
        f"| {stage or 'an empty folder'} | {n} |"
        for stage, n in sorted(stages.items(), key=lambda i: len(i[0]))
    ]
    lines += ["", "| recipe | runs | kills | passed |", "|---|---:|---:|---:|"]
    for recipe in RECIPES:
        part = [(r, k) for r, k in kills if r["recipe"] == recipe]
        n_runs = sum(r["recipe"] == recipe for r in records)
        lines.append(
            f"| {recipe}, {RECIPES[recipe]} | {n_runs} | {len(part)} | {sum(passed(r, k) for r, k in part)} |"
        )
    lines += [
        "",
        f"{s['runs']} runs of {BASE['max_iters']} steps; {s['losses_compared']:,} logged rows compared at their ends. "
        f"{s['between_rename_and_pointer']} kills fell between a checkpoint's rename and its pointer, "
        f"{s['with_a_torn_row']} tore a row of metrics.jsonl, {s['before_the_first_checkpoint']} came before the first "
        f"checkpoint. In {s['ended_before_the_kill']} starts the process ended before its kill; these do not count.",
        "",
        "Compared: weights and AdamW's moments in every bit; all rows of metrics.jsonl but speed and memory; counters; "
        "which checkpoints are kept; `latest` and `best`; and that nothing half-written stays.",
        "",
        f"- command: `{command}`",
        f"- commit: {', '.join(sorted({str(r['commit']) for r in records}))}",
        f"- machine: {runs.machine()}, torch {torch.__version__}",
        f"- date: {max(r['date'] for r in records)}",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    command = " ".join(["python", "scripts/trust/kill_train.py", *argv])
    if not list(args.data_dir.glob("*_train_*.bin")):
        subprocess.run(
            [sys.executable, str(ROOT / "data/pydocs/prepare.py"), f"--out_dir={args.data_dir}"], check=True
        )
    args.out.mkdir(parents=True, exist_ok=True)
    records_path = args.out / "records.jsonl"
    records = (
        [json.loads(line) for line in records_path.read_text().splitlines()] if records_path.exists() else []
    )
    done = sum(len(r["kills"]) for r in records)
    if done:
        print(f"{done} kills in {len(records)} runs are on record in {records_path}; going on from there")
    if done < args.kills:
        twins = {recipe: make_twin(args, recipe) for recipe in args.recipes}
    began, guard = time.monotonic(), threading.Lock()
    reserved, number = done, len(records)

    def work() -> None:
        nonlocal reserved, number
        while True:
            with guard:
                late = args.minutes and time.monotonic() - began > 60 * args.minutes
                wanted = min(args.per_run, args.kills - reserved)
                if wanted < 1 or late:
                    return
                reserved, mine, number = reserved + wanted, number, number + 1
            record = killed_run(args, mine, wanted, twins)
            with guard:
                reserved -= wanted - len(record["kills"])
                records.append(record)
                with open(records_path, "a") as f:
                    f.write(json.dumps(record) + "\n")
                ok = sum(passed(record, k) for k in record["kills"])
                total = sum(len(r["kills"]) for r in records)
                print(
                    f"run {mine:3d} {record['recipe']:<15} {ok} of {len(record['kills'])} kills passed, {total} of "
                    f"{args.kills} done, {time.monotonic() - began:.0f} s"
                    + (f"  TROUBLE: {record['trouble']}" if record["trouble"] else ""),
                    flush=True,
                )

    threads = [threading.Thread(target=work) for _ in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not records:
        return 0
    s = summary(records)
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        provenance = {
            "command": command, "commits": sorted({str(r["commit"]) for r in records}), "machine": runs.machine(),
            "torch": torch.__version__, "date": max(r["date"] for r in records),
        }  # fmt: skip
        text = json.dumps(
            provenance | {"summary": s, "runs": sorted(records, key=lambda r: r["run"])}, indent=1
        )
        args.report.with_suffix(".json").write_text(text + "\n")
        args.report.with_suffix(".md").write_text(table(records, command))
    print(f"{s['passed']} of {s['kills']} kills passed; {s['in_a_write']} fell into a checkpoint write")
    if s["kills"] < args.kills:
        print("the same command goes on from here")
        return 0 if s["passed"] == s["kills"] else 1
    return 0 if s["passed"] >= args.kills and not s["trouble"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
