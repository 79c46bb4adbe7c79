"""A run shown elsewhere while it trains: its metrics.jsonl, row by row, in Weights & Biases or in a local trackio.

    python -m engine.tracker out/demo/kronecker_s1337 --to=trackio      show a run that was trained without one

A process of its own follows the record, so that nothing that happens to a tracker stops a run or makes it wait, and
a killed run is still sent to its last row. Every start sends the record from its first row: a resumed run is whole.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from functools import partial
from pathlib import Path

from data import DataError
from data.console import Parser, first_line
from data.files import Lock
from data.records import read_record

ROOT = Path(__file__).resolve().parent.parent
FINISH = 30  # seconds that the end of a run waits for its last rows to be sent
GIVE_UP = 300  # seconds after the run's end when a process that still sends ends itself


# ---- in the training process


class Tracker:
    """Starts the process that shows `out_dir` in `to` ("wandb" or "trackio"), and passes on what it says."""

    def __init__(self, out_dir, to: str):
        out_dir = Path(out_dir).resolve()
        command = [sys.executable, "-m", "engine.tracker", str(out_dir), f"--to={to}", "--follow"]
        try:
            with open(out_dir / "tracker.log", "a") as log:
                # a session of its own: Ctrl-C is for the run, which ends this process by closing its input
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
                    text=True, errors="replace", start_new_session=True,
                )  # fmt: skip
        except OSError as e:
            note(f"{to} did not start ({e}); the run goes on with metrics.jsonl alone")
            self.close = lambda: None
            return
        voice = threading.Thread(target=pass_on, args=(self.process.stdout,), daemon=True)
        voice.start()
        # also when the run ends by a signal or an error, and nobody calls close()
        self.close = weakref.finalize(self, finish, self.process, voice, to)


def note(sentence: str, file=None) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody listens any more
        print(f"note: {sentence}", file=file, flush=True)


def pass_on(sentences) -> None:
    for line in sentences:
        note(line.removeprefix("note: ").rstrip("\n"))


def finish(process: subprocess.Popen, voice: threading.Thread, to: str) -> None:
    """The run is over: let the process send the last rows, but do not wait for ever."""
    with contextlib.suppress(OSError):  # it has ended before
        process.stdin.write("\n")  # closing alone says nothing while a forked worker holds a copy of the pipe
        process.stdin.close()
    try:
        code = process.wait(FINISH)
        voice.join(1)
        if code not in (0, 1):  # with 1 it has said why
            note(f"the process that sends rows to {to} died ({code}); they are in metrics.jsonl")
    except subprocess.TimeoutExpired:
        note(
            f"{to} has not taken all rows within {FINISH} seconds; they are in metrics.jsonl, and "
            f"`python -m engine.tracker OUT_DIR --to={to}` sends them again"
        )


# ---- in the process of its own


def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("out_dir", type=Path, help="folder of the run")
    parser.add_argument("--to", choices=("wandb", "trackio"), required=True, help="where to show it")
    parser.add_argument("--follow", action="store_true", help="wait for new rows until stdin is closed")
    args = parser.parse_args(argv)
    voice, sys.stdout = sys.stdout, sys.stderr  # what the packages print goes to the log
    say = partial(note, file=voice)
    over = threading.Event()
    if args.follow:
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_IGN)  # the run's end is the end, however it comes
        threading.Thread(target=wait_for_the_end, args=(over,), daemon=True).start()
    else:
        over.set()
    try:
        config = read_record(args.out_dir / "config.json", dict, "a run's configuration")
        run = read_record(args.out_dir / "run.json", dict, "a run's record")
        # the process of the run's last start, killed a moment ago, may still send its rows
        refusal = f"another process still sends the rows of {args.out_dir}"
        with Lock(args.out_dir / ".tracker.lock", refusal, patience=GIVE_UP):
            send = {"wandb": send_to_wandb, "trackio": send_to_trackio}[args.to]
            send(args.out_dir, config, run, follow(args.out_dir / "metrics.jsonl", over), say)
        return 0
    except Unreachable as e:
        say(f"wandb cannot be reached ({e}); the run is written offline, and `wandb sync` uploads it")
        # from anew and with another wandb-core: this one keeps hold of a run that it could not begin
        os.environ["WANDB_MODE"] = "offline"
        os.environ.pop("WANDB_SERVICE", None)
        os.execv(sys.executable, [sys.executable, "-m", "engine.tracker", *argv])
    except Exception as e:
        missing = isinstance(e, ModuleNotFoundError) and e.name == args.to
        why = f"is not installed: pip install {args.to}" if missing else f"failed ({first_line(e)})"
        if not args.follow:
            sys.exit(f"error: {e}" if isinstance(e, DataError) else f"error: {args.to} {why}")
        traceback.print_exc()
        say(f"{args.to} {why}; the record is {args.out_dir / 'metrics.jsonl'} alone")
        return 1


class Unreachable(Exception):
    """wandb's server did not take the run."""


def wait_for_the_end(over: threading.Event) -> None:
    os.read(0, 1)  # until the run says that it is over, or dies
    over.set()
    time.sleep(GIVE_UP)
    os._exit(1)


def follow(path: Path, over: threading.Event):
    """Rows of a metrics.jsonl as they are written, until the run is over. A line that was cut short is left out."""
    with open(path, encoding="utf-8") as file:
        rest = ""
        while True:
            last = over.is_set()  # asked first: what was written before the end is read below
            *lines, rest = (rest + file.read()).split("\n")
            for line in filter(str.strip, lines):
                yield {k: float("nan") if v is None else v for k, v in json.loads(line).items()}
            if last:
                return
            over.wait(1)


def names(out_dir: Path, config: dict, run: dict) -> dict:
    """Project, group and name: in one project, the runs of one comparison share a group and lie over each other."""
    return {
        "project": config["wandb_project"],
        "group": config["wandb_group"] or out_dir.resolve().parent.name,
        "name": config["wandb_run_name"] or f"{run['arm']}-s{run['seed']}",
        "config": config | {"run": run},
    }


def send_to_wandb(out_dir: Path, config: dict, run: dict, rows, say) -> None:
    import wandb

    known = names(out_dir, config, run) | {
        "id": run["wandb_id"],
        "job_type": "train",
        "tags": [run["arm"], f"seed {run['seed']}"],
        "dir": str(out_dir),
        "settings": {
            "init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", 30)),
            "finish_timeout": GIVE_UP,
            "silent": True,
            "console": "off",
        },
    }
    mode = wandb.setup().settings.mode
    if mode in ("offline", "dryrun"):
        # each such file holds the whole run, and takes the place of an earlier one when it is uploaded
        shown = wandb.init(**known, mode="offline")
    else:
        try:
            if mode != "disabled" and not wandb.login(prompt=False, verify=False):
                raise ValueError("nobody is logged in: wandb login")
            shown = wandb.init(**known, mode=mode, resume="allow")
        except Exception as e:
            raise Unreachable(first_line(e)) from e
        if shown.url:
            say(f"wandb shows this run at {shown.url}")
    shown.define_metric("iter")
    shown.define_metric("tokens")
    shown.define_metric("*", step_metric="iter")
    for row in rows:
        if row["iter"] >= shown.starting_step:  # the server has the rows before
            shown.log(row, step=row["iter"])
    shown.finish()


def send_to_trackio(out_dir: Path, config: dict, run: dict, rows, say) -> None:
    # only this machine's dashboard: nothing is asked of a network
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        os.environ.pop(name, None)
    import trackio

    known = names(out_dir, config, run)
    try:
        there = list(trackio.Api().runs(known["project"]))
    except ValueError:  # a new project
        there = []
    for old in there:
        if ((old.config or {}).get("run") or {}).get("wandb_id") == run["wandb_id"]:
            old.delete()  # this run, sent by an earlier start
    shown = trackio.init(**known, embed=False)
    say(f"to see this run: trackio show --project {shlex.quote(known['project'])}")
    for row in rows:
        shown.log(row, step=row["iter"])
    shown.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
