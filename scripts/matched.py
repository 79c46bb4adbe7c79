"""Train arms x seeds of one recipe, matched: the same data in the same order, the same body, the same schedule.

    python scripts/matched.py config/demo.py --out=out/demo
    python scripts/matched.py config/gpt2_124m_fineweb_edu.py --out=out/gpt2_124m --nproc_per_node=8 --check
    python scripts/matched.py RECIPE --arms=bpe_untied,kronecker --seeds=1337 --max_iters=100
    python scripts/matched.py config/experiments/ladder.py --jobs=2 --minutes=60

Runs that are finished are left alone and interrupted ones go on, so the same command can be given again at
any time. --check proves that the runs will match, and trains nothing. Any other --key=value goes to train.py
as it is.
"""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(ROOT)
    import scripts.by_path  # noqa: F401 - Ctrl-C

import configurator
from data import DataError
from data.console import cores, output_arrived
from data.loader import fingerprint
from engine import contract
from engine.errors import RunError, sentences
from engine.plan import batch_split, global_batch
from engine.runs import read_run
from scripts import devices, experiment, forecast, pool
from scripts.arguments import Parser, names, number, some_of, whole

DEFAULT_ARMS, DEFAULT_SEEDS = "bpe_tied,bpe_untied,kronecker", "1337,1338,1339"
OWN_KEYS = ("seed", "out_dir", "init_from", "eval_only", "dry_run", "check_only")  # this script sets them


def arguments(argv: list[str]):
    """(args, the words that go to train.py as they are); .configs: {arm: its configuration} of a recipe."""
    parser = Parser(__doc__)
    add, count = parser.add_argument, whole(0, 10_000)
    arms = some_of(sorted(p.stem for p in experiment.ARMS.glob("*.py")), "arm")
    own = "with commas (default: {}; an experiment's own)"
    ranks = "ranks of one run, through torchrun, each on a GPU of its own (0: as few as its memory allows, mostly 1)"
    jobs = "runs at a time (0: as many as the GPUs allow; on a CPU a core each, at most 4)"
    scripts = "for scripts: train.py's arguments, a line for each run that could start; or what compare.py would read"
    add("recipe", help="config file that all runs share, e.g. config/demo.py, or an experiment's file")
    add("--arms", type=arms, default=[], help="names in config/arms/, " + own.format(DEFAULT_ARMS))
    add("--seeds", type=seeds, default=[], help=own.format(DEFAULT_SEEDS))
    add("--rungs", type=names, default=[], help="of an experiment: these alone, with commas")
    add("--out", type=Path, help="folder of the runs (default: out/<recipe>)")
    add("--dry_run", action="store_true", help="print what would run and what it costs")
    add("--check", action="store_true", help="prove that the runs will match; train nothing")
    add("--print", choices=("runs", "compare"), help=scripts)
    add("--gpus_per_run", "--nproc_per_node", dest="gpus_per_run", type=count, default=0, help=ranks)
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
    args.configs = {}
    args.experiment = exp = experiment.read(args.recipe) if experiment.is_experiment(args.recipe) else None
    if exp is None:
        args.arms, args.seeds = args.arms or names(DEFAULT_ARMS), args.seeds or seeds(DEFAULT_SEEDS)
        if args.rungs:
            parser.error(f"{args.recipe} has no rung {args.rungs[0]!r}: only experiments have rungs")
        refuse_false_labels(args, passed)
        files = {arm: str(experiment.arm_file(arm)) for arm in args.arms}
        args.configs = {a: configurator.load([args.recipe, f, *passed], quiet=True) for a, f in files.items()}
    elif passed:
        way = f"so {passed[0]} cannot be given: change the file"
        parser.error(f"an experiment's file says all keys of its runs, {way}")
    else:
        of_file = {seed for stage in (exp.tuning, *exp.recheck, *exp.final) for seed in stage.seeds}
        asked = (("rung", args.rungs, exp.rungs), ("arm", args.arms, exp.arms), ("seed", args.seeds, of_file))
        for what, given, known in asked:
            for name in given:
                if name not in known:
                    parser.error(f"{args.recipe} has no {what} {name!r}: it has {', '.join(map(str, known))}")
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
                raise RunError(
                    f"{name} is set by this command for each run, so it cannot come from {word}: {instead}"
                )
            if name in set_by_arms or defines_an_arm(name):
                raise RunError(f"{name} defines an arm, so it cannot come from {word}: {advice}")
    if "arm" in configurator.read_file(args.recipe):
        raise RunError(f"{args.recipe} is an arm's file, not a recipe: give a recipe, and the arm by --arms")
    for name in filter(defines_an_arm, configurator.read_file(args.recipe)):
        for arm, file in files.items():
            if name not in file:
                raise RunError(f"{name} in {args.recipe} would change what {arm} is: {advice}")


# ---- the jobs


def make_jobs(args, passed: list[str]) -> dict[pool.Job, tuple[str, int]]:
    """{job: its arm and seed} of a recipe, seed by seed."""
    jobs = {}
    for seed, arm in itertools.product(args.seeds, args.arms):
        words = [args.recipe, os.path.relpath(experiment.arm_file(arm)), *passed, f"--seed={seed}"]
        steps = args.configs[arm].max_iters
        jobs[make_job(args, f"{arm}, seed {seed}", words, f"{arm}_s{seed}", steps)] = arm, seed
    return jobs


def experiment_job(args, run: experiment.Run) -> pool.Job:
    recipe, arm, *keys = experiment.command_keys(args.experiment, run)
    words = [os.path.relpath(recipe), os.path.relpath(arm), *keys]
    steps = args.experiment.lengths[run.length]["max_iters"]
    return make_job(args, run.name, words, run.name, steps)


def make_job(args, name: str, words: list[str], folder: str, max_iters: int) -> pool.Job:
    """A job of train.py with these words, in OUT/FOLDER, by torchrun where a run has several ranks.

    Paths are as a person would write them: run.json keeps the command, and is shown to others.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus_per_run}"]
    start = [sys.executable, *(torchrun if args.gpus_per_run > 1 else []), os.path.relpath(ROOT / "train.py")]
    command = [*start, *words, f"--out_dir={args.out / folder}", "--init_from=auto"]
    return pool.Job(name, tuple(command), args.out / folder, max_iters)


def workers(args, keys: list[str]):
    """The engine of pool.run that runs with these keys want: this machine's GPUs, else its cores, or a Ray cluster."""
    device = configurator.load(keys, quiet=True).device
    if device.startswith("cuda:"):
        instead = f"not --device={device}: say which with CUDA_VISIBLE_DEVICES"
        raise RunError(f"each run gets a GPU of its own, so {instead}")
    if args.engine == "ray":
        from scripts.ray_pool import OnRay

        gpus = {"cuda": True, "auto": None}.get(device, False)
        return OnRay(args.ray_address, args.gpus_per_run, gpus, args.jobs, args.nice)
    gpus = devices.visible_gpus() if device in ("auto", "cuda") else []
    slots = devices.slots(gpus, args.gpus_per_run, args.jobs) if gpus else [()] * cpu_jobs(args)
    return pool.Local(slots, max(1, cores() // (len(slots) * args.gpus_per_run)), args.nice)


def cpu_jobs(args) -> int:
    """Runs at a time on a CPU. Small ones gain more from company than from a second thread."""
    return args.jobs or max(1, min(4, cores() // (args.gpus_per_run or 1)))


# ---- the proof that they match


def identities(asked: list[tuple]) -> list[contract.Member]:
    """What train.py says of runs before it starts them. asked: (name, arm, seed, command)."""
    members = []
    for i, (name, arm, seed, words) in enumerate(asked, 1):
        print(f"\rchecking {i} of {len(asked)}: {name}   ", end="", flush=True)
        ask = subprocess.run([*words, "--check_only=True"], capture_output=True, text=True)
        if ask.returncode:
            print()
            cause = (ask.stderr.strip().splitlines() or [f"exit status {ask.returncode}"])[-1]
            raise RunError(f"{name} does not start: {cause.removeprefix('error: ')}")
        run = json.loads(ask.stdout.strip().splitlines()[-1])
        members.append(contract.Member(name, arm, seed, run["config"], run))
    print()
    return members


def prove(members: list[contract.Member], swept=()) -> None:
    """Print what the runs share; RunError with the fields that differ."""
    for seed, run in {m.seed: m.info for m in reversed(members)}.items():
        body, data = run["body_sha256"][:16], run["data_sha256"][:16]
        print(f"seed {seed}: body {body}, first and last global batch {data}")
    first = members[0].info
    print(f"schedule {first['schedule_sha256'][:16]}, validation windows {first['val_sha256'][:16]}")
    if wrong := list(contract.differences(members, swept)):
        raise RunError("these runs do not match: " + "; ".join(wrong))
    but = f" but for {' and '.join(swept)}" if swept else ""
    share = f"share schedule{but} and validation windows, and each seed's arms body and data"
    print(f"matched: {len(members)} runs {share}")


def check(args, passed: list[str]) -> None:
    """Prove that a recipe's runs will match, or an experiment's final ones at each place, in one setting of every arm."""
    if not args.experiment:
        jobs = make_jobs(args, passed).items()
        prove(identities([(job.name, arm, seed, job.command) for job, (arm, seed) in jobs]))
        return
    places: dict[tuple, dict] = {}
    for run in chosen_runs(args)[1]:
        if run.stage == "final":
            places.setdefault((run.rung, run.length), {}).setdefault((run.arm, run.seed), run)
    if not places:
        cure = "run the tuning first, or ask for more"
        raise RunError(f"no final run of this choice is known yet, so nothing was checked: {cure}")
    for (rung, length), runs in places.items():
        print(f"rung {rung}, length {length}")
        asked = [(run.name, run.arm, run.seed, experiment_job(args, run).command) for run in runs.values()]
        prove(identities(asked), swept=("learning_rate", "min_lr"))


# ---- experiments


def selected(args, run: experiment.Run) -> bool:
    wanted = ((run.rung, args.rungs), (run.arm, args.arms), (run.seed, args.seeds))
    return all(not names or value in names for value, names in wanted)


def chosen_runs(args) -> tuple[experiment.Plan, list[experiment.Run]]:
    """The plan that the records lead to, and those of its runs that were asked for."""
    plan = experiment.plan_of(args.experiment, experiment.read_records(args.experiment))
    return plan, [run for run in plan.runs if selected(args, run)]


def next_jobs(args) -> tuple[dict[pool.Job, experiment.Run], str]:
    """({job to run now: its run}, a line about what is done).

    In the plan's order, to the end of the first place at which a choice is to be made: what it leads to is known only
    then. A run that ended before its record could be written gets it here.
    """
    while True:
        plan, runs = chosen_runs(args)
        jobs = {experiment_job(args, run): run for run in runs if run.name not in plan.losses}
        ended = [job for job in jobs if pool.state(job)[0] != "unfinished"]
        if not ended:
            break
        for job in ended:
            keep_record(args, jobs, job)
    line = f"{args.experiment.name}: {len(runs)} runs{'' if plan.complete else ' known so far'}, {len(jobs)} to do"
    places = [(run.stage, run.rung, run.length) for run in jobs.values()]
    open_ = next((place for place in places if place[0] != "final"), None)
    end = len(places) - places[::-1].index(open_) if open_ else len(places)
    return dict(list(jobs.items())[:end]), line


def keep_record(args, jobs: dict[pool.Job, experiment.Run], job: pool.Job) -> None:
    experiment.write_record(args.experiment, jobs[job], job.out_dir, pool.state(job)[0])


def run_experiment(args) -> int:
    """Run what the experiment's file asks for and no record has yet, stage after stage; the exit status."""
    end = time.monotonic() + 60 * (args.minutes or math.inf)
    diverged, engine = 0, None
    while True:
        jobs, line = next_jobs(args)
        if not jobs:
            break
        engine = engine or workers(args, experiment.command_keys(args.experiment, next(iter(jobs.values()))))
        pool.say(f"{line}, {engine}")
        left = (end - time.monotonic()) / 60
        keep = partial(keep_record, args, jobs)
        status = pool.run(list(jobs), engine, left, args.retries, args.patience, on_end=keep)
        if status not in (0, pool.DIVERGED):
            return status
        diverged = diverged or status
    pool.say(line)
    if not (args.rungs or args.arms or args.seeds):
        pool.say(f"the experiment is finished: python scripts/compare.py {shlex.quote(args.recipe)}")
    return diverged


def refuse_other_runs(args, asked: dict[pool.Job, tuple[str, int]]) -> None:
    """RunError where a run that has ended in the folder was made with other keys, batch or data than are asked for now:
    old figures are no answer to a new question. Runs that go on are held to that by train.py."""
    cure = "choose another --out, or remove it"
    for job, (arm, _) in asked.items():
        if pool.state(job)[0] == "unfinished":
            continue
        (config, run), wanted = read_run(job.out_dir), args.configs[arm]
        windows = ("eval_tokens", "eval_skip_tokens")
        experiment.check_keys(job.out_dir, config, wanted, windows, "this command", cure)
        tokens = global_batch(wanted) * wanted.block_size
        if run["tokens_per_step"] != tokens:
            there = f"{run['tokens_per_step']:,} tokens a step, but this command asks for {tokens:,}"
            raise RunError(f"{job.out_dir} was made with {there}: {cure}")
        data_dir = Path(wanted.data_dir or ROOT / "data" / wanted.dataset)
        same = [config.get(key) for key in ("data_dir", "dataset")] == [wanted.data_dir, wanted.dataset]
        with suppress(DataError):  # nothing whole to hold it against
            same = fingerprint(data_dir) == run["data_fingerprint"]
        if not same:
            raise RunError(f"{job.out_dir} was trained on other data than {data_dir}: {cure}")


def run_recipe(args, passed: list[str]) -> int:
    """Run what of a recipe has not ended; the exit status."""
    asked = make_jobs(args, passed)
    refuse_other_runs(args, asked)
    jobs, engine = list(asked), workers(args, [args.recipe, *passed])
    states = Counter(pool.state(job)[0] for job in jobs)
    done = ", ".join(f"{states[s]} {s}" for s in ("finished", "diverged") if states[s] or s == "finished")
    begun = f"{len(jobs)} runs of {jobs[0].max_iters:,} steps in {args.out}: {done}"
    print(f"{begun}, {states['unfinished']} to do, {engine}", flush=True)
    status = pool.run(jobs, engine, args.minutes, args.retries, args.patience)
    if status == 0:
        print(f"all {len(jobs)} runs are finished: python scripts/compare.py {shlex.quote(str(args.out))}")
    return status


def print_for_a_script(args, passed: list[str]) -> None:
    if args.print == "compare":
        print(args.recipe if args.experiment else args.out)
        return
    train = os.path.relpath(ROOT / "train.py")
    jobs = next_jobs(args)[0] if args.experiment else make_jobs(args, passed)
    if not args.experiment:
        refuse_other_runs(args, jobs)
    for job in jobs:
        if pool.state(job)[0] == "unfinished":
            print(shlex.join(job.command[job.command.index(train) + 1 :]))
    output_arrived()


def main(argv: list[str]) -> int:
    args, passed = arguments(argv)
    exp, price = args.experiment, args.price_per_gpu_hour
    for config in args.configs.values():
        batch_split(config, args.gpus_per_run or 1)
    if args.dry_run:
        if exp:
            print(forecast.describe_experiment(exp, partial(selected, args), cpu_jobs(args), price))
        else:
            print(forecast.describe_jobs(args.configs, len(args.seeds), price))
        return 0
    if not args.gpus_per_run:
        args.gpus_per_run = forecast.ranks_that_fit(args.configs.values()) if args.engine == "local" else 1
    if args.print:
        print_for_a_script(args, passed)
    elif args.check:
        check(args, passed)
    else:
        return run_experiment(args) if exp else run_recipe(args, passed)
    return 0


if __name__ == "__main__":
    with sentences():
        sys.exit(main(sys.argv[1:]))
