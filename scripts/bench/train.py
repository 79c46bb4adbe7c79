"""Training speed and peak memory: our train.py against nanoGPT's own, and the arms against each other.

    python scripts/bench/train.py --nanogpt-dir ../nanoGPT          (a checkout of karpathy/nanoGPT)
    python scripts/bench/train.py --setting=demo --shares
    python scripts/bench/train.py --setting=124m --device=cuda --dtype=bfloat16 --compile --nanogpt-dir ../nanoGPT

Every side runs as its own process, one after the other, round after round; a side's figure is the median of
its steps after the first ones, and ratios are medians over the rounds' pairs, with the lowest and highest. Both
read the same headerless train.bin and use the same model, batch, number format, compile setting and threads. On
CUDA the peak memory is the allocator's, and MFU stands beside it (engine/flops.py names its convention and the
device's peak). --shares runs train.py with a clock around its parts: with --setting=demo the whole of config/demo.py,
evaluations, checkpoints and records included.
--batch_size, --accumulate and further --key=value (attention, loss, compile_mode) are for our side alone;
--nanogpt-batch and --nanogpt-accumulate for nanoGPT's. The side kronecker:table is the arm with its embedding computed
as scripts/gpu/candidates.py does.
"""

import json
import math
import pickle
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import write_json, write_text
from engine.errors import sentences
from engine.metrics import read_metrics
from scripts import provenance
from scripts.analysis.report import Table
from scripts.arguments import Parser, device, names, number, some_of, whole
from scripts.bench.rounds import alternate, ratios, timed, times
from scripts.experiment import ARMS, arm_file

SETTINGS = {
    "gpt2-vocabulary": {"vocab_size": 50304, "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8},
    "demo": {"vocab_size": 4096, "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8},
    "124m": {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32},
    "toy": {"vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4},
}  # fmt: skip


def write_data(folder: Path, vocab_size: int) -> None:
    """Zipf-like tokens, as text has them, in nanoGPT's headerless form; and a tokenizer of made-up words."""
    from data.meta import write_meta

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ranks = np.minimum(rng.zipf(1.2, 2_000_000) - 1, vocab_size - 1)
    tokens = rng.permutation(vocab_size)[ranks].astype(np.uint16)
    tokens[:1_900_000].tofile(folder / "train.bin")
    tokens[1_900_000:].tofile(folder / "val.bin")
    # byte lengths as in GPT-2's vocabulary: 1 to 16, six on average
    words = [
        "".join(chr(97 + c) for c in rng.integers(0, 26, min(16, 1 + rng.poisson(5))))
        for _ in range(vocab_size)
    ]
    spec = {"kind": "chars", "itos": words}
    write_meta(folder, {"format": 1, "tokenizer": spec, "vocab_size": vocab_size, "dtype": "uint16"})


def figures(all_ms: list[float], tokens: int, gb: float, shape: dict, device: str) -> dict:
    """One run of one side: all_ms: its steps; tokens of a step. mfu in per cent, None where the peak is unknown."""
    import torch

    from engine import flops
    from model import GPTConfig

    ms = statistics.median(all_ms)
    peak = flops.peak_flops(torch.device(device))
    work = flops.flops_per_token(GPTConfig(**{k: v for k, v in shape.items() if k != "batch_size"}))
    tokens_per_s = 1e3 * tokens / ms
    mfu = 100 * tokens_per_s * work / peak[0] if peak else None
    return {"ms": ms, "tokens": tokens, "tokens_per_s": tokens_per_s, "gb": gb, "mfu": mfu, "all_ms": all_ms}


def our_command(side: str, shape: dict, work: Path, out_dir: Path, args) -> tuple[list[str], list[str]]:
    """(the script, its arguments). side: an arm, or ARM:WAY (see above)."""
    arm, _, way = side.partition(":")
    script = ["scripts/gpu/candidates.py", "train", way] if way else ["train.py"]
    keys = shape | common(args) | {"gradient_accumulation_steps": args.accumulate}
    keys |= {"batch_size": args.batch_size or shape["batch_size"], "eval_tokens": shape["block_size"]}
    keys |= {"data_dir": work / "data" / "bench", "out_dir": out_dir, "keep_best": False, "ckpt_interval": -1}
    keys |= args.keys
    return [str(ROOT / script[0]), *script[1:]], [str(arm_file(arm)), *flags(keys)]


def run_ours(side: str, shape: dict, work: Path, number: int, args) -> dict:
    """train.py as it is; its clock is that of its own log, one row a step."""
    out_dir = work / f"{side.replace(':', '_')}_{number}"
    script, words = our_command(side, shape, work, out_dir, args)
    _, memory = timed([sys.executable, *script, f"--seed={1 + number}", *words], work, args.left())
    rows = [r for r in read_metrics(out_dir) if "train/loss" in r]
    shutil.rmtree(out_dir)
    tokens = (args.batch_size or shape["batch_size"]) * args.accumulate * shape["block_size"]
    all_ms = [1e3 * tokens / r["tok_per_sec"] for r in rows[args.skip :]]
    gb = rows[-1]["mem_gb"] if args.device == "cuda" else memory
    return figures(all_ms, tokens, gb, shape, args.device)


def run_shares(arm: str, setting: str, work: Path, args) -> dict:
    """Shares of the loop's time: of the demo as its recipe has it, of --steps steps in another setting."""
    if setting == "demo":
        words = [str(ROOT / "config" / "demo.py"), str(arm_file(arm))]
        words += flags({"data_dir": work / "data" / "bench", "out_dir": work / "shares"} | args.keys)
    else:
        _, words = our_command(arm, SETTINGS[setting], work, work / "shares", args)
    text, _ = timed([sys.executable, str(Path(__file__).with_name("shares.py")), *words], work, args.left())
    shutil.rmtree(work / "shares")
    return json.loads(text.splitlines()[-1])


def shares_table(run: str, shares: dict[str, dict]) -> Table:
    """Shares of each arm, {arm: {part: share}}, a row each."""
    parts = list(next(iter(shares.values())))
    rows = [[arm, *(f"{share:.1%}" for share in row.values())] for arm, row in shares.items()]
    return Table(f"Where the time of a training goes, {run}", ["arm", *parts], rows)


def flags(keys: dict) -> list[str]:
    return [f"--{k}={v}" for k, v in keys.items()]


# Runs a script as it is and says what the allocator's peak was.
WITH_PEAK = (
    "import os, runpy, sys, torch; del sys.argv[0]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
    "runpy.run_path(sys.argv[0], run_name='__main__'); "
    "print('peak bytes', torch.cuda.max_memory_allocated())"
)


def run_nanogpt(shape: dict, work: Path, number: int, args) -> dict:
    """nanoGPT's train.py as it is; its clock is that of its own log line, one step each."""
    checkout = Path(args.nanogpt_dir).resolve()
    link = work / "configurator.py"
    if not link.exists():
        link.symlink_to(checkout / "configurator.py")  # it reads this from the current folder
    keys = {k: v for k, v in shape.items() if k != "vocab_size"} | common(args)
    keys["batch_size"] = args.nanogpt_batch or args.batch_size or shape["batch_size"]
    keys["gradient_accumulation_steps"] = args.nanogpt_accumulate or args.accumulate
    keys |= {"dataset": "bench", "out_dir": f"nanogpt_{number}", "eval_iters": 1}
    keys |= {"always_save_checkpoint": False, "wandb_log": False}
    vocabulary = work / "data" / "bench" / "meta.pkl"
    vocabulary.write_bytes(pickle.dumps({"vocab_size": shape["vocab_size"]}))
    start = [sys.executable] + (["-c", WITH_PEAK] if args.device == "cuda" else [])
    text, memory = timed([*start, str(checkout / "train.py"), *flags(keys)], work, args.left())
    vocabulary.unlink()
    all_ms = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.naif]+, time ([\d.]+)ms", text)]
    if args.device == "cuda":
        memory = int(re.findall(r"peak bytes (\d+)", text)[-1]) / 1e9
    tokens = keys["batch_size"] * keys["gradient_accumulation_steps"] * shape["block_size"]
    return figures(all_ms[args.skip :], tokens, memory, shape, args.device)


def side_table(setting: str, rounds: dict) -> Table:
    """Times, speed, MFU and memory of every side, medians over its rounds, and ratios of the rounds' pairs."""
    bases = [s for s in ("nanoGPT", "bpe_untied") if s in rounds] or [next(iter(rounds))]
    rows = []
    for side, found in rounds.items():
        row = [side]
        for key, digits in (("ms", 1), ("tokens", 0), ("tokens_per_s", 0), ("mfu", 1), ("gb", 2)):
            values = [f[key] for f in found if f[key] is not None]
            row.append(f"{statistics.median(values):,.{digits}f}" if values else "-")
        row += [times(ratios(rounds, side, base, "tokens_per_s"), 3) for base in bases]
        rows.append([*row, times(ratios(rounds, side, bases[0], "gb")), len(found)])
    header = ["side", "ms a step", "tokens a step", "tokens/s", "MFU, %", "peak GB"]
    header += [*(f"tokens/s over {base}" for base in bases), f"memory over {bases[0]}", "rounds"]
    return Table(f"A training step, {setting}", header, rows)


def common(args) -> dict:
    """Keys that our train.py and nanoGPT's share."""
    return {
        "max_iters": args.steps, "eval_interval": 10**6, "log_interval": 1, "device": args.device, "dtype": args.dtype,
        "compile": args.compile, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "warmup_iters": 10,
    }  # fmt: skip


def arguments(argv=None):
    """The arguments; .keys are those of train.py, .left() says how many seconds there are."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--nanogpt-dir", default="", help="checkout of nanoGPT to measure against")
    settings = f"with commas: {', '.join(SETTINGS)}"
    add("--setting", type=some_of(SETTINGS), default="gpt2-vocabulary,demo", help=settings)
    add("--arms", type=names, default="bpe_tied,bpe_untied,kronecker", help="in config/arms/, with commas")
    add("--rounds", type=whole(1), default=3, help="times that every side runs (%(default)s)")
    add("--minutes", type=number(0, 1e6, above=True), help="begin no round that would end later")
    add("--steps", type=whole(2), default=8, help="steps of one process, --skip of which do not count")
    add("--skip", type=whole(0), default=2, help="steps at the start that do not count (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--compile", action="store_true")
    add("--shares", action="store_true", help="also say where the time goes")
    add("--out", type=Path, help="write the figures as JSON and markdown to this folder")
    add("--batch_size", type=whole(0), default=0, help="micro-batch (0: the setting's)")
    add("--accumulate", type=whole(1), default=1, help="micro-batches a step")
    add("--nanogpt-batch", type=whole(0), default=0, help="nanoGPT's micro-batch (0: ours)")
    add("--nanogpt-accumulate", type=whole(0), default=0, help="nanoGPT's (0: ours)")
    args, more = parser.parse_known_args(argv)
    wrong = next((word for word in more if not re.fullmatch(r"--\w+=.+", word)), None)
    if wrong:
        parser.error(f"unrecognized argument {wrong}")
    if args.steps < args.skip + 2:
        parser.error(
            f"--steps={args.steps} leaves too few after --skip={args.skip}: give at least {args.skip + 2}"
        )
    known = sorted(path.stem for path in ARMS.glob("*.py"))
    unknown = next((arm for arm in args.arms if arm.partition(":")[0] not in known), None)
    if unknown:
        parser.error(f"there is no arm {unknown!r}: choose from {', '.join(known)}")
    if args.nanogpt_dir and not (Path(args.nanogpt_dir) / "train.py").is_file():
        parser.error(f"{args.nanogpt_dir} is no checkout of nanoGPT: it has no train.py")
    args.keys = dict(word[2:].split("=", 1) for word in more)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    args.left = lambda: deadline - time.monotonic()  # seconds
    return args


def measure(setting: str, args) -> tuple[dict, list[Table]]:
    """Figures of every side in one setting, and their tables."""
    shape = SETTINGS[setting]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_data(work / "data" / "bench", shape["vocab_size"])
        sides = {side: lambda n, side=side: run_ours(side, shape, work, n, args) for side in args.arms}
        if args.nanogpt_dir:
            sides["nanoGPT"] = lambda n: run_nanogpt(shape, work, n, args)
        else:
            print("nanoGPT is left out: --nanogpt-dir names a checkout of it", file=sys.stderr)
        rounds = alternate(
            sides, args.rounds, args.left, lambda line: print(line, file=sys.stderr, flush=True)
        )
        found, tables = {"rounds": rounds}, [side_table(setting, rounds)]
        if args.shares:
            found["shares"] = {arm: run_shares(arm, setting, work, args) for arm in args.arms}
            run = "config/demo.py in full" if setting == "demo" else f"{args.steps} steps of {setting}"
            tables.append(shares_table(run, found["shares"]))
    return found, tables


def main(argv=None) -> None:
    args = arguments(argv)
    with sentences():
        made = provenance.provenance(__file__, argv) | {
            k: getattr(args, k) for k in ("device", "dtype", "compile", "keys")
        }
        record, parts = made | {"settings": {}}, ["# Training speed"]
        parts.append(
            f"`{made['command']}` at commit {made['commit']}, {made['machine']}, {made['date']}; {args.dtype}, compile {args.compile}."
        )
        for setting in args.setting:
            found, tables = measure(setting, args)
            record["settings"][setting] = {"shape": SETTINGS[setting]} | found
            parts += [t.markdown() for t in tables]
            print("\n\n".join(t.text() for t in tables) + "\n", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / "bench_train.json", record)
            write_text(args.out / "bench_train.md", "\n\n".join(parts) + "\n")
            print(f"written to {args.out}/bench_train.json and bench_train.md")


if __name__ == "__main__":
    main()
