"""Where the time of a training goes: train.py as it is, with a clock around the functions that its loop calls.

    python scripts/bench/shares.py config/demo.py config/arms/kronecker.py --out_dir=out/shares

takes train.py's arguments; the last line is JSON, the share of the loop's time by part. scripts/bench/train.py --shares
makes a table of it.
"""

import contextlib
import functools
import json
import sys
import time
from pathlib import Path
from unittest import mock

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch

import configurator
import model
import train
from engine import checkpoint, evaluation, runs
from engine.errors import sentences
from engine.metrics import Metrics
from engine.progress import Progress
from engine.step import GuardedStep

# The functions of a part, each as (where its caller looks it up, name); what they call is theirs.
PARTS = {
    "embedding": [(model.GPT, "embed")],
    "blocks": [(model.Block, "forward")],
    "head and loss": [(model, "cross_entropy")],
    "backward": [(torch.Tensor, "backward")],
    "clip and AdamW": [(GuardedStep, "step")],
    "evaluation": [(evaluation, "evaluate"), (train, "token_counts"), (model.GPT, "wte_norms")],
    "checkpoints": [(runs, "save"), (checkpoint, "keep_as_best")],
    "logging": [(Metrics, "log"), (Progress, "figures"), (Progress, "line")],
}  # fmt: skip
BESIDE = ("evaluation", "checkpoints", "logging")


def shares(config) -> dict[str, float]:
    """Share of the loop's time by part, of "the rest", and of all that is beside training; the loop lasts from its first
    part to the run's end."""
    seconds, running, began = dict.fromkeys(PARTS, 0.0), [], []

    def clocked(part, function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            if running:  # inside another part, which it belongs to
                return function(*args, **kwargs)
            running.append(part)
            began.append(time.perf_counter())
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                seconds[part] += time.perf_counter() - began[-1]
                running.clear()

        return run

    with contextlib.ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clocked(part, getattr(owner, name))))
        train.main(config)
        whole = time.perf_counter() - began[0]
    found = {part: s / whole for part, s in seconds.items()}
    beside = {", ".join(BESIDE): sum(map(found.get, BESIDE))}
    return found | {"the rest": 1 - sum(found.values())} | beside


def main(argv=None) -> None:
    with sentences():
        print(json.dumps(shares(configurator.load(sys.argv[1:] if argv is None else argv))))


if __name__ == "__main__":
    main()
