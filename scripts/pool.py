"""Run training jobs side by side, each on devices of its own, until all have ended.

A job is a command that trains into a folder and goes on from what it finds there. This module starts jobs,
watches them, starts again what was lost, and says how each ended; it knows neither arms nor recipes.
"""

import ctypes
import datetime
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from data.console import explain

TIME_IS_UP, DIVERGED = 124, 3  # exit statuses beside 0, 1 and 128 + signal; timeout(1) has the first, too
HEADER = "--- started on"  # of each start in train.log
GRACE = 300  # seconds that a job has to save once it is asked to stop


@dataclass(frozen=True)
class Job:
    name: str  # as a person would say it, e.g. "kronecker, seed 1338"
    command: tuple[str, ...]
    out_dir: Path
    max_iters: int


def state(job: Job) -> tuple[str, int]:
    """("finished" | "diverged" | "unfinished", step of the last row), by what the job's folder says.

    Diverged: the last evaluation gave no number, or the run has said in run.json that it gave up.
    """
    rows = last_rows(job.out_dir)
    step = rows[-1].get("iter", 0) if rows else 0
    ends = [row["val/loss"] for row in rows if "val/loss" in row and row.get("iter") == job.max_iters]
    if ends:
        return ("diverged" if ends[-1] is None else "finished"), step
    try:
        gave_up = json.loads((job.out_dir / "run.json").read_text()).get("diverged") is not None
    except (OSError, ValueError, AttributeError):
        gave_up = False
    return ("diverged" if gave_up else "unfinished"), step


def last_rows(out_dir) -> list[dict]:
    """Rows in the last 64 KiB of metrics.jsonl; torn lines are passed over."""
    rows = []
    try:
        with open(Path(out_dir) / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - (1 << 16)))
            for line in f:
                with suppress(ValueError):
                    rows.append(json.loads(line))
    except OSError:
        pass
    return [row for row in rows if isinstance(row, dict)]


def last(job: Job, key: str) -> dict:
    """The last row that has a key; {} where none has."""
    return next((row for row in reversed(last_rows(job.out_dir)) if key in row), {})


# ---- one job on this machine


class Local:
    """Children of this process; each of the slots, a tuple of CUDA device names (empty: the CPU), takes one at a time."""

    def __init__(self, slots: list[tuple[str, ...]], threads: int = 1, nice: int = 0):
        self.slots, self.threads, self.nice = list(slots), threads, nice
        self.taken: dict[subprocess.Popen, tuple[str, ...]] = {}

    def __str__(self) -> str:
        gpus = f" on GPUs {' '.join(','.join(slot) for slot in self.slots)}" if any(self.slots) else ""
        return f"{len(self.slots)} at a time{gpus}"

    def has_room(self) -> bool:
        return bool(self.slots)

    def start(self, job: Job) -> subprocess.Popen:
        child = start_child(job, self.slots[0], self.threads, self.nice)
        self.taken[child] = self.slots.pop(0)
        return child

    def poll(self, child: subprocess.Popen) -> int | str | None:
        """The exit status of a child that has ended (negative: the signal that ended it), else None.

        Other engines may answer with a sentence: how the run was lost.
        """
        if child.poll() is not None:
            self.slots.append(self.taken.pop(child))
        return child.returncode

    def stop(self, child: subprocess.Popen, number: int = signal.SIGTERM) -> None:
        stop_child(child, number)


def start_child(job: Job, devices=(), threads: int = 1, nice: int = 0, place: str = "") -> subprocess.Popen:
    """Start a job's command; what it prints goes to train.log in its folder.

    It leads a session of its own, so that Ctrl-C reaches this process alone, which then asks its children to
    save. On Linux the kernel sends the child SIGTERM when this process dies, whatever kills it: the child
    saves, and nothing trains on unseen.
    """
    # what the user has set stands; torchrun's own limit for a rank to save is 30 seconds
    usual = {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE // 2)}
    environment = usual | os.environ
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def before_exec() -> None:
        if nice:
            os.nice(nice)
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it died before that
                os._exit(128 + signal.SIGTERM)

    job.out_dir.mkdir(parents=True, exist_ok=True)
    with open(job.out_dir / "train.log", "a") as log:
        gpus = environment.get("CUDA_VISIBLE_DEVICES")
        where = f"{place or socket.gethostname()}{f', GPUs {gpus}' * bool(gpus)}"
        print(f"{HEADER} {where}: {shlex.join(job.command)}", file=log, flush=True)
        how = {"env": environment, "start_new_session": True, "preexec_fn": before_exec}
        how |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(job.command, **how)


def ranks_of(child: subprocess.Popen) -> dict[int, psutil.Process]:
    """{rank: process} of what torchrun has started; {} of any other child."""
    found = {}
    with suppress(psutil.NoSuchProcess):  # it has just ended
        for process in psutil.Process(child.pid).children():
            with suppress(psutil.Error):
                if (rank := process.environ().get("RANK")) is not None:
                    found[int(rank)] = process
    return found


def stop_child(child: subprocess.Popen, number: int) -> None:
    """Send a child's session a signal; SIGKILL also to torchrun's ranks, which lead sessions of their own.

    A tracker, in yet another session, is left to send the last rows.
    """
    ranks = ranks_of(child) if number == signal.SIGKILL else {}
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(child.pid, number)
    for process in ranks.values():
        with suppress(psutil.NoSuchProcess):
            process.kill()


def last_words(log: Path, offset: int = 0) -> str:
    """The cause that a log gives from a position on: its last error sentence, else its last line."""
    try:
        with open(log, "rb") as f:
            f.seek(offset)
            lines = f.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    lines = [line for line in lines if not line.startswith(HEADER)] or ["it printed nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    return (errors or lines)[-1]


# ---- all jobs


@dataclass
class Attempt:
    """A job that is running: its handle with the engine, and when it last made a row."""

    job: Job
    handle: object
    log_start: int
    seen: tuple = ()
    since: float = field(default_factory=time.monotonic)
    hung: bool = False
    asked: float | None = None  # when it was asked to stop

    def stop(self, engine) -> None:
        """Ask once; after GRACE seconds end what has not listened."""
        if self.asked is None:
            self.asked = time.monotonic()
            engine.stop(self.handle)
        elif time.monotonic() - self.asked > GRACE:
            engine.stop(self.handle, signal.SIGKILL)

    def idle(self) -> float:
        """Seconds without a new row in metrics.jsonl, once it is out of the engine's queue."""
        now = file_mark(self.job.out_dir / "metrics.jsonl")
        started = file_mark(self.job.out_dir / "train.log")[:1] > (self.log_start,)
        if now != self.seen or not started:
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() - self.since


def file_mark(path: Path) -> tuple:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns


def run(
    jobs: list[Job],
    engine,
    minutes: float | None = None,
    retries: int = 1,
    patience: float = 3600,
    on_end: Callable[[Job], None] = lambda job: None,
) -> int:
    """Run the jobs that have not ended; the exit status.

    engine: Local, or anything with its four methods. minutes: then stop, every job saved. retries: how often a job
    that was lost (ended by a signal, or with its node), hung (no new row for `patience` seconds) or failed is started
    again. on_end: called with each job that ends finished or diverged.

    0: all are finished; 1: one failed, and the rest has run; DIVERGED: none failed, but one ended without a finite
    loss; TIME_IS_UP, 128 + signal: stopped, and the same call goes on from there.
    """
    progress = Progress(jobs)
    label = {job.name: f"run {i} of {len(jobs)} {job.name}" for i, job in enumerate(jobs, 1)}
    ends = {job.name: (state(job)[0], "") for job in jobs}  # how, and why
    tries = Counter()
    waiting = [job for job in jobs if ends[job.name][0] == "unfinished"]
    running: list[Attempt] = []
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    stop = None  # the exit status, once all are asked to stop

    def start(job: Job) -> None:
        log = file_mark(job.out_dir / "train.log") or (0,)
        try:
            running.append(Attempt(job, engine.start(job), log[0]))
        except OSError as e:
            e.filename = e.filename or job.out_dir
            ends[job.name] = "failed", explain(e) or str(e)

    def end(a: Attempt, code: int | str) -> None:
        name = a.job.name
        ends[name] = how, cause = how_it_ended(a, code, stop is not None)
        if how in ("finished", "diverged"):
            on_end(a.job)
            loss = f"val loss {last(a.job, 'val/loss')['val/loss']:.4f}" if how == "finished" else ""
            say(f"{label[name]}: {loss or f'diverged {cause}'}")
        elif how != "interrupted" and stop is None:
            tries[name] += 1
            again = tries[name] <= retries
            say(f"{label[name]}: {how} ({cause}){'; started again' * again}")
            waiting.extend([a.job] * again)

    with collected_signals() as signals:
        try:
            while running or (waiting and stop is None):
                while waiting and stop is None and engine.has_room():
                    start(waiting.pop(0))
                time.sleep(0.3)
                if stop is None and (signals or time.monotonic() > deadline):
                    stop = 128 + signals[0] if signals else TIME_IS_UP
                    signals.clear()
                    what = "each run finishes its step and saves; the same command goes on from there"
                    say(f"stopping: {what}")
                for a in running:
                    a.hung = a.hung or (stop is None and a.idle() > patience)
                    if a.hung or stop is not None:
                        a.stop(engine)
                    if stop is not None and signal.SIGINT in signals:  # Ctrl-C again: at once
                        engine.stop(a.handle, signal.SIGKILL)
                progress.show([(label[a.job.name], a.job) for a in running])
                for a in list(running):
                    code = engine.poll(a.handle)
                    if code is not None:
                        running.remove(a)
                        end(a, code)
        finally:  # children are left here by an error of this program alone
            for a in running:
                engine.stop(a.handle)
    if stop is not None and any(how in ("unfinished", "interrupted") for how, _ in ends.values()):
        return stop
    return report(jobs, ends)


def how_it_ended(a: Attempt, code: int | str, asked: bool) -> tuple[str, str]:
    """(finished | diverged | interrupted | hung | lost | failed, the cause in words)."""
    now, step = state(a.job)
    if now != "unfinished" or asked:
        return now if now != "unfinished" else "interrupted", f"at step {step}"
    if a.hung:
        return "hung", f"no new step after {step}"
    if isinstance(code, str):
        return "lost", code
    number = -code if code < 0 else code - 128
    if code < 0 or number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return "lost", f"ended by {signal.Signals(number).name} at step {step}"
    words = last_words(a.job.out_dir / "train.log", a.log_start)
    return "failed", words if code else f"it ended at step {step} of {a.job.max_iters}: {words}"


def report(jobs: list[Job], ends: dict[str, tuple[str, str]]) -> int:
    """Name on stderr every job that has not finished, those with the same cause together; the exit status."""
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        how, cause = ends[job.name]
        if how != "finished":
            groups.setdefault((how, cause or f"at step {state(job)[1]}"), []).append(job)
    for (how, cause), members in groups.items():
        log = members[0].out_dir / "train.log"
        verb = how if how in ("diverged", "failed") else f"was {how}"
        text = f"{'; '.join(job.name for job in members)} {verb}{':' * (how != 'diverged')} {cause}"
        text += f" (all of it: {log})" if log.exists() else ""
        advice = ": the loss was not finite; delete the folder to train it anew"
        print(f"error: {text}{advice * (how == 'diverged')}", file=sys.stderr, flush=True)
    kinds = {how for how, _ in groups}
    return 1 if kinds - {"diverged"} else DIVERGED if kinds else 0


class Progress:
    """One line on all that runs: every second on a terminal, every ten elsewhere."""

    def __init__(self, jobs: list[Job]):
        self.jobs = jobs
        self.started = self.shown = time.monotonic()
        self.at_start = self.steps_done()

    def steps_done(self) -> int:
        states = [(job, *state(job)) for job in self.jobs]
        return sum(step if how == "unfinished" else job.max_iters for job, how, step in states)

    def show(self, running: list[tuple[str, Job]]) -> None:
        now = time.monotonic()
        if now - self.shown < (1 if sys.stdout.isatty() else 10):
            return
        self.shown = now
        parts = []
        for name, job in running:
            if row := last(job, "train/loss"):
                loss = "nan" if row["train/loss"] is None else f"{row['train/loss']:.3f}"
                speed = row.get("tok_per_sec") or 0
                parts.append(f"{name}: step {row['iter']}/{job.max_iters} loss {loss} {speed:,.0f} tok/s")
        if not parts:
            return
        total, done = sum(job.max_iters for job in self.jobs), self.steps_done()
        if done > self.at_start:
            left = (now - self.started) * (total - done) / (done - self.at_start)
            parts.append(f"{datetime.timedelta(seconds=int(left))} left")
        show_status(" | ".join(parts))


def say(line: str) -> None:
    """A line that stays, over the one of `show_status`."""
    print(("\r\033[K" if sys.stdout.isatty() else "") + line, flush=True)


def show_status(line: str) -> None:
    """A line that the next one replaces on a terminal."""
    if sys.stdout.isatty():
        print("\r\033[K" + line[: os.get_terminal_size().columns - 1], end="", flush=True)
    else:
        print(line, flush=True)


@contextmanager
def collected_signals():
    """SIGINT, SIGTERM and SIGHUP go into the list that this gives, instead of ending the process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]  # nohup's SIGHUP is not
    got: list[int] = []
    old = {n: signal.signal(n, lambda number, frame: got.append(number)) for n in heeded}
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
