"""How a training grows with its ranks, and its loader with the number of shards.

    python scripts/bench/scale.py --out results/training

Ranks: train.py on the CPU through torchrun and gloo, one thread a rank, the global batch the same for all. Shards: the
same tokens in more and more files: opening them all, and reading batches whose rows lie scattered over them.
"""

import shutil
import statistics
import sys
import tempfile
import tracemalloc
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from data.loader import TrainBatches
from data.shards import write_shard
from engine.errors import sentences
from engine.metrics import read_metrics
from scripts.arguments import flags, whole
from scripts.bench import rounds as bench
from scripts.bench.growth import growth
from scripts.bench.train import SETTINGS
from scripts.experiment import arm_file
from scripts.made_up import write_data
from scripts.provenance import ROOT, provenance

ROWS, BLOCK = 32, 128  # of a batch
N_TOKENS = 2_000_000  # of all shards together
SKIPPED = 3  # steps at a training's start that do not count


def train_on(n_ranks: int, work: Path, args) -> dict:
    """Milliseconds of a step, the median, and megabytes of rank 0 at its peak."""
    keys = SETTINGS[args.setting] | {
        "batch_size": 8, "global_batch_size": ROWS, "max_iters": args.steps, "log_interval": 1, "eval_interval": 10**6,
        "eval_tokens": 4096, "ckpt_interval": -1, "keep_best": False, "dtype": "float32", "bias": False, "device": "cpu",
        "data_dir": work / "data", "out_dir": work / "run",
    }  # fmt: skip
    torchrun = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [ROOT / "train.py", arm_file("kronecker"), *flags(keys)]
    bench.run([*torchrun, f"--nproc_per_node={n_ranks}", *command], work)
    rows = [row for row in read_metrics(keys["out_dir"]) if "train/loss" in row]
    shutil.rmtree(keys["out_dir"])
    steps = [1e3 * ROWS * keys["block_size"] / row["tok_per_sec"] for row in rows[SKIPPED:]]
    return {"step, ms": statistics.median(steps), "memory of a rank, MB": 1e3 * rows[-1]["mem_gb"]}


def read_from(n_shards: int, work: Path) -> dict:
    """Milliseconds to open so many shards and for one batch of them, the median of 20; the loader's memory at its peak
    (Python's and NumPy's)."""
    folder = work / f"shards_{n_shards}"
    if not folder.is_dir():
        folder.mkdir()
        tokens = np.random.default_rng(0).integers(0, 4096, N_TOKENS // n_shards).astype(np.uint16)
        for number in range(1, n_shards + 1):
            write_shard(folder / f"scale_train_{number:06d}.bin", tokens)

    def start() -> TrainBatches:
        batches = TrainBatches(folder, BLOCK, ROWS, seed=1)
        batches.rows(0, 0, ROWS)
        return batches

    opened, batches = bench.timed(start)
    each = [bench.timed(partial(batches.rows, step, 0, ROWS))[0] for step in range(1, 21)]
    tracemalloc.start()
    start()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = {"start and first batch, ms": opened, "batch, ms": statistics.median(each)}
    return found | {"memory of the loader, KB": peak / 1e3}


def main(argv=None) -> None:
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=whole(1, 64), nargs="+", default=[1, 2, 4], help="numbers of ranks (1 2 4)")
    counts = [1, 10, 100, 1000]
    add("--shards", type=whole(1, 2000), nargs="+", default=counts, help="numbers of shards (1 10 100 1000)")
    add("--setting", default="demo", choices=SETTINGS, help="the model that the ranks train (%(default)s)")
    add("--steps", type=whole(SKIPPED + 2), default=20, help="of a training (%(default)s)")
    args = parser.parse_args(argv)
    with sentences(), tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_data(work / "data", SETTINGS[args.setting]["vocab_size"])
        made, record, parts = provenance(__file__, argv), {}, []
        for what, numbers, run in (
            ("ranks", args.ranks, lambda n: train_on(n, work, args)),
            ("shards", args.shards, lambda n: read_from(n, work)),
        ):
            numbers = list(dict.fromkeys(numbers))
            record[what] = rounds = bench.alternate({n: partial(run, n) for n in numbers}, args.rounds)
            for quantity in rounds[numbers[0]][0]:
                values = [statistics.median(bench.column(rounds, n, quantity)) for n in numbers]
                name, _, unit = quantity.rpartition(", ")
                base = args.out / f"growth_{what}_{name.split()[0]}"
                parts += growth(f"{name.capitalize()} and {what}", what, unit, numbers, {name: values}, base)
        bench.publish(args.out, "growth", "Growth with ranks and shards", made, record, parts)


if __name__ == "__main__":
    main()
