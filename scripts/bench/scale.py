"""How a training grows with its ranks, and its loader with the number of shards.

    python scripts/bench/scale.py --out results/training

Ranks: train.py on the CPU through torchrun and gloo, one thread a rank, the global batch the same for all. Shards: the
same tokens in more and more files: opening them all, and reading batches whose rows lie scattered over them.
"""

import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from data.files import write_json, write_text
from data.loader import TrainBatches
from data.shards import write_shard
from engine.errors import sentences
from engine.metrics import read_metrics
from scripts import provenance
from scripts.arguments import Parser, whole
from scripts.bench.growth import growth
from scripts.bench.rounds import alternate, timed
from scripts.bench.train import ARMS, ROOT, SETTINGS, flags, write_data

ROWS, BLOCK = 32, 128  # of a batch
N_TOKENS = 2_000_000  # of all shards together


def train_on(n_ranks: int, work: Path, args) -> dict:
    """Milliseconds of a step and megabytes of rank 0 at its peak; the median over all steps but the first three."""
    out_dir = work / f"ranks_{n_ranks}"
    keys = SETTINGS[args.setting] | {"global_batch_size": ROWS, "max_iters": args.steps, "log_interval": 1}
    keys |= {
        "batch_size": 8,
        "eval_interval": 10**6,
        "eval_tokens": 4096,
        "ckpt_interval": -1,
        "keep_best": False,
    }
    keys |= {"data_dir": work / "data", "out_dir": out_dir, "dtype": "float32", "bias": False}
    python = ["env", "OMP_NUM_THREADS=1", sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    words = [str(ROOT / "train.py"), str(ARMS / "kronecker.py"), "--device=cpu", *flags(keys)]
    timed([*python, *torchrun, *words], work)
    rows = [row for row in read_metrics(out_dir) if "train/loss" in row]
    shutil.rmtree(out_dir)
    tokens = ROWS * keys["block_size"]
    steps = [1e3 * tokens / row["tok_per_sec"] for row in rows[3:]]
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
    start = time.perf_counter()
    batches = TrainBatches(folder, BLOCK, ROWS, seed=1)
    batches.rows(0, 0, ROWS)
    opened = time.perf_counter() - start
    each = []
    for step in range(1, 21):
        start = time.perf_counter()
        batches.rows(step, 0, ROWS)
        each.append(time.perf_counter() - start)
    tracemalloc.start()
    TrainBatches(folder, BLOCK, ROWS, seed=1).rows(0, 0, ROWS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = {"start and first batch, ms": 1e3 * opened, "batch, ms": 1e3 * statistics.median(each)}
    return found | {"memory of the loader, KB": peak / 1e3}


def main(argv=None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=whole(1, 64), nargs="+", default=[1, 2, 4], help="numbers of ranks (1 2 4)")
    add(
        "--shards",
        type=whole(1, 2000),
        nargs="+",
        default=[1, 10, 100, 1000],
        help="numbers of shards (1 10 100 1000)",
    )
    add("--setting", default="demo", choices=SETTINGS, help="the model that the ranks train (%(default)s)")
    add("--steps", type=whole(5), default=20, help="of a training (%(default)s)")
    add("--rounds", type=whole(1), default=3, help="times that every number is measured (%(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "bench", help="folder of tables and figures (%(default)s)")
    args = parser.parse_args(argv)
    with sentences(), tempfile.TemporaryDirectory() as temporary:
        work, say = Path(temporary), lambda line: print(line, file=sys.stderr, flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        write_data(work / "data", SETTINGS[args.setting]["vocab_size"])
        record = provenance.provenance(__file__, argv)
        parts = ["# Growth with ranks and shards"]
        parts += [
            f"`{record['command']}` at commit {record['commit']}, {record['machine']}, {record['date']}."
        ]
        for what, numbers, run in (
            ("ranks", args.ranks, lambda n: train_on(n, work, args)),
            ("shards", args.shards, lambda n: read_from(n, work)),
        ):
            sides = {n: lambda _, n=n, run=run: run(n) for n in numbers}
            record[what] = rounds = alternate(sides, args.rounds, say=say)
            for quantity in [q for q in rounds[numbers[0]][0] if q != "round"]:
                values = [statistics.median(f[quantity] for f in rounds[n]) for n in numbers]
                name, _, unit = quantity.rpartition(", ")
                base = args.out / f"growth_{what}_{name.split()[0]}"
                table = growth(f"{name.capitalize()} and {what}", what, unit, numbers, {name: values}, base)
                print(table.text() + "\n", flush=True)
                parts += [table.markdown(), f"![{name}]({base.name}.svg)"]
        write_json(args.out / "growth.json", record)
        write_text(args.out / "growth.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
