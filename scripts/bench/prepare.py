"""How fast is data/fineweb_edu/prepare.py, against the pipeline that everybody writes?

    python scripts/bench/prepare.py --input text.jsonl.xz --json results/data/bench_prepare.json

Both sides take the same JSON lines (unpacked beforehand, so that no decompressor is the limit), the same number of
processes and the same disk, in turns. The plain side is a multiprocessing.Pool over documents, tiktoken's
encode_ordinary, a NumPy array with a range check, and a copy into a uint16 shard, the pipeline of llm.c's and
modded-nanogpt's scripts. With --modded-dir CHECKOUT theirs runs too, their
own data/fineweb.py with its download replaced by the same lines. All tokens are compared in the end.
"""

import argparse
import datetime
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

import numpy as np

from data.shards import find_shards, open_shard, write_shard

ROOT = Path(__file__).resolve().parents[2]
MODDED = """
import json, os, runpy, sys
import datasets
script, source, processes = sys.argv[1:]
class Rows:
    def __iter__(self):
        with open(source, "rb") as file:
            for line in file:
                yield json.loads(line)
datasets.load_dataset = lambda *args, **kwargs: Rows()
os.cpu_count = lambda: int(processes) + 2  # it leaves two cores to others
sys.argv = [script, "--shard_size", "100000000"]
runpy.run_path(script, run_name="__main__")
"""


# ------------------------------------------------------------------------------------- the plain pipeline


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


# --------------------------------------------------------------------------------------------- measuring


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


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command with everything that it starts; raises if it fails."""
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
        raise SystemExit(f"error: {' '.join(command)} failed: {output[-2000:]}")
    return seconds, peak


def all_tokens(folder: Path) -> np.ndarray:
    paths = find_shards(folder, "val") + find_shards(folder, "train")
    return np.concatenate([open_shard(path).tokens for path in paths])


def ten_megabyte_documents(source: Path, target: Path) -> Path:
    """The same text in documents of 10 MB, which no pipeline expects."""
    with open(source, "rb") as file, open(target, "w", encoding="utf-8") as out:
        texts, size = [], 0
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size >= 10_000_000:
                out.write(json.dumps({"text": "\n".join(texts)}) + "\n")
                texts, size = [], 0
        out.write(json.dumps({"text": "\n".join(texts)}) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, help="JSON lines with a text key, plain or .xz")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes, both sides (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modded-dir", type=Path, help="a checkout of modded-nanogpt (or its data folder)")
    parser.add_argument("--json", type=Path, help="where the figures go; beside it a .md")
    parser.add_argument(
        "--plain", nargs=4, help=argparse.SUPPRESS
    )  # source out_dir processes shard_size: one run
    args = parser.parse_args()
    if args.plain:
        return plain(Path(args.plain[0]), Path(args.plain[1]), int(args.plain[2]), int(args.plain[3]))
    if args.input is None or not args.input.is_file():
        sys.exit(f"error: no input file {args.input}: give JSON lines with --input")
    modded = None
    if args.modded_dir:
        found = [args.modded_dir / "data" / "fineweb.py", args.modded_dir / "fineweb.py"]
        modded = next((path for path in found if path.is_file()), None)
        if modded is None:
            sys.exit(f"error: no data/fineweb.py in {args.modded_dir}")
    from engine.runs import commit, machine

    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None

    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        source = args.input
        if source.suffix == ".xz":
            source = scratch / source.stem
            with lzma.open(args.input) as packed, open(source, "wb") as file:
                shutil.copyfileobj(packed, file, 1 << 22)
        with open(source, "rb") as file:  # also brings it into the page cache, for both sides
            texts = [len(json.loads(line)["text"].encode()) for line in file]
        size = 100_000_000
        me = [sys.executable, str(Path(__file__).resolve())]
        sides = {
            "ours": lambda out: [
                sys.executable,
                str(ROOT / "data" / "fineweb_edu" / "prepare.py"),
                *("--input", str(source), "--out-dir", str(out), "--workers", str(args.workers)),
                *("--val-tokens", "1000000", "--shard-size", str(size)),
            ],
            "plain": lambda out: [*me, "--plain", str(source), str(out), str(args.workers), str(size)],
        }  # fmt: skip
        if modded:

            def run_modded(out):
                out.mkdir(parents=True)
                shutil.copy(modded, out / "fineweb.py")
                return [sys.executable, "-c", MODDED, str(out / "fineweb.py"), str(source), str(args.workers)]

            sides["modded-nanogpt's"] = run_modded
        runs = {side: [] for side in sides}
        tokens = {}
        for repeat in range(args.repeats):
            for side, command in sides.items():
                out = scratch / "out"
                seconds, peak = timed(command(out))
                folder = next(out.glob("fineweb*B"), out)
                stream = all_tokens(folder)
                first = tokens.setdefault("all", stream)
                if not np.array_equal(first, stream):
                    sys.exit(f"error: {side} gave other tokens than ours")
                runs[side].append({"seconds": round(seconds, 2), "peak_mb": round(peak / 1e6)})
                print(
                    f"{repeat + 1} of {args.repeats}  {side:26} {seconds:6.2f} s  {peak / 1e6:5.0f} MB",
                    flush=True,
                )
                shutil.rmtree(out)
        n = len(tokens["all"])
        # not races but limits: a packed source, and documents of 10 MB
        extras = []
        cases = {"documents of 10 MB each": ten_megabyte_documents(source, scratch / "long.jsonl")}
        if args.input.suffix == ".xz":
            cases["from the .xz itself"] = args.input
        for name, path in cases.items():
            command = sides["ours"](scratch / "out")
            command[command.index(str(source))] = str(path)
            seconds, peak = timed(command)
            mb = sum(texts) / 1e6 / seconds
            extras.append({"case": name, "seconds": round(seconds, 2), "mb_per_second": round(mb, 1)})
            extras[-1]["peak_mb"] = round(peak / 1e6)
            if name == "from the .xz itself" and not np.array_equal(
                all_tokens(scratch / "out"), tokens["all"]
            ):
                sys.exit("error: the packed source gave other tokens")
            shutil.rmtree(scratch / "out")
    rows = []
    for side, measured in runs.items():
        seconds = statistics.median(run["seconds"] for run in measured)
        ratios = [run["seconds"] / own["seconds"] for run, own in zip(measured, runs["ours"], strict=True)]
        rows.append(
            {
                "side": side,
                "seconds": seconds,
                "tokens_per_second": round(n / seconds),
                "tokens_per_second_per_core": round(n / seconds / args.workers),
                "mb_per_second": round(sum(texts) / 1e6 / seconds, 1),
                "minutes_for_10B_tokens": round(1e10 / n * seconds / 60),
                "core_hours_for_10B_tokens": round(1e10 / n * seconds / 3600 * args.workers, 2),
                "ours_is_faster_by": round(statistics.median(ratios), 2),
                "peak_mb": max(run["peak_mb"] for run in measured),
                "runs": measured,
            }
        )
    report = {
        "what": "tokenizing local JSON lines into token shards, whole program with start-up and fsync",
        "command": "python " + " ".join(["scripts/bench/prepare.py", *map(_public, sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "input": {"documents": len(texts), "text_bytes": sum(texts), "tokens": n, "name": args.input.name},
        "processes": args.workers,
        "load_average_before": load,
        "same_tokens_from_all_sides": True,
        "sides": rows,
        "ours_on_other_input": extras,
    }
    lines = [
        "| side | tokens/s | per core | MB/s | 10B tokens take | core-hours | peak memory | ours is faster by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['side']} | {r['tokens_per_second'] / 1e6:.2f}M | {r['tokens_per_second_per_core'] / 1e6:.2f}M | "
        f"{r['mb_per_second']} | {r['minutes_for_10B_tokens']} min | {r['core_hours_for_10B_tokens']} | "
        f"{r['peak_mb']} MB | {r['ours_is_faster_by']}x |"
        for r in rows
    ]
    lines += ["", "| the same text | seconds | MB/s | peak memory |", "|---|---|---|---|"]
    lines += [f"| {e['case']} | {e['seconds']} | {e['mb_per_second']} | {e['peak_mb']} MB |" for e in extras]
    lines += [
        "",
        f"{n:,} tokens, {sum(texts) / 1e6:.0f} MB of text in {len(texts):,} documents (`{args.input.name}`, unpacked), "
        f"{args.workers} processes; medians of {args.repeats} runs in turns, ratios by pairs; every side gave the same "
        f"tokens. {report['machine']}; commit {report['commit']}; {report['date']}; `{report['command']}`",
    ]
    print("\n".join(lines))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        args.json.with_suffix(".md").write_text("# Preparing shards\n\n" + "\n".join(lines) + "\n")


def _public(argument: str) -> str:
    """Arguments without the machine's private folders."""
    return Path(argument).name if argument.startswith(("/", "..")) else argument


if __name__ == "__main__":
    main()
