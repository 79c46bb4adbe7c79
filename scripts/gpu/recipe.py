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
probes       all probes on the runs that this machine has (--text: held-out text, for typos in what they generate)
sweep        short runs of the arms with more than the paper's embedding
gather       one page of everything in --out: the runs' records (a few kilobytes each, so that those of several machines
             and days stand side by side), their comparison, the benches' tables; refuses runs that do not match

Further words go to the command that a piece calls: bench/embedding.py, bench/train.py, matched.py, probes/spelling.py.
--show prints the commands of a piece and runs nothing. --toy runs them at a size for a CPU. Nothing is fetched from
a network. In a copy without .git, the variable KNG_COMMIT says which commit it is.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

from data.files import write_text
from data.records import read_record
from engine.errors import RunError, sentences
from scripts import matched, provenance
from scripts.analysis import numbers, words
from scripts.analysis.report import arms_of, say
from scripts.analysis.runs import find_run_folders, load_folder
from scripts.arguments import Parser, number
from scripts.compare import write_comparison
from scripts.experiment import ARMS, arm_file
from scripts.provenance import ROOT

RECIPE = ROOT / "config" / "gpt2_124m_short.py"
PIECES = "correctness embedding speed train probes sweep gather".split()
PROBES = "spelling layers tradeoff norms generation".split()
COMPARED = "bpe_tied,bpe_untied,kronecker"
SWEPT = ",".join(["bpe_untied", "kronecker", *sorted(path.stem for path in ARMS.glob("kronecker_*.py"))])
# a quarter of a run
SWEEP = {"max_iters": 400, "eval_interval": 100, "ckpt_interval": -1, "warmup_iters": 40}
TOY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "global_batch_size": 8,
    "vocab_size": 0, "max_iters": 40, "warmup_iters": 4, "learning_rate": 3e-3, "min_lr": 3e-4, "eval_interval": 10,
    "eval_tokens": 2048, "log_interval": 5, "ckpt_interval": 40, "dtype": "float32", "pos_dim": 8,
}  # fmt: skip
TOY_SWEEP = {"max_iters": 20, "eval_interval": 5, "warmup_iters": 2}
# half a million tokens a step, as in nanoGPT's recipe, which cuts them up its own way
SPEED = (
    "--setting=124m --device=cuda --dtype=bfloat16 --compile --steps=9 --batch_size=64 --accumulate=8 "
    "--nanogpt-batch=12"
)
# What plan.json pins: runs that differ in one of these belong to another comparison.
PINNED = ("tokens", "tokens_per_step", "data_fingerprint", "val_sha256", "schedule_sha256")


# ---- the pieces


def arguments(argv):
    """The arguments, with the folders that they leave open; .more: the words for a piece's command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pieces", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    add("--work", type=Path, help="runs and caches (default: out/gpu; toy: out/gpu_toy)")
    add("--out", type=Path, help="figures and records (default: results/124m; toy: WORK/results)")
    add("--data-dir", type=Path, default=ROOT / "data" / "edu_mix", help="prepared shards (%(default)s)")
    minutes = number(0, 1e6, above=True)
    add("--minutes", type=minutes, default=8.7, help="what this call may take (%(default)s)")
    add("--toy", action="store_true", help="the same commands at a size for a CPU")
    add("--show", action="store_true", help="print the commands and run nothing")
    args, args.more = parser.parse_known_args(argv)
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
    minutes = f"--minutes={left(args):.2f}"
    if piece == "correctness":
        record = f"--junitxml={args.out / 'gpu_tests.xml'}"
        tests = str(ROOT / "tests" / "test_gpu.py")
        return [[sys.executable, "-m", "pytest", "-q", "-m", "gpu", record, tests]]
    if piece == "embedding":
        toy = ["--quick", "--rounds", "3"] * args.toy
        bench = script("scripts/bench/embedding.py", *measured, *toy, *args.more)
        ways = script("scripts/gpu/candidates.py", *measured, *["--toy"] * args.toy)
        return [bench, [*bench, "--dtype", "bfloat16"], ways]
    if piece == "speed":
        size = ["--setting=toy", "--steps=4"] if args.toy else [*SPEED.split(), minutes]
        return [
            script("scripts/bench/train.py", *size, f"--arms={COMPARED}", f"--out={args.out}", *args.more)
        ]
    if piece in ("train", "sweep"):
        folder, arms, more = ("runs", COMPARED, {}) if piece == "train" else ("sweep", SWEPT, SWEEP)
        more = TOY_SWEEP if args.toy and more else more
        place = [f"--arms={arms}", "--seeds=1337", f"--out={args.work / folder}", minutes]
        return [script("scripts/matched.py", RECIPE, *place, *keys(args, more), *args.more)]
    if piece == "probes":
        toy = ["--samples=1", "--max_new_tokens=4"] * args.toy
        probes = [(name, toy if name == "generation" else []) for name in PROBES]
        probes += [("spelling", ["--generate", "1000", *args.more])] if args.more else []
        common = ["--runs", args.work / "runs", *measured]
        return [script(f"scripts/probes/{name}.py", *common, *more) for name, more in probes]
    return []


def left(args) -> float:
    """Minutes of this call that are left."""
    return max(0.01, (args.deadline - time.monotonic()) / 60)


def run(command: list[str], args) -> str:
    """Run one command within the time that is left; what kept it from its end, or nothing."""
    try:
        # those that know the time save what they have
        status = subprocess.run(command, cwd=ROOT, timeout=60 * left(args) + 30).returncode
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        return "no time was left; the same command goes on"


def read_plan(args) -> dict:
    path = args.out / "plan.json"
    return read_record(path, dict, "a plan") if path.is_file() else {}


def check_facts(name: str, run: dict, steps: int, plan: dict) -> None:
    """Refuse runs whose facts are not the plan's, naming the first that differs."""
    facts = run | {"tokens": run["tokens_per_step"] * steps}
    for key in PINNED:
        if key in plan and facts[key] != plan[key]:
            raise RunError(
                f"{name} do not belong to this comparison: {key} is {facts[key]}, in plan.json it is {plan[key]}; "
                "prepare the same data and leave the recipe as it is"
            )


def check_plan(args) -> None:
    """Hold the runs that are about to start to --out/plan.json, where there is one."""
    if plan := read_plan(args):
        command = script("train.py", RECIPE, arm_file("bpe_tied"), *keys(args, {}))
        first = matched.identities([("the first run", "bpe_tied", 1337, command)])[0]
        check_facts("these runs", first.run, first.config["max_iters"], plan)


# ---- the page of all pieces


def copy_records(source: Path, target: Path) -> None:
    """The small records of every run below source, under the run's own name below target."""
    for folder in find_run_folders([source]) if source.is_dir() else ():
        there = target / folder.name
        if len({load_folder(f).info["body_sha256"] for f in (folder, there) if f.is_dir()}) > 1:
            raise RunError(f"{there} and {folder} are two runs of one name: take one away")
        there.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "run.json", "metrics.jsonl"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, there / name)


def compared(folder: Path, out: Path, plan: dict, command: str) -> list[str]:
    """Compare the runs below folder into out/compare; the tables and claims as Markdown, nothing where no run is."""
    if not folder.is_dir():
        return []
    runs = [load_folder(f) for f in find_run_folders([folder])]
    for r in runs:
        check_facts(f"the records of {r.name}", r.info, r.max_iters, plan)
    arms = arms_of(runs)
    c = numbers.compare(runs, next((a for a in ("bpe_tied", "bpe_untied") if a in arms), arms[0]))
    write_comparison(c, runs, out, command)
    return [*(t.markdown() for t in words.tables(c)), *c["claims"], *words.all_notes(c)]


def tests_of(path: Path) -> list[str]:
    """What pytest's own record says."""
    if not path.is_file():
        return []
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    tests, failures, errors, skipped = (
        int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")
    )
    failed = "".join(
        f"\n- {case.get('name')}" for case in suite.iter("testcase") if list(case.iter("failure"))
    )
    text = f"{tests} tests, {failures + errors} failed, {skipped} skipped ({suite.get('timestamp', '')[:10]})"
    return ["## Tests on the GPU", f"{text}{failed}."]


def gather(args, argv) -> None:
    """Write OUT/summary.md from the runs below WORK and everything that the benches left in OUT."""
    command, out = provenance.command(__file__, argv), args.out
    for kind in ("runs", "sweep"):
        copy_records(args.work / kind, out / kind)
    parts = ["# GPT-2 124M on a GPU", *compared(out / "runs", out, read_plan(args), command)]
    swept = compared(out / "sweep", out / "sweep", {}, command)
    parts += ["# What moves the gap: short runs of their own schedule", *swept] if swept else []
    pages = [*sorted(out.glob("embedding_*.md")), out / "candidates.md", out / "bench_train.md"]
    parts += [path.read_text(encoding="utf-8").strip() for path in pages if path.is_file()]
    parts += tests_of(out / "gpu_tests.xml")
    if len(parts) == 1:
        raise RunError(f"there is nothing to gather in {args.work} and {out}: run some pieces first")
    probes = sorted((out / "compare" / "probes").glob("*.md"))
    links = "\n".join(f"- [{p.stem}](compare/probes/{p.name})" for p in probes)
    parts += ["## Probes", links] if probes else []
    parts.append(f"Gathered by `{command}` on {provenance.today()}.")
    write_text(out / "summary.md", "\n\n".join(parts) + "\n")
    say(f"written to {out / 'summary.md'}")


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
                gather(args, argv)
        if failed:
            raise RunError("not done: " + "; ".join(failed))


if __name__ == "__main__":
    main()
