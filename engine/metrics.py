"""metrics.jsonl: the run's own record, one JSON object a line."""

import json
import os
import sys
from pathlib import Path

import torch
from typing_extensions import Required, TypedDict

from data.files import finite, write_text
from data.records import STRICT, read_rows
from engine.tracker import Tracker

# The figures that others compute with carry nanoGPT's wandb names, and null stands for NaN. Only `iter` is in all rows.
FIGURES = ("train/loss", "val/loss", "val/bpb", "wte/rms", "grad_norm", "tok_per_sec")
Row = TypedDict("Row", {"iter": Required[int]} | dict.fromkeys(FIGURES, float | None), total=False)
Row.__pydantic_config__ = STRICT


def read_metrics(out_dir) -> list[dict]:
    """Rows of metrics.jsonl, [] where there is none yet; a last line that a kill cut short is left out."""
    path = Path(out_dir) / "metrics.jsonl"
    return read_rows(path, Row, "a run's metrics") if path.is_file() else []


def is_finished(out_dir, max_iters: int) -> bool:
    return any("val/loss" in r and r["iter"] == max_iters for r in read_metrics(out_dir))


class Metrics:
    """Appends rows to metrics.jsonl. Rows from `first_iter` on are dropped: they are made again."""

    def __init__(self, out_dir, first_iter: int, tracker: str = "none"):
        path = Path(out_dir) / "metrics.jsonl"
        rows = [r for r in read_metrics(out_dir) if r["iter"] < first_iter]
        write_text(path, "".join(json.dumps(r) + "\n" for r in rows))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run
        self.tracker = None if tracker == "none" else Tracker(out_dir, tracker)

    def log(self, row: dict) -> None:
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
