"""Train arms x seeds of one recipe, matched: the same data in the same order, the same body, the same schedule.

    python scripts/matched.py config/demo.py --out=out/demo
    python scripts/matched.py config/gpt2_124m_fineweb_edu.py --out=out/gpt2_124m --nproc_per_node=8 --check
    python scripts/matched.py RECIPE --arms=bpe_untied,kronecker --seeds=1337 --max_iters=100
    python scripts/matched.py config/experiments/ladder.py --jobs=2 --minutes=60

Runs that are finished are left alone and interrupted ones go on, so the same command can be given again at
any time. --check proves that the runs will match, and trains nothing. Any other --key=value goes to train.py
as it is.
"""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)
    import scripts.by_path  # noqa: F401 - Ctrl-C

import configurator
from engine import contract
from engine.errors import sentences
from scripts import devices, experiment, forecast, pool
from scripts.arguments import Parser, names, number, some_of, whole

DEFAULT_ARMS, DEFAULT_SEEDS = "bpe_tied,bpe_untied,kronecker", "1337,1338,1339"
OWN_KEYS = ("seed", "out_dir", "init_from", "eval_only", "dry_run", "check_only")  # this script sets them


def arguments(argv: list[str]):
    """(args, the words that go to train.py as they are)."""
    parser = Parser(__doc__)
    add, count = parser.add_argument, whole(0, 10_000)
    arms = some_of(sorted(p.stem for p in experiment.ARMS.glob("*.py")), "arm")
    add("recipe", help="config file that all runs share, e.g. config/demo.py, or an experiment's file")
    own = "with commas (default: {}; an experiment's own)"
    add("--arms", type=arms, default=[], help="names in config/arms/, " + own.format(DEFAULT_ARMS))
    add("--seeds", type=seeds, default=[], help=own.format(DEFAULT_SEEDS))
    add("--rungs", type=names, default=[], help="of an experiment: these alone, with commas")
    add("--out", type=Path, help="folder of the runs (default: out/<recipe>)")
    add("--dry_run", action="store_true", help="print what would run and what it costs")
    add("--check", action="store_true", help="prove that the runs will match; train nothing")
    scripts = "for scripts: train.py's arguments, a line for each run that could start; or what compare.py would read"
    add("--print", choices=("runs", "compare"), help=scripts)
    ranks = "ranks of one run, through torchrun, each on a GPU of its own (0: as few as its memory allows, mostly 1)"
    add("--gpus_per_run", "--nproc_per_node", dest="gpus_per_run", type=count, default=0, help=ranks)
    jobs = "runs at a time (0: as many as the GPUs allow; on a CPU a core each, at most 4)"
    add("--jobs", type=count, default=0, help=jobs)
    add("--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster")
    add("--ray_address", default="", help="auto | HOST:PORT (empty: RAY_ADDRESS, else a Ray of its own)")
    add("--price_per_gpu_hour", type=number(0), default=0, help="dollars, for the cost that --dry_run shows")
    add("--minutes", type=number(0, 1e9, above=True), help="stop after so many minutes; every run saves")
    add("--nice", type=whole(0, 19), default=0, help="priority of the runs, 0 to 19 (lowest)")
    add("--retries", type=count, default=1, help="starts more of a run that is lost, hangs or fails")
    hangs = "seconds without a new step after which a run hangs"
    add("--patience", type=number(1, 1e9), default=3600, help=hangs)
    args, passed = parser.parse_known_args(argv)
    if args.ray_address and args.engine != "ray":
        parser.error("--ray_address needs --engine=ray")
    args.out = args.out or Path("out") / Path(args.recipe).stem
    exp = args.experiment = experiment.read(args.recipe) if experiment.is_experiment(args.recipe) else None
    if exp is None:
        args.arms, args.seeds = args.arms or names(DEFAULT_ARMS), args.seeds or seeds(DEFAULT_SEEDS)
        if args.rungs:
            parser.error(f"{args.recipe} has no rung {args.rungs[0]!r}: only experiments have rungs")
        refuse_false_labels(args, passed)
        return args, passed
    if passed:
        parser.error(
            f"an experiment's file says all keys of its runs, so {passed[0]} cannot be given: change the file"
        )
    for what, given, known in (("rung", args.rungs, exp.rungs), ("arm", args.arms, exp.arms)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{args.recipe} has no {what} {unknown[0]!r}: it has {', '.join(known)}")
    return args, passed


def seeds(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them, each once."""
    return list(dict.fromkeys(map(whole(-(2**63), 2**63 - 1), names(text))))


def defines_an_arm(name: str) -> bool:
    return name in ("arm", "wte", "tie_weights") or name.startswith("wte_")


def refuse_false_labels(args, passed: list[str]) -> None:
    """Keys that this script or an arm's file sets may not come from elsewhere: the run's name would lie."""
    advice = "put it into a file of its own, config/arms/NAME.py, and give --arms=NAME"
    files = {arm: configurator.read_file(str(experiment.arm_file(arm))) for arm in args.arms}
    set_by_arms = {name for file in files.values() for name in file}
    for word in passed:
        for name in [word[2:].partition("=")[0]] if word.startswith("--") else configurator.read_file(word):
            if name in OWN_KEYS:
                instead = {"seed": "give --seeds", "out_dir": "give --out"}.get(name, "use train.py for that")
                sys.exit(
                    f"error: {name} is set by this command for each run, so it cannot come from {word}: {instead}"
                )
            if name in set_by_arms or defines_an_arm(name):
                sys.exit(f"error: {name} defines an arm, so it cannot come from {word}: {advice}")
    for name in configurator.read_file(args.recipe):
        changed = [arm for arm, file in files.items() if defines_an_arm(name) and name not in file]
        if changed:
            sys.exit(f"error: {name} in {args.recipe} would change what {changed[0]} is: {advice}")


# ---- the jobs


def make_jobs(args, passed: list[str]) -> list[pool.Job]:
    steps = {arm: recipe_of(args, passed, arm).max_iters for arm in args.arms}
    return [
        pool.Job(f"{arm}, seed {seed}", command(args, passed, arm, seed), folder(args, arm, seed), steps[arm])
        for seed in args.seeds
        for arm in args.arms
    ]


def recipe_of(args, passed: list[str], arm: str):
    """The configuration of an arm's runs."""
    return configurator.load([args.recipe, str(experiment.arm_file(arm)), *passed], quiet=True)


def command(args, passed: list[str], arm: str, seed: int) -> list[str]:
    # paths as a person would write them: run.json keeps the command, and is shown to others
    files = [os.path.relpath(ROOT / "train.py"), args.recipe, os.path.relpath(experiment.arm_file(arm))]
    own = [f"--seed={seed}", f"--out_dir={folder(args, arm, seed)}", "--init_from=auto"]
    return [*python(args), *files, *passed, *own]


def python(args) -> list[str]:
    """How train.py is started: by torchrun where a run has several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus_per_run}"]
    return [sys.executable, *(torchrun if args.gpus_per_run > 1 else [])]


def folder(args, arm: str, seed: int) -> Path:
    return args.out / f"{arm}_s{seed}"


def workers(args, keys: list[str]):
    """The engine of pool.run that runs with these keys want: this machine's GPUs, else its cores, or a Ray cluster."""
    device = configurator.load(keys, quiet=True).device
    if device.startswith("cuda:"):
        sys.exit(
            f"error: each run gets a GPU of its own, so not --device={device}: say which with CUDA_VISIBLE_DEVICES"
        )
    if args.engine == "ray":
        from scripts.ray_pool import OnRay

        gpus = {"cuda": True, "auto": None}.get(device, False)
        return OnRay(args.ray_address, args.gpus_per_run, gpus, args.jobs, args.nice)
    gpus = devices.visible_gpus() if device in ("auto", "cuda") else []
    slots = devices.slots(gpus, args.gpus_per_run, args.jobs) if gpus else [()] * cpu_jobs(args)
    return pool.Local(slots, max(1, (os.cpu_count() or 1) // (len(slots) * args.gpus_per_run)), args.nice)


def cpu_jobs(args) -> int:
    """Runs at a time on a CPU. Small ones gain more from company than from a second thread."""
    return args.jobs or max(1, min(4, (os.cpu_count() or 1) // (args.gpus_per_run or 1)))


# ---- the proof that they match


def identities(asked: list[tuple[str, str, int, list[str]]]) -> list[contract.Member]:
    """What train.py says of runs before it starts them. asked: (name, arm, seed, command)."""
    members = []
    for i, (name, arm, seed, words) in enumerate(asked):
        print(f"\rchecking {i + 1} of {len(asked)}: {name}   ", end="", flush=True)
        ask = subprocess.run([*words, "--check_only=True"], capture_output=True, text=True)
        if ask.returncode:
            cause = (ask.stderr.strip().splitlines() or [f"exit status {ask.returncode}"])[-1]
            sys.exit(f"\nerror: {name} does not start: {cause.removeprefix('error: ')}")
        run = json.loads(ask.stdout.strip().splitlines()[-1])
        members.append(contract.Member(name, arm, seed, run["config"], run))
    print()
    return members


def prove(members: list[contract.Member], swept=()) -> None:
    """Print what the runs share; exits with the fields that differ."""
    for seed, run in {m.seed: m.run for m in reversed(members)}.items():
        print(
            f"seed {seed}: body {run['body_sha256'][:16]}, first and last global batch {run['data_sha256'][:16]}"
        )
    first = members[0].run
    print(f"schedule {first['schedule_sha256'][:16]}, validation windows {first['val_sha256'][:16]}")
    wrong = list(contract.differences(members, swept))
    if wrong:
        sys.exit("error: these runs do not match: " + "; ".join(wrong))
    but = f" but for {' and '.join(swept)}" if swept else ""
    print(
        f"matched: {len(members)} runs share schedule{but} and validation windows, and each seed's arms body and data"
    )


def check_experiment(args) -> None:
    """Prove for each rung and length that the final runs will match, in one setting of every arm."""
    exp = args.experiment
    plan = experiment.Plan(exp, experiment.losses_of(experiment.read_records(exp)))
    places: dict[tuple, dict] = {}
    for run in plan.runs:
        if run.stage == "final" and selected(args, run):
            places.setdefault((run.rung, run.length), {}).setdefault((run.arm, run.seed), run)
    for (rung, length), runs in places.items():
        print(f"rung {rung}, length {length}")
        asked = [(run.name, run.arm, run.seed, experiment_job(args, run).command) for run in runs.values()]
        prove(identities(asked), swept=("learning_rate", "min_lr"))


# ---- experiments


def selected(args, run: experiment.Run) -> bool:
    return all(
        not wanted or value in wanted
        for value, wanted in ((run.rung, args.rungs), (run.arm, args.arms), (run.seed, args.seeds))
    )


def experiment_job(args, run: experiment.Run) -> pool.Job:
    recipe, arm, *keys = experiment.command_keys(args.experiment, run)
    out_dir = args.out / run.name
    files = [os.path.relpath(ROOT / name) for name in ("train.py", recipe, arm)]
    own = [f"--out_dir={out_dir}", "--init_from=auto"]
    max_iters = args.experiment.lengths[run.length]["max_iters"]
    return pool.Job(run.name, [*python(args), *files, *keys, *own], out_dir, max_iters)


def next_jobs(args) -> tuple[list[pool.Job], dict[str, experiment.Run], str]:
    """(jobs that can run now, the runs behind the names, a line about both).

    Choices come first: what the tuning leads to is known only when it has ended. A run that ended before its record
    could be written gets it here.
    """
    exp = args.experiment
    while True:
        losses = experiment.losses_of(experiment.read_records(exp))
        plan = experiment.Plan(exp, losses)
        runs = {run.name: run for run in plan.runs if selected(args, run)}
        jobs = [experiment_job(args, run) for name, run in runs.items() if name not in losses]
        ended = [job for job in jobs if pool.state(job)[0] != "unfinished"]
        for job in ended:
            keep_record(exp, runs[job.name], job)
        if not ended:
            known = "" if plan.complete else " known so far"
            line = f"{exp.name}: {len(runs)} runs{known}, {len(jobs)} to do"
            return [job for job in jobs if runs[job.name].stage != "final"] or jobs, runs, line


def run_experiment(args) -> int:
    """Run what the experiment's file asks for and no record has yet, stage after stage; the exit status."""
    exp = args.experiment
    end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    screen = pool.Screen()
    status, engine = 0, None
    while True:
        jobs, runs, line = next_jobs(args)
        if jobs and engine is None:
            engine = workers(args, experiment.command_keys(exp, runs[jobs[0].name]))
        screen.say(f"{line}, {engine}" if jobs else line)
        if not jobs:
            break
        left = (end - time.monotonic()) / 60 if args.minutes else None
        one = pool.run(
            jobs, engine, left, args.retries, args.patience,
            on_end=lambda job, runs=runs: keep_record(exp, runs[job.name], job),
        )  # fmt: skip
        if one not in (0, pool.DIVERGED):
            return one
        status = one
    if status == 0 and not (args.rungs or args.arms or args.seeds):
        screen.say(f"the experiment is finished: python scripts/compare.py {shlex.quote(args.recipe)}")
    return status


def keep_record(exp, run: experiment.Run, job: pool.Job) -> None:
    experiment.write_record(exp, run, job.out_dir, pool.state(job)[0])


def print_for_a_script(args, passed: list[str]) -> None:
    if args.print == "compare":
        print(args.recipe if args.experiment else args.out)
        return
    jobs = next_jobs(args)[0] if args.experiment else make_jobs(args, passed)
    train = os.path.relpath(ROOT / "train.py")
    for job in jobs:
        if pool.state(job)[0] == "unfinished":
            print(shlex.join(job.command[job.command.index(train) + 1 :]))


def main(argv: list[str]) -> int:
    args, passed = arguments(argv)
    exp = args.experiment
    configs = {} if exp else {arm: recipe_of(args, passed, arm) for arm in args.arms}
    if args.dry_run:
        price = args.price_per_gpu_hour
        if exp:
            print(forecast.describe_experiment(exp, lambda run: selected(args, run), cpu_jobs(args), price))
        else:
            print(forecast.describe_jobs(configs, len(args.seeds), price))
        return 0
    if not args.gpus_per_run:
        args.gpus_per_run = forecast.ranks_that_fit(configs.values()) if args.engine == "local" else 1
    if args.print:
        print_for_a_script(args, passed)
        return 0
    if args.check:
        if exp:
            check_experiment(args)
        else:
            asked = [(arm, seed) for seed in args.seeds for arm in args.arms]
            prove(identities([(f"{a}, seed {s}", a, s, command(args, passed, a, s)) for a, s in asked]))
        return 0
    if exp:
        return run_experiment(args)
    jobs = make_jobs(args, passed)
    engine = workers(args, [args.recipe, *passed])
    states = Counter(pool.state(job)[0] for job in jobs)
    done = ", ".join(f"{states[s]} {s}" for s in ("finished", "diverged") if states[s] or s == "finished")
    begun = f"{len(jobs)} runs of {jobs[0].max_iters:,} steps in {args.out}: {done}"
    print(f"{begun}, {states['unfinished']} to do, {engine}", flush=True)
    status = pool.run(jobs, engine, args.minutes, args.retries, args.patience)
    if status == 0:
        print(f"all {len(jobs)} runs are finished: python scripts/compare.py {shlex.quote(str(args.out))}")
    return status


def cli(argv: list[str]) -> None:
    with sentences():
        sys.exit(main(argv))


if __name__ == "__main__":
    cli(sys.argv[1:])
