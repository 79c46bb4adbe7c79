"""Kill a run at every line that it executes, in turn, and let the next start finish it.

    python scripts/trust/kill_lines.py --report results/trust/kill_lines
    python scripts/trust/kill_lines.py --stride 10                           at every tenth
    python scripts/trust/kill_lines.py --minutes 4                           a slice; the same command goes on

A kill from outside (scripts/trust/kill_train.py) seldom finds the few microseconds between two renames. Here a
forked child trains four steps under a trace function that sends it SIGKILL as the N-th line of train.py,
engine/ or data/files.py begins; a second child goes on undisturbed, and what it ends with is held against the twin
that was never killed. First in a run that begins (`fresh`), then in one that goes on from what a kill in the middle
of a checkpoint write has left (`resumed`).
"""

import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a fork must not inherit a thread pool
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import torch._dynamo  # noqa: F401 - the optimizer imports it: better once here than in every child

import configurator
import train
from data.identity import SETTLED_SECONDS
from data.meta import characters_meta, write_meta
from data.shards import write_shard
from engine.errors import RunError, sentences
from scripts.arguments import whole
from scripts.provenance import ROOT
from scripts.trust import twin

KEYS = twin.SMALL | {
    "n_layer": 1, "n_embd": 16, "block_size": 16, "batch_size": 4, "global_batch_size": 4, "max_iters": 4,
    "eval_interval": 2, "ckpt_interval": 1, "eval_tokens": 64, "warmup_iters": 1, "dropout": 0.1,
}  # fmt: skip
TRACED = ["train.py", "data/files.py", *sorted(f"engine/{p.name}" for p in (ROOT / "engine").glob("*.py"))]
SCENES = ("fresh", "resumed")


def child(args, name: str, kill_at: int = 0, when=None, lines_to=None, **changes) -> int:
    """Train OUT/NAME in a fork of this process; returns its exit status, negative for a signal.

    kill_at: number of the line (from 1) at which it kills itself. when: kills itself at the first line for
    which when() is true. lines_to: a file that gets "file:line" of all lines executed.
    """
    names = {str(ROOT / f): f for f in TRACED}
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seen, status = [], 1

    def on_line(frame, event, arg):
        if event == "line":
            seen.append(f"{names[frame.f_code.co_filename]}:{frame.f_lineno}")
            if len(seen) == kill_at or (when is not None and when()):
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    try:
        with open(args.out / f"{name}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        keys = KEYS | {"data_dir": args.out / "data", "out_dir": args.out / name} | changes
        sys.settrace(lambda frame, event, arg: on_line if frame.f_code.co_filename in names else None)
        train.main(configurator.load([f"--{k}={v}" for k, v in keys.items()]))
        sys.settrace(None)
        if lines_to:
            lines_to.write_text("\n".join(seen))
        status = 0
    except BaseException as e:
        sys.settrace(None)
        print(f"error: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def begin(out: Path, scene: str, name: str) -> None:
    """Empty OUT/NAME, or fill it with what a scene begins from."""
    shutil.rmtree(out / name, ignore_errors=True)
    if scene == "resumed":
        shutil.copytree(out / "torn", out / name)


def kill_and_go_on(args, job: dict) -> dict:
    """The trouble, if any, with a run killed at line number job["number"] and started again."""
    name = f"{job['scene']}_{job['number']}"
    begin(args.out, job["scene"], name)
    killed = child(args, name, kill_at=job["number"])
    if killed != -signal.SIGKILL:
        return {"trouble": f"it ended with status {killed} before its line came"}
    if went_on := child(args, name):
        return {"trouble": f"the next start ended with status {went_on}"}
    if wrong := twin.differences(twin.compare(args.out / name, args.out / "twin", KEYS["keep"])):
        return {"trouble": f"not {', '.join(wrong)}"}
    shutil.rmtree(args.out / name)
    (args.out / f"{name}.log").unlink()
    return {"trouble": None}


def prepare(args) -> list[dict]:
    """Make data, the twin and what a kill in a write leaves; {"scene", "number", "line"} of every line executed."""
    out, lines = args.out, []
    for name in ("twin", "torn", "data"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "data").mkdir()
    tokens = np.random.default_rng(0).integers(0, 28, 3000).astype(np.uint16)
    write_shard(out / "data" / "noise_val_000000.bin", tokens[:500])
    write_shard(out / "data" / "noise_train_000001.bin", tokens[500:])
    write_meta(out / "data", characters_meta("noise", list("\n abcdefghijklmnopqrstuvwxyz")))
    # so that the twin remembers the shards' hashes, and all others execute the same lines
    time.sleep(SETTLED_SECONDS + 0.1)
    if child(args, "twin", keep=twin.ALL):
        raise RunError(f"the unkilled twin does not train: see {out / 'twin.log'}")

    def writing_third() -> bool:
        folders = twin.half_written(out / "torn")
        return any(f.name.endswith("3") and (f / "optimizer.pt").exists() for f in folders)

    if child(args, "torn", when=writing_third) != -signal.SIGKILL:
        raise RunError(f"no kill fell into the third checkpoint's write: see {out / 'torn.log'}")
    for scene in SCENES:
        name = f"{scene}_all"
        begin(out, scene, name)
        if child(args, name, lines_to=out / f"{name}.lines"):
            raise RunError(f"an unkilled run fails under the trace function: see {out / f'{name}.log'}")
        executed = (out / f"{name}.lines").read_text().split()
        lines += [{"scene": scene, "number": n, "line": line} for n, line in enumerate(executed, 1)]
    return lines


def parts(records: list[dict], executed: dict) -> list:
    """The report's paragraphs and tables."""
    passed = {"passed": lambda r: r["trouble"] is None}
    lines = " and ".join(f"a `{scene}` run executes {n:,} lines" for scene, n in executed.items())
    return [
        f"**{sum(map(passed['passed'], records)):,} of {len(records):,}** killed runs were finished by the next start and "
        f"ended in the twin's bits. {lines.capitalize()}; the kills fell on {len({r['line'] for r in records}):,} different "
        "lines of source.",
        twin.tally("By run", "run", records, lambda r: r["scene"], passed),
        twin.tally("By file", "file", records, lambda r: f"`{r['line'].partition(':')[0]}`", passed),
        "`fresh`: a run that begins. `resumed`: one that goes on from what a kill in the middle of a checkpoint "
        "write has left. Compared are weights and moments in every bit, all rows but speed and memory, the run's "
        "record, the kept checkpoints, `latest` and `best`, and that nothing half-written stays.",
    ]


def main(argv=None) -> int:
    parser = twin.parser(__doc__, "out/kill_lines")
    parser.add_argument("--stride", type=whole(1), default=1, help="kill at every so many-th line")
    args = parser.parse_args(argv)
    with sentences():
        args.out = args.out.resolve()
        args.out.mkdir(parents=True, exist_ok=True)
        lines = prepare(args)
        executed = {scene: sum(line["scene"] == scene for line in lines) for scene in SCENES}
        jobs = lines[:: -args.stride][::-1]  # the last line, too
        # lines that are executed no longer, or at another moment, were killed in other code
        records, todo = twin.kept(args, jobs)
        twin.go_on(args, records, todo, partial(kill_and_go_on, args), 2)
        bad = [r for r in records if r["trouble"]]
        passed = len(records) - len(bad)
        data = {"executed": executed, "kills": len(records), "passed": passed, "failed": bad}
        title = "Killed at every line, against the unkilled twin"
        twin.report(args, __file__, argv, records, data, title, parts(records, executed))
        print(f"{passed} of {len(records)} killed runs ended in the twin's bits")
        return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
