"""What every bench is made of: sides that take turns, ratios within a round with their spread, a page and its record."""

import argparse
import contextlib
import math
import re
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import torch

from data.files import expanded
from engine.errors import RunError
from engine.ranks import settle
from scripts.analysis.report import progress
from scripts.arguments import Parser, whole
from scripts.pool import last_words
from scripts.provenance import ROOT, write_page


def parser(doc: str, rounds: int = 3) -> Parser:
    """The arguments that the benches share."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--rounds", type=whole(1), default=rounds, help="times that every side runs (%(default)s)")
    add("--out", type=expanded, default=ROOT / "out" / "bench", help="folder of the page and its record")
    return parser


def nanogpt(text: str) -> Path:
    """An argparse type: a checkout of nanoGPT."""
    folder = expanded(text).resolve()
    for name in ("train.py", "model.py", "configurator.py"):
        if not (folder / name).is_file():
            raise argparse.ArgumentTypeError(f"{text} is no checkout of nanoGPT: it has no {name}")
    return folder


def timed(work, device: str = "cpu") -> tuple[float, object]:
    """(milliseconds of one call, what it gave); on CUDA by the device's own clock."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        given = work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), given
    where = torch.device(device)
    settle(where)
    start = time.perf_counter()
    given = work()
    settle(where)
    return 1e3 * (time.perf_counter() - start), given


def run(command: list, cwd=ROOT, limit=math.inf, watch=True) -> tuple[str, float, float]:
    """(output, seconds, peak GB) of a process, which is ended after `limit` seconds; RunError if it fails.

    watch: look at its memory (else 0 GB). The look at a whole tree, such as a compiler's helpers make, slows it down.
    """
    with tempfile.NamedTemporaryFile() as out:
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
            seconds = time.perf_counter() - began
            if seconds > max(limit, 1):
                process.kill()
            peak = max(peak, memory_of(process.pid)) if watch else 0
        if process.returncode == -signal.SIGKILL and limit < math.inf:
            raise RunError(f"ended after {limit:.0f} s, without figures")
        if process.returncode:
            script = next(word for word in map(str, command) if word.endswith(".py"))
            raise RunError(f"{script} failed: {last_words(Path(out.name))}")
        return Path(out.name).read_text(), seconds, peak / 1e9


def memory_of(pid: int) -> int:
    """Bytes: the peak so far of a process alone; what it and all below it hold now, shared pages counted once; else 0.

    The pages of a process alone are not looked at, which would slow it down.
    """
    try:
        root = psutil.Process(pid)
        below = root.children(recursive=True)
        return sum(p.memory_full_info().pss for p in [root, *below]) if below else high_water(pid)
    except (psutil.Error, OSError, TypeError, AttributeError):  # one has just ended; or this is not Linux
        return 0


def high_water(pid: int | str = "self") -> int:
    """Bytes of a process's resident memory at its peak (what wait4 gives counts the parent's from before exec)."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def alternate(sides: dict, n_rounds: int, left=lambda: math.inf, say=progress) -> dict[str, list]:
    """Call each side once a round, there and back again: {side: [its figures in each round]}.

    left: function that gives the seconds that are left. Where they are counted, a round that would take longer than
    the longest before it is not begun (the first always is), and a side that fails is said and has None in that round
    instead of ending the measurement.
    """
    rounds, longest = {side: [] for side in sides}, 0.0
    for n in range(n_rounds):
        if n and left() < longest:
            say(f"no time for round {n + 1} of {n_rounds}")
            break
        began = time.perf_counter()
        for side in list(sides)[:: -1 if n % 2 else 1]:
            say(f"round {n + 1} of {n_rounds}, {side}")
            try:
                rounds[side].append(sides[side]())
            except RunError as e:
                if left() == math.inf:
                    raise
                say(f"{side}: {e}")
                rounds[side].append(None)
        longest = max(longest, time.perf_counter() - began)
    return rounds


def column(rounds: dict, side: str, key: str) -> list:
    """One figure of a side in each round, None where it has none."""
    return [figures and figures[key] for figures in rounds.get(side, ())]


def median(values: list, form: str = ",.2f") -> str:
    """The median of the rounds' figures, "-" where there is none."""
    there = [v for v in values if v is not None]
    return format(statistics.median(there), form) if there else "-"


def ratio(over: list, under: list) -> str:
    """The median of one side's figures over another's, round by round, and where there are several the lowest and highest."""
    found = [a / b for a, b in zip(over, under, strict=False) if a is not None and b]
    if not found:
        return "-"
    middle, low, high = (
        f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}"
        for x in (statistics.median(found), min(found), max(found))
    )
    return f"{middle}x" if len(found) == 1 else f"{middle}x ({low} to {high})"


def publish(folder: Path, name: str, title: str, made: dict, record: dict, parts: list) -> None:
    """Print the tables and write FOLDER/NAME.json and .md; made: what `provenance` gave, parts: paragraphs and Tables."""
    print("\n\n".join(p if isinstance(p, str) else p.text() for p in parts))
    write_page(folder / name, title, made, record, parts)
    print(f"\nwritten to {folder / name}.json and .md")
