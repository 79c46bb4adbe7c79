"""Kill data/fineweb_edu/prepare.py with SIGKILL over and over; what comes out in the end must not show it.

    python scripts/trust/kill_prepare.py --input text.jsonl --kills 100 --report results/data/kill_prepare

One uninterrupted run with one worker gives the reference. Then the same set is prepared again and again in fresh
folders by runs that are killed after a random time, every second one while it writes a file, each time with another
number of workers, until the wanted number of kills is reached. Each finished folder is compared with the
reference, file by file, by SHA-256; between kills no shard may be there under its name that is not whole.
"""

import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import expanded, sha256
from data.shards import open_shard
from engine.errors import RunError, sentences
from scripts.arguments import whole
from scripts.pool import last_words
from scripts.provenance import ROOT
from scripts.trust import twin


def start(args, out: Path, workers: int) -> subprocess.Popen:
    script, size = ROOT / "data" / "fineweb_edu" / "prepare.py", f"--shard-size={args.shard_size}"
    words = [f"--input={args.input}", f"--out-dir={out}", f"--workers={workers}", size]
    return twin.launch([sys.executable, script, *words], out.parent)


def finish(process: subprocess.Popen, out: Path) -> dict[str, str]:
    """The set's digests, once it is through."""
    if process.wait():
        raise RunError(f"a run that nothing killed failed: {last_words(out.parent / 'train.log')}")
    return digests(out)


def digests(folder: Path, pattern: str = "[!.]*") -> dict[str, str]:
    """{name: SHA-256} of a set's files, without the memory of their hashes."""
    return {path.name: sha256(path) for path in sorted(folder.glob(pattern)) if path.name != "prepare.lock"}


def check(found: dict[str, str], reference: dict[str, str], when: str) -> None:
    """RunError if a file is another than the reference's."""
    if wrong := sorted({name for name, _ in found.items() - reference.items()}):
        raise RunError(f"{when} the set differs from the uninterrupted one in {', '.join(wrong[:5])}")


def strike(rng: random.Random, process: subprocess.Popen, out: Path, usual: float) -> bool:
    """Kill after a random part of the usual seconds, or as soon after that as a file is being written; whether it fell on
    a living process."""
    at_write = rng.random() < 0.5
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(0, usual))
    while at_write and process.poll() is None and not [*out.glob("*.tmp")]:
        time.sleep(0.0002)
    process.kill()
    return process.wait() == -signal.SIGKILL


def kill_and_compare(args, scratch: Path) -> dict:
    """Kills, runs and finished sets in figures; RunError at the first difference."""
    rng, began = random.Random(args.seed), time.perf_counter()
    first = scratch / "reference" / "set"  # every folder has the same name, since shards are named after it
    reference = finish(start(args, first, 1), first)
    usual = time.perf_counter() - began
    print(f"reference: {len(reference)} files in {usual:.1f} s", flush=True)
    runs, finished, stages = 0, 0, Counter()
    while (kills := stages.total()) < args.kills or not finished:
        out = scratch / f"attempt{finished}" / "set"
        process = start(args, out, rng.choice([1, 2, 3]))
        runs += 1
        if kills < args.kills and strike(rng, process, out, usual):
            names = [p.name for p in out.glob("*") if p.name != "prepare.lock"]
            half = any(name.endswith(".tmp") for name in names)
            stages["before the first file" if not names else "writing" if half else "between files"] += 1
            for path in out.glob("*.bin"):
                open_shard(path)  # raises unless header and size agree
            check(digests(out, "*.bin"), reference, f"after kill {kills + 1}")
            continue
        found = finish(process, out)
        for one, other in ((found, reference), (reference, found)):
            check(one, other, f"after {kills} kills, finished,")
        finished += 1
        print(f"set {finished} finished after {kills} kills in all, identical", flush=True)
    return {
        "kills": kills, "runs": runs, "sets_finished": finished, "sets_identical_to_the_uninterrupted_one": finished,
        "files_a_set": len(reference), "killed_while": dict(stages), "seconds": round(time.perf_counter() - began),
        "seed": args.seed,
    }  # fmt: skip


def main(argv=None) -> None:
    parser = twin.parser(__doc__)
    add = parser.add_argument
    add("--input", type=expanded, required=True, help="text, as prepare.py takes it")
    add("--kills", type=whole(1), default=100, help="kills in all")
    add("--shard-size", type=whole(100), default=6000, help="tokens a shard")
    add("--seed", type=whole(0), default=1337, help="of the instants")
    args = parser.parse_args(argv)
    with sentences(), tempfile.TemporaryDirectory() as scratch:
        if not args.input.is_file():
            raise RunError(f"there is no input file {args.input}")
        found = kill_and_compare(args, Path(scratch))
        text = "Random SIGKILLs of data/fineweb_edu/prepare.py; finished sets compared by SHA-256, meta.json included.\n"
        text += "\n".join(f"- {what.replace('_', ' ')}: {figure}" for what, figure in found.items())
        print(text)
        twin.report(args, __file__, argv, "Preparation killed at random instants", found, [text])


if __name__ == "__main__":
    main()
