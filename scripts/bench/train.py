"""Training speed and peak memory: our train.py against nanoGPT's own, and the arms against each other.

    python scripts/bench/train.py --nanogpt-dir ../nanoGPT          (a checkout of karpathy/nanoGPT)
    python scripts/bench/train.py --setting=demo --breakdown
    python scripts/bench/train.py --setting=124m --device=cuda --dtype=bfloat16 --compile --nanogpt-dir ../nanoGPT

Every side runs as its own process, one after the other, round after round; a side's figure is the median of
its steps after the first ones, and ratios are medians over the rounds' pairs. Both read the same headerless
train.bin and use the same model, batch, number format, compile setting and threads. On CUDA the peak memory
is the allocator's, and MFU stands beside it (engine/flops.py names its convention and the device's peak).
--batch_size, --accumulate and further --key=value (attention, loss, compile_mode) are for our side alone;
--nanogpt-batch and --nanogpt-accumulate for nanoGPT's.
"""

import argparse
import itertools
import json
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
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)

from engine.metrics import read_metrics
from engine.runs import commit, machine

SETTINGS = {
    "gpt2-vocabulary": {"vocab_size": 50304, "n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 8},
    "demo": {"vocab_size": 4096, "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8},
    "124m": {"vocab_size": 50304, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "batch_size": 32},
    "toy": {"vocab_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4},
}  # fmt: skip
ARMS = {
    "bpe_tied": {"wte": "stock", "tie_weights": True},
    "bpe_untied": {"wte": "stock", "tie_weights": False},
    "kronecker": {"wte": "kronecker", "tie_weights": False},
    "kronecker_tied": {"wte": "kronecker", "tie_weights": True},
}


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


class BenchError(ValueError):
    """A side did not run; the message says which and why."""


def timed(command: list[str], cwd: Path, env: dict, limit: float | None = None) -> tuple[str, float]:
    """(output, peak resident memory in GB) of a process, which is ended after `limit` seconds."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT)
        clock = threading.Timer(limit or 10**6, process.kill)
        clock.start()
        _, status, usage = os.wait4(process.pid, 0)
        clock.cancel()
        out.seek(0)
        text = out.read()
    if os.waitstatus_to_exitcode(status) == -signal.SIGKILL and limit is not None:
        raise BenchError(f"ended after {limit:.0f} s, without figures")
    if os.waitstatus_to_exitcode(status):
        lines = text.strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        script = next(word for word in command if word.endswith(".py"))
        raise BenchError(f"{script} failed: {said.removeprefix('error: ')}")
    return text, usage.ru_maxrss * 1024 / 1e9


def figures(times: list[float], tokens: int, gb: float, shape: dict, device: str) -> dict:
    """One run of one side: times in ms, tokens of a step. mfu in per cent, None where the peak is unknown."""
    import torch

    from engine import flops
    from model import GPTConfig

    ms = statistics.median(times)
    names = [k for k in shape if k not in ("batch_size", "gradient_accumulation_steps")]
    peak = flops.peak_flops(torch.device(device))
    work = flops.flops_per_token(GPTConfig(**{k: shape[k] for k in names}))
    tokens_per_s = 1e3 * tokens / ms
    mfu = 100 * tokens_per_s * work / peak[0] if peak else None
    return {"ms": ms, "tokens": tokens, "tokens_per_s": tokens_per_s, "gb": gb, "mfu": mfu, "all_ms": times}


def run_ours(arm: str, shape: dict, steps: int, work: Path, number: int, args, script=("train.py",)) -> dict:
    """train.py as it is; its clock is that of its own log, one row a step. script: what to run in its place."""
    out_dir = work / f"{arm}_{number}"
    keys = shape | ARMS[arm] | common(args)
    keys |= {
        "gradient_accumulation_steps": args.accumulate,
        "batch_size": args.batch_size or shape["batch_size"],
    }
    keys |= {"data_dir": work / "data" / "bench", "out_dir": out_dir, "eval_tokens": shape["block_size"]}
    keys["keep_best"] = False
    keys |= {"max_iters": steps, "seed": 1 + number, "eval_interval": 10**6, "ckpt_interval": -1} | args.keys
    flags = [f"--{k}={v}" for k, v in keys.items()]
    command = [sys.executable, str(ROOT / script[0]), *script[1:], *flags]
    _, memory = timed(command, work, dict(os.environ), args.limit)
    rows = [r for r in read_metrics(out_dir) if "train/loss" in r]
    shutil.rmtree(out_dir)
    tokens = keys["batch_size"] * args.accumulate * shape["block_size"]
    times = [1e3 * tokens / r["tok_per_sec"] for r in rows[args.skip :]]
    gb = rows[-1]["mem_gb"] if args.device == "cuda" else memory
    return figures(times, tokens, gb, shape, args.device)


# Runs a script as it is and says what the allocator's peak was.
WITH_PEAK = (
    "import os, runpy, sys, torch; del sys.argv[0]; sys.path.insert(0, os.path.dirname(sys.argv[0])); "
    "runpy.run_path(sys.argv[0], run_name='__main__'); "
    "print('peak bytes', torch.cuda.max_memory_allocated())"
)


def run_nanogpt(shape: dict, steps: int, work: Path, number: int, args) -> dict:
    """nanoGPT's train.py as it is; its clock is that of its own log line, one step each."""
    checkout = Path(args.nanogpt_dir).resolve()
    link = work / "configurator.py"
    if not link.exists():
        link.symlink_to(checkout / "configurator.py")  # it reads this from the current folder
    keys = {k: v for k, v in shape.items() if k != "vocab_size"} | common(args)
    keys["batch_size"] = args.nanogpt_batch or args.batch_size or shape["batch_size"]
    keys["gradient_accumulation_steps"] = args.nanogpt_accumulate or args.accumulate
    keys |= {"dataset": "bench", "out_dir": f"nanogpt_{number}", "max_iters": steps, "eval_iters": 1}
    keys |= {"always_save_checkpoint": False, "wandb_log": False, "eval_interval": 10**6}
    keys["dtype"] = args.dtype
    (work / "data" / "bench" / "meta.pkl").write_bytes(pickled_vocabulary(shape["vocab_size"]))
    flags = [f"--{k}={v!r}" if not isinstance(v, str) else f"--{k}={v}" for k, v in keys.items()]
    start = [sys.executable] + (["-c", WITH_PEAK] if args.device == "cuda" else [])
    text, memory = timed([*start, str(checkout / "train.py"), *flags], work, dict(os.environ), args.limit)
    (work / "data" / "bench" / "meta.pkl").unlink()
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.naif]+, time ([\d.]+)ms", text)][args.skip :]
    if args.device == "cuda":
        memory = int(re.findall(r"peak bytes (\d+)", text)[-1]) / 1e9
    tokens = keys["batch_size"] * keys["gradient_accumulation_steps"] * shape["block_size"]
    return figures(times, tokens, memory, shape, args.device)


def alternate(sides: dict, n_rounds: int, left=None, say=print) -> dict[str, list[dict]]:
    """Run each side once a round, there and back again: {side: [figures, with the "round" they belong to]}.

    sides: {name: function of the round's number}. left: function that gives the seconds that are left; then a
    round that would take longer than the longest before it is not begun (the first always is), and a side
    that fails is told and left out of that round instead of ending the measurement.
    """
    rounds, longest = {side: [] for side in sides}, 0.0
    for number in range(n_rounds):
        if left is not None and number and left() < longest:
            say(f"no time for round {number + 1} of {n_rounds}")
            break
        began = time.perf_counter()
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            say(f"round {number + 1} of {n_rounds}, {side}")
            try:
                rounds[side].append({"round": number} | sides[side](number))
            except BenchError as e:
                if left is None:
                    raise
                say(f"{side}: {e}")
        longest = max(longest, time.perf_counter() - began)
    return rounds


def absolute(rounds: dict[str, list[dict]]) -> list[str]:
    """Markdown table of times, speed, MFU and memory: medians over the rounds."""

    def median(side, key, digits):
        values = [f[key] for f in rounds[side] if f[key] is not None]
        return f"{statistics.median(values):,.{digits}f}" if values else "-"

    lines = [
        "| side | ms a step | tokens a step | tokens/s | MFU, % | peak memory, GB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for side, found in rounds.items():
        cells = [
            median(side, k, d)
            for k, d in (("ms", 1), ("tokens", 0), ("tokens_per_s", 0), ("mfu", 1), ("gb", 1))
        ]
        lines.append(f"| {side} | " + " | ".join(cells) + " |" if found else f"| {side} | - |")
    return lines


def pickled_vocabulary(size: int) -> bytes:
    import pickle

    return pickle.dumps({"vocab_size": size})


def common(args) -> dict:
    return {
        "log_interval": 1, "device": args.device, "dtype": args.dtype,
        "compile": args.compile, "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "warmup_iters": 10,
    }  # fmt: skip


def breakdown(shape: dict, args) -> dict:
    """Share of a step's time by part, for each arm: forward hooks and clocks around each phase."""
    import torch

    import train
    from configurator import Config
    from engine.ranks import keep_heap
    from model import GPT, GPTConfig

    keep_heap()
    device = torch.device(args.device)
    table = {}
    names = {k: v for k, v in shape.items() if k != "batch_size"}
    rng = np.random.default_rng(0)
    lengths = torch.from_numpy(np.clip(1 + rng.poisson(5, shape["vocab_size"]), 1, 16).astype(np.int16))
    data = torch.from_numpy(rng.integers(97, 123, (shape["vocab_size"], 16)).astype(np.uint8))
    data[torch.arange(16) >= lengths[:, None]] = 0
    ranks = np.minimum(
        rng.zipf(1.2, (shape["batch_size"], shape["block_size"] + 1)) - 1, shape["vocab_size"] - 1
    )
    ids = torch.from_numpy(ranks).to(device)
    for arm, choice in ARMS.items():
        model = GPT(GPTConfig(**names, **choice, bias=False), (data, lengths)).to(device)
        optimizer = train.make_optimizer(model, Config(**choice), device.type)
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--nanogpt-dir", default="", help="checkout of nanoGPT to measure against")
    parser.add_argument(
        "--setting", default="gpt2-vocabulary,demo", help=f"with commas: {', '.join(SETTINGS)}"
    )
    parser.add_argument("--arms", default="bpe_tied,bpe_untied,kronecker", help="arms of ours, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=8, help="steps of one process, --skip of which do not count"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--breakdown", action="store_true", help="also print where a step's time goes")
    parser.add_argument("--out", default="", help="write the figures as JSON and markdown to this folder")
    parser.add_argument("--skip", type=int, default=2, help="steps at the start that do not count")
    parser.add_argument("--batch_size", type=int, default=0, help="micro-batch (0: the setting's)")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--nanogpt-batch", type=int, default=0, help="nanoGPT's micro-batch (0: ours)")
    parser.add_argument("--nanogpt-accumulate", type=int, default=0, help="nanoGPT's (0: ours)")
    args, more = parser.parse_known_args(argv)
    wrong = [word for word in more if not re.fullmatch(r"--\w+=.+", word)]
    if wrong:
        parser.error(f"unrecognized argument {wrong[0]}")
    args.limit = None  # seconds a process may take; gpu_suite.py sets it
    args.keys = dict(word[2:].split("=", 1) for word in more)
    if args.nanogpt_dir and not (Path(args.nanogpt_dir) / "train.py").is_file():
        sys.exit(f"error: {args.nanogpt_dir} is no checkout of nanoGPT: it has no train.py")
    unknown = [s for s in args.setting.split(",") if s not in SETTINGS] + [
        a for a in args.arms.split(",") if a not in ARMS
    ]
    if unknown or args.rounds < 1 or args.steps < args.skip + 2:
        sys.exit(
            f"error: {unknown[0] if unknown else 'rounds or steps'} cannot be measured: see --help "
            f"(steps at least {args.skip + 2})"
        )
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    arms = args.arms.split(",")
    report = {
        "command": "python " + " ".join(sys.argv), "commit": commit(), "machine": machine(), "date": str(date.today()),
        "device": args.device, "dtype": args.dtype, "compile": args.compile, "settings": {},
    }  # fmt: skip
    text = []
    for setting in args.setting.split(","):
        shape = SETTINGS[setting]
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            write_data(work / "data" / "bench", shape["vocab_size"])
            call = (shape, args.steps, work)
            sides = {a: lambda n, a=a, call=call: run_ours(a, *call, n, args) for a in arms}
            if args.nanogpt_dir:
                sides["nanoGPT"] = lambda n, call=call: run_nanogpt(*call, n, args)
            try:
                rounds = alternate(
                    sides, args.rounds, say=lambda line: print(line, file=sys.stderr, flush=True)
                )
            except BenchError as e:
                sys.exit(f"error: {e}")
        against = {side: "nanoGPT" if args.nanogpt_dir else arms[0] for side in sides}
        found = {}
        for side in sides:
            mine, base = rounds[side], rounds[against[side]]
            found[side] = {
                "tokens_per_s_ratio": statistics.median(
                    m["tokens_per_s"] / b["tokens_per_s"] for m, b in zip(mine, base, strict=True)
                ),
                "peak_memory_ratio": statistics.median(
                    m["gb"] / b["gb"] for m, b in zip(mine, base, strict=True)
                ),
                "rounds": mine,
            }
        base = next(iter(against.values()))
        lines = [f"| {setting} | tokens/s against {base} | peak memory against {base} |", "|---|---|---|"]
        for side in sides:
            f = found[side]
            lines.append(f"| {side} | {f['tokens_per_s_ratio']:.2f}x | {f['peak_memory_ratio']:.2f}x |")
        if args.device == "cuda":
            lines += ["", *absolute(rounds)]
        if {"kronecker", "bpe_untied"} <= set(arms):
            pairs = zip(rounds["kronecker"], rounds["bpe_untied"], strict=True)
            ratio = statistics.median(b["ms"] / k["ms"] for k, b in pairs)
            found["kronecker against bpe_untied"] = ratio
            lines.append(f"\n`kronecker` makes {ratio:.3f}x the tokens/s of `bpe_untied`.")
        if args.breakdown:
            shares = breakdown(shape, args)
            found["breakdown"] = shares
            parts = list(next(iter(shares.values())))
            lines += [
                "",
                f"| share of a step, {setting} | " + " | ".join(parts) + " |",
                "|---" * (len(parts) + 1) + "|",
            ]
            lines += [
                f"| {arm} | " + " | ".join(f"{row.get(p, 0):.1%}" for p in parts) + " |"
                for arm, row in shares.items()
            ]
        report["settings"][setting] = {"shape": shape, "figures": found}
        print("\n".join(lines) + "\n", flush=True)
        text += [*lines, ""]
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench_train.json").write_text(json.dumps(report, indent=1) + "\n")
        made = f"`{report['command']}` at commit {report['commit']}, {report['machine']}, {report['date']}; {args.dtype}, compile {args.compile}."
        (folder / "bench_train.md").write_text(
            "# Training speed\n\n" + made + "\n\n" + "\n".join(text) + "\n"
        )
        print(f"written to {folder}/bench_train.json and bench_train.md")


if __name__ == "__main__":
    main()
