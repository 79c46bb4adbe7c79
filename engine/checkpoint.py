"""Checkpoints that survive a kill at any instant.

    out_dir/ckpt/step_000400/model.safetensors   weights, fp32, plain names
                             optimizer.pt        loads with weights_only=True
                             state.json          step, best loss, ..., and SHA-256 of the two files above
                             DONE                SHA-256 of state.json, written last
    out_dir/latest, out_dir/best                 the name of a folder in ckpt/

A folder is written beside its final name, flushed to the disk and renamed; nothing is ever written over an
older checkpoint. Loading checks every hash and runs no code.
"""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data import DataError, console
from data.files import flush, plain_name, publish, sha256, write_json, write_text
from data.records import Record, read_record
from engine import pretrained
from engine.errors import RunError

FILES = ("model.safetensors", "optimizer.pt")
STEP = re.compile(r"step_([0-9]{6}|[1-9][0-9]{6,14})")  # as path_of writes it


class State(Record):
    """state.json: where the training stands, beside weights and moments."""

    step: int
    sha256: dict[str, str]
    best_val: float | None = None
    skipped: int = 0  # steps in all whose loss or gradient was not finite
    streak: int = 0  # how many of them stand at the end
    good: int = 0  # steps since float16's loss scale moved
    loss_scale: float = 1.0


def save(out_dir, step: int, weights: dict, optimizer: dict, state: dict) -> Path:
    """Write ckpt/step_NNNNNN; weights and optimizer are state_dicts, state has the other fields of State.

    Raises RunError where the disk does not take it, and leaves what was there before.
    """
    out_dir = Path(out_dir)
    folder = path_of(out_dir, step)
    temporary = folder.with_name(f".writing_{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        folder.parent.mkdir(exist_ok=True)  # but not out_dir: whoever removed it ends the run
        temporary.mkdir()
        # pages of a view or of a column-major parameter are laid out plainly first
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, temporary / FILES[0])
        with open(temporary / FILES[1], "wb") as file:  # torch's own writer hides what went wrong
            torch.save(optimizer, file)
        state = state | {"step": step, "sha256": {name: sha256(temporary / name) for name in FILES}}
        write_json(temporary / "state.json", state)
        write_text(temporary / "DONE", sha256(temporary / "state.json"))
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        if folder.is_dir():  # only a damaged one can be here: whole ones are resumed from
            shutil.rmtree(folder)
        elif folder.exists():  # nothing of ours: out of the way with it
            folder.rename(folder.with_name(f"{folder.name}.displaced"))
        publish(temporary, folder)
        point(out_dir, "latest", folder.name)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = console.explain(error)
        if cause is None:
            raise
        raise RunError(f"{folder} could not be written ({cause}); the last whole one is untouched") from error
    return folder


def path_of(out_dir, step: int) -> Path:
    return Path(out_dir) / "ckpt" / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def point(out_dir, name: str, target: str) -> None:
    """Make out_dir/<name> say `target`, atomically."""
    write_text(Path(out_dir) / name, target + "\n")


def pointed(out_dir, name: str) -> Path | None:
    """The checkpoint that out_dir/<name> names, whether it is there or not; None without a name."""
    path = Path(out_dir) / name
    try:
        return Path(out_dir) / "ckpt" / plain_name(path.read_text().strip())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} names no checkpoint ({error}): write the name of one in ckpt/") from None


def steps(out_dir) -> list[Path]:
    """Checkpoint folders, oldest first; whatever else lies beside them is left alone."""
    folders = [path for path in Path(out_dir).glob("ckpt/*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole."""
    try:
        if (folder / "DONE").read_text() != sha256(folder / "state.json"):
            return "its state.json was altered"
        state = read_state(folder)
        if folder.name != path_of("", state.step).name:
            return f"its state.json is that of step {state.step:,}"
        for name in FILES:
            if sha256(folder / name) != state.sha256.get(name):
                return f"its {name} was altered or cut"
    except FileNotFoundError as e:
        return f"its {Path(e.filename).name} is missing"
    except (DataError, UnicodeError, OSError) as e:
        return str(e)
    return None


def read_state(folder: Path) -> State:
    return read_record(folder / "state.json", State, "a checkpoint's state")


def newest(out_dir, good_before: int | None = None) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over.

    good_before: also pass over those that were saved while steps were being skipped, and those of this step or later:
    the loss at a checkpoint's own step is the first that its weights give.
    """
    for folder in reversed(steps(out_dir)):
        if wrong := fault(folder):
            print(f"note: {folder} is passed over: {wrong}")
        elif good_before is None or (is_good(folder) and step_of(folder) < good_before):
            return folder
    return None


def is_good(folder: Path) -> bool:
    """Whether a checkpoint was saved with its last step taken, not skipped as non-finite."""
    try:
        return read_state(folder).streak == 0
    except DataError:
        return False


def choose(out_dir, which: str = "latest") -> Path:
    """The folder of the 'latest' or 'best' checkpoint, or of a step's number; checked."""
    if which == "latest":
        folder = newest(out_dir)
    elif which == "best":
        folder = pointed(out_dir, "best")
    else:
        number = re.fullmatch(r"(?:step_)?([0-9]{1,15})", which)
        folder = path_of(out_dir, int(number[1])) if number else None
    if folder is None or not folder.is_dir():
        raise RunError(f"{out_dir} has no {which} checkpoint: train it first, or name another run")
    if which != "latest" and (wrong := fault(folder)):
        raise RunError(f"checkpoint {folder} cannot be used: {wrong}; choose another with --which=STEP")
    return folder


def load(folder: Path, with_optimizer: bool = True) -> tuple[dict, dict | None, dict]:
    """(weights, optimizer or None, state) on the CPU. No code in them is run."""
    optimizer = None
    try:
        if with_optimizer:
            optimizer = torch.load(folder / FILES[1], map_location="cpu", weights_only=True)
        weights = load_file(folder / FILES[0])
    except (OSError, MemoryError):
        raise
    except Exception as e:  # bytes that are something else may raise anything
        raise RunError(f"{folder} holds no checkpoint of this project ({console.first_line(e)})") from None
    return weights, optimizer, read_state(folder).model_dump()


def restore(model, optimizer, loaded: tuple[dict, dict, dict]) -> dict:
    """Put what `load` gave into model and optimizer; the state."""
    weights, moments, state = loaded
    pretrained.load(model, weights, "the checkpoint")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(moments)
    except (ValueError, LookupError, TypeError, AttributeError) as e:  # decay to or from 0: other groups
        raise RunError(f"the moments belong to other groups of parameters ({e}): keep weight_decay") from None
    for group, ours in zip(optimizer.param_groups, settings, strict=True):
        group.update(ours)  # the configuration's word counts, not the checkpoint's
    return state


def keep_as_best(out_dir, step: int, keep: int) -> None:
    """Let `best` name the checkpoint of a step, and delete the one that it named until now if it is old."""
    point(out_dir, "best", path_of(out_dir, step).name)
    prune(out_dir, keep)


def recover(out_dir, folder: Path | None) -> None:
    """Before going on from `folder`: clear away what a kill left half-written, and let `latest` name the folder.

    Later checkpoints can only be damaged ones: they are renamed, or they would outlive new ones.
    """
    for later in steps(out_dir):
        if folder is not None and step_of(later) > step_of(folder):
            shutil.rmtree(later.with_name(f"{later.name}.damaged"), ignore_errors=True)
            later.rename(later.with_name(f"{later.name}.damaged"))
    remove_half_written(out_dir)
    for leftover in Path(out_dir).glob("*.tmp"):
        if leftover.stem in OURS:
            leftover.unlink()
    if folder is not None and pointed(out_dir, "latest") != folder:
        point(out_dir, "latest", folder.name)


# Files of a run's folder that are written beside and renamed.
OURS = ("latest", "best", "config.json", "run.json", "data_meta.json", "metrics.jsonl", "nonfinite.json")


def prune(out_dir, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, the best and the last good one, and half-written ones."""
    folders = steps(out_dir)
    good = next((folder for folder in reversed(folders) if is_good(folder)), None)
    kept = {*folders[-keep:], pointed(out_dir, "best"), good}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    remove_half_written(out_dir)


def remove_half_written(out_dir) -> None:
    for leftover in Path(out_dir).glob("ckpt/.writing_*"):
        shutil.rmtree(leftover, ignore_errors=True)
