"""metrics.jsonl, the run's own record, and wandb beside it when asked."""

import json
import math
import os
import sys
from pathlib import Path

import torch

from engine.checkpoint import flush


def read_metrics(out_dir) -> list[dict]:
    """Rows of metrics.jsonl; a torn last line, left by a kill, is passed over."""
    path = Path(out_dir) / "metrics.jsonl"
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def is_finished(out_dir, max_iters: int) -> bool:
    return any("val/loss" in r and r["iter"] == max_iters for r in read_metrics(out_dir))


class Metrics:
    """Appends rows to metrics.jsonl and to wandb. Rows from `first_iter` on are dropped: they are made again."""

    def __init__(self, out_dir, first_iter: int, wandb_run=None):
        self.path, self.wandb_run = Path(out_dir) / "metrics.jsonl", wandb_run
        rows = [r for r in read_metrics(out_dir) if r["iter"] < first_iter]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
        flush(temporary)
        os.replace(temporary, self.path)
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open as long as the run

    def log(self, row: dict) -> None:
        # JSON knows no NaN; null says the same to every reader
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(plain) + "\n")
        if self.wandb_run is not None:
            try:
                self.wandb_run.log(row, step=row["iter"])
            except Exception as e:
                print(f"note: wandb failed ({e}); the run goes on with metrics.jsonl alone")
                self.wandb_run = None

    def sync(self) -> None:
        """All rows so far are on the disk itself, not in the system's memory."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(quiet=True)


def start_wandb(config: dict, run: dict):
    """A wandb run, or None with a word why not: wandb must never stop or delay a training run."""
    try:
        import wandb
    except ImportError:
        print("note: wandb is not installed (pip install wandb); the run goes on with metrics.jsonl alone")
        return None
    mode = os.environ.get("WANDB_MODE", "online")
    try:
        if mode == "online" and not wandb.api.api_key:
            # asking for a key would wait for ever where nobody sits at the terminal
            print(
                "note: wandb is not logged in (wandb login); logging offline, `wandb sync` uploads it later"
            )
            mode = "offline"
        return wandb.init(
            project=config["wandb_project"],
            name=config["wandb_run_name"] or f"{run['arm']}-s{run['seed']}",
            group=config["wandb_group"] or Path(config["out_dir"]).resolve().parent.name,
            tags=[run["arm"], f"seed {run['seed']}"],
            id=run["wandb_id"],
            resume="allow",
            dir=config["out_dir"],
            config=config | {"run": run},
            mode=mode,
            settings=wandb.Settings(init_timeout=30, silent=True),
        )
    except Exception as e:
        print(
            f"note: wandb did not start ({str(e).splitlines()[0]}); the run goes on with metrics.jsonl alone"
        )
        return None


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
