"""Kill a small training with SIGKILL, start it again, and compare it with a twin that nothing disturbs.

    python scripts/trust/kill_train.py --report results/trust/kill_train              100 kills at random instants
    python scripts/trust/kill_train.py --lines 40 --report results/trust/kill_lines   one at every 40th executed line

At random instants: each run is killed a few times and started again (--init_from=auto) until it is through; half of the
kills wait for a checkpoint's write, where there is most to break. Such kills seldom find the few microseconds between two
renames. At lines: a trace function sends SIGKILL as the N-th line of train.py, engine/ or data/files.py begins, first in
a run that begins (`fresh`), then in one that goes on from what a kill in the middle of a write has left (`resumed`).

Every start is a fork of this process, which trains as train.py does. A run passes if what it became is its twin in every
bit: weights, moments, rows, record, kept checkpoints, pointers. Further --key=value go to train.py (for instance
--device=cuda --deterministic=True).
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork must not inherit a thread pool
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch._dynamo  # noqa: F401 - the optimizer imports it: better once here than in every fork

import configurator
import train
from data.identity import SETTLED_SECONDS
from engine.errors import RunError, sentences
from scripts.arguments import flags, whole
from scripts.experiment import arm_file
from scripts.made_up import write_data
from scripts.pool import last_words
from scripts.provenance import ROOT
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
PER_RUN = 5  # kills that one run suffers
AT_LINES = KEYS | {
    "n_layer": 1, "n_embd": 16, "block_size": 16, "global_batch_size": 4, "max_iters": 4, "eval_interval": 2,
    "eval_tokens": 64, "warmup_iters": 1, "ckpt_interval": 1, "dropout": 0.1,
}  # fmt: skip
TRACED = [ROOT / "train.py", ROOT / "data" / "files.py", *(ROOT / "engine").glob("*.py")]
SCENES = ("fresh", "resumed")
FORK = multiprocessing.get_context("fork")


def begin(arm: str, keys: dict, out_dir: Path, on_line=None):
    """Train in a fork of this process. on_line: called there as (number from 1, "file:line") before each line of TRACED."""
    words = [str(arm_file(arm)), *flags(keys | {"out_dir": out_dir})]
    process = FORK.Process(target=train_here, args=(words, log_of(out_dir), on_line), daemon=True)
    process.start()
    return process


def log_of(out_dir: Path) -> Path:
    return out_dir.with_name(f"{out_dir.name}.log")


def train_here(words: list[str], log: Path, on_line) -> None:
    names, number = {str(path): path.relative_to(ROOT) for path in TRACED}, 0
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def trace(frame, event, _):
        nonlocal number
        if event == "line":
            number += 1
            on_line(number, f"{names[frame.f_code.co_filename]}:{frame.f_lineno}")
        return trace

    with sentences():
        config = configurator.load(words)
        if on_line:
            sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename in names else None)
        try:
            train.main(config)
        finally:
            sys.settrace(None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_twin(arm: str, keys: dict, out_dir: Path) -> float:
    """Train a run that keeps all of its checkpoints; the seconds that it took."""
    began = time.monotonic()
    process = begin(arm, keys | {"keep": 10**6}, out_dir)
    process.join()
    if process.exitcode:
        raise RunError(f"the unkilled twin does not train: {last_words(log_of(out_dir))}")
    return time.monotonic() - began


def finish(arm: str, keys: dict, out_dir: Path, its_twin: Path, patience: float = 600) -> str:
    """Start a killed run for the last time; its trouble, if any."""
    process = begin(arm, keys, out_dir)
    process.join(patience)
    if process.is_alive():
        process.kill()
        return f"a start hung for {patience:.0f} s"
    if process.exitcode:
        return f"a start ended with status {process.exitcode}: {last_words(log_of(out_dir))}"
    return compared(keys, out_dir, its_twin)


def compared(keys: dict, out_dir: Path, its_twin: Path) -> str:
    """In what a run that is through is not its twin, if in anything."""
    wrong = twin.differences(out_dir, its_twin, int(keys["keep"]))
    return f"not the twin's: {', '.join(wrong)}" if wrong else ""


# ---- at random instants


def strike(process, out_dir: Path, rng: random.Random, seconds: float, steps: int) -> bool:
    """Kill at a random instant of so many seconds, or within a step's time of the next write's beginning; whether it
    fell on a living process."""
    at_write = rng.random() < 0.5
    process.join(rng.uniform(0, seconds))
    if at_write:
        while process.is_alive() and not twin.half_written(out_dir):
            time.sleep(0.0002)
        process.join(rng.uniform(0, seconds / steps))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def killed_run(arm: str, keys: dict, out_dir: Path, its_twin: Path, seconds: float, kills: int, rng) -> dict:
    """{"kills": what each of so many found half-written, "missed": starts that ended before theirs, "trouble"} of a run.

    One that comes through before its last kill is compared as it stands, and run anew.
    """
    found = {"arm": arm, "kills": [], "missed": 0}
    while len(found["kills"]) < kills:
        process = begin(arm, keys, out_dir)
        if strike(process, out_dir, rng, seconds, int(keys["max_iters"])):
            half = twin.half_written(out_dir)
            files = sorted(path.name for path in half[0].iterdir()) if half else []
            found["kills"].append({"in_write": bool(half), "files": files})
        elif process.exitcode:
            return found | {"trouble": f"a start failed: {last_words(log_of(out_dir))}"}
        else:
            found["missed"] += 1
            if wrong := compared(keys, out_dir, its_twin):
                return found | {"trouble": wrong}
            shutil.rmtree(out_dir)
    return found | {"trouble": finish(arm, keys, out_dir, its_twin)}


def at_random(args, work: Path) -> tuple[list[dict], list]:
    """Kills at random instants: (one record a run, the report's paragraphs and tables)."""
    rng, records, seconds = random.Random(args.seed), [], {}
    for number, first in enumerate(range(0, args.kills, PER_RUN)):
        arm = list(RECIPES)[number % len(RECIPES)]
        keys = KEYS | RECIPES[arm] | {"data_dir": work / "data"} | args.keys
        if arm not in seconds:
            seconds[arm] = make_twin(arm, keys, work / f"twin_{arm}")
        kills = min(PER_RUN, args.kills - first)
        run = killed_run(arm, keys, work / f"run_{number}", work / f"twin_{arm}", seconds[arm], kills, rng)
        print(f"run {number}, {arm}: {kills} kills, {run['trouble'] or 'the twin in every bit'}", flush=True)
        records.append(run)
    kills = [kill | {"arm": r["arm"], "passed": not r["trouble"]} for r in records for kill in r["kills"]]
    columns = {"fell into a checkpoint write": lambda k: k["in_write"], "passed": lambda k: k["passed"]}
    in_write = [k for k in kills if k["in_write"]]
    written = "By what the writes had finished when they were killed"
    return records, [
        f"**{sum(k['passed'] for k in kills)} of {len(kills)}** kills ended in the twin's bits; {len(in_write)} fell into "
        f"a checkpoint's write. {len(records)} runs of {KEYS['max_iters']} steps; in {sum(r['missed'] for r in records)} "
        "starts the process ended before its kill, which does not count.",
        twin.tally(written, "files", in_write, lambda k: ", ".join(k["files"]) or "an empty folder", columns),
        twin.tally("By recipe", "recipe", kills, lambda k: f"{k['arm']}, {RECIPES[k['arm']]}", columns),
    ]


# ---- at every line


def at_lines(args, work: Path) -> tuple[list[dict], list]:
    """Kills at every args.lines-th executed line: (one record a kill, the report's paragraphs and tables)."""
    arm, keys, executed = "bpe_tied", AT_LINES | {"data_dir": work / "data"} | args.keys, {}
    # so that the twin remembers the shards' hashes, and all others execute the same lines
    time.sleep(SETTLED_SECONDS + 0.1)
    make_twin(arm, keys, work / "twin")

    def in_third_write(*_) -> None:
        if list(work.glob("torn/ckpt/.writing_*3/optimizer.pt")):
            die()

    torn = begin(arm, keys, work / "torn", in_third_write)
    torn.join()
    if torn.exitcode != -signal.SIGKILL:
        raise RunError(f"no kill fell into the third checkpoint's write: {last_words(log_of(work / 'torn'))}")

    def killed(scene: str, name: str, on_line) -> int:
        """The exit status of a run of a scene."""
        if scene == "resumed":
            shutil.copytree(work / "torn", work / name)
        process = begin(arm, keys, work / name, on_line)
        process.join()
        return process.exitcode

    for scene in SCENES:
        with open(work / f"{scene}.lines", "w+", buffering=1) as lines:
            if killed(scene, scene, lambda _, place: lines.write(f"{place}\n")):
                raise RunError(f"an unkilled run fails under trace: {last_words(log_of(work / scene))}")
            lines.seek(0)
            executed[scene] = lines.read().split()
    records = [
        {"scene": scene, "number": number, "line": places[number - 1]}
        for scene, places in executed.items()
        for number in reversed(range(len(places), 0, -args.lines))  # the last line, too
    ]
    for record in records:
        number, name = record["number"], "{scene}_{number}".format(**record)
        status = killed(record["scene"], name, lambda n, _: n == number and die())  # noqa: B023 - called in this turn
        if status != -signal.SIGKILL:
            record["trouble"] = f"it ended with status {status} before its line came"
        else:
            record["trouble"] = finish(arm, keys, work / name, work / "twin")
        if not record["trouble"]:
            shutil.rmtree(work / name)
        print(f"{name}, {record['line']}: {record['trouble'] or 'the twin in every bit'}", flush=True)
    passed = {"passed": lambda r: not r["trouble"]}
    lines = " and ".join(f"a `{scene}` run executes {len(at):,} lines" for scene, at in executed.items())
    return records, [
        f"**{sum(map(passed['passed'], records)):,} of {len(records):,}** killed runs ended in the twin's bits. "
        f"{lines.capitalize()}; the kills fell on {len({r['line'] for r in records}):,} different lines of source.",
        twin.tally("By run", "run", records, lambda r: r["scene"], passed),
        twin.tally("By file", "file", records, lambda r: f"`{r['line'].partition(':')[0]}`", passed),
        "`fresh`: a run that begins. `resumed`: one that goes on from what a kill in the middle of a write has left.",
    ]


def arguments(argv):
    """The arguments; .keys are those for train.py."""
    parser = twin.parser(__doc__)
    add = parser.add_argument
    add("--kills", type=whole(1), default=100, help="kills that must fall on a living process (%(default)s)")
    add("--seed", type=int, default=1, help="of the instants")
    add("--lines", type=whole(1), metavar="N", help="kill at every N-th executed line instead")
    args, passed = parser.parse_known_args(argv)
    if wrong := [p for p in passed if not p.startswith("--") or "=" not in p]:
        parser.error(f"{' '.join(wrong)} is unknown here: further keys of train.py are written --key=value")
    args.keys = dict(p[2:].split("=", 1) for p in passed)
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    with sentences():
        work = Path(tempfile.mkdtemp(prefix="kill_train_"))
        write_data(work / "data", twin.VOCABULARY)
        records, parts = (at_lines if args.lines else at_random)(args, work)
        parts.append(
            "Compared: weights and AdamW's moments in every bit; all rows of metrics.jsonl but speed and memory; counters; "
            "the run's record; which checkpoints are kept; `latest` and `best`; and that nothing half-written stays."
        )
        title = f"Killed at {'every line' if args.lines else 'random instants'}, against the unkilled twin"
        twin.report(args, __file__, argv, title, {"runs": records}, parts)
        bad = [r for r in records if r["trouble"]]
        print(f"{len(records) - len(bad)} of {len(records)} killed runs ended in the twin's bits")
        if bad:
            print(f"the runs with trouble stay in {work}")
            return 1
        shutil.rmtree(work)
        return 0


if __name__ == "__main__":
    sys.exit(main())
