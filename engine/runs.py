"""A run's folder: who it is, and where runs lie."""

import dataclasses
import errno
import hashlib
import json
import os
import secrets
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from engine import checkpoint
from engine.errors import RunError

# What two runs must share to be compared; what only describes the machine or the arm stays out.
SCHEDULE = (
    "learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr"
    " block_size dropout tokens_per_step dtype"
).split()


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    checkpoint.flush(temporary)
    os.replace(temporary, path)


def read_json(path: Path, what: str) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(
            f"{path.parent} is no run: it has no {path.name}; give the out_dir of {what}"
        ) from None
    except ValueError:
        raise RunError(
            f"{path} is damaged: it holds no JSON; restore it, or train into another out_dir"
        ) from None


def read_run(out_dir) -> tuple[dict, dict]:
    """(config, run): the resolved keys, and what identifies the run."""
    out_dir = Path(out_dir)
    what = "a finished or interrupted training"
    return read_json(out_dir / "config.json", what), read_json(out_dir / "run.json", what)


def find_runs(paths) -> list[Path]:
    """Every folder at or below the paths that holds a run, sorted."""
    found = set()
    for path in map(Path, paths):
        found.update(p.parent for p in path.rglob("run.json"))
    return sorted(found)


# What a resume may not change, because the checkpoint would mean something else.
FIXED = (
    "seed wte tie_weights n_layer n_head n_embd block_size vocab_size bias gelu pos_dim char_dim byte_extraction"
    " wte_init_rms wte_norm wte_permute_seed wte_ngrams wte_rank length_normalize z_normalize"
).split()


def begin(out_dir: Path, config, run: dict) -> Path | None:
    """Write config.json and run.json of a new run, or check that the one that is there may go on.

    The checkpoint to go on from, or None. `run` takes over what the run that is there has said of its start.
    """
    there = checkpoint.steps(out_dir)
    folder = checkpoint.newest(out_dir) if config.init_from in ("resume", "auto") else None
    if config.init_from == "resume" and folder is None:
        raise RunError(f"{out_dir} has no whole checkpoint to resume from: start with --init_from=scratch")
    if config.init_from not in ("resume", "auto") and there:
        raise RunError(
            f"{out_dir} already holds a run with {there[-1].name}: go on with --init_from=auto, or choose another --out_dir"
        )
    if folder is not None:
        old_config, old_run = read_run(out_dir)
        for name in FIXED:
            if old_config.get(name) != getattr(config, name):
                raise RunError(
                    f"{out_dir} was trained with {name}={old_config.get(name)!r}, but now it is {getattr(config, name)!r}: "
                    "give the same, or choose another --out_dir"
                )
        for name in ("data_fingerprint", "tokens_per_step", "val_sha256"):
            if old_run[name] != run[name]:
                raise RunError(
                    f"{out_dir} was trained with another {name} ({old_run[name]}, now {run[name]}): "
                    "give the same data and batch, or choose another --out_dir"
                )
        for name in ("body_sha256", "started", "wandb_id"):
            run[name] = old_run[name]
    checkpoint.recover(out_dir, folder)
    write_json(out_dir / "config.json", dataclasses.asdict(config))
    write_json(out_dir / "run.json", run)
    return folder


def signed(run: dict, config, device) -> dict:
    """run.json's contents: who the run is, and which code, machine and command made it."""
    keys = dataclasses.asdict(config) | {"tokens_per_step": run["tokens_per_step"]}
    return (
        {"arm": config.arm, "seed": config.seed}
        | run
        | {
            "schedule_sha256": schedule_sha256(keys),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
            "torch": torch.__version__,
            "commit": commit(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "wandb_id": secrets.token_hex(4),
        }
    )


def sha256_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def schedule_sha256(config: dict) -> str:
    return sha256_of({k: config[k] for k in SCHEDULE})


def commit() -> str | None:
    """The checkout's commit, '+' behind it when files differ from it; outside a checkout KNG_COMMIT, else None."""
    try:
        ask = {
            "cwd": Path(__file__).parent,
            "capture_output": True,
            "text": True,
            "check": True,
            "timeout": 10,
        }
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **ask).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **ask).stdout.strip()
        return head + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("KNG_COMMIT")


def machine() -> str:
    """Processor and cores, for provenance."""
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        import platform

        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


class Lock:
    """Keeps a second process out of a run's folder for as long as this one lives."""

    def __init__(self, out_dir):
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        self.file = open(out_dir / ".lock", "a")  # noqa: SIM115 - held until the process ends
        try:
            import fcntl
        except ImportError:
            return  # Windows: no such lock, and so no such protection
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks, as some clusters have
            raise RunError(
                f"another process trains in {out_dir}: wait for it, or choose another out_dir"
            ) from None
