"""How fast is data/fineweb_edu/prepare.py, against the pipeline that everybody writes; and what is it waiting for?

    python scripts/bench/prepare.py --input text.jsonl.xz --out results/data

Both sides take the same JSON lines (unpacked beforehand, so that no decompressor is the limit), as many threads as the
other has processes, and the same disk, in turns. The plain side is a multiprocessing.Pool over documents, tiktoken's
encode_ordinary, a NumPy array with a range check, and a copy into a uint16 shard, the pipeline of llm.c's and
modded-nanogpt's scripts. All tokens are compared in the end. Then each stage of ours is timed alone, on one core.
"""

import json
import lzma
import multiprocessing
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from data.console import cores
from data.encoder import Encoder
from data.files import expanded
from data.identity import shard_record
from data.pipeline import checked_of
from data.shards import find_shards, open_shard, write_shard
from data.sources import SKIP_REASONS, local_blocks, read_block
from data.tokenizers import load_tokenizer
from engine.errors import RunError, sentences
from scripts.analysis.report import Table
from scripts.arguments import whole
from scripts.bench import rounds as bench
from scripts.provenance import ROOT, provenance

SHARD_SIZE, VAL_TOKENS = 100_000_000, 1_000_000


def _plain_encode(document: dict) -> np.ndarray:
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")  # made once a process, and then looked up
    ids = [encoding._special_tokens["<|endoftext|>"]]
    ids.extend(encoding.encode_ordinary(document["text"]))
    array = np.array(ids)
    assert (array >= 0).all() and (array < 2**16).all(), "ids over uint16"
    return array.astype(np.uint16)


def plain(source: Path, out_dir: Path, processes: int, shard_size: int = SHARD_SIZE) -> None:
    """Tokenize JSON lines with a pool, one document after the other into a buffer of one shard."""
    out_dir.mkdir(parents=True)
    with open(source, "rb") as file, multiprocessing.Pool(processes) as pool:
        buffer, count, number = np.empty(shard_size, np.uint16), 0, 0

        def write() -> None:
            write_shard(out_dir / f"plain_{'train' if number else 'val'}_{number:06d}.bin", buffer[:count])

        for ids in pool.imap(_plain_encode, map(json.loads, file), chunksize=16):
            while len(ids):
                room = min(len(ids), shard_size - count)
                buffer[count : count + room] = ids[:room]
                count, ids = count + room, ids[room:]
                if count == shard_size:
                    write()
                    count, number = 0, number + 1
        if count:
            write()


def all_tokens(folder: Path) -> np.ndarray:
    paths = find_shards(folder, "val") + find_shards(folder, "train")
    return np.concatenate([open_shard(path).tokens for path in paths])


def unpacked(paths: list[Path], target: Path) -> list[str]:
    """Write the lines of all files, plain or .xz, to one; the text of each document."""
    with open(target, "wb") as out:
        for path in paths:
            with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    texts = []
    for block in local_blocks([target], "text"):  # also brings it into the page cache, for both sides
        found, skipped = read_block(block, "text")
        texts += found
        if wrong := [what for reason, what in SKIP_REASONS.items() if skipped[reason]]:
            raise RunError(f"some lines of --input {wrong[0]}: both sides want JSON lines with a text key")
    return texts


def stages(source: Path, packed: list[Path], scratch: Path) -> dict[str, float]:
    """Seconds of each stage of ours for the whole text, one after the other on this thread.

    reading: lines from the page cache, cut into blocks; parsing: JSON to text; checking: tiktoken on its share;
    writing: hash, disk and fsync; unpacking: the .xz, which a packed source adds.
    """
    names = ("start", "reading", "parsing", "encoding", "checking", "writing", "unpacking")
    seconds = dict.fromkeys(names, 0.0)

    def spent(stage: str, action, *given):
        ms, value = bench.timed(partial(action, *given))
        seconds[stage] += ms / 1e3
        return value

    os.environ["RAYON_NUM_THREADS"] = "1"  # gigatoken's threads
    encoder = spent("start", lambda: Encoder(load_tokenizer("gpt2")))
    shard, pieces = scratch / "stage.bin", []
    blocks, number = local_blocks([source], "text"), 0
    while (block := spent("reading", next, blocks, None)) is not None:
        texts, _ = spent("parsing", read_block, block, "text")
        ids, _ = spent("encoding", encoder.encode, texts)
        for k in checked_of(number, len(texts)):
            spent("checking", encoder.tokenizer.encode, texts[k])
        pieces.append(ids)
        number += 1
    spent("writing", lambda: write_shard(shard, np.concatenate(pieces)))
    spent("writing", shard_record, shard, "val", encoder.tokenizer.eot)
    for path in packed:
        with lzma.open(path) as file:
            while spent("unpacking", file.read, 1 << 20):
                pass
    return seconds


def measure(args, scratch: Path) -> dict:
    """Time the sides in turns, and each stage; refuses figures of sides whose tokens differ."""
    source, out, expected = scratch / "text.jsonl", scratch / "out", []
    packed = [path for path in args.input if path.suffix == ".xz"]
    texts = unpacked(args.input, source)
    workers = f"--workers={args.workers}"
    ours = [sys.executable, ROOT / "data" / "fineweb_edu" / "prepare.py", "--out-dir", out, workers]
    ours += [f"--val-tokens={VAL_TOKENS}", f"--shard-size={SHARD_SIZE}", "--input"]
    plainly = [sys.executable, __file__, workers, "--plain-to", out, "--input", source]

    def run(command: list) -> dict:
        _, seconds, gb = bench.run(command)
        stream = all_tokens(out)
        expected[:] = expected or [stream]
        if not np.array_equal(expected[0], stream):
            raise RunError(f"{command[1]} gave other tokens than the other side")
        shutil.rmtree(out)
        return {"seconds": seconds, "peak_mb": 1e3 * gb}

    sides = {"ours": partial(run, [*ours, source]), "plain": partial(run, plainly)}
    if packed:
        sides["ours, from the .xz itself"] = partial(run, [*ours, *args.input])
    rounds = bench.alternate(sides, args.rounds)
    return {
        "input": " + ".join(path.name for path in args.input), "documents": len(texts), "tokens": len(expected[0]),
        "mb": sum(len(text.encode()) for text in texts) / 1e6, "workers": args.workers, "rounds": rounds,
        "stage_seconds_on_one_core": stages(source, packed, scratch),
    }  # fmt: skip


def tables(record: dict) -> list[Table]:
    """The sides, and where the time of ours goes."""
    mb, tokens, rounds = record["mb"], record["tokens"], record["rounds"]
    seconds = {side: bench.column(rounds, side, "seconds") for side in rounds}
    rows = []
    for side, of_side in seconds.items():
        speeds = [bench.median([tokens / s / 1e6 for s in of_side]) + "M"]
        speeds.append(bench.median([mb / s for s in of_side], ".1f"))
        minutes = bench.median([1e10 / tokens * s / 60 for s in of_side], ".1f")
        peak = f"{max(bench.column(rounds, side, 'peak_mb')):.0f} MB"
        rows.append([side, *speeds, f"{minutes} min", peak, bench.ratio(of_side, seconds["ours"])])
    each = record["stage_seconds_on_one_core"].items()
    spent = [[stage, f"{s:.2f}", f"{mb / s:.1f}" if s else ""] for stage, s in each]
    note = (
        f"{tokens:,} tokens, {mb:.0f} MB of text in {record['documents']:,} documents ({record['input']}, unpacked), "
        f"{record['workers']} threads or processes; medians over the rounds, ratios by pairs; every side gave the same tokens."
    )
    header = ["side", "tokens/s", "MB/s", "10B tokens take", "peak memory", "ours is faster by"]
    of_stages = (
        "Each stage alone, one after the other on one thread. In a preparation reading, writing and unpacking are the "
        "first thread's, parsing and encoding and checking the others'; parsing holds Python's lock."
    )
    return [
        Table("Sides", header, rows, note=note),
        Table("Where the time goes", ["stage", "seconds on one core", "MB/s"], spent, note=of_stages),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = bench.parser(__doc__)
    add = parser.add_argument
    add("--input", type=expanded, nargs="+", required=True, help="JSON lines with a text key, plain or .xz")
    add("--workers", type=whole(1), default=cores(), help="threads or processes (%(default)s)")
    add("--plain-to", type=Path, metavar="DIR", help="only tokenize --input, by the plain pipeline")
    args = parser.parse_args(argv)
    with sentences():
        for path in args.input:
            if not path.is_file():
                raise RunError(f"no input file {path}: give JSON lines with --input")
        if args.plain_to:
            return plain(args.input[0], args.plain_to, args.workers)
        with tempfile.TemporaryDirectory() as scratch:
            record = measure(args, Path(scratch))
        made = provenance(__file__, argv)
        bench.publish(args.out, "bench_prepare", "Preparing shards", made, record, tables(record))


if __name__ == "__main__":
    main()
