"""Training speed and peak memory: our train.py against nanoGPT's own, and the arms against each other.

    python scripts/bench/train.py --nanogpt-dir ../nanoGPT          (a checkout of karpathy/nanoGPT)
    python scripts/bench/train.py --setting=demo --breakdown
    python scripts/bench/train.py --setting=124m --device=cuda --dtype=bfloat16 --compile --nanogpt-dir ../nanoGPT

Every side runs as its own process, one after the other, round after round; a side's figure is the median of
its steps after the first ones, and ratios are medians over the rounds' pairs. Both read the same headerless
train.bin and use the same model, batch, number format, compile setting and threads. On CUDA the peak memory
is the allocator's, and MFU stands beside it (engine/flops.py names its convention and the device's peak).
--batch_size, --accumulate and further --key=value (attention, loss, compile_mode) are for our side alone;
--nanogpt-batch and --nanogpt-accumulate for nanoGPT's. The side kronecker:table is the arm with its embedding computed
as scripts/gpu/candidates.py does.
"""

import dataclasses
import itertools
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

import configurator
from data.files import write_json, write_text
from engine.errors import RunError, sentences
from engine.metrics import read_metrics
from scripts import provenance
from scripts.analysis.report import Table
from scripts.arguments import Parser, device, names, number, whole

SETTINGS = {
    "gpt2-vocabulary": {"vocab_size": 50304, "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8},
    "demo": {"vocab_size": 4096, "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8},
    "124m": {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32},
    "toy": {"vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4},
}  # fmt: skip
ARMS = ROOT / "config" / "arms"


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


def timed(command: list[str], cwd: Path, env: dict, limit: float = math.inf) -> tuple[str, float]:
    """(output, peak resident memory in GB) of a process, which is ended after `limit` seconds."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT)
        clock = threading.Timer(min(max(limit, 1.0), 10**6), process.kill)
        clock.start()
        _, status, usage = os.wait4(process.pid, 0)
        clock.cancel()
        out.seek(0)
        text = out.read()
    if os.waitstatus_to_exitcode(status) == -signal.SIGKILL and limit < math.inf:
        raise RunError(f"ended after {limit:.0f} s, without figures")
    if os.waitstatus_to_exitcode(status):
        lines = text.strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        script = next(word for word in command if word.endswith(".py"))
        raise RunError(f"{script} failed: {said.removeprefix('error: ')}")
    return text, usage.ru_maxrss * 1024 / 1e9


def figures(all_ms: list[float], tokens: int, gb: float, shape: dict, device: str) -> dict:
    """One run of one side: all_ms: its steps; tokens of a step. mfu in per cent, None where the peak is unknown."""
    import torch

    from engine import flops
    from model import GPTConfig

    ms = statistics.median(all_ms)
    names = [k for k in shape if k not in ("batch_size", "gradient_accumulation_steps")]
    peak = flops.peak_flops(torch.device(device))
    work = flops.flops_per_token(GPTConfig(**{k: shape[k] for k in names}))
    tokens_per_s = 1e3 * tokens / ms
    mfu = 100 * tokens_per_s * work / peak[0] if peak else None
    return {"ms": ms, "tokens": tokens, "tokens_per_s": tokens_per_s, "gb": gb, "mfu": mfu, "all_ms": all_ms}


def run_ours(side: str, shape: dict, work: Path, number: int, args) -> dict:
    """train.py as it is; its clock is that of its own log, one row a step. side: an arm, or ARM:WAY (see above)."""
    arm, _, way = side.partition(":")
    out_dir = work / f"{arm}_{number}"
    script = ["scripts/gpu/candidates.py", "train", way] if way else ["train.py"]
    keys = shape | common(args)
    keys |= {
        "gradient_accumulation_steps": args.accumulate,
        "batch_size": args.batch_size or shape["batch_size"],
    }
    keys |= {"data_dir": work / "data" / "bench", "out_dir": out_dir, "eval_tokens": shape["block_size"]}
    keys["keep_best"] = False
    keys |= {
        "max_iters": args.steps,
        "seed": 1 + number,
        "eval_interval": 10**6,
        "ckpt_interval": -1,
    } | args.keys
    flags = [f"--{k}={v}" for k, v in keys.items()]
    command = [sys.executable, str(ROOT / script[0]), *script[1:], str(ARMS / f"{arm}.py"), *flags]
    _, memory = timed(command, work, dict(os.environ), args.left())
    rows = [r for r in read_metrics(out_dir) if "train/loss" in r]
    shutil.rmtree(out_dir)
    tokens = keys["batch_size"] * args.accumulate * shape["block_size"]
    all_ms = [1e3 * tokens / r["tok_per_sec"] for r in rows[args.skip :]]
    gb = rows[-1]["mem_gb"] if args.device == "cuda" else memory
    return figures(all_ms, tokens, gb, shape, args.device)


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
    keys |= {"dataset": "bench", "out_dir": f"nanogpt_{number}", "max_iters": args.steps, "eval_iters": 1}
    keys |= {"always_save_checkpoint": False, "wandb_log": False, "eval_interval": 10**6}
    keys["dtype"] = args.dtype
    (work / "data" / "bench" / "meta.pkl").write_bytes(pickled_vocabulary(shape["vocab_size"]))
    flags = [f"--{k}={v!r}" if not isinstance(v, str) else f"--{k}={v}" for k, v in keys.items()]
    start = [sys.executable] + (["-c", WITH_PEAK] if args.device == "cuda" else [])
    text, memory = timed([*start, str(checkout / "train.py"), *flags], work, dict(os.environ), args.left())
    (work / "data" / "bench" / "meta.pkl").unlink()
    all_ms = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.naif]+, time ([\d.]+)ms", text)][
        args.skip :
    ]
    if args.device == "cuda":
        memory = int(re.findall(r"peak bytes (\d+)", text)[-1]) / 1e9
    tokens = keys["batch_size"] * keys["gradient_accumulation_steps"] * shape["block_size"]
    return figures(all_ms, tokens, memory, shape, args.device)


def alternate(sides: dict, n_rounds: int, left=lambda: math.inf, say=print) -> dict[str, list[dict]]:
    """Run each side once a round, there and back again: {side: [figures, with the "round" they belong to]}.

    sides: {name: function of the round's number}. left: function that gives the seconds that are left. Where they
    are counted, a round that would take longer than the longest before it is not begun (the first always is), and
    a side that fails is said and left out of that round instead of ending the measurement.
    """
    rounds, longest = {side: [] for side in sides}, 0.0
    for n in range(n_rounds):
        if n and left() < longest:
            say(f"no time for round {n + 1} of {n_rounds}")
            break
        began = time.perf_counter()
        for side in list(sides)[:: 1 if n % 2 == 0 else -1]:
            say(f"round {n + 1} of {n_rounds}, {side}")
            try:
                rounds[side].append({"round": n} | sides[side](n))
            except RunError as e:
                if left() == math.inf:
                    raise
                say(f"{side}: {e}")
        longest = max(longest, time.perf_counter() - began)
    return rounds


def ratio(rounds: dict, side: str, base: str, key: str = "tokens_per_s") -> float | None:
    """Median over the rounds that both have of one side's figure over another's."""
    of_base = {f["round"]: f[key] for f in rounds.get(base, ())}
    found = [f[key] / of_base[f["round"]] for f in rounds[side] if f["round"] in of_base]
    return statistics.median(found) if found else None


def times(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}x"


def side_table(setting: str, rounds: dict) -> Table:
    """Times, speed, MFU and memory of every side, medians over its rounds, and ratios of the rounds' pairs."""
    bases = [s for s in ("nanoGPT", "bpe_untied") if s in rounds] or [next(iter(rounds))]
    rows = []
    for side, found in rounds.items():
        row = [side]
        for key, digits in (("ms", 1), ("tokens", 0), ("tokens_per_s", 0), ("mfu", 1), ("gb", 2)):
            values = [f[key] for f in found if f[key] is not None]
            row.append(f"{statistics.median(values):,.{digits}f}" if values else "-")
        row += [times(ratio(rounds, side, base), 3) for base in bases]
        rows.append([*row, times(ratio(rounds, side, bases[0], "gb")), len(found)])
    header = ["side", "ms a step", "tokens a step", "tokens/s", "MFU, %", "peak GB"]
    header += [*(f"tokens/s over {base}" for base in bases), f"memory over {bases[0]}", "rounds"]
    return Table(f"A training step, {setting}", header, rows)


def breakdown_table(setting: str, shares: dict) -> Table:
    """Share of a step by part, an arm a row."""
    parts = list(next(iter(shares.values())))
    rows = [[arm, *(f"{row.get(p, 0):.1%}" for p in parts)] for arm, row in shares.items()]
    return Table(f"Where a step's time goes, {setting}", ["arm", *parts], rows)


def pickled_vocabulary(size: int) -> bytes:
    import pickle

    return pickle.dumps({"vocab_size": size})


def common(args) -> dict:
    """Keys that our train.py and nanoGPT's share."""
    return {
        "log_interval": 1, "device": args.device, "dtype": args.dtype,
        "compile": args.compile, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "warmup_iters": 10,
    }  # fmt: skip


def breakdown(shape: dict, args) -> dict:
    """Share of a step's time by part, for each arm: forward hooks and clocks around each phase."""
    import torch

    import train
    from engine.ranks import keep_heap
    from model import GPT, GPTConfig

    keep_heap()
    device = torch.device(args.device)
    table = {}
    shape_keys = {k: v for k, v in shape.items() if k != "batch_size"}
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(np.clip(1 + rng.poisson(5, shape["vocab_size"]), 1, 16).astype(np.int16))
    data = torch.from_numpy(rng.integers(97, 123, (shape["vocab_size"], 16)).astype(np.uint8))
    data[torch.arange(16) >= lengths[:, None]] = 0
    ranks = np.minimum(
        rng.zipf(1.2, (shape["batch_size"], shape["block_size"] + 1)) - 1, shape["vocab_size"] - 1
    )
    ids = torch.from_numpy(ranks).to(device)
    for arm in args.arms:
        config = configurator.load([str(ARMS / f"{arm.partition(':')[0]}.py")], quiet=True)
        config = dataclasses.replace(config, **shape_keys, bias=False)
        model = GPT(
            GPTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(GPTConfig)}),
            (data, lengths),
        )
        model = model.to(device)
        optimizer = train.make_optimizer(model, config, device.type)
        marks = []

        def mark(name, marks=marks):
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append((name, time.perf_counter()))

        model.transformer.wte.register_forward_hook(lambda *_, mark=mark: mark("embedding"))
        model.transformer.ln_f.register_forward_hook(lambda *_, mark=mark: mark("blocks"))
        total: dict = {}
        for step in range(7):
            marks.clear()
            mark("start")
            _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            mark("head and loss")
            loss.backward()
            mark("backward")
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if device.type in ("cpu", "cuda"):
                optimizer.found_inf, optimizer.grad_scale = (~norm.isfinite()).float(), norm.clamp(min=1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mark("clip and AdamW")
            if step >= 2:
                for (_, before), (name, after) in itertools.pairwise(marks):
                    total[name] = total.get(name, 0.0) + after - before
        whole = sum(total.values())
        table[arm] = {name: t / whole for name, t in total.items()}
    return table


def arguments(argv=None):
    """The arguments; .keys are those of train.py, .left() says how many seconds there are."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--nanogpt-dir", default="", help="checkout of nanoGPT to measure against")
    add("--setting", type=names, default="gpt2-vocabulary,demo", help=f"with commas: {', '.join(SETTINGS)}")
    add(
        "--arms",
        type=names,
        default="bpe_tied,bpe_untied,kronecker",
        help="names in config/arms/, with commas",
    )
    add("--rounds", type=whole(1), default=3, help="times that every side runs (%(default)s)")
    add("--minutes", type=number(0, 1e6, above=True), help="begin no round that would end later")
    add("--steps", type=whole(2), default=8, help="steps of one process, --skip of which do not count")
    add("--skip", type=whole(0), default=2, help="steps at the start that do not count (%(default)s)")
    add("--device", type=device, default="cpu", help="cpu or cuda (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--compile", action="store_true")
    add("--breakdown", action="store_true", help="also print where a step's time goes")
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
    for what, given, known in (
        ("setting", args.setting, list(SETTINGS)),
        ("arm", [a.partition(":")[0] for a in args.arms], sorted(p.stem for p in ARMS.glob("*.py"))),
    ):
        unknown = next((x for x in given if x not in known), None)
        if unknown:
            parser.error(f"there is no {what} {unknown!r}: choose from {', '.join(known)}")
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
        rounds = alternate(
            sides, args.rounds, args.left, lambda line: print(line, file=sys.stderr, flush=True)
        )
    found, tables = {"rounds": rounds}, [side_table(setting, rounds)]
    if args.breakdown:
        found["breakdown"] = breakdown(shape, args)
        tables.append(breakdown_table(setting, found["breakdown"]))
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
