"""Checkpoints that survive a kill at any instant.

    out_dir/ckpt/step_000400/model.safetensors   weights, fp32, plain names
                             optimizer.pt        loads with weights_only=True
                             state.json          step, best loss, ..., and SHA-256 of the two files above
                             DONE                SHA-256 of state.json, written last
    out_dir/latest, out_dir/best                 the name of a folder in ckpt/

A folder is written beside its final name, flushed to the disk and renamed; nothing is ever written over an
older checkpoint. Loading checks every hash and runs no code.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.errors import RunError

FILES = ("model.safetensors", "optimizer.pt")


def save(out_dir, step: int, weights: dict, optimizer: dict, state: dict) -> Path:
    """Write ckpt/step_NNNNNN; weights and optimizer are state_dicts, state whatever JSON holds."""
    folder = Path(out_dir) / "ckpt" / f"step_{step:06d}"
    temporary = folder.with_name(f".writing_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        # pages of a view or of a column-major parameter are laid out plainly first
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / FILES[0])
        torch.save(optimizer, temporary / FILES[1])
        state = state | {"step": step, "sha256": {name: sha256(temporary / name) for name in FILES}}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        (temporary / "DONE").write_text(sha256(temporary / "state.json"))
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        if folder.exists():  # only a damaged one can be here: whole ones are resumed from
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush(folder.parent)
    point(out_dir, "latest", folder.name)
    return folder


def point(out_dir, name: str, target: str) -> None:
    """Make out_dir/<name> say `target`, atomically."""
    temporary = Path(out_dir) / f".{name}.tmp"
    temporary.write_text(target + "\n")
    flush(temporary)
    os.replace(temporary, Path(out_dir) / name)
    flush(Path(out_dir))


def pointed(out_dir, name: str) -> Path | None:
    path = Path(out_dir) / name
    return Path(out_dir) / "ckpt" / path.read_text().strip() if path.is_file() else None


def steps(out_dir) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(
        Path(out_dir).glob("ckpt/step_*"), key=lambda p: int(p.name[5:]) if p.name[5:].isdigit() else -1
    )


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        if (folder / "DONE").read_text() != sha256(folder / "state.json"):
            return "its state.json was altered"
        state = json.loads((folder / "state.json").read_text())
        for name in FILES:
            if sha256(folder / name) != state["sha256"][name]:
                return f"its {name} was altered or cut"
    except FileNotFoundError as e:
        return f"its {Path(e.filename).name} is missing"
    except (KeyError, TypeError, ValueError):
        return "its state.json is no checkpoint's"
    return None


def newest(out_dir) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    for folder in reversed(steps(out_dir)):
        wrong = fault(folder)
        if wrong is None:
            return folder
        print(f"note: {folder} is passed over: {wrong}")
    return None


def choose(out_dir, which: str = "latest") -> Path:
    """The folder of the 'latest' or 'best' checkpoint, or of a step's number; checked."""
    if which == "latest":
        folder = newest(out_dir)
    elif which == "best":
        folder = pointed(out_dir, "best")
    else:
        number = which.removeprefix("step_")
        folder = Path(out_dir) / "ckpt" / f"step_{int(number):06d}" if number.isdigit() else None
    if folder is None or not folder.is_dir():
        raise RunError(f"{out_dir} has no {which} checkpoint: train it first, or name another run")
    if which != "latest" and (wrong := fault(folder)):
        raise RunError(f"checkpoint {folder} cannot be used: {wrong}; choose another with --which=STEP")
    return folder


def load(folder: Path, with_optimizer: bool = True) -> tuple[dict, dict | None, dict]:
    """(weights, optimizer or None, state) on the CPU."""
    optimizer = None
    if with_optimizer:
        optimizer = torch.load(folder / FILES[1], map_location="cpu", weights_only=True)
    return load_file(folder / FILES[0]), optimizer, json.loads((folder / "state.json").read_text())


def recover(out_dir, folder: Path | None) -> None:
    """After a kill: clear away what was half-written, and let `latest` name the checkpoint that is gone on from."""
    for leftover in Path(out_dir).glob("ckpt/.writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("latest", "best"):
        (Path(out_dir) / f".{name}.tmp").unlink(missing_ok=True)
    if folder is not None and pointed(out_dir, "latest") != folder:
        point(out_dir, "latest", folder.name)


def prune(out_dir, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints and the best one, and what a kill left half-written."""
    folders = steps(out_dir)
    best = pointed(out_dir, "best")
    for folder in folders[: -keep or None]:
        if folder != best:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in Path(out_dir).glob("ckpt/.writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """fsync a file or (where the system allows it) a folder."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if Path(path).is_file():
            raise e
    finally:
        os.close(fd)
