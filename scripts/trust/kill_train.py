"""Kill a small training with SIGKILL at random instants, start it again, and compare it with an unkilled twin.

    python scripts/trust/kill_train.py --kills 100 --seed 1 --report results/trust/kill_train
    python scripts/trust/kill_train.py --kills 100 --seed 1 --minutes 4      a slice; the same command goes on

Each run is killed a few times and started again with the same command (--init_from=auto) until it is through. Many
kills are aimed at checkpoint writes, the others fall anywhere in a start, the training or a resume; only a kill that
ended a living process counts. It passes if what it left (newest whole checkpoint, rows so far) and what its run became
(weights, moments, rows, record, kept checkpoints, pointers) are the twin's in every bit.
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
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import expanded
from engine.errors import RunError, sentences
from scripts.arguments import some_of, whole
from scripts.pool import last_words
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
PER_RUN, SIDE_BY_SIDE = 5, 2  # kills that one run suffers; runs at a time


def arguments(argv) -> argparse.Namespace:
    parser = twin.parser(__doc__, "out/kill_train")
    add = parser.add_argument
    add("--kills", type=whole(1), default=100, help="kills that must land on a living process")
    add("--seed", type=int, default=1, help="of the instants")
    add("--data_dir", type=expanded, default=twin.PYDOCS, help="prepared if empty")
    add("--recipes", type=some_of(RECIPES), default=",".join(RECIPES), help="with commas")
    args, passed = parser.parse_known_args(argv)
    if wrong := [p for p in passed if not p.startswith("--") or "=" not in p]:
        parser.error(f"{' '.join(wrong)} is unknown here: further keys of train.py are written --key=value")
    args.passed = dict(p[2:].split("=", 1) for p in passed)
    return args


def keys_of(args, recipe: str) -> dict:
    return KEYS | RECIPES[recipe] | {"data_dir": args.data_dir} | args.passed


def begin(args, recipe: str, out_dir: Path, **changes) -> subprocess.Popen:
    command = twin.train_command(recipe, out_dir, keys_of(args, recipe) | changes)
    return twin.launch([sys.executable, *command], out_dir)


def make_twin(args, recipe: str) -> dict:
    """Train it, and measure how long its parts take now, in seconds: "awake" until its loop, a "write", the "total"."""
    out_dir = args.out / f"twin_{recipe}"
    shutil.rmtree(out_dir, ignore_errors=True)
    began, awake, since, writes = time.monotonic(), 0.0, None, []
    process = begin(args, recipe, out_dir, keep=twin.ALL)
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
    longest = {
        "write": 1.2 * times["write"], "file": 0, "running": 0.9 * (times["total"] - times["awake"]),
        "any": 0.9 * times["total"],
    }  # fmt: skip
    aim = {"kind": kind, "nth": rng.randint(1, 5), "delay": rng.uniform(0, longest[kind])}
    return aim | ({"file": rng.choice([*FILES, "latest"])} if kind == "file" else {})


def writing(out_dir: Path, aim: dict):
    """A function that is true while the aim's nth write is going on and has come to the aim's file."""
    seen = set()

    def now() -> bool:
        folders = twin.half_written(out_dir)
        seen.update(f.name for f in folders)
        there = any("file" not in aim or (f / aim["file"]).exists() for f in folders)
        return len(seen) >= aim["nth"] and there

    return now


def await_aim(process: subprocess.Popen, out_dir: Path, aim: dict, patience: float) -> bool:
    """Wait until the moment to strike; False if the process ended by itself or hangs before it came."""
    signs = []
    if (
        aim["kind"] != "any"
    ):  # right before its loop a start writes this anew, earlier leftovers being cleared
        signs.append(lambda: twin.renewed(out_dir / "metrics.jsonl"))
    if aim.get("file") == "latest":  # the rename is behind it, pruning is being done
        signs.append(lambda: twin.renewed(out_dir / "latest"))
    elif aim["kind"] in ("write", "file"):
        signs.append(lambda: writing(out_dir, aim))
    if not all(twin.comes(sign(), [process], patience) for sign in signs):
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(aim["delay"])
    return process.poll() is None


# ---- runs, each killed a few times


def killed_run(args, twins: dict, job: dict) -> dict:
    """What became of a run: each of its kills with what it left, starts that ended before their kill ("missed"), the
    logged losses that were compared, and its trouble, if any. A run that comes through too early is run anew."""
    rng, recipe, out_dir = (
        random.Random(f"{args.seed}/{job['run']}"),
        job["recipe"],
        args.out / f"run_{job['run']:03d}",
    )
    times = twins[recipe]
    patience, keep = 60 + 20 * times["total"], int(keys_of(args, recipe)["keep"])
    kills, found, through = [], {"missed": 0, "losses": 0, "trouble": None}, True
    while not found["trouble"] and (len(kills) < job["wanted"] or not through):
        if through:
            shutil.rmtree(out_dir, ignore_errors=True)
        aim = draw_aim(rng, times) if len(kills) < job["wanted"] else None
        began = time.monotonic()
        process = begin(args, recipe, out_dir)
        if aim and await_aim(process, out_dir, aim, patience):
            process.kill()
            if process.wait() == -signal.SIGKILL:
                after = round(time.monotonic() - began, 3)
                kills.append({"aim": aim, "after_s": after} | twin.left(out_dir, times["dir"]))
                through = False
                continue
        found["missed"] += aim is not None
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            found["trouble"] = f"a start hung for {patience:.0f} s"
            break
        if status:
            found["trouble"] = f"a start ended with status {status}: {last_words(out_dir / 'train.log')}"
        else:
            end, through = twin.compare(out_dir, times["dir"], keep), True
            found["losses"] += end["losses"]
            found["trouble"] = f"not {', '.join(wrong)}" if (wrong := twin.differences(end)) else None
    if not found["trouble"]:
        shutil.rmtree(out_dir)  # a run with trouble stays, to be looked into
    return found | {"kills": kills}


# ---- the report


def kills_of(records: list[dict]) -> list[dict]:
    """All kills, each with its recipe, and whether what it left and what its run became are the twin's."""
    return [
        kill | {"recipe": r["recipe"], "passed": not (r["trouble"] or twin.differences(kill))}
        for r in records
        for kill in r["kills"]
    ]


def parts(records: list[dict]) -> list:
    """The report's paragraphs and tables."""
    kills = kills_of(records)
    columns = {"fell into a checkpoint write": lambda k: k["in_write"], "passed": lambda k: k["passed"]}

    def count(of_kill) -> int:
        return sum(map(bool, map(of_kill, kills)))

    def written(kill: dict) -> str:
        files = [f"`{f}`" for f in FILES if f in kill["files_there"]]
        return ", ".join(files) or "an empty folder"

    return [
        f"**{count(columns['passed'])} of {len(kills)}** kills left the twin's bits behind and ended in the twin's bits.",
        twin.tally("By aim", "aimed at", kills, lambda k: AIMS[k["aim"]["kind"]][0], columns),
        twin.tally(
            "By what the writes had finished when they were killed", "files",
            [k for k in kills if k["in_write"]], written, columns,
        ),
        twin.tally("By recipe", "recipe", kills, lambda k: f"{k['recipe']}, {RECIPES[k['recipe']]}", columns),
        f"{len(records)} runs of {KEYS['max_iters']} steps; {sum(r['losses'] for r in records):,} logged rows compared at "
        f"their ends. {count(lambda k: k['between_rename_and_pointer'])} kills fell between a checkpoint's rename and its "
        f"pointer, {count(lambda k: k['torn_row'])} tore a row of metrics.jsonl, {count(lambda k: k['newest'] is None)} "
        f"came before the first checkpoint. In {sum(r['missed'] for r in records)} starts the process ended before its "
        "kill; these do not count.",
        "Compared: weights and AdamW's moments in every bit; all rows of metrics.jsonl but speed and memory; counters; "
        "the run's record; which checkpoints are kept; `latest` and `best`; and that nothing half-written stays.",
    ]  # fmt: skip


def main(argv=None) -> int:
    args = arguments(argv)
    with sentences():
        cycle, wanted = len(args.recipes), [PER_RUN] * (args.kills // PER_RUN)
        wanted += [args.kills % PER_RUN] if args.kills % PER_RUN else []
        jobs = [{"run": i, "recipe": args.recipes[i % cycle], "wanted": n} for i, n in enumerate(wanted)]
        records, todo = twin.kept(args, jobs)
        if todo:
            args.data_dir = twin.prepared(args.data_dir)
            names = list(dict.fromkeys(job["recipe"] for job in todo))
            made = twin.side_by_side(partial(make_twin, args), names, SIDE_BY_SIDE)
            twins = dict(zip(names, made, strict=True))
            twin.go_on(args, records, todo, partial(killed_run, args, twins), SIDE_BY_SIDE)
        kills = kills_of(records)
        counts = {"kills": len(kills), "passed": sum(k["passed"] for k in kills)}
        counts["in_a_write"] = sum(k["in_write"] for k in kills)
        title = "Killed at random instants, against the unkilled twin"
        twin.report(args, __file__, argv, records, counts | {"runs": records}, title, parts(records))
        print("{passed} of {kills} kills passed; {in_a_write} fell into a checkpoint write".format(**counts))
        return 0 if counts["passed"] == len(kills) and not any(r["trouble"] for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
