"""What a GPU is needed for, in pieces that each end within nine minutes; every piece calls a command of this project.

    python scripts/gpu/recipe.py correctness
    python scripts/gpu/recipe.py embedding --text PACK.jsonl.xz
    python scripts/gpu/recipe.py speed --nanogpt-dir ../nanoGPT
    python scripts/gpu/recipe.py train --arms bpe_untied,kronecker --seeds 1337
    python scripts/gpu/recipe.py probes
    python scripts/gpu/recipe.py sweep
    python scripts/gpu/recipe.py gather                            (needs no GPU)

correctness  the tests marked gpu
embedding    time and memory of the embedding against nn.Embedding and the PyPI reference, and other ways to its sums
speed        a training step of every arm and of nanoGPT's train.py
train        runs of config/gpt2_124m_short.py that belong to --out/plan.json; the same command goes on
probes       all probes on the runs that this machine has
sweep        short runs of the arms with more than the paper's embedding
gather       records, comparison and tables of all pieces in --out; refuses runs that do not match

--show prints the commands of a piece and runs nothing. --toy runs them at a size for a CPU. Nothing is fetched from
a network. In a copy without .git, the variable KNG_COMMIT says which commit it is.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.records import read_record
from engine.errors import RunError, sentences
from scripts import matched
from scripts.arguments import Parser, names, number, whole
from scripts.experiment import ARMS, arm_file
from scripts.gpu import gather

RECIPE = ROOT / "config" / "gpt2_124m_short.py"
PIECES = "correctness embedding speed train probes sweep gather".split()
PROBES = "spelling layers tradeoff norms generation".split()
COMPARED = ["bpe_tied", "bpe_untied", "kronecker"]
SWEPT = ["bpe_untied", "kronecker", *sorted(path.stem for path in ARMS.glob("kronecker_*.py"))]
SWEEP = {
    "max_iters": 400,
    "eval_interval": 100,
    "ckpt_interval": -1,
    "warmup_iters": 40,
}  # a quarter of a run
TOY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "global_batch_size": 8,
    "vocab_size": 0, "max_iters": 40, "warmup_iters": 4, "learning_rate": 3e-3, "min_lr": 3e-4, "eval_interval": 10,
    "eval_tokens": 2048, "log_interval": 5, "ckpt_interval": 40, "dtype": "float32", "pos_dim": 8,
}  # fmt: skip
TOY_SWEEP = {"max_iters": 20, "eval_interval": 5, "warmup_iters": 2}


def arguments(argv):
    """The arguments, with the folders that they leave open."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pieces", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    add("--work", type=Path, help="runs and caches (default: out/gpu; toy: out/gpu_toy)")
    add("--out", type=Path, help="figures and records (default: results/124m; toy: WORK/results)")
    add("--data-dir", type=Path, default=ROOT / "data" / "edu_mix", help="prepared shards (%(default)s)")
    minutes = number(0, 1e6, above=True)
    add("--minutes", type=minutes, default=8.7, help="what this call may take (%(default)s)")
    add("--arms", type=names, default=[], help="train, sweep: names in config/arms/, with commas")
    add("--seeds", type=names, default=["1337"], help="train, sweep: with commas (1337)")
    add("--text", type=Path, help="embedding: a pack of text whose ids are looked up; probes: held-out text")
    add("--nanogpt-dir", default="", help="speed: checkout of nanoGPT to measure against")
    add("--rounds", type=whole(1), default=3, help="speed: rounds (%(default)s)")
    add("--toy", action="store_true", help="the same commands at a size for a CPU")
    add("--show", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    args.work = args.work or ROOT / "out" / ("gpu_toy" if args.toy else "gpu")
    args.out = args.out or (args.work / "results" if args.toy else ROOT / "results" / "124m")
    if args.toy and args.out.resolve().is_relative_to(ROOT / "results"):
        parser.error("toy figures do not belong into results/: choose another --out")
    return args


def script(path: str, *words) -> list[str]:
    """A command of this project."""
    return [sys.executable, str(ROOT / path), *map(str, words)]


def keys(args, more: dict) -> list[str]:
    """train.py's keys beside the recipe."""
    values = (TOY if args.toy else {}) | more | {"data_dir": args.data_dir}
    return [f"--{k}={v}" for k, v in values.items()]


def commands(args, piece: str) -> list[list[str]]:
    """The commands of a piece, in their order."""
    measured = ["--device", "cpu" if args.toy else "cuda", "--out", args.out]
    text = ["--text", args.text] if args.text else []
    if piece == "correctness":
        record = f"--junitxml={args.out / 'gpu_tests.xml'}"
        return [
            [sys.executable, "-m", "pytest", "-q", "-m", "gpu", record, str(ROOT / "tests" / "test_gpu.py")]
        ]
    if piece == "embedding":
        size = ["--quick", "--rounds", "3", "--no-memory"] if args.toy else ["--reference-gb", "60"]
        bench = script("scripts/bench/embedding.py", *measured, *text, *size)
        ways = script("scripts/gpu/candidates.py", *measured, *["--toy"] * args.toy)
        return [bench, [*bench, "--dtype", "bfloat16", "--no-memory"], ways]
    if piece == "speed":
        # half a million tokens a step, as in nanoGPT's recipe, which cuts them up its own way
        size = "--setting=124m --device=cuda --dtype=bfloat16 --compile --steps=9 --skip=3 --batch_size=64 --accumulate=8"
        size += f" --nanogpt-batch=12 --nanogpt-accumulate=40 --minutes={left(args):.2f}"
        size = "--setting=toy --steps=4" if args.toy else size
        nanogpt = [f"--nanogpt-dir={args.nanogpt_dir}"] if args.nanogpt_dir else []
        sides = [f"--arms={','.join(COMPARED)}", f"--rounds={args.rounds}", f"--out={args.out}", *nanogpt]
        return [script("scripts/bench/train.py", *size.split(), *sides)]
    if piece in ("train", "sweep"):
        folder, arms, more = ("runs", COMPARED, {}) if piece == "train" else ("sweep", SWEPT, SWEEP)
        more = TOY_SWEEP if args.toy and piece == "sweep" else more
        words = [f"--arms={','.join(args.arms or arms)}", f"--seeds={','.join(args.seeds)}"]
        words += [f"--out={args.work / folder}", f"--minutes={left(args):.2f}"]
        return [script("scripts/matched.py", RECIPE, *words, *keys(args, more))]
    if piece == "probes":
        options = {"generation": ["--samples=1", "--max_new_tokens=4"] if args.toy else []}
        probes = [(name, options.get(name, [])) for name in PROBES]
        probes += [("spelling", ["--generate", "1000", *text])] if text else []
        common = ["--runs", args.work / "runs", *measured]
        return [script(f"scripts/probes/{name}.py", *common, *more) for name, more in probes]
    return []


def check_plan(args) -> None:
    """Hold the runs that are about to start to --out/plan.json, where there is one."""
    if (args.out / "plan.json").is_file():
        command = script("train.py", RECIPE, arm_file("bpe_tied"), *keys(args, {}))
        first = matched.identities([("the first run", "bpe_tied", 1337, command)])[0]
        plan = read_record(args.out / "plan.json", dict, "a plan")
        gather.check_facts("these runs", first.run, first.config["max_iters"], plan)


def left(args) -> float:
    """Minutes of this call that are left."""
    return max(0.01, (args.deadline - time.monotonic()) / 60)


def run(command: list[str], args) -> str:
    """Run one command within the time that is left; what kept it from its end, or nothing."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait(60 * left(args) + 30)  # those that know the time save what they have
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return "no time was left; the same command goes on"
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def main(argv=None) -> None:
    args = arguments(argv)
    with sentences():
        args.deadline = time.monotonic() + 60 * args.minutes
        # compiled kernels are kept for the next piece, and found again by the next call on this machine
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.work / "inductor").resolve()))
        args.out.mkdir(parents=True, exist_ok=True)
        failed = []
        for piece in [p for p in PIECES if p in args.pieces]:
            if piece == "train" and not args.show:
                check_plan(args)
            for command in commands(args, piece):
                print(f"{piece}: {shlex.join(command)}", flush=True)
                trouble = "" if args.show else run(command, args)
                if trouble:
                    failed.append(f"{piece} ({Path(command[1]).name}): {trouble}")
            if piece == "gather" and not args.show:
                gather.gather(args.work, args.out, argv)
        if failed:
            raise RunError("not done: " + "; ".join(failed))


if __name__ == "__main__":
    main()
