"""What runs will need before they start: GPUs for their memory, FLOPs, hours, dollars."""

from collections.abc import Callable, Iterable, Mapping

import torch

import configurator
import train
from engine import costs, flops
from engine.plan import global_batch, rank_memory
from scripts import devices, experiment


def ranks_that_fit(configs: Iterable) -> int:
    """GPUs of one run: 1, unless its memory is estimated at more than one has; then the fewest that share it well.

    More GPUs take smaller micro-batches, but every one holds all weights and moments: what does not fit by that does
    not fit at all, and train.py will say so.
    """
    configs = [config for config in configs if config.device in ("auto", "cuda")]
    if not configs or not torch.cuda.is_available():
        return 1
    room = 0.9 * torch.cuda.get_device_properties(0).total_memory / 1e9
    n_gpus, most = len(devices.visible_gpus()), 1
    shapes = [train.outline(config, torch.device("cpu"))[1] for config in configs]
    outlines = [(c, shape, train.count_parameters(shape)) for c, shape in zip(configs, shapes, strict=True)]
    for n in range(1, n_gpus + 1):
        if n_gpus % n or any(global_batch(config) % n for config in configs):
            continue
        if all(sum(rank_memory(*outline, n, True, "cuda").values()) < room for outline in outlines):
            return n
        most = n
    return most


def work_of(config) -> tuple[costs.Work, dict[str, int]]:
    """(what a run with these keys asks of its machine, its parameters by part)."""
    config, shape, *_ = train.outline(config, torch.device("cpu"))
    params = train.count_parameters(shape)
    return costs.work_of(config, global_batch(config), params, flops.flops_per_token(shape)), params


def describe_jobs(configs: Mapping[str, configurator.Config], n_seeds: int, price: float) -> str:
    """What each arm's run asks for, and when the runs of so many seeds would have ended on GPUs of four kinds."""
    lines, works = [], []
    for arm, config in configs.items():
        work, params = work_of(config)
        works.append(work)
        lines.append(
            f"{arm:<18} {params['total']:>13,} parameters, {work.steps:,} steps, {work.steps * work.flops_per_step:.3g} "
            f"FLOPs, {work.gradient_bytes / 1e6:,.1f} MB of gradients all-reduced a step"
        )
    return "\n".join([*lines, costs.describe_runs(works * n_seeds, price)])


def describe_experiment(exp, chosen: Callable[[experiment.Run], bool], n_jobs: int, price: float) -> str:
    """Runs, tokens, FLOPs and hours of an experiment, by rung, length and stage, with what is done already."""
    losses = experiment.losses_of(experiment.read_records(exp))
    groups: dict[tuple, list] = {}
    for run in filter(chosen, experiment.Plan(exp, losses, pretend=True).runs):
        groups.setdefault((run.stage, run.rung, run.length), []).append(run)
    rows, works = [], []
    for (stage, rung, length), runs in groups.items():
        todo = [run for run in runs if run.name not in losses]
        arms = {run.arm: configurator.load(experiment.command_keys(exp, run), quiet=True) for run in todo}
        of_arm = {arm: work_of(config)[0] for arm, config in arms.items()}
        group = [of_arm[run.arm] for run in todo]
        tokens = len(todo) * experiment.tokens_of(exp, runs[0])
        cost = sum(work.steps * work.flops_per_step for work in group)
        rows.append(
            f"{stage:<8} {rung:<4} {length:<5} {len(runs):>5} runs, {len(todo):>4} to do{tokens / 1e6:>9,.0f}M tokens "
            f"{cost:>10.2e} FLOPs {cost / (exp.gflops * 1e9) / 3600:>7.1f} h"
        )
        works += group
    total = sum(work.steps * work.flops_per_step for work in works)
    hours = total / (exp.gflops * 1e9) / 3600
    if works:
        rows.append(costs.describe_runs(works, price))
    rows.append(
        f"in all {total:.2e} FLOPs: {hours:.1f} hours of one thread at {exp.gflops:g} GFLOP/s, {hours / n_jobs:.1f} at "
        f"{n_jobs} runs at a time (evaluations not counted; where a grid must be extended, there are more)"
    )
    return "\n".join(rows)
