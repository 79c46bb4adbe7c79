"""Sides that are measured in turns: the runs, and ratios of the runs of one round with their spread."""

import math
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from engine.errors import RunError


def timed(command: list[str], cwd: Path, limit: float = math.inf) -> tuple[str, float]:
    """(output, peak resident memory in GB) of a process, which is ended after `limit` seconds."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
        clock = threading.Timer(min(max(limit, 1.0), 10**6), process.kill)
        clock.start()
        _, status, usage = os.wait4(process.pid, 0)
        clock.cancel()
        out.seek(0)
        text = out.read()
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL and limit < math.inf:
        raise RunError(f"ended after {limit:.0f} s, without figures")
    if code:
        lines = text.strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        script = next(word for word in command if word.endswith(".py"))
        raise RunError(f"{script} failed: {said.removeprefix('error: ')}")
    return text, usage.ru_maxrss * 1024 / 1e9


def alternate(sides: dict, n_rounds: int, left=lambda: math.inf, say=print) -> dict[str, list[dict]]:
    """Run each side once a round, there and back again: {side: [figures, with the "round" they belong to]}.

    sides: {name: function of the round's number}. left: function that gives the seconds that are left. Where they
    are counted, a round that would take longer than the longest before it is not begun (the first always is), and
    a side that fails is said and left out of that round instead of ending the measurement.
    """
    rounds, longest = {side: [] for side in sides}, 0.0
    for n in range(n_rounds):
        if n and left() < longest:
            say(f"no time for round {n + 1} of {n_rounds}")
            break
        began = time.perf_counter()
        for side in list(sides)[:: 1 if n % 2 == 0 else -1]:
            say(f"round {n + 1} of {n_rounds}, {side}")
            try:
                rounds[side].append({"round": n} | sides[side](n))
            except RunError as e:
                if left() == math.inf:
                    raise
                say(f"{side}: {e}")
        longest = max(longest, time.perf_counter() - began)
    return rounds


def ratios(rounds: dict, side: str, base: str, key: str) -> list[float]:
    """One side's figure over another's in each round that both have."""
    of_base = {f["round"]: f[key] for f in rounds.get(base, ())}
    return [f[key] / of_base[f["round"]] for f in rounds[side] if f["round"] in of_base]


def times(ratios: list[float], digits: int = 2) -> str:
    """The median ratio, and the lowest and highest in brackets where there are several."""
    if not ratios:
        return "-"
    middle, low, high = (f"{f(ratios):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle}x" if len(ratios) == 1 else f"{middle}x ({low} to {high})"
