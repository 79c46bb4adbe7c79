"""Train arms x seeds of one recipe, matched: the same data in the same order, the same body, the same schedule.

    python scripts/matched.py config/demo.py --out=out/demo
    python scripts/matched.py config/gpt2_124m_fineweb_edu.py --out=out/gpt2_124m --nproc_per_node=8 --check
    python scripts/matched.py RECIPE --arms=bpe_untied,kronecker --seeds=1337 --max_iters=100

Runs that are finished are left alone and interrupted ones go on, so the same command can be given again at
any time. --check proves that the runs will match, and trains nothing. Keys that are not named here go to
train.py as they are.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import configurator
from engine.metrics import is_finished, read_metrics

ARMS = ROOT / "config" / "arms"
# What all arms of one seed share, and what all runs share.
PER_SEED = {"body_sha256": "body at step 0", "data_sha256": "data or its order"}
OVERALL = {
    "val_sha256": "validation windows",
    "schedule_sha256": "schedule",
    "tokens_per_step": "tokens a step",
    "data_fingerprint": "training data",
}


def arguments(argv: list[str]):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Further --key=value go to train.py.", allow_abbrev=False
    )
    parser.add_argument("recipe", help="config file that all runs share, e.g. config/demo.py")
    parser.add_argument(
        "--arms", default="bpe_tied,bpe_untied,kronecker", help="names in config/arms/, with commas"
    )
    parser.add_argument("--seeds", default="1337,1338,1339", help="with commas")
    parser.add_argument("--out", default="", help="folder of the runs (default: out/<recipe>)")
    parser.add_argument("--nproc_per_node", type=int, default=1, help="ranks of one run, through torchrun")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at a time (0: as many as CPU cores, at most 4; 1 on GPUs)"
    )
    parser.add_argument("--check", action="store_true", help="prove that the runs will match; train nothing")
    args, passed = parser.parse_known_args(argv)
    args.arms = [a for a in args.arms.replace(",", " ").split() if a]
    known = sorted(p.stem for p in ARMS.glob("*.py"))
    for arm in args.arms:
        if arm not in known:
            sys.exit(
                f"error: there is no arm {arm!r}: choose from {', '.join(known)}, or add config/arms/{arm}.py"
            )
    try:
        args.seeds = [int(s) for s in args.seeds.replace(",", " ").split()]
    except ValueError:
        sys.exit(f"error: --seeds={args.seeds} are no whole numbers: write --seeds=1337,1338")
    if not args.arms or not args.seeds:
        sys.exit("error: there is nothing to run: name at least one arm and one seed")
    if args.nproc_per_node < 1:
        sys.exit(f"error: --nproc_per_node is {args.nproc_per_node}, but a run needs at least 1 rank")
    args.out = Path(args.out or f"out/{Path(args.recipe).stem}")
    return args, passed


def command(args, passed: list[str], arm: str, seed: int, *more: str) -> list[str]:
    if args.nproc_per_node > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc_per_node={args.nproc_per_node}"]
    else:
        start = [sys.executable]
    # paths as a person would write them: run.json keeps the command, and is shown to others
    files = [os.path.relpath(ROOT / "train.py"), args.recipe, os.path.relpath(ARMS / f"{arm}.py")]
    own = [f"--seed={seed}", f"--out_dir={folder(args, arm, seed)}", "--init_from=auto"]
    return start + files + passed + own + list(more)


def folder(args, arm: str, seed: int) -> Path:
    return args.out / f"{arm}_s{seed}"


def jobs_and_threads(args) -> tuple[int, int]:
    """(runs at a time, threads a run). Small CPU runs gain more from company than from a second thread."""
    import torch

    cores = os.cpu_count() or 1
    if torch.cuda.is_available():
        return args.jobs or 1, cores
    n_jobs = args.jobs or max(1, min(4, cores // args.nproc_per_node))
    return n_jobs, max(1, cores // (n_jobs * args.nproc_per_node))


def check(args, passed, todo, environment) -> None:
    """Compare the identities that train.py reports for each run; exits with the fields that differ."""
    found = {}
    for i, (arm, seed) in enumerate(todo):
        print(f"\rchecking {i + 1} of {len(todo)}: {arm}, seed {seed}   ", end="", flush=True)
        ask = subprocess.run(
            command(args, passed, arm, seed, "--check_only=True"),
            capture_output=True,
            text=True,
            env=environment,
        )
        if ask.returncode:
            sys.exit(f"\nerror: {arm}, seed {seed} does not start: {ask.stderr.strip().splitlines()[-1]}")
        found[arm, seed] = json.loads(ask.stdout.strip().splitlines()[-1])
    print()
    (a0, s0), first = next(iter(found.items()))
    wrong = []
    for (arm, seed), run in found.items():
        twin_arm, twin = next((a, r) for (a, s), r in found.items() if s == seed)
        wrong += [
            f"{what} of {arm}, seed {seed}, and {a0}, seed {s0}"
            for k, what in OVERALL.items()
            if run[k] != first[k]
        ]
        wrong += [
            f"{what} of {arm} and {twin_arm}, seed {seed}"
            for k, what in PER_SEED.items()
            if run[k] != twin[k]
        ]
    for seed in args.seeds:
        run = found[args.arms[0], seed]
        print(
            f"seed {seed}: body {run['body_sha256'][:16]}, first and last global batch {run['data_sha256'][:16]}"
        )
    print(f"schedule {first['schedule_sha256'][:16]}, validation windows {first['val_sha256'][:16]}")
    if wrong:
        sys.exit("error: these runs do not match: " + "; ".join(wrong))
    print(
        f"matched: {len(found)} runs share schedule and validation windows, and each seed's arms body and data"
    )


def show(args, todo, running, started: float, finished: int, begun: dict, last: bool = False) -> None:
    """One line for each running job, or a status line on a terminal."""
    parts = []
    for (arm, seed), job in running.items():
        rows = read_metrics(folder(args, arm, seed))
        train = [r for r in rows if "train/loss" in r]
        if train:
            row = train[-1]
            loss = row["train/loss"]
            parts.append(
                f"run {job['number']} of {len(todo)} {arm} s{seed}: step {row['iter']}/{job['max_iters']}"
                f" loss {'nan' if loss is None else format(loss, '.3f')} {row['tok_per_sec']:,.0f} tok/s"
            )
            begun[arm, seed] = row["iter"] / job["max_iters"]
    share = (finished + sum(begun.get(k, 0) for k in running)) / len(todo)
    spent = time.time() - started
    share_at_start = begun.setdefault("start", share)
    if share > share_at_start:
        left = spent * (1 - share) / (share - share_at_start)
        parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
    line = " | ".join(parts)
    if not line:
        return
    if sys.stdout.isatty():
        columns = os.get_terminal_size().columns if sys.stdout.isatty() else 110
        print("\r\033[K" + line[: columns - 1], end="", flush=True)
    else:
        print(line, flush=True)


def main(argv: list[str]) -> int:
    args, passed = arguments(argv)
    todo = [(arm, seed) for seed in args.seeds for arm in args.arms]
    n_jobs, threads = jobs_and_threads(args)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    config = configurator.load([args.recipe, *passed], quiet=True)
    if args.check:
        check(args, passed, todo, environment)
        return 0

    waiting = [k for k in todo if not is_finished(folder(args, *k), config.max_iters)]
    print(f"{len(todo)} runs of {config.max_iters:,} steps in {args.out}: {len(todo) - len(waiting)} finished, "
          f"{len(waiting)} to do, {n_jobs} at a time")  # fmt: skip
    running: dict = {}
    begun: dict = {}
    started, told = time.time(), 0.0
    wish = []
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: wish.append(number))
    failed = []
    try:
        while (waiting and not failed and not wish) or running:
            while waiting and len(running) < n_jobs and not failed and not wish:
                arm, seed = waiting.pop(0)
                out_dir = folder(args, arm, seed)
                out_dir.mkdir(parents=True, exist_ok=True)
                log = open(out_dir / "train.log", "a")  # noqa: SIM115 - the child writes it
                # a group of its own: Ctrl-C reaches this script alone, which then asks all runs to save
                process = subprocess.Popen(
                    command(args, passed, arm, seed), stdout=log, stderr=subprocess.STDOUT, env=environment,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                number = todo.index((arm, seed)) + 1
                running[arm, seed] = {"process": process, "number": number, "max_iters": config.max_iters}
            if wish and not begun.get("told"):
                begun["told"] = True
                print("\nstopping: each run finishes its step and saves; the same command goes on from there")
                for job in running.values():
                    os.killpg(job["process"].pid, signal.SIGTERM)
            time.sleep(0.3)
            if time.time() - told > (1 if sys.stdout.isatty() else 10):
                told = time.time()
                show(args, todo, running, started, len(todo) - len(waiting) - len(running), begun)
            for k, job in list(running.items()):
                if job["process"].poll() is None:
                    continue
                del running[k]
                arm, seed = k
                if job["process"].returncode == 0:
                    rows = [r for r in read_metrics(folder(args, arm, seed)) if "val/loss" in r]
                    clear = "\r\033[K" if sys.stdout.isatty() else ""
                    print(
                        f"{clear}run {job['number']} of {len(todo)} {arm}, seed {seed}: val loss {rows[-1]['val/loss']:.4f}",
                        flush=True,
                    )
                elif not wish:
                    failed.append(k)
    finally:
        for job in running.values():
            os.killpg(job["process"].pid, signal.SIGKILL)
    if failed:
        for arm, seed in failed:
            path = folder(args, arm, seed) / "train.log"
            lines = path.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
            print(
                f"\nerror: {arm}, seed {seed} failed: {said.removeprefix('error: ')} (all of it: {path})",
                file=sys.stderr,
            )
        return 1
    if wish:
        return 128 + wish[0]
    print(f"all {len(todo)} runs are finished: python scripts/compare.py {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
