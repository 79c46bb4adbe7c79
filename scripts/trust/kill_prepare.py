"""Kill data/fineweb_edu/prepare.py with SIGKILL over and over; what comes out in the end must not show it.

    python scripts/trust/kill_prepare.py --input text.jsonl --kills 100 --json results/data/kill_prepare.json

One uninterrupted run with one worker gives the reference. Then the same set is prepared again and again in fresh
folders by runs that are killed after a random time, or the moment a file of a random number appears, each time with
another number of workers, until the wanted number of kills is reached. Each finished folder is compared with the
reference, file by file, by SHA-256; between kills no shard may be there under its name that is not whole.
"""

import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.files import expanded, sha256, write_json
from data.shards import open_shard
from scripts.arguments import Parser, whole
from scripts.provenance import provenance

PREPARE = Path(__file__).resolve().parents[2] / "data" / "fineweb_edu" / "prepare.py"


def command(source: Path, out: Path, workers: int, shard_size: int) -> list[str]:
    options = {"--input": source, "--out-dir": out, "--workers": workers, "--shard-size": shard_size}
    return [sys.executable, str(PREPARE), *(str(part) for option in options.items() for part in option)]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.iterdir()) if path.name != "prepare.lock"]
    return {path.name: sha256(path) for path in files}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--input", type=expanded, required=True)
    parser.add_argument("--kills", type=whole(1), default=100)
    parser.add_argument("--shard-size", type=whole(100), default=6000)
    parser.add_argument("--seed", type=whole(0), default=1337)
    parser.add_argument("--json", type=expanded)
    args = parser.parse_args(argv)
    if not args.input.is_file():
        sys.exit(f"error: no input file {args.input}")
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        # every folder has the same name, since shards are named after it
        reference_dir = Path(scratch) / "reference" / "set"
        started = time.perf_counter()
        subprocess.run(
            command(args.input, reference_dir, 1, args.shard_size), check=True, stdout=subprocess.DEVNULL
        )
        usual = time.perf_counter() - started
        reference = digests(reference_dir)
        shards = sum(name.endswith(".bin") for name in reference)
        print(f"reference: {shards} shards in {usual:.1f} s", flush=True)
        kills = finished = runs = 0
        stages: collections.Counter = collections.Counter()
        began = time.perf_counter()
        while kills < args.kills or not finished:
            out = Path(scratch) / f"attempt{finished}" / "set"
            workers = rng.choice([0, 1, 2, 3])
            process = subprocess.Popen(
                command(args.input, out, workers, args.shard_size),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            runs += 1
            if kills < args.kills:
                kind = rng.choice(["time", "file", "shard"])
                deadline = time.perf_counter() + (rng.uniform(0, usual) if kind == "time" else usual)
                present = len(list(out.glob("*.bin"))) if out.is_dir() else 0
                target = present + rng.randrange(1, max(2, shards // 8))
                while process.poll() is None and time.perf_counter() < deadline:
                    if kind == "file" and list(out.glob("*.tmp")) and len(list(out.glob("*.bin"))) >= target:
                        break
                    if kind == "shard" and len(list(out.glob("*.bin"))) >= target:
                        break
                    time.sleep(0.0005 if kind != "time" else 0.002)
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                    names = (
                        [p.name for p in out.iterdir() if p.name != "prepare.lock"] if out.is_dir() else []
                    )
                    writing = any(name.endswith(".tmp") for name in names)
                    stages[
                        "before the first file" if not names else "writing" if writing else "between files"
                    ] += 1
                    for path in out.glob("*.bin"):
                        open_shard(path)  # raises unless header and size agree
                        if sha256(path) != reference[path.name]:
                            sys.exit(
                                f"error: after kill {kills} {path.name} is there and differs from the reference"
                            )
                    continue
            stderr = process.communicate()[1].decode()
            if process.returncode:
                sys.exit(f"error: a run after {kills} kills failed: {stderr[-500:]}")
            if digests(out) != reference:
                different = {name for name in reference.keys() | digests(out).keys()}
                different = [n for n in sorted(different) if reference.get(n) != digests(out).get(n)]
                sys.exit(f"error: after {kills} kills the finished set differs in {', '.join(different[:5])}")
            finished += 1
            print(f"set {finished} finished after {kills} kills in all, identical", flush=True)
    report = {
        "what": "random SIGKILLs of data/fineweb_edu/prepare.py; finished sets compared by SHA-256, meta.json included",
        "kills": kills,
        "runs": runs,
        "sets_finished": finished,
        "sets_identical_to_the_uninterrupted_one": finished,
        "shards_a_set": shards,
        "killed_while": dict(stages),
        "seconds": round(time.perf_counter() - began),
        "seed": args.seed,
    } | provenance(__file__, argv)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, report)


if __name__ == "__main__":
    main()
