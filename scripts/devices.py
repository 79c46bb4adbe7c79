"""Which GPUs are here, by names that CUDA_VISIBLE_DEVICES takes, and which run gets which."""

import os
import re
import subprocess
from itertools import cycle, islice, takewhile

from engine.errors import RunError


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use; each MIG instance is one of its own.

    What CUDA_VISIBLE_DEVICES says, if it is set (indices, UUIDs, MIG UUIDs; CUDA stops at the first that is no
    device). Else what nvidia-smi lists, by UUID, for CUDA itself shows but one MIG instance; without it what torch
    counts.
    """
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        names = takewhile(lambda name: name and name != "-1", (name.strip() for name in said.split(",")))
        return list(dict.fromkeys(names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        import torch

        return [str(i) for i in range(torch.cuda.device_count())]
    return listed_gpus(listed.stdout)


def listed_gpus(text: str) -> list[str]:
    """UUIDs in the output of `nvidia-smi -L`; of a GPU that is cut into MIG instances, theirs."""
    names: list[str] = []
    whole = ""
    for line in text.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        if uuid and line.startswith("GPU "):
            whole = uuid[1]
            names.append(whole)
        elif uuid and line.lstrip().startswith("MIG "):
            if names[-1] == whole:
                names.pop()
            names.append(uuid[1])
    return names


def slots(gpus: list[str], gpus_per_run: int, at_a_time: int = 0) -> list[tuple[str, ...]]:
    """Groups of GPUs, one for each run at a time (0: as many as there are groups; more share them in turn)."""
    if gpus_per_run > len(gpus):
        raise RunError(
            f"a run on {gpus_per_run} GPUs needs more than the {len(gpus)} here: lower --gpus_per_run, or use several "
            "nodes (scripts/slurm/README.md)"
        )
    if gpus_per_run > 1 and any(name.startswith("MIG-") for name in gpus):
        raise RunError("MIG instances cannot work together on one run: use --gpus_per_run=1")
    groups = [tuple(gpus[i : i + gpus_per_run]) for i in range(0, len(gpus), gpus_per_run)]
    groups = [group for group in groups if len(group) == gpus_per_run]
    return list(islice(cycle(groups), at_a_time or len(groups)))
