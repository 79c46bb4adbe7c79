"""How fast does the loader read, and does its memory stay flat?

    python scripts/bench/loader.py --json results/data/bench_loader.json

On one core, from shards in the page cache: tokens a second of data.loader in three shapes, in turns with the loop
that nanoGPT's train.py has (a new memory map a batch, random places, one array a row); resident memory over 100,000
batches of ours, and of the same rows through memory maps that stay open; and the cost of drawing the order itself at
100B tokens.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from data.files import expanded, write_json, write_text
from data.loader import TrainBatches, permute
from data.shards import open_shard, write_shard
from scripts import arguments
from scripts.arguments import Parser, whole
from scripts.provenance import provenance

# block_size and rows: the 124M recipe on one GPU (a whole global batch), one micro-batch of it, a CPU's toy
SHAPES = ((1024, 528), (1024, 12), (256, 32), (64, 16))
H200_TOKENS_PER_SECOND = 500_000  # about what GPT-2 124M consumes at 40 to 45% of its bf16 peak


def memory() -> dict[str, int]:
    """Resident memory of this process in MiB: all, and the part that is pages of files."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return {
        name: int(fields[key].split()[0]) // 1024 for name, key in (("all", "VmRSS"), ("of_files", "RssFile"))
    }


def nanogpt_batch(path: Path, offset: int, block_size: int, rows: int):
    """The reading loop that is known from nanoGPT: a fresh map each time, since a kept one grows."""
    data = np.memmap(path, dtype=np.uint16, mode="r", offset=offset)
    places = torch.randint(len(data) - block_size, (rows,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in places])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in places])
    return x, y


def rate(action, tokens: int, seconds: float) -> float:
    """Tokens a second of an action that takes a step number and yields so many tokens."""
    step, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        action(step)
        step += 1
    return step * tokens / (time.perf_counter() - started)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--seconds",
        type=arguments.number(0, above=True),
        default=1.0,
        help="of each measurement (%(default)s)",
    )
    parser.add_argument("--repeats", type=whole(1), default=5)
    parser.add_argument(
        "--batches", type=whole(10), default=100_000, help="for the memory's sake (%(default)s)"
    )
    parser.add_argument("--shards", type=whole(1), default=4)
    parser.add_argument("--shard-tokens", type=whole(1_000_000), default=50_000_000)
    parser.add_argument("--json", type=expanded, help="where the figures go; beside it a .md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rng = np.random.default_rng(0)
        for number in range(1, args.shards + 1):
            write_shard(
                folder / f"bench_train_{number:06d}.bin",
                rng.integers(0, 50257, args.shard_tokens).astype(np.uint16),
            )
        first = open_shard(folder / "bench_train_000001.bin")
        for path in folder.iterdir():
            path.read_bytes()  # into the page cache
        speeds = []
        for block_size, rows in SHAPES:
            batches = TrainBatches(folder, block_size, rows, seed=1337)
            ours, theirs = [], []
            for _ in range(args.repeats):
                ours.append(rate(lambda s: batches.rows(s, 0, rows), block_size * rows, args.seconds))  # noqa: B023
                theirs.append(
                    rate(
                        lambda s: nanogpt_batch(first.path, first.offset, block_size, rows),  # noqa: B023
                        block_size * rows,
                        args.seconds,
                    )
                )
            speed = statistics.median(ours)
            speeds.append(
                {
                    "block_size": block_size,
                    "rows": rows,
                    "tokens_per_second": round(speed),
                    "nanogpt_loop_tokens_per_second": round(statistics.median(theirs)),
                    "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
                    "times_an_h200_running_124M": round(speed / H200_TOKENS_PER_SECOND, 1),
                }
            )
            print(speeds[-1], flush=True)
        batches = TrainBatches(folder, 1024, 12, seed=1337)
        for step in range(100):
            batches.rows(step, 0, 12)
        readings, started = [memory()], time.perf_counter()
        for step in range(args.batches):
            batches.rows(step, 0, 12)
            if (step + 1) % (args.batches // 10) == 0:
                readings.append(memory())
        seconds = time.perf_counter() - started
        kept = [open_shard(path).tokens for path in sorted(folder.iterdir())]
        before_maps = memory()
        for step in range(args.batches // 5):
            for window in batches.window_ids(step).tolist():
                shard, place = divmod(window, (args.shard_tokens - 1) // 1024)
                kept[shard][place * 1024 : place * 1024 + 1025].astype(np.int64)
        after_maps = memory()
    windows = 100_000_000_000 // 1024
    draws = np.arange(528)
    permute(draws, windows, 0, 0)
    started = time.perf_counter()
    for epoch in range(200):
        permute(draws, windows, 0, epoch)
    microseconds = (time.perf_counter() - started) / 200 * 1e6
    report = provenance(__file__, argv) | {
        "what": "data.loader on one core, from shards in the page cache",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "shards": args.shards,
        "shard_tokens": args.shard_tokens,
        "h200_tokens_per_second_assumed": H200_TOKENS_PER_SECOND,
        "speed": speeds,
        "memory_mib": {
            "batches": args.batches,
            "rows_of_1024": 12,
            "seconds": round(seconds, 1),
            "ours_every_tenth_of_the_way": readings,
            "growth": readings[-1]["all"] - readings[0]["all"],
            "same_rows_through_kept_memory_maps_growth": after_maps["all"] - before_maps["all"],
            "after_batches": args.batches // 5,
        },
        "drawing_528_windows_of_100B_tokens_microseconds": round(microseconds),
    }
    lines = [
        "| block_size x rows | tokens/s | nanoGPT's loop | ratio | times what an H200 consumes |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['block_size']} x {s['rows']} | {s['tokens_per_second'] / 1e6:.1f}M | "
        f"{s['nanogpt_loop_tokens_per_second'] / 1e6:.1f}M | {s['ratio']}x | {s['times_an_h200_running_124M']} |"
        for s in speeds
    ]
    grown = report["memory_mib"]
    lines += [
        "",
        f"Memory over {args.batches:,} batches of 12 x 1,024 from {args.shards * args.shard_tokens * 2 / 1e6:.0f} MB of "
        f"shards: {readings[0]['all']} MiB at first, {readings[-1]['all']} MiB in the end (growth {grown['growth']} MiB); "
        f"kept memory maps grow by {grown['same_rows_through_kept_memory_maps_growth']} MiB in "
        f"{grown['after_batches']:,} batches. Drawing 528 windows out of 100B tokens takes {microseconds:.0f} us and no "
        f"array. H200 at {H200_TOKENS_PER_SECOND:,} tokens/s for GPT-2 124M, an assumption. One core of "
        f"{report['machine']}; medians of {args.repeats} turns; commit {report['commit']}; {report['date']}; "
        f"`{report['command']}`",
    ]
    print("\n".join(lines))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, report)
        write_text(args.json.with_suffix(".md"), "# Reading batches\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
