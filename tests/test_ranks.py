"""engine/ranks.py: ranks that were started differently refuse to train together."""

import os
import platform
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, two_ranks

from engine.errors import RunError
from engine.ranks import Ranks, StopSignal, keep_heap


def test_a_rank_with_another_learning_rate_is_refused_by_all(tiny_flags, tmp_path):
    typo = tiny_flags(tmp_path / "run", batch_size=2, learning_rate=3e-2)
    right = tiny_flags(tmp_path / "run", batch_size=2)
    ranks = two_ranks(right, typo)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    for rank, text in zip(ranks, said, strict=True):
        assert rank.returncode == 1, text
        assert text.strip() == (
            "error: rank 1 has learning_rate=0.03, but rank 0 has 0.003: start all ranks with the same command"
        )
    assert not (tmp_path / "run").exists()


def test_agreement(monkeypatch):
    import torch.distributed as dist

    everyone = [{"a": 1, "b": 2}, {"a": 1, "b": 2}]

    def gather(box, ours, group):
        box[:] = everyone

    monkeypatch.setattr(dist, "all_gather_object", gather)
    ranks = Ranks(0, 2, None)
    ranks.agree({}, "x")
    everyone[1] = {"a": 1, "c": 2}
    with pytest.raises(RunError, match="rank 1 has b=None, but rank 0 has 2: mend it"):
        ranks.agree({}, "mend it")
    Ranks(0, 1, None).agree({"a": 1}, "x")  # one alone agrees with itself


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_is_remembered_for_the_loop(name, handlers):
    stop = StopSignal()
    assert (stop.number, stop.name) == (None, "another rank")
    os.kill(os.getpid(), signal.Signals[name])
    assert (stop.number, stop.name) == (signal.Signals[name], name)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
    assert stop.name == name
    with pytest.raises(SystemExit) as leaving:  # Ctrl-C behind it does not wait
        os.kill(os.getpid(), signal.SIGINT)
    assert leaving.value.code == 128 + signal.SIGINT


def test_a_signal_on_the_way_out_changes_nothing(handlers):
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit) as leaving:
        stop.leave()
    assert leaving.value.code == 128 + signal.SIGTERM
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)


def test_a_rank_that_leaves_a_group_runs_its_exit_functions_and_keeps_its_words_and_status():
    code = """
import atexit, torch.distributed as dist
from engine import ranks
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "the last rows are sent")
ranks.leave(SystemExit("error: this does not go together"))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout == "the last rows are sent\n"
    assert ended.stderr.endswith("error: this does not go together\n") and ended.returncode == 1


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.number is None


GLIBC = tuple(map(int, re.findall(r"\d+", platform.libc_ver()[1])))  # () for another libc


@pytest.mark.skipif(
    GLIBC < (2, 35), reason="older glibc keeps no block above 32 MiB, and others have no mallopt"
)
def test_freed_memory_is_used_again():
    """Fresh memory costs a page fault for every 4 KiB of it; glibc's own rule keeps no block above 32 MiB."""
    import resource

    keep_heap()
    faults = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10 << 20)  # 40 MiB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000
