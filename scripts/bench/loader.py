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
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import torch

from data.files import expanded, write_json, write_text
from data.loader import TrainBatches, permute
from data.shards import open_shard, write_shard
from engine.errors import sentences
from scripts import arguments
from scripts.analysis.report import Table
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


def speeds(folder: Path, repeats: int, seconds: float) -> list[dict]:
    """Tokens a second of each shape, ours and nanoGPT's loop in turns."""
    first, found = open_shard(folder / "bench_train_000001.bin"), []
    for block_size, rows in SHAPES:
        batches, size = TrainBatches(folder, block_size, rows, seed=1337), block_size * rows
        loops = (
            lambda step, batches=batches, rows=rows: batches.rows(step, 0, rows),
            lambda step, shape=(block_size, rows): nanogpt_batch(first.path, first.offset, *shape),
        )
        ours, theirs = zip(
            *([rate(loop, size, seconds) for loop in loops] for _ in range(repeats)), strict=True
        )
        speed = statistics.median(ours)
        found.append(
            {
                "block_size": block_size,
                "rows": rows,
                "tokens_per_second": round(speed),
                "nanogpt_loop_tokens_per_second": round(statistics.median(theirs)),
                "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2),
                "times_an_h200_running_124M": round(speed / H200_TOKENS_PER_SECOND, 1),
            }
        )
        print(found[-1], flush=True)
    return found


def growth(folder: Path, n_batches: int, shard_tokens: int) -> dict:
    """Memory (MiB) over many batches of ours, and over a fifth of them through memory maps that stay open."""
    batches = TrainBatches(folder, 1024, 12, seed=1337)
    for step in range(100):
        batches.rows(step, 0, 12)
    readings, started = [memory()], time.perf_counter()
    for step in range(n_batches):
        batches.rows(step, 0, 12)
        if (step + 1) % (n_batches // 10) == 0:
            readings.append(memory())
    seconds = time.perf_counter() - started
    kept, before = [open_shard(path).tokens for path in sorted(folder.iterdir())], memory()["all"]
    for step in range(n_batches // 5):
        for window in batches.window_ids(step).tolist():
            shard, place = divmod(window, (shard_tokens - 1) // 1024)
            kept[shard][place * 1024 : place * 1024 + 1025].astype(np.int64)
    return {
        "batches": n_batches,
        "rows_of_1024": 12,
        "seconds": round(seconds, 1),
        "ours_every_tenth_of_the_way": readings,
        "growth": readings[-1]["all"] - readings[0]["all"],
        "same_rows_through_kept_memory_maps_growth": memory()["all"] - before,
        "after_batches": n_batches // 5,
    }


def microseconds_of_drawing() -> int:
    """What the numbers of 528 windows out of 100B tokens take."""
    windows, draws = 100_000_000_000 // 1024, np.arange(528)
    permute(draws, windows, 0, 0)
    started = time.perf_counter()
    for epoch in range(200):
        permute(draws, windows, 0, epoch)
    return round((time.perf_counter() - started) / 200 * 1e6)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    positive = arguments.number(0, above=True)
    add("--seconds", type=positive, default=1.0, help="of each measurement (%(default)s)")
    add("--repeats", type=whole(1), default=5)
    add("--batches", type=whole(10), default=100_000, help="for the memory's sake (%(default)s)")
    add("--shards", type=whole(1), default=4)
    add("--shard-tokens", type=whole(1_000_000), default=50_000_000)
    add("--json", type=expanded, help="where the figures go; beside it a .md")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with sentences(), tempfile.TemporaryDirectory() as scratch:
        folder, rng = Path(scratch), np.random.default_rng(0)
        for number in range(1, args.shards + 1):
            path = folder / f"bench_train_{number:06d}.bin"
            write_shard(path, rng.integers(0, 50257, args.shard_tokens).astype(np.uint16))
            path.read_bytes()  # into the page cache
        report = provenance(__file__, argv) | {
            "what": "data.loader on one core, from shards in the page cache",
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "shards": args.shards,
            "shard_tokens": args.shard_tokens,
            "h200_tokens_per_second_assumed": H200_TOKENS_PER_SECOND,
            "speed": speeds(folder, args.repeats, args.seconds),
            "memory_mib": growth(folder, args.batches, args.shard_tokens),
            "drawing_528_windows_of_100B_tokens_microseconds": microseconds_of_drawing(),
        }
    found = table(report, args.repeats)
    print(found.text())
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, report)
        write_text(args.json.with_suffix(".md"), f"# Reading batches\n\n{found.markdown()}\n")


def table(report: dict, repeats: int) -> Table:
    """The speeds, with the memory and the provenance below."""
    grown, mb = report["memory_mib"], report["shards"] * report["shard_tokens"] * 2 / 1e6
    readings = grown["ours_every_tenth_of_the_way"]
    return Table(
        "Tokens a second",
        ["block_size x rows", "tokens/s", "nanoGPT's loop", "ratio", "times what an H200 consumes"],
        [
            [f"{s['block_size']} x {s['rows']}", f"{s['tokens_per_second'] / 1e6:.1f}M",
             f"{s['nanogpt_loop_tokens_per_second'] / 1e6:.1f}M", f"{s['ratio']}x", s["times_an_h200_running_124M"]]
            for s in report["speed"]
        ],
        note=f"Memory over {grown['batches']:,} batches of 12 x 1,024 from {mb:.0f} MB of shards: {readings[0]['all']} MiB "
        f"at first, {readings[-1]['all']} MiB in the end (growth {grown['growth']} MiB); kept memory maps grow by "
        f"{grown['same_rows_through_kept_memory_maps_growth']} MiB in {grown['after_batches']:,} batches. Drawing 528 "
        f"windows out of 100B tokens takes {report['drawing_528_windows_of_100B_tokens_microseconds']} us and no array. "
        f"H200 at {H200_TOKENS_PER_SECOND:,} tokens/s for GPT-2 124M, an assumption. One core of {report['machine']}; "
        f"medians of {repeats} turns; commit {report['commit']}; {report['date']}; {report['command']}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
