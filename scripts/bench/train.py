"""Training speed and peak memory: our train.py against nanoGPT's own, and the arms against each other.

    python scripts/bench/train.py --nanogpt-dir ../nanoGPT          (a checkout of karpathy/nanoGPT)
    python scripts/bench/train.py --setting=demo --shares
    python scripts/bench/train.py --setting=124m --device=cuda --dtype=bfloat16 --compile --nanogpt-dir ../nanoGPT

Every side runs as its own process, one after the other, round after round; a side's figure is the median of its steps
after the first two, a ratio the median over the rounds' pairs, with the lowest and highest. Both read the same
headerless train.bin and use the same model, batch, number format, compile setting and threads. On CUDA the peak memory
is the allocator's, and MFU stands beside it (engine/flops.py names its convention and the device's peak). --shares runs
train.py with a clock around its parts: with --setting=demo the whole of config/demo.py, evaluations, checkpoints and
records included. --batch_size, --accumulate and further --key=value (attention, loss, compile_mode) are for our side
alone. The side kronecker:table is the arm with its embedding computed as scripts/gpu/candidates.py does.
"""

import contextlib
import functools
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch

import configurator
import model
import train
from engine import checkpoint, evaluation, flops, runs
from engine.errors import sentences
from engine.metrics import Metrics, Progress, read_metrics
from engine.step import GuardedStep
from scripts.analysis.report import Table, progress
from scripts.arguments import device, flags, names, number, some_of, whole
from scripts.bench import rounds as bench
from scripts.experiment import ARMS, arm_file
from scripts.made_up import write_data
from scripts.provenance import ROOT, provenance

SETTINGS = {
    "gpt2-vocabulary": {"vocab_size": 50304, "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8},
    "demo": {"vocab_size": 4096, "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8},
    "124m": {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32},
    "toy": {"vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4},
}  # fmt: skip
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
SKIPPED = 2  # steps at a process's start that do not count

# Runs a script as it is and says what the allocator's peak was.
WITH_PEAK = (
    "import os, runpy, sys, torch; del sys.argv[0]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
    "runpy.run_path(sys.argv[0], run_name='__main__'); "
    "print('peak bytes', torch.cuda.max_memory_allocated())"
)


def common(args) -> dict:
    """Keys that our train.py and nanoGPT's share."""
    return {
        "max_iters": args.steps, "eval_interval": 10**6, "log_interval": 1, "device": args.device, "dtype": args.dtype,
        "compile": args.compile, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "warmup_iters": 10,
    }  # fmt: skip


def figures(all_ms: list[float], keys: dict, shape: dict, gb: float, device: str) -> dict:
    """One run of one side: all_ms: its steps; keys: how it cuts a step up. mfu in per cent, None where the peak is unknown."""
    ms = statistics.median(all_ms[SKIPPED:])
    tokens = keys["batch_size"] * keys["gradient_accumulation_steps"] * shape["block_size"]
    peak = flops.peak_flops(torch.device(device))
    work = flops.flops_per_token(model.GPTConfig(**{k: v for k, v in shape.items() if k != "batch_size"}))
    tokens_per_s = 1e3 * tokens / ms
    mfu = 100 * tokens_per_s * work / peak[0] if peak else None
    return {"ms": ms, "tokens": tokens, "tokens_per_s": tokens_per_s, "gb": gb, "mfu": mfu, "all_ms": all_ms}


def our_keys(shape: dict, work: Path, args) -> dict:
    keys = shape | common(args) | {
        "batch_size": args.batch_size or shape["batch_size"], "gradient_accumulation_steps": args.accumulate,
        "eval_tokens": shape["block_size"], "ckpt_interval": -1, "keep_best": False,
        "data_dir": work / "data" / "bench", "out_dir": work / "ours",
    }  # fmt: skip
    return keys | args.keys


def run_ours(side: str, shape: dict, work: Path, args) -> dict:
    """train.py as it is, or as scripts/gpu/candidates.py changes it (ARM:WAY); its clock is its own log, a row a step."""
    arm, _, way = side.partition(":")
    keys = our_keys(shape, work, args)
    script = [ROOT / "scripts" / "gpu" / "candidates.py", way] if way else [ROOT / "train.py"]
    command = [sys.executable, *script, arm_file(arm), *flags(keys)]
    _, _, gb = bench.run(command, work, args.left(), args.device == "cpu")
    rows = [r for r in read_metrics(keys["out_dir"]) if "train/loss" in r]
    shutil.rmtree(keys["out_dir"])
    tokens = keys["batch_size"] * keys["gradient_accumulation_steps"] * shape["block_size"]
    all_ms = [1e3 * tokens / r["tok_per_sec"] for r in rows]
    return figures(all_ms, keys, shape, rows[-1]["mem_gb"] if args.device == "cuda" else gb, args.device)


def run_nanogpt(shape: dict, work: Path, args) -> dict:
    """nanoGPT's train.py as it is; its clock is that of its own log line, one a step."""
    link = work / "configurator.py"
    if not link.exists():
        link.symlink_to(args.nanogpt_dir / "configurator.py")  # it reads this from the current folder
    ours = args.batch_size or shape["batch_size"]
    batch = args.nanogpt_batch or ours
    cut = {"batch_size": batch, "gradient_accumulation_steps": max(1, ours * args.accumulate // batch)}
    keys = {k: v for k, v in shape.items() if k != "vocab_size"} | common(args) | cut
    keys |= {"dataset": "bench", "eval_iters": 1, "always_save_checkpoint": False, "wandb_log": False}
    start = [sys.executable] + (["-c", WITH_PEAK] if args.device == "cuda" else [])
    command = [*start, args.nanogpt_dir / "train.py", *flags(keys)]
    text, _, gb = bench.run(command, work, args.left(), args.device == "cpu")
    all_ms = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.naif]+, time ([\d.]+)ms", text)]
    if args.device == "cuda":
        gb = int(re.findall(r"peak bytes (\d+)", text)[-1]) / 1e9
    return figures(all_ms, keys, shape, gb, args.device)


def clocked(part: str, function, seconds: dict, running: list):
    """The function, whose time counts as its part's unless it runs inside another one, which it belongs to then."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        if running:
            return function(*args, **kwargs)
        running.append(part)
        began = time.perf_counter()
        seconds.setdefault("began", began)
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[part] += time.perf_counter() - began
            running.clear()

    return run


def shares(config) -> dict[str, float]:
    """Share of the loop's time by part, of "the rest", and of all that is beside training; the loop lasts from its first
    part to the run's end."""
    seconds, running = dict.fromkeys(PARTS, 0.0), []
    with contextlib.ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                timed = clocked(part, getattr(owner, name), seconds, running)
                stack.enter_context(mock.patch.object(owner, name, timed))
        train.main(config)
        whole = time.perf_counter() - seconds.pop("began")
    found = {part: s / whole for part, s in seconds.items()}
    beside = {", ".join(BESIDE): sum(map(found.get, BESIDE))}
    return found | {"the rest": 1 - sum(found.values())} | beside


def run_shares(arm: str, setting: str, work: Path, args) -> dict:
    """Shares of the loop's time: of the demo as its recipe has it, of --steps steps in another setting."""
    keys, recipe = our_keys(SETTINGS[setting], work, args), []
    if setting == "demo":
        recipe = [str(ROOT / "config" / "demo.py")]
        keys = {k: keys[k] for k in ("data_dir", "out_dir", *args.keys)}
    with contextlib.redirect_stdout(sys.stderr):
        found = shares(configurator.load([*recipe, str(arm_file(arm)), *flags(keys)]))
    shutil.rmtree(keys["out_dir"])
    return found


def side_table(setting: str, rounds: dict) -> Table:
    """Times, speed, MFU and memory of every side, medians over its rounds, and ratios of the rounds' pairs."""
    bases = [s for s in ("nanoGPT", "bpe_untied") if s in rounds] or [next(iter(rounds))]
    columns = {"ms": ",.1f", "tokens": ",.0f", "tokens_per_s": ",.0f", "mfu": ".1f", "gb": ".2f"}
    against = [*(("tokens_per_s", base) for base in bases), ("gb", bases[0])]
    rows = []
    for side, found in rounds.items():
        row = [side, *(bench.median(bench.column(rounds, side, key), form) for key, form in columns.items())]
        for key, base in against:
            row.append(bench.ratio(bench.column(rounds, side, key), bench.column(rounds, base, key)))
        rows.append([*row, sum(f is not None for f in found)])
    header = ["side", "ms a step", "tokens a step", "tokens/s", "MFU, %", "peak GB"]
    header += [*(f"tokens/s over {base}" for base in bases), f"memory over {bases[0]}", "rounds"]
    return Table(f"A training step, {setting}", header, rows)


def arguments(argv=None):
    """The arguments; .keys are those of train.py, .left() says how many seconds there are."""
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--nanogpt-dir", type=bench.nanogpt, help="checkout of nanoGPT to measure against")
    settings = f"with commas: {', '.join(SETTINGS)}"
    add("--setting", type=some_of(SETTINGS, "setting"), default="gpt2-vocabulary,demo", help=settings)
    add("--arms", type=names, default="bpe_tied,bpe_untied,kronecker", help="in config/arms/, with commas")
    add("--minutes", type=number(0, 1e6, above=True), help="begin no round that would end later")
    steps = f"of one process, the first {SKIPPED} of which do not count (%(default)s)"
    add("--steps", type=whole(SKIPPED + 2), default=8, help=steps)
    add("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--compile", action="store_true")
    add("--shares", action="store_true", help="also say where the time goes")
    add("--batch_size", type=whole(0), default=0, help="micro-batch (0: the setting's)")
    add("--accumulate", type=whole(1), default=1, help="micro-batches a step")
    theirs = "nanoGPT's micro-batch, in as large a step (0: ours)"
    add("--nanogpt-batch", type=whole(0), default=0, help=theirs)
    args, more = parser.parse_known_args(argv)
    if wrong := next((word for word in more if not re.fullmatch(r"--\w+=.+", word)), None):
        parser.error(f"unrecognized argument {wrong}")
    known = sorted(path.stem for path in ARMS.glob("*.py"))
    if unknown := next((arm for arm in args.arms if arm.partition(":")[0] not in known), None):
        parser.error(f"there is no arm {unknown!r}: choose from {', '.join(known)}")
    args.keys = dict(word[2:].split("=", 1) for word in more)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    args.left = lambda: deadline - time.monotonic()
    return args


def measure(setting: str, args) -> tuple[dict, list[Table]]:
    """Figures of every side in one setting, and their tables."""
    shape = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_data(work / "data" / "bench", shape["vocab_size"])
        sides = {side: partial(run_ours, side, shape, work, args) for side in args.arms}
        if args.nanogpt_dir:
            sides["nanoGPT"] = partial(run_nanogpt, shape, work, args)
        else:
            progress("nanoGPT is left out: --nanogpt-dir names a checkout of it")
        rounds = bench.alternate(sides, args.rounds, args.left)
        found, tables = {"shape": shape, "rounds": rounds}, [side_table(setting, rounds)]
        if args.shares:
            arms = [arm for arm in args.arms if ":" not in arm]
            found["shares"] = by_arm = {arm: run_shares(arm, setting, work, args) for arm in arms}
            run = "config/demo.py in full" if setting == "demo" else f"{args.steps} steps of {setting}"
            rows = [[arm, *(f"{share:.1%}" for share in of_arm.values())] for arm, of_arm in by_arm.items()]
            header = ["arm", *next(iter(by_arm.values()))]
            tables.append(Table(f"Where the time of a training goes, {run}", header, rows))
    return found, tables


def main(argv=None) -> None:
    args = arguments(argv)
    with sentences():
        made = provenance(__file__, argv)
        found = {setting: measure(setting, args) for setting in args.setting}
        parts = [f"{args.dtype}, compile {args.compile}."]
        parts += [table for _, tables in found.values() for table in tables]
        record = {"settings": {setting: record for setting, (record, _) in found.items()}}
        bench.publish(args.out, "bench_train", "Training speed", made, record, parts)


if __name__ == "__main__":
    main()
