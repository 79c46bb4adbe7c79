"""What training will cost, before it starts: hours, bytes between GPUs, dollars, and which packing ends first.

Every formula stands here once, and every figure has its source beside it.
"""

import heapq
import math
import os
import time
from dataclasses import dataclass

import torch

from engine.flops import PEAK_TFLOPS, peak_flops
from engine.plan import largest_divisor


@dataclass(frozen=True)
class Gpu:
    """A GPU in its maker's machine of eight. GB/s each way: of one GPU to the others, and of the node to other nodes."""

    tflops: float
    within_node: float
    between_nodes: float


# NVIDIA's data sheets. NVLink is sold as the sum of both ways (A100 600 GB/s, H100 and H200 900, B200 1,800); a DGX has
# one network adapter for each of its eight GPUs (A100: 200 Gbit/s, the others: 400).
GPUS = {
    "A100": Gpu(PEAK_TFLOPS["A100"], 300, 8 * 200 / 8),
    "H100": Gpu(PEAK_TFLOPS["H100"], 450, 8 * 400 / 8),
    "H200": Gpu(PEAK_TFLOPS["H200"], 450, 8 * 400 / 8),
    "B200": Gpu(PEAK_TFLOPS["B200"], 900, 8 * 400 / 8),
}
NUMBERS = (1, 8, 16, 32, 64)
MFU = 0.4  # assumed for all; results/124m has what was measured on one


@dataclass(frozen=True)
class Work:
    """What one run asks of its machine. rows: sequences of a step, which ranks can share without a remainder only."""

    steps: int
    rows: int
    flops_per_step: float
    gradient_bytes: int


def work_of(config, rows: int, params: dict[str, int], flops_token: int) -> Work:
    """DDP sends every trainable number's gradient in float32; evaluations are not counted."""
    return Work(config.max_iters, rows, flops_token * rows * config.block_size, 4 * params["total"])


def all_reduce_seconds(n_bytes: float, n: int, gpu: Gpu) -> float:
    """Of a ring over n GPUs: 2 (n - 1)/n times the bytes go over the slowest link (Patarasuk and Yuan 2009).

    NCCL's rings leave a node by all its adapters at once, so that link is the node's (nccl-tests, PERFORMANCE.md).
    """
    link = gpu.within_node if n <= 8 else min(gpu.within_node, gpu.between_nodes)
    return 2 * (n - 1) / n * n_bytes / (link * 1e9)


def hours(work: Work, n: int, gpu: Gpu) -> float:
    """Of one run on n GPUs at MFU, as if no part of the all-reduce were hidden behind the backward pass."""
    step = work.flops_per_step / (n * gpu.tflops * 1e12 * MFU)
    return work.steps * (step + all_reduce_seconds(work.gradient_bytes, n, gpu)) / 3600


def pack(durations: list[float], slots: int) -> float:
    """When the last run ends if each takes the first free slot, in the order given, as the pool, Ray and Slurm do."""
    free = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def best_split(works: list[Work], n: int, gpu: Gpu) -> tuple[float, int]:
    """(hours until all runs have ended, GPUs of one run) of the split of n GPUs that ends first; ties go to fewer."""
    splits = [g for g in range(1, n + 1) if n % g == 0 and all(work.rows % g == 0 for work in works)]
    return min((pack([hours(work, g, gpu) for work in works], n // g), g) for g in splits)


def dollars(gpu_hours: float, price: float) -> str:
    return f", ${gpu_hours * price:,.{0 if gpu_hours * price >= 100 else 2}f}" if price else ""


def clock(h: float) -> str:
    return f"{h:,.0f} h" if h >= 100 else f"{h:.1f} h" if h >= 1 else f"{60 * h:.1f} min"


def grid(numbers, cell) -> list[str]:
    """A row for each number of GPUs, a column for each kind; cell(n, gpu) is the text."""
    cells = {n: [cell(n, gpu) for gpu in GPUS.values()] for n in numbers}
    width = max(len(text) for row in cells.values() for text in row) + 2
    head = f"{'GPUs':>6}" + "".join(f"{name:>{width}}" for name in GPUS)
    return [head] + [f"{n:>6}" + "".join(f"{text:>{width}}" for text in row) for n, row in cells.items()]


def describe_run(work: Work, params: dict[str, int], device: torch.device, price: float) -> str:
    """The cost of one run on GPUs of four kinds, and on the device that is here."""
    saved = 4 * (params["stock_table"] - params["input"])
    compared = f", {saved / (4 * params['stock_table']):.0%} fewer than a table's" if saved > 0 else ""
    lines = [
        f"cost        at {MFU:.0%} of the dense bf16 peak (small models reach less), evaluations not counted; a step all-reduces "
        f"{work.gradient_bytes / 1e6:,.1f} MB of gradients (input side {4 * params['input'] / 1e6:,.1f} MB{compared}) in the "
        "time in brackets, counted as if none of it overlapped with computing"
    ]

    def cell(n: int, gpu: Gpu) -> str:
        h = hours(work, n, gpu)
        reduce = f" ({1e3 * all_reduce_seconds(work.gradient_bytes, n, gpu):.1f} ms)" if n > 1 else ""
        return f"{clock(h)}{reduce}{dollars(n * h, price)}"

    lines += grid(dict.fromkeys(largest_divisor(work.rows, n) for n in NUMBERS), cell)
    return "\n".join([*lines, f"  here      {describe_here(work, device)}"])


def describe_here(work: Work, device: torch.device) -> str:
    peak = peak_flops(device)
    if peak is not None:
        rate, what = peak[0], f"one {peak[1]}"
    elif device.type == "cpu":
        rate = matmul_rate()
        what = f"{os.cpu_count()} cores, {rate / 1e9:,.0f} GFLOP/s measured by a float32 matmul"
    else:
        return f"{device}: its peak is unknown, so no hours (KNG_PEAK_TFLOPS states it)"
    return f"{clock(work.steps * work.flops_per_step / (rate * MFU) / 3600)} on {what}"


def matmul_rate() -> float:
    """FLOP/s of a float32 matmul on this CPU with torch's threads, measured for a tenth of a second."""
    n = 768
    a, best, end = torch.ones(n, n), math.inf, time.perf_counter() + 0.1
    while (began := time.perf_counter()) < end:
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def describe_runs(works: list[Work], price: float) -> str:
    """When all of several runs would have ended on so many GPUs, and with how many GPUs a run."""
    total = sum(work.steps * work.flops_per_step for work in works)
    lines = [
        f"cost        {len(works)} runs, {total:.3g} FLOPs at {MFU:.0%} of the dense bf16 peak (small models reach less), evaluations "
        "not counted; hours until the last run has ended, with the GPUs shared out among the runs in the fastest way"
    ]

    def cell(n: int, gpu: Gpu) -> str:
        h, per_run = best_split(works, n, gpu)
        return f"{clock(h)} at {per_run} a run{dollars(n * h, price)}"

    return "\n".join([*lines, *grid(NUMBERS, cell)])
