"""Kill a small training with SIGKILL at random instants, start it again, and compare it with an unkilled twin.

    python scripts/trust/kill_train.py --kills 100 --seed 1 --report results/trust/kill_train
    python scripts/trust/kill_train.py --kills 100 --seed 1 --minutes 4      a slice; the same command goes on

Each run is killed a few times and started again with the same command (--init_from=auto) until it is through.
Many kills are aimed at checkpoint writes: at a moment after a .writing_* folder appears, or at the appearance
of one of its files; others fall anywhere in the training, in a start or in a resume. Only a kill that ended a
living process counts. After each one, the newest whole checkpoint and the rows logged so far are held against
the twin's; at the end the final weights, the optimizer's moments, all rows, the record, the kept checkpoints and
the pointers. Equal means every bit: a kill passes if what it left and what its run became are the twin's.
Further --key=value go to train.py (e.g. --device=cuda --deterministic=True).
"""

import argparse
import contextlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.files import expanded, write_json
from engine import checkpoint
from engine.errors import RunError, sentences
from scripts.analysis.report import Table
from scripts.arguments import Parser, number, some_of, whole
from scripts.pool import last_words
from scripts.provenance import ROOT, commit, today
from scripts.trust import twin

KEYS = twin.SMALL | {
    "n_embd": 32, "block_size": 32, "batch_size": 4, "max_iters": 30, "eval_interval": 7, "eval_tokens": 512,
    "warmup_iters": 3, "pos_dim": 8,
}  # fmt: skip
# Very frequent checkpoints, so that much of a run's life is writing; each arm saves at another interval.
RECIPES = {
    "kronecker": {"ckpt_interval": 1, "global_batch_size": 4, "dropout": 0.1},
    "bpe_tied": {"ckpt_interval": 2, "global_batch_size": 8},
    "kronecker_tied": {"ckpt_interval": 3, "global_batch_size": 4, "keep": 1},
}
FILES = ("model.safetensors", "optimizer.pt", "state.json", "DONE")  # of a checkpoint, as they are written
# What a kill waits for, and how many of a hundred do: most of them for a write, where there is most to break.
AIMS = {
    "write": ("a moment after a `.writing_*` folder appears", 45),
    "file": ("the appearance of one of its files, or of a new `latest`", 20),
    "running": ("any moment from the loop's start to its end", 20),
    "any": ("any moment from the process's start to its end", 15),
}


def arguments(argv) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--kills", type=whole(1), default=100, help="kills that must land on a living process")
    add("--seed", type=int, default=1, help="of the instants")
    add("--per_run", type=whole(1), default=5, help="kills that one run suffers")
    add("--jobs", type=whole(1), default=2, help="runs side by side")
    add("--minutes", type=number(0), default=0, help="begin no further run after so many (0: no limit)")
    add("--recipes", type=some_of(RECIPES), default=",".join(RECIPES), help="with commas")
    add("--data_dir", type=expanded, default=ROOT / "data" / "pydocs", help="prepared if empty")
    add("--out", type=expanded, default=Path("out/kill_train"), help="folder of the runs")
    add("--report", type=expanded, help="write REPORT.json and REPORT.md")
    args, passed = parser.parse_known_args(argv)
    if wrong := [p for p in passed if not p.startswith("--") or "=" not in p]:
        parser.error(f"{' '.join(wrong)} is unknown here: further keys of train.py are written --key=value")
    args.passed = dict(p[2:].split("=", 1) for p in passed)
    return args


def keys_of(args, recipe: str) -> dict:
    return KEYS | RECIPES[recipe] | {"data_dir": args.data_dir} | args.passed


def start(args, recipe: str, out_dir: Path, **changes) -> subprocess.Popen:
    command = twin.train_command(recipe, out_dir, keys_of(args, recipe) | changes)
    return twin.launch([sys.executable, *command], out_dir / "train.log")


def make_twin(args, recipe: str) -> dict:
    """Train it, and measure how long its parts take now, in seconds: "awake" until its loop, a "write", the "total"."""
    out_dir = args.out / f"twin_{recipe}"
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    began, awake, since, writes = time.monotonic(), 0.0, None, []
    process = start(args, recipe, out_dir, keep=twin.ALL)
    while process.poll() is None:
        time.sleep(0.0005)
        now = time.monotonic()
        if not awake and (out_dir / "metrics.jsonl").exists():
            awake = now - began
        if twin.half_written(out_dir):
            since = since or now
        elif since is not None:
            writes, since = [*writes, now - since], None
    if process.returncode:
        raise RunError(f"the unkilled twin does not train: {last_words(out_dir / 'train.log')}")
    total = time.monotonic() - began
    return {"dir": out_dir, "awake": awake, "write": statistics.median(writes), "total": total}


# ---- one kill


def draw_aim(rng: random.Random, times: dict) -> dict:
    """What to wait for, and how long after it to strike; the times are those of `make_twin`."""
    kind = rng.choices(list(AIMS), [share for _, share in AIMS.values()])[0]
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


def writing(out_dir: Path, aim: dict):
    """A function that is true while the aim's nth write is going on and has come to the aim's file."""
    seen = set()

    def now() -> bool:
        folders = twin.half_written(out_dir)
        seen.update(f.name for f in folders)
        return len(seen) >= aim["nth"] and any(
            "file" not in aim or (f / aim["file"]).exists() for f in folders
        )

    return now


def await_aim(process: subprocess.Popen, out_dir: Path, aim: dict, patience: float) -> bool:
    """Wait until the moment to strike; False if the process ended by itself or hangs before it came."""
    signs = []
    if aim["kind"] != "any":
        signs.append(
            twin.renewed(out_dir / "metrics.jsonl")
        )  # right before the loop, earlier leftovers being cleared
    if aim["kind"] in ("write", "file"):  # a new `latest`: the rename is behind it, pruning is being done
        latest = aim.get("file") == "latest"
        signs.append(twin.renewed(out_dir / "latest") if latest else writing(out_dir, aim))
    end = time.monotonic() + patience
    for sign in signs:
        while not sign():
            if process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.0002)
    if aim["delay"]:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(aim["delay"])
    return process.poll() is None


def post_mortem(out_dir: Path, twin_dir: Path) -> dict:
    """What a kill left behind, and whether it is the twin's."""
    half = twin.half_written(out_dir)
    metrics = out_dir / "metrics.jsonl"
    raw = metrics.read_text() if metrics.exists() else ""
    found = twin.left(out_dir, twin_dir)
    latest = checkpoint.pointed(out_dir, "latest")
    return found | {
        "in_write": bool(half),
        "files_there": sorted(p.name for p in half[0].iterdir()) if half else [],
        "between_rename_and_pointer": bool(found["newest"] and not half)
        and (latest is None or latest.name != found["newest"]),
        "torn_row": bool(raw) and not raw.endswith("\n"),
    }


# ---- one run, killed a few times


def killed_run(args, count: int, wanted: int, twins: dict) -> dict:
    """The record of run number `count`: up to `wanted` kills, what each left, and what the run became."""
    rng = random.Random(f"{args.seed}/{count}")
    recipe = args.recipes[count % len(args.recipes)]
    times = twins[recipe]
    patience = 60 + 20 * times["total"]
    out_dir = args.out / f"run_{count:03d}"
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir(parents=True)
    record = {"run": count, "recipe": recipe, "missed": 0, "trouble": None, "kills": []}
    while True:
        aim = draw_aim(rng, times) if len(record["kills"]) < wanted else None
        began = time.monotonic()
        process = start(args, recipe, out_dir)
        if aim and await_aim(process, out_dir, aim, patience):
            process.send_signal(signal.SIGKILL)
            if process.wait() == -signal.SIGKILL:
                kill = {"aim": aim, "after_s": round(time.monotonic() - began, 3)}
                record["kills"].append(kill | post_mortem(out_dir, times["dir"]))
                continue
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            record["trouble"] = f"a start hung for {patience:.0f} s"
            break
        record["missed"] += aim is not None
        if status:
            record["trouble"] = f"a start ended with status {status}: {last_words(out_dir / 'train.log')}"
        break
    record |= {"commit": commit(), "date": today()}
    if record["trouble"] is None:
        record["end"] = twin.compare(out_dir, times["dir"], int(keys_of(args, recipe)["keep"]))
        if not twin.differences(record["end"]):
            shutil.rmtree(out_dir)  # a run that differs stays, to be looked into
    return record


def passed(record: dict, kill: dict) -> bool:
    """Of one kill: what it left is the twin's, and so is what its run became."""
    return record["trouble"] is None and not twin.differences(kill) and not twin.differences(record["end"])


def kill_runs(args, records: list[dict]) -> None:
    """Add records of further runs, some side by side, until there are enough kills, no minutes left, or trouble."""
    args.data_dir = twin.prepared(args.data_dir)
    began, troubled = time.monotonic(), False
    count = max((r["run"] for r in records), default=-1) + 1
    with ThreadPoolExecutor(args.jobs) as pool:
        twins = dict(zip(args.recipes, pool.map(lambda r: make_twin(args, r), args.recipes), strict=True))
        running = {}  # future: kills that it may bring
        while True:
            missing = args.kills - sum(len(r["kills"]) for r in records) - sum(running.values())
            late = args.minutes and time.monotonic() - began > 60 * args.minutes
            if missing > 0 and len(running) < args.jobs and not late and not troubled:
                wanted = min(args.per_run, missing)
                running[pool.submit(killed_run, args, count, wanted, twins)] = wanted
                count += 1
                continue
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                record = future.result()
                troubled = troubled or record["trouble"] is not None
                records.append(record)
                write_json(args.out / "records.json", records)
                print(
                    f"run {record['run']:3d} {record['recipe']:<15} {sum(passed(record, k) for k in record['kills'])} of "
                    f"{len(record['kills'])} kills passed, {sum(len(r['kills']) for r in records)} of {args.kills} done, "
                    f"{time.monotonic() - began:.0f} s{'  TROUBLE: ' * bool(record['trouble'])}{record['trouble'] or ''}",
                    flush=True,
                )


# ---- the report


def summary(records: list[dict]) -> dict:
    kills = [(r, k) for r in records for k in r["kills"]]
    return {
        "kills": len(kills),
        "passed": sum(passed(r, k) for r, k in kills),
        "runs": len(records),
        "in_a_write": sum(k["in_write"] for _, k in kills),
        "between_rename_and_pointer": sum(k["between_rename_and_pointer"] for _, k in kills),
        "with_a_torn_row": sum(k["torn_row"] for _, k in kills),
        "before_the_first_checkpoint": sum(k["newest"] is None for _, k in kills),
        "ended_before_the_kill": sum(r["missed"] for r in records),
        "losses_compared": sum(r["end"]["losses"] for r in records if "end" in r),
        "trouble": [r["trouble"] for r in records if r["trouble"]],
    }


def tables(records: list[dict], s: dict) -> list:
    """The report's paragraphs and tables."""
    kills = [(r, k) for r in records for k in r["kills"]]

    def row(name: str, part: list, *more) -> list:
        return [name, *more, len(part), sum(k["in_write"] for _, k in part), sum(passed(*p) for p in part)]

    by_aim = [
        row(name, [p for p in kills if p[1]["aim"]["kind"] == kind]) for kind, (name, _) in AIMS.items()
    ]
    by_recipe = [
        row(
            f"{name}, {keys}",
            [p for p in kills if p[0]["recipe"] == name],
            sum(r["recipe"] == name for r in records),
        )
        for name, keys in RECIPES.items()
    ]
    stages = Counter(
        ", ".join(f"`{f}`" for f in FILES if f in k["files_there"]) for _, k in kills if k["in_write"]
    )
    counted = ["kills", "fell into a checkpoint write", "passed"]
    return [
        f"**{s['passed']} of {s['kills']}** kills left the twin's bits behind and ended in the twin's bits.",
        Table("By aim", ["aimed at", *counted], [*by_aim, row("all", kills)]),
        Table(
            "By what the writes had finished when they were killed",
            ["files", "kills"],
            [[stage or "an empty folder", n] for stage, n in sorted(stages.items(), key=lambda i: len(i[0]))],
        ),
        Table("By recipe", ["recipe", "runs", *counted], by_recipe),
        f"{s['runs']} runs of {KEYS['max_iters']} steps; {s['losses_compared']:,} logged rows compared at their ends. "
        f"{s['between_rename_and_pointer']} kills fell between a checkpoint's rename and its pointer, "
        f"{s['with_a_torn_row']} tore a row of metrics.jsonl, {s['before_the_first_checkpoint']} came before the first "
        f"checkpoint. In {s['ended_before_the_kill']} starts the process ended before its kill; these do not count.",
        "Compared: weights and AdamW's moments in every bit; all rows of metrics.jsonl but speed and memory; counters; "
        "the run's record; which checkpoints are kept; `latest` and `best`; and that nothing half-written stays.",
    ]


def main(argv=None) -> int:
    args = arguments(argv)
    with sentences():
        args.out.mkdir(parents=True, exist_ok=True)
        records = twin.kept(args.out / "records.json")
        done = sum(len(r["kills"]) for r in records)
        if done:
            print(f"{done} kills in {len(records)} runs are on record in {args.out}; going on from there")
        if done < args.kills:
            kill_runs(args, records)
        if not records:
            return 0
        s = summary(records)
        if args.report:
            data = {"summary": s, "runs": sorted(records, key=lambda r: r["run"])}
            title = "Killed at random instants, against the unkilled twin"
            twin.report(args.report, twin.made_by(__file__, argv, records), data, title, *tables(records, s))
        print(f"{s['passed']} of {s['kills']} kills passed; {s['in_a_write']} fell into a checkpoint write")
        if s["kills"] < args.kills:
            print("the same command goes on from here")
        return 0 if s["passed"] == s["kills"] and not s["trouble"] else 1


if __name__ == "__main__":
    sys.exit(main())
