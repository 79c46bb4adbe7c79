"""What a GPU is needed for, in pieces that each end within nine minutes; every piece calls a command of this project.

    python scripts/gpu/recipe.py correctness
    python scripts/gpu/recipe.py embedding --text PACK.jsonl.xz
    python scripts/gpu/recipe.py speed --nanogpt-dir ../nanoGPT
    python scripts/gpu/recipe.py train --arms bpe_untied,kronecker --seeds 1337
    python scripts/gpu/recipe.py probes
    python scripts/gpu/recipe.py sweep
    python scripts/gpu/recipe.py gather                            (needs no GPU)

correctness  the tests marked gpu
embedding    time and memory of the embedding and of other ways to its sums, against nn.Embedding and the PyPI reference
speed        a training step of every arm and of nanoGPT's train.py
train        runs of config/gpt2_124m_short.py that belong to --out/plan.json; the same command goes on
probes       all probes on the runs that this machine has (--text: held-out text, for typos in what they generate)
sweep        short runs of the arms with more than the paper's embedding
gather       the comparison of all records in --out, from whichever machines and days they are

Further words go to the command that a piece calls: bench/embedding.py, bench/train.py, matched.py, probes/spelling.py,
compare.py. --show prints the commands of a piece and runs nothing. Nothing is fetched from a network. In a copy without
.git, the variable KNG_COMMIT says which commit it is.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import write_atomic
from data.records import read_record
from engine.errors import RunError, sentences
from engine.metrics import read_metrics
from scripts import matched
from scripts.analysis.runs import find_run_folders, load_folder
from scripts.arguments import Parser, number
from scripts.experiment import ARMS
from scripts.provenance import ROOT

RECIPE = ROOT / "config" / "gpt2_124m_short.py"
PIECES = "correctness embedding speed train probes sweep gather".split()
SAVING = 0.7  # minutes
COMPARED = "bpe_tied,bpe_untied,kronecker"
SWEPT = ",".join(["bpe_untied", "kronecker", *sorted(path.stem for path in ARMS.glob("kronecker_*.py"))])
# a quarter of a run
SWEEP = "--max_iters=400 --eval_interval=100 --ckpt_interval=-1 --warmup_iters=40".split()
# half a million tokens a step, as in nanoGPT's recipe, which cuts them up its own way
SPEED = (
    "--setting=124m --dtype=bfloat16 --compile --steps=9 --batch_size=64 --accumulate=8 --nanogpt-batch=12"
)
# What plan.json pins: runs that differ in one of these belong to another comparison.
PINNED = ("tokens", "tokens_per_step", "data_fingerprint", "val_sha256", "schedule_sha256")


def arguments(argv):
    """The arguments; .more: the words for a piece's command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pieces", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    add("--work", type=Path, default=ROOT / "out" / "gpu", help="runs and caches (%(default)s)")
    add("--out", type=Path, default=ROOT / "results" / "124m", help="figures and records (%(default)s)")
    add("--data-dir", type=Path, default=ROOT / "data" / "edu_mix", help="prepared shards (%(default)s)")
    minutes = number(0, 1e6, above=True)
    add("--minutes", type=minutes, default=8.7, help="what this call may take (%(default)s)")
    add("--show", action="store_true", help="print the commands and run nothing")
    args, args.more = parser.parse_known_args(argv)
    return args


def commands(args, piece: str) -> list[list[str]]:
    """The commands of a piece, in their order: words after Python's own."""
    measured, left = ["--device=cuda", f"--out={args.out}"], f"--minutes={minutes_left(args):.2f}"
    if piece == "correctness":
        found = f"--junitxml={args.out / 'gpu_tests.xml'}"
        return [["-m", "pytest", "-q", "-m", "gpu", found, "tests/test_gpu.py"]]
    if piece == "embedding":
        bench = ["scripts/bench/embedding.py", *measured, *args.more]
        return [bench, [*bench, "--dtype=bfloat16"]]
    if piece == "speed":
        return [["scripts/bench/train.py", *SPEED.split(), *measured, left, f"--arms={COMPARED}", *args.more]]
    if piece in ("train", "sweep"):
        folder, arms, keys = ("runs", COMPARED, []) if piece == "train" else ("sweep", SWEPT, SWEEP)
        # a run that is stopped in time still saves 2 GB, and what starts it takes some seconds
        left = f"--minutes={max(0.01, minutes_left(args) - SAVING):.2f}"
        place = [f"--arms={arms}", "--seeds=1337", f"--out={args.work / folder}", left]
        return [["scripts/matched.py", str(RECIPE), *place, f"--data_dir={args.data_dir}", *keys, *args.more]]
    if piece == "probes":
        probes = [[name, *measured] for name in "spelling layers tradeoff generation".split()]
        probes.insert(3, ["norms", measured[1]])  # which loads no model
        probes += [["spelling", *measured, "--generate=1000", *args.more]] if args.more else []
        runs = f"--runs={args.work / 'runs'}"
        return [[f"scripts/probes/{name}.py", runs, *words] for name, *words in probes]
    runs, sweep = args.out / "runs", args.out / "sweep"
    swept = [["scripts/compare.py", str(sweep), "--baseline=bpe_untied"]] if sweep.is_dir() else []
    return [["scripts/compare.py", str(runs), f"--out={args.out}", *args.more], *swept]


def minutes_left(args) -> float:
    """Minutes of this call that are left."""
    return max(0.01, (args.deadline - time.monotonic()) / 60)


def run(command: list[str], args) -> str:
    """Run one command within the time that is left; what kept it from its end, or nothing."""
    try:
        # those that know the time save what they have
        status = subprocess.run(command, cwd=ROOT, timeout=60 * minutes_left(args) + 30).returncode
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return "no time was left; the same command goes on"


# ---- the plan, and the records of its runs


def check_facts(args, name: str, run: dict, steps: int) -> None:
    """Refuse a run whose facts are not those of --out/plan.json, where there is one, naming the first that differs."""
    path = args.out / "plan.json"
    plan = read_record(path, dict, "a plan") if path.is_file() else {}
    facts = run | {"tokens": run["tokens_per_step"] * steps}
    for key in PINNED:
        if key in plan and facts[key] != plan[key]:
            raise RunError(
                f"{name} does not belong to this comparison: {key} is {facts[key]}, in plan.json it is {plan[key]}; "
                "prepare the same data and leave the recipe as it is"
            )


def check_plan(args, words: list[str]) -> None:
    """Hold the runs that matched.py would start, given these words, to the plan."""
    chosen, passed = matched.arguments(words)
    job, (arm, seed) = next(iter(matched.make_jobs(chosen, passed).items()))
    (first,) = matched.identities([(job.name, arm, seed, job.command)])
    check_facts(args, job.name, first.info, first.config["max_iters"])


def last_step(folder: Path) -> int:
    """The step of a run's last row, -1 where there is none."""
    return max((row["iter"] for row in read_metrics(folder)), default=-1)


def keep_records(args) -> None:
    """Copy the small records of every run below --work, under the run's own name, to below --out.

    A record that is there already and says more, of a machine that was given back, stays.
    """
    for run in args.work.glob("*/*/run.json"):
        there = args.out / run.parent.relative_to(args.work)
        if last_step(there) > last_step(run.parent):
            print(f"{there} stays as it is: {run.parent} has not come as far", flush=True)
            continue
        there.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "run.json", "metrics.jsonl"):
            if (run.parent / name).is_file():
                write_atomic(there / name, [(run.parent / name).read_bytes()])


def main(argv=None) -> None:
    args = arguments(argv)
    with sentences():
        args.deadline = time.monotonic() + 60 * args.minutes
        # compiled kernels are kept for the next piece, and found again by the next call on this machine
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").resolve()))
        args.out.mkdir(parents=True, exist_ok=True)
        failed = []
        for piece in [p for p in PIECES if p in args.pieces]:
            if piece == "gather" and not args.show:
                for run_folder in find_run_folders([args.out / "runs"]):
                    kept = load_folder(run_folder)
                    check_facts(args, f"the record of {kept.name}", kept.info, kept.max_iters)
            if piece == "train" and not args.show:
                for words in commands(args, piece):
                    check_plan(args, words[1:])
            for words in commands(args, piece):  # with the minutes that are left now
                command = [sys.executable, *words]
                print(f"{piece}: {shlex.join(command)}", flush=True)
                if args.show:
                    continue
                if trouble := run(command, args):
                    failed.append(f"{piece} ({Path(words[0]).name}): {trouble}")
            if not args.show:
                keep_records(args)
        if failed:
            raise RunError("not done: " + "; ".join(failed))


if __name__ == "__main__":
    main()
