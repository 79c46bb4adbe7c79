"""How fast does the loader read, and does its memory stay flat?

    python scripts/bench/loader.py --out results/data

On one core, from shards in the page cache: tokens a second of data.loader in several shapes, in turns with the loop
that nanoGPT's train.py has (a new memory map a batch, random places, one array a row); and resident memory over 100,000
batches of ours.
"""

import os
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np
import psutil
import torch

from data.loader import TrainBatches
from data.shards import open_shard, write_shard
from engine.errors import sentences
from scripts.analysis.report import Table
from scripts.bench import rounds as bench
from scripts.provenance import provenance

# block_size and rows: the 124M recipe on one GPU (a whole global batch), one micro-batch of it, a CPU's toy
SHAPES = ((1024, 528), (1024, 12), (256, 32), (64, 16))
SHARDS, SHARD_TOKENS = 4, 50_000_000
SECONDS = 1.0  # of each measurement of speed
BATCHES = 100_000  # for the memory's sake
H200 = 500_000  # tokens/s: about what GPT-2 124M consumes at 40 to 45% of its bf16 peak, an assumption


def nanogpt_batch(path: Path, offset: int, block_size: int, rows: int):
    """The reading loop that is known from nanoGPT: a fresh map each time, since a kept one grows."""
    data = np.memmap(path, dtype=np.uint16, mode="r", offset=offset)
    places = torch.randint(len(data) - block_size, (rows,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in places])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in places])
    return x, y


def rate(batch_of, tokens: int) -> float:
    """Tokens a second of a function that takes a step's number and reads so many tokens."""
    started = time.perf_counter()
    for step in count(1):
        batch_of(step)
        if (seconds := time.perf_counter() - started) >= SECONDS:
            return step * tokens / seconds


def speeds(folder: Path, n_rounds: int) -> dict[str, dict]:
    """{shape: {side: tokens/s of each round}}."""
    first, found = open_shard(folder / "bench_train_000001.bin"), {}
    for block_size, rows in SHAPES:
        ours = partial(TrainBatches(folder, block_size, rows, seed=1337).rows, lo=0, hi=rows)
        theirs = partial(nanogpt_batch, first.path, first.offset, block_size)
        sides = {"ours": ours, "nanogpt_loop": lambda step, theirs=theirs, rows=rows: theirs(rows)}
        sides = {side: partial(rate, loop, block_size * rows) for side, loop in sides.items()}
        found[f"{block_size} x {rows}"] = bench.alternate(sides, n_rounds)
    return found


def memory_over_time(folder: Path) -> list[int]:
    """Memory (MiB) before and at every tenth of many batches."""
    batches, readings = TrainBatches(folder, 1024, 12, seed=1337), []
    for step in range(BATCHES + 1):
        batches.rows(step, 0, 12)
        if step % (BATCHES // 10) == 0:
            readings.append(psutil.Process().memory_info().rss >> 20)
    return readings


def main(argv: list[str] | None = None) -> None:
    args = bench.parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with sentences(), tempfile.TemporaryDirectory() as scratch:
        folder, rng = Path(scratch), np.random.default_rng(0)
        for number in range(1, SHARDS + 1):
            path = folder / f"bench_train_{number:06d}.bin"
            write_shard(path, rng.integers(0, 50257, SHARD_TOKENS).astype(np.uint16))
            path.read_bytes()  # into the page cache
        record = {"tokens_per_second": speeds(folder, args.rounds), "memory_mib": memory_over_time(folder)}
        made = provenance(__file__, argv)
        bench.publish(args.out, "bench_loader", "Reading batches", made, record, [table(record)])


def table(record: dict) -> Table:
    """The speeds, and what else was measured below."""
    rows = []
    for shape, sides in record["tokens_per_second"].items():
        millions = {side: [speed / 1e6 for speed in of_side] for side, of_side in sides.items()}
        speeds = [bench.median(of_side, ".1f") + "M" for of_side in millions.values()]
        times = bench.median([speed * 1e6 / H200 for speed in millions["ours"]], ".1f")
        rows.append([shape, *speeds, bench.ratio(*millions.values()), times])
    header = ["block_size x rows", "tokens/s", "nanoGPT's loop", "ratio", "times what an H200 consumes"]
    first, *_, last = record["memory_mib"]
    note = (
        f"One core. Memory over {BATCHES:,} batches of 12 x 1,024 from {2 * SHARDS * SHARD_TOKENS / 1e6:.0f} MB of "
        f"shards: {first} MiB at first, {last} MiB in the end. H200 at {H200:,} tokens/s for GPT-2 124M, an assumption."
    )
    return Table("Tokens a second", header, rows, note=note)


if __name__ == "__main__":
    main()
