"""A run's folder: its records, who it is, and whether a training may begin or go on in it."""

import dataclasses
import hashlib
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from data.files import Lock, write_json
from data.loader import fingerprint
from data.meta import TokenizerSchema
from data.records import Count, PlainName, Record, read_record
from data.tokenizers import load_tokenizer
from engine import checkpoint, contract, metrics
from engine.errors import RunError


class Start(Record):
    """One start of a run: what was called, from which code, where, and at which step."""

    time: str
    step: int
    command: str = ""
    commit: str | None = None
    world: int = 1
    device: str = ""
    torch: str = ""


class Segment(Record):
    """A schedule that was changed on purpose, and from which step on."""

    step: int
    changed: dict[str, Annotated[list, Field(min_length=2, max_length=2)]]  # key: before, after


def plain(value):
    """The value, if it is no list and no object."""
    if isinstance(value, list | dict):
        raise ValueError("it should be a number, a text, true, false or null")
    return value


Key = Annotated[object, AfterValidator(plain)]  # a value in config.json


class Parameters(Record):
    """How many numbers a model trains, by part; stock_table: what a learned table would have."""

    input: Count
    body: Count
    head: Count
    total: Count
    stock_table: Annotated[int, Field(ge=1, lt=2**63)]


class Cause(Record):
    tokens: Count


class Codec(Record):
    """What is read again of kronecker.audit's report."""

    tokens: Count
    mean_bytes: float
    longest_bytes: Count
    pos_dim: Count
    truncated: Count
    colliding_tokens: Count
    collision_groups: Count
    by_cause: dict[str, Cause]
    buffer_bytes: Count


class Run(Record):
    """run.json: who the run is. Device, torch, commit, command and world are those of the last start."""

    arm: PlainName  # legends and files are named after it
    seed: int
    body_sha256: str
    data_sha256: str
    data_fingerprint: str | None = None
    val_sha256: str
    schedule_sha256: str
    tokens_per_step: int
    params: Parameters | None = None
    codec: Codec | None = None
    flops_per_token: float | None = None
    world: int = 1
    micro_batch: int | None = None  # sequences that one rank took at a time
    device: str = ""
    torch: str = ""
    commit: str | None = None
    command: str = ""
    started: str = ""
    wandb_id: str = Field("", pattern=r"^[\w-]*$")
    starts: list[Start] = []
    segments: list[Segment] = []
    diverged: int | None = None  # the step at which it was given up


# What a record says of its last start.
LAST_START = ("command", "commit", "world", "device", "torch")


def read_run(out_dir) -> tuple[dict, dict]:
    """(config, run): the resolved keys, and what identifies the run. Raises DataError or RunError."""
    out_dir = Path(out_dir)
    config = read_record(out_dir / "config.json", dict[str, Key], "a run's configuration")
    run = read_record(out_dir / "run.json", Run, "a run's record")
    return config, run.model_dump()


def recorded(config, names) -> dict:
    """Of these keys, those that the user leaves open, as the run that is in out_dir has them; {} for a new run."""
    path = Path(config.out_dir) / "config.json"
    begun = path.is_file() and path.with_name("run.json").is_file()
    old = read_record(path, dict[str, Key], "a run's configuration") if begun else {}
    given = getattr(config, "given", {})
    return {name: old[name] for name in names if name in old and name not in given}


class DescribedData(Record):
    """What is read of data_meta.json, the description of the data that a run was trained on."""

    tokenizer: TokenizerSchema | str | None


def read_tokenizer(out_dir):
    """The tokenizer of a run, from its folder alone, or by name from tiktoken's cache. DataError, or RunError for none."""
    path = Path(out_dir) / "data_meta.json"
    data = read_record(path, DescribedData, "the description of a run's data")
    spec = data.model_dump(exclude_unset=True)["tokenizer"]
    if spec is None:
        raise RunError(f"{out_dir} was trained on ids without a tokenizer: there is no text to go from or to")
    return load_tokenizer(spec, base_dir=out_dir)


def lock(out_dir) -> Lock:
    """Keeps a second training out of a run's folder, which is made if need be, for as long as the lock lives."""
    refusal = f"another process trains in {out_dir}: wait for it, or choose another out_dir"
    return Lock(Path(out_dir) / ".lock", refusal)


def resumable(out_dir, config, run: dict) -> Path | None:
    """The checkpoint to go on from, or None for a new run; whatever does not fit is refused. Writes nothing.

    `run` takes over what the record that is there says of the run's start.
    """
    out_dir = Path(out_dir)
    there = checkpoint.steps(out_dir)
    resumes = config.init_from in ("resume", "auto")
    if there and not resumes:
        way_out = "go on with --init_from=auto, or choose another --out_dir"
        raise RunError(f"{out_dir} already holds a run with {there[-1].name}: {way_out}")
    folder = checkpoint.newest(out_dir) if resumes else None
    if folder is None:
        check_nothing_is_erased(out_dir, config)
        if config.init_from == "resume":
            raise RunError(f"{out_dir} has no whole checkpoint to resume from: use --init_from=scratch")
        if (out_dir / "run.json").is_file():  # ended before its first checkpoint: its starts are remembered
            run["starts"] = read_record(out_dir / "run.json", Run, "a run's record").model_dump()["starts"]
        return None
    old_config, old_run = read_run(out_dir)
    step = checkpoint.read_state(folder).step
    if config.max_iters < step:
        limit = f"max_iters={config.max_iters:,}: take more steps, or another --out_dir"
        raise RunError(f"{folder} is at step {step:,}, beyond {limit}")
    changed = contract.check_resume(out_dir, old_config, config, type(config)())
    for name in contract.IDENTITY:
        if name in ("body_sha256", "schedule_sha256") or (name == "data_sha256" and "max_iters" in changed):
            continue  # of step 0; of keys that were looked at; of the last batch too
        if old_run[name] != run[name]:
            way_out = "give the same data and batch, or choose another --out_dir"
            was = f"was trained with another {name} ({old_run[name]}, now {run[name]})"
            raise RunError(f"{out_dir} {was}: {way_out}")
    for name in ("body_sha256", "started", "wandb_id", "segments", "starts"):
        run[name] = old_run[name]
    if changed:
        run["segments"] = [*old_run["segments"], {"step": step, "changed": changed}]
    return folder


def check_nothing_is_erased(out_dir: Path, config) -> None:
    """Refuse to begin anew over the record of a run that got as far as a checkpoint, or over what is no run's at all."""
    rows = metrics.read_metrics(out_dir)
    furthest = max((row["iter"] for row in rows), default=0)
    try:
        old = read_run(out_dir)[0]
    except ValueError:
        old = {}  # rows without a whole record are somebody's all the same
    old = dataclasses.asdict(config) | old
    interval = old["ckpt_interval"] or old["eval_interval"]
    had_one = (
        checkpoint.steps(out_dir)
        or any(checkpoint.pointed(out_dir, name) for name in ("latest", "best"))
        or (rows and not (out_dir / "run.json").is_file())
        or metrics.is_evaluated(out_dir, old["max_iters"])
        or (0 < interval <= furthest and not any(row.get("skipped") for row in rows))
    )
    if had_one:
        raise RunError(
            f"{out_dir} holds the record of a run up to step {furthest:,}, but no whole checkpoint to go on from: "
            f"restore {out_dir / 'ckpt'}, or choose another --out_dir"
        )
    for name in ("config.json", "tokenizer.json"):  # a run's first file is run.json
        if (out_dir / name).is_file() and not (out_dir / "run.json").is_file():
            raise RunError(f"{out_dir} holds a {name} but no run: choose another --out_dir")


def begin(out_dir, config, run: dict, step: int, meta: dict, tokenizer) -> None:
    """Write the records of a start at a step: run.json, config.json, data_meta.json and the tokenizer.

    meta: the data as data.meta.describe has it; so a run can be sampled without its data.
    """
    out_dir = Path(out_dir)
    this = {"time": now(), "step": step} | {k: run[k] for k in LAST_START}
    run["starts"] = [*run.get("starts", []), this]
    checkpoint.recover(out_dir, checkpoint.path_of(out_dir, step) if step else None)
    write_json(out_dir / "run.json", run)  # first: a changed schedule must never stand unsaid
    write_json(out_dir / "config.json", dataclasses.asdict(config))
    kept = {k: v for k, v in meta.items() if k != "shards"}
    if tokenizer is not None:
        tokenizer.save(out_dir)
        kept["tokenizer"] = tokenizer.spec
    write_json(out_dir / "data_meta.json", kept)


def give_up(out_dir, windows: dict[int, list[int]]) -> str:
    """Record that a run diverged, until its next start; the sentence to end it with.

    windows: the training windows of each step of the last streak that was skipped.
    """
    out_dir, step = Path(out_dir), max(windows)
    write_json(out_dir / "nonfinite.json", {"steps": list(windows), "window_ids": windows})
    write_json(out_dir / "run.json", read_run(out_dir)[1] | {"diverged": step})
    first = min(windows)
    if good := checkpoint.newest(out_dir, good_before=first):
        left = f"the last good checkpoint is {good}"
    else:
        there = checkpoint.newest(out_dir)
        left = f"no checkpoint before step {first} is left" + (f", only {there}" if there else "")
    return (
        f"loss or gradient was not finite in {len(windows)} steps in a row up to step {step}, which were skipped: lower "
        f"learning_rate, or look at the data in {out_dir / 'nonfinite.json'}; {left}"
    )


def check_still_there(out_dir, step: int) -> None:
    """Refuse to go on when the run's folder was taken away: what is written now would be lost."""
    if not (Path(out_dir) / "run.json").is_file():
        raise RunError(f"{out_dir} was removed while its run was at step {step:,}: the run cannot be kept")


def save(out_dir, step: int, model, optimizer, state: dict, log, keep: int) -> None:
    """Checkpoint of a step; state as checkpoint.save has it, log: the run's Metrics, keep: newest checkpoints kept."""
    check_still_there(out_dir, step)
    log.sync()  # rows before this step are never made again
    checkpoint.save(out_dir, step, model.state_dict(), optimizer.state_dict(), state)
    checkpoint.prune(out_dir, keep)


def data_facts(data_dir, train, val, max_iters: int) -> dict:
    """What identifies a run's data: its bytes, the first and the last global batch, the validation windows.

    train: data.loader.TrainBatches; val: data.loader.ValWindows.
    """
    whole = fingerprint(data_dir)
    batches = [train.rows(step, 0, train.global_batch)[0].numpy() for step in (0, max_iters - 1)]
    batches = contract.sha256_of([whole, *(hashlib.sha256(batch).hexdigest() for batch in batches)])
    return {"data_fingerprint": whole, "data_sha256": batches, "val_sha256": val.sha256()}


def identity(config, facts: dict, device) -> dict:
    """run.json of a new run: who it is, and which code, machine and command made it. facts: Run's other fields."""
    who = {"arm": config.arm, "seed": config.seed}
    return who | facts | {
        "schedule_sha256": contract.schedule_sha256(dataclasses.asdict(config), facts["tokens_per_step"]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "started": now(),
        "command": shlex.join(sys.argv),
        "wandb_id": secrets.token_hex(4),
    }  # fmt: skip


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's commit, '+' behind it when files differ from it; outside a checkout KNG_COMMIT, else None."""

    def git(*words: str) -> str:
        command = ["git", "-C", Path(__file__).parent, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("KNG_COMMIT")


def machine() -> str:
    """Processor and cores, for provenance."""
    try:
        name = re.search(r"^model name\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].strip()
    except (OSError, TypeError):  # no such file, or it names none
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
