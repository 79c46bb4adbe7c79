"""How fast is data/fineweb_edu/prepare.py, against the pipeline that everybody writes; and what is it waiting for?

    python scripts/bench/prepare.py --input text.jsonl.xz --json results/data/bench_prepare.json

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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import numpy as np

from data import DataError, console
from data.encoder import Encoder
from data.files import expanded, write_json, write_text
from data.pipeline import CHECK_ONE_IN, OpenShard
from data.shards import find_shards, open_shard, write_shard
from data.sources import local_blocks, read_block
from data.tokenizers import load_tokenizer
from scripts.analysis.report import Table
from scripts.arguments import Parser, whole
from scripts.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
SHARD_SIZE = "100000000"


def _plain_worker(name: str) -> None:
    global encoding
    import tiktoken

    encoding = tiktoken.get_encoding(name)


def _plain_encode(document: dict) -> np.ndarray:
    ids = [encoding._special_tokens["<|endoftext|>"]]
    ids.extend(encoding.encode_ordinary(document["text"]))
    array = np.array(ids)
    assert (array >= 0).all() and (array < 2**16).all(), "ids over uint16"
    return array.astype(np.uint16)


def plain(source: Path, out_dir: Path, processes: int, shard_size: int) -> None:
    """Tokenize JSON lines with a pool, one document after the other into a buffer of one shard."""
    out_dir.mkdir(parents=True)
    with open(source, "rb") as file, multiprocessing.Pool(processes, _plain_worker, ("gpt2",)) as pool:
        buffer, count, number = np.empty(shard_size, np.uint16), 0, 0
        for ids in pool.imap(_plain_encode, map(json.loads, file), chunksize=16):
            while len(ids):
                room = min(len(ids), shard_size - count)
                buffer[count : count + room] = ids[:room]
                count, ids = count + room, ids[room:]
                if count == shard_size:
                    write_shard(out_dir / f"plain_{'train' if number else 'val'}_{number:06d}.bin", buffer)
                    count, number = 0, number + 1
        if count:
            write_shard(out_dir / f"plain_{'train' if number else 'val'}_{number:06d}.bin", buffer[:count])


def tree_memory(pid: int) -> int:
    """Bytes of memory of a process and all below it, shared pages counted once (PSS), Linux only."""
    total, todo = 0, [pid]
    while todo:
        pid = todo.pop()
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue
    return total


def timed(command: list[str]) -> dict:
    """Seconds and peak memory (MB) of a command with everything that it starts; DataError if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, over = 0, threading.Event()

    def watch():
        nonlocal peak
        while not over.wait(0.1):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    if process.returncode:
        raise DataError(f"{' '.join(command)} failed: {output[-2000:]}")
    return {"seconds": round(seconds, 2), "peak_mb": round(peak / 1e6)}


def all_tokens(folder: Path) -> np.ndarray:
    paths = find_shards(folder, "val") + find_shards(folder, "train")
    return np.concatenate([open_shard(path).tokens for path in paths])


def unpacked(paths: list[Path], target: Path) -> list[int]:
    """Write the lines of all files, plain or .xz, to one; the bytes of text of each document."""
    with open(target, "wb") as out:
        for path in paths:
            with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
                shutil.copyfileobj(file, out, 1 << 22)
    with open(target, "rb") as file:  # also brings it into the page cache, for both sides
        return [len(json.loads(line)["text"].encode()) for line in file]


def ten_megabyte_documents(source: Path, target: Path) -> Path:
    """The same text in documents of 10 MB, which no pipeline expects."""
    with open(source, "rb") as file, open(target, "w", encoding="utf-8") as out:
        texts = []
        for line in file:
            texts.append(json.loads(line)["text"])
            if sum(map(len, texts)) >= 10_000_000:
                out.write(json.dumps({"text": "\n".join(texts)}) + "\n")
                texts = []
        out.write(json.dumps({"text": "\n".join(texts)}) + "\n")
    return target


def stages(source: Path, packed: list[Path], scratch: Path) -> dict[str, float]:
    """Seconds of each stage of ours for the whole text, one after the other on this thread.

    reading: lines from the page cache, cut into blocks; parsing: JSON to text; checking: tiktoken on its share; writing: hash, disk and fsync; unpacking: the .xz, which a packed source adds.
    """
    seconds = dict.fromkeys(
        ("start", "reading", "parsing", "encoding", "checking", "writing", "unpacking"), 0.0
    )
    clock = time.perf_counter

    def spent(stage: str, action, *given):
        began = clock()
        value = action(*given)
        seconds[stage] += clock() - began
        return value

    encoder = spent("start", lambda: Encoder(load_tokenizer("gpt2")))
    shard = OpenShard(scratch / "stage.bin", 2**31 - 1, encoder.dtype)
    blocks, number = local_blocks([source], "text"), 0
    while (block := spent("reading", next, blocks, None)) is not None:
        texts, _ = spent("parsing", read_block, block, "text")
        ids, _ = spent("encoding", encoder.encode, texts)
        for text in texts[-37 * number % CHECK_ONE_IN :: CHECK_ONE_IN]:
            spent("checking", encoder.tokenizer.encode, text)
        spent("writing", shard.take, ids)
        number += 1
    spent("writing", shard.finish, "val", encoder.tokenizer.eot)
    for path in packed:
        with lzma.open(path) as file:
            while spent("unpacking", file.read, 1 << 20):
                pass
    return {stage: round(value, 2) for stage, value in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--input", type=expanded, nargs="+", required=True, help="JSON lines with a text key, plain or .xz")
    add("--workers", type=whole(1), default=os.cpu_count(), help="threads or processes (%(default)s)")
    add("--repeats", type=whole(1), default=3, help="runs of each side, in turns (%(default)s)")
    add("--json", type=expanded, help="where the figures go; beside it a .md")
    add("--plain-to", metavar="DIR", help="only tokenize --input, by the plain pipeline")
    args = parser.parse_args(argv)
    with console.sentences():
        for path in args.input:
            if not path.is_file():
                raise DataError(f"no input file {path}: give JSON lines with --input")
        if args.plain_to:
            return plain(args.input[0], Path(args.plain_to), args.workers, int(SHARD_SIZE))
        with tempfile.TemporaryDirectory() as scratch:
            report = measure(args, Path(scratch)) | provenance(__file__, argv)
        page = "\n\n".join(table.markdown() for table in tables(report))
        print("\n\n".join(table.text() for table in tables(report)))
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, report)
            write_text(args.json.with_suffix(".md"), "# Preparing shards\n\n" + page + "\n")


def measure(args, scratch: Path) -> dict:
    """Time both sides in turns, ours on other input, and each stage; refuses figures of sides whose tokens differ."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    source, out = scratch / "text.jsonl", scratch / "out"
    packed = [path for path in args.input if path.suffix == ".xz"]
    lengths = unpacked(args.input, source)
    mb = sum(lengths) / 1e6

    def ours(*sources: Path) -> list[str]:
        flags = ["--out-dir", str(out), "--workers", str(args.workers), "--val-tokens", "1000000"]
        script = str(ROOT / "data" / "fineweb_edu" / "prepare.py")
        return [sys.executable, script, *flags, "--shard-size", SHARD_SIZE, "--input", *map(str, sources)]

    script = str(Path(__file__).resolve())
    flags = ["--workers", str(args.workers), "--plain-to", str(out), "--input", str(source)]
    sides = {"ours": ours(source), "plain": [sys.executable, script, *flags]}
    runs, expected = {side: [] for side in sides}, None

    def run(command: list[str], compare: bool = True) -> dict:
        nonlocal expected
        measured, stream = timed(command), all_tokens(out)
        expected = stream if expected is None else expected
        if compare and not np.array_equal(expected, stream):
            raise DataError(f"{' '.join(command)} gave other tokens than ours")
        shutil.rmtree(out)
        return measured

    for repeat in range(args.repeats):
        for side, command in sides.items():
            runs[side].append(run(command))
            print(f"{repeat + 1} of {args.repeats}  {side:20} {runs[side][-1]}", flush=True)
    long = ten_megabyte_documents(source, scratch / "long.jsonl")
    others = {"documents of 10 MB each": run(ours(long), compare=False)}
    if packed:
        others["from the .xz itself"] = run(ours(*args.input))
    rows = []
    for side, measured in runs.items():
        seconds = statistics.median(run["seconds"] for run in measured)
        ratios = [run["seconds"] / own["seconds"] for run, own in zip(measured, runs["ours"], strict=True)]
        rows.append(
            {
                "side": side,
                "seconds": seconds,
                "tokens_per_second": round(len(expected) / seconds),
                "mb_per_second": round(mb / seconds, 1),
                "minutes_for_10B_tokens": round(1e10 / len(expected) * seconds / 60, 1),
                "ours_is_faster_by": round(statistics.median(ratios), 2),
                "peak_mb": max(run["peak_mb"] for run in measured),
                "runs": measured,
            }
        )
    names = " + ".join(path.name for path in args.input)
    return {
        "what": "tokenizing local JSON lines into token shards, whole program with start-up and fsync",
        "input": {
            "name": names,
            "documents": len(lengths),
            "text_bytes": sum(lengths),
            "tokens": len(expected),
        },
        "workers": args.workers,
        "repeats": args.repeats,
        "load_average_before": load,
        "python": sys.version.split()[0],
        "sides": rows,
        "ours_on_other_input": others,
        "stage_seconds_on_one_core": stages(source, packed, scratch),
    }


def tables(report: dict) -> list[Table]:
    """The figures as tables: the sides, ours on other input, and where its time goes."""
    text, mb = report["input"], report["input"]["text_bytes"] / 1e6
    made = f"{report['machine']}; commit {report['commit']}; {report['date']}; load before {report['load_average_before']}"
    sides = [
        (r["side"], f"{r['tokens_per_second'] / 1e6:.2f}M", r["mb_per_second"], f"{r['minutes_for_10B_tokens']} min",
         f"{r['peak_mb']} MB", f"{r['ours_is_faster_by']}x")
        for r in report["sides"]
    ]  # fmt: skip
    others = [
        (name, r["seconds"], round(mb / r["seconds"], 1), f"{r['peak_mb']} MB")
        for name, r in report["ours_on_other_input"].items()
    ]
    spent = [
        (stage, s, round(mb / s, 1) if s else "") for stage, s in report["stage_seconds_on_one_core"].items()
    ]
    return [
        Table(
            "Sides",
            ["side", "tokens/s", "MB/s", "10B tokens take", "peak memory", "ours is faster by"],
            sides,
            note=f"{text['tokens']:,} tokens, {mb:.0f} MB of text in {text['documents']:,} documents ({text['name']}, "
            f"unpacked), {report['workers']} threads or processes; medians of {report['repeats']} runs in turns, ratios "
            f"by pairs; every side gave the same tokens. {made}; {report['command']}",
        ),
        Table("Ours on the same text in another form", ["form", "seconds", "MB/s", "peak memory"], others),
        Table(
            "Where the time goes",
            ["stage", "seconds on one core", "MB/s"],
            spent,
            note="Each stage alone, one after the other on one thread. In a preparation reading, writing and unpacking are "
            "the first thread's, parsing and encoding and checking the others'; parsing holds Python's lock.",
        ),
    ]


if __name__ == "__main__":
    main()
