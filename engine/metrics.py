"""metrics.jsonl, the run's own record, one JSON object a line; and how fast the training is."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator
from typing_extensions import Required, TypedDict

from data.console import writing
from data.files import finite, write_text
from data.records import STRICT, read_rows
from engine.flops import peak_flops
from engine.ranks import settle
from engine.tracker import Tracker

# The figures that others compute with carry nanoGPT's wandb names, and null stands for NaN. Only `iter` is in all rows.
FIGURES = ("train/loss", "val/loss", "val/bpb", "wte/rms", "grad_norm", "tok_per_sec")
Named = TypedDict("Named", {"iter": Required[int]} | dict.fromkeys(FIGURES, float | None), total=False)
Named.__pydantic_config__ = STRICT


def evaluated(row: Named) -> Named:
    """A row whose losses by frequency, too many to be named, are numbers or null as well."""
    for key, x in row.items():
        if key.startswith("val/") and (isinstance(x, bool) or not isinstance(x, int | float | None)):
            raise ValueError(f"{key} should be a number or null")
    return row


Row = Annotated[Named, AfterValidator(evaluated)]


def read_metrics(out_dir) -> list[dict]:
    """Rows of metrics.jsonl, [] where there is none yet; a last line that a kill cut short is left out."""
    path = Path(out_dir) / "metrics.jsonl"
    return read_rows(path, Row, "a run's metrics") if path.is_file() else []


def is_evaluated(out_dir, step: int) -> bool:
    """Whether the record holds the evaluation of a step; with that of max_iters a run is finished."""
    return any("val/loss" in r and r["iter"] == step for r in read_metrics(out_dir))


class Metrics:
    """Appends rows to metrics.jsonl. Rows from `first_iter` on are dropped: they are made again."""

    def __init__(self, out_dir, first_iter: int, tracker: str = "none"):
        path = Path(out_dir) / "metrics.jsonl"
        rows = [r for r in read_metrics(out_dir) if r["iter"] < first_iter]
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self.tracker = None if tracker == "none" else Tracker(out_dir, tracker)

    def log(self, row: dict) -> None:
        with writing(self.file.name):
            self.file.write(json.dumps(finite(row)) + "\n")

    def sync(self) -> None:
        """All rows so far are on the disk itself, not in the system's memory."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.tracker is not None:
            self.tracker.close()


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (10^9 bytes): the allocator's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


class Progress:
    """Times the steps from `first` to max_iters; the clock stands still during evaluations and saves.

    flops_per_token: of the model; world: ranks that share a step.
    """

    def __init__(self, first: int, max_iters: int, tokens_per_step: int, flops_per_token: int, device, world):
        self.first, self.max_iters, self.tokens_per_step = first, max_iters, tokens_per_step
        self.device, self.flops_per_token = device, flops_per_token
        peak = peak_flops(device)
        self.peak = peak[0] * world if peak else None
        self.seconds, self.steps = 0.0, 0  # since the last figures
        self.started = self.began = time.perf_counter()

    def settle(self) -> None:
        """Before anything but training: what the device still has to do belongs to the steps before."""
        self.seconds += settle(self.device)

    def timed(self, work, *args):
        """work(*args), whose time counts: on a GPU a rank waits for a slower one's host between the steps, not in them."""
        began = time.perf_counter()
        result = work(*args)
        self.seconds += time.perf_counter() - began
        return result

    def begin_step(self) -> None:
        self.began = time.perf_counter()

    def end_step(self) -> None:
        self.seconds, self.steps = self.seconds + time.perf_counter() - self.began, self.steps + 1

    def figures(self) -> dict:
        """tok_per_sec of the steps since the last call, mfu (percent) where the device's peak is known, mem_gb."""
        row = {"tok_per_sec": self.steps * self.tokens_per_step / self.seconds}
        if self.peak:
            row["mfu"] = 100 * row["tok_per_sec"] * self.flops_per_token / self.peak
        self.seconds, self.steps = 0.0, 0
        return row | {"mem_gb": memory_gb(self.device)}

    def line(self, row: dict) -> str:
        """The row of a step as a line for the terminal, with the time that is left."""
        step, spent = row["iter"], time.perf_counter() - self.started
        left = int(spent / (step + 1 - self.first) * (self.max_iters - step - 1))
        mfu = f"  mfu {row['mfu']:.1f}%" if "mfu" in row else ""
        return (
            f"step {step:>6,}/{self.max_iters:,}  loss {row['train/loss']:.4f}  lr {row['lr']:.2e}  "
            f"norm {row['grad_norm']:.2f}  {row['tok_per_sec']:,.0f} tok/s{mfu}  {left // 60}:{left % 60:02d} left"
        )
