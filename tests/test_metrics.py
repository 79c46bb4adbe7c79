"""engine/metrics.py: the record itself."""

import json
import time
from pathlib import Path

import pytest
import torch

from data import DataError
from engine.metrics import Metrics, Progress, is_evaluated, memory_gb, read_metrics

ROWS = [{"iter": i, "train/loss": 3.0 - i / 10} for i in range(4)]


def write(folder, rows, tail=""):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return path


def test_rows_are_whole_lines_as_soon_as_they_are_logged(tmp_path):
    record = Metrics(tmp_path, 0)
    for i, row in enumerate(ROWS):
        record.log(row)
        assert read_metrics(tmp_path) == ROWS[: i + 1]
    record.sync()
    record.close()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_what_is_not_finite_is_null(tmp_path):
    record = Metrics(tmp_path, 0)
    record.log({"iter": 0, "a": float("nan"), "b": float("inf"), "c": 1.5, "d": 2})
    record.close()
    assert read_metrics(tmp_path) == [{"iter": 0, "a": None, "b": None, "c": 1.5, "d": 2}]


def test_rows_that_will_be_made_again_are_dropped_and_the_rest_is_kept_as_it_was(tmp_path):
    path = write(tmp_path, [*ROWS[:2], {"iter": 2, "val/loss": 1 / 3}, *ROWS[2:]])
    kept = path.read_text().splitlines()[:2]
    record = Metrics(tmp_path, 2)
    assert path.read_text().splitlines() == kept
    record.log({"iter": 2, "val/loss": 1 / 3})
    record.close()
    assert read_metrics(tmp_path) == [*ROWS[:2], {"iter": 2, "val/loss": 1 / 3}]


@pytest.mark.parametrize("tail", ['{"iter": 4, "train', "{", "\0\0\0\0", '{"iter": 4}\n{"it'])
def test_a_last_line_cut_short_is_left_out_and_does_not_spoil_the_next(tail, tmp_path):
    write(tmp_path, ROWS, tail)
    whole = [*ROWS, {"iter": 4}] if "\n" in tail else ROWS
    assert read_metrics(tmp_path) == whole
    record = Metrics(tmp_path, 5)
    record.log({"iter": 5})
    record.close()
    assert read_metrics(tmp_path) == [*whole, {"iter": 5}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 5 of .*metrics.jsonl"),
        ('{"train/loss": 1.0}', "line 5 of .*iter"),
        ('{"iter": "4"}', "line 5 of .*iter"),
        ('{"iter": 4, "val/loss": "low"}', "line 5 of .*val/loss"),
        ('{"iter": 4, "val/by_input/64": "low"}', "line 5 of .*val/by_input/64 should be a number or null"),
        ("[4]", "line 5 of"),
    ],
)
def test_a_damaged_line_in_the_middle_is_named_and_nothing_is_rewritten(line, words, tmp_path):
    path = write(tmp_path, ROWS, f"{line}\n" + '{"iter": 5}\n')
    before = path.read_bytes()
    with pytest.raises(DataError, match=words):
        Metrics(tmp_path, 2)
    assert path.read_bytes() == before


def test_a_run_is_evaluated_by_its_last_evaluation_alone(tmp_path):
    assert read_metrics(tmp_path) == []
    assert not is_evaluated(tmp_path, 3)
    write(tmp_path, [*ROWS, {"iter": 2, "val/loss": 2.0}])
    assert not is_evaluated(tmp_path, 3)  # the step of that number was made, its evaluation was not
    write(tmp_path, [*ROWS, {"iter": 3, "val/loss": None}])
    assert is_evaluated(tmp_path, 3)
    assert not is_evaluated(tmp_path, 4)


def test_memory_is_the_peak_of_this_process_in_gigabytes():
    if not Path("/proc/self/status").is_file():
        pytest.skip("the system's own figure is read from /proc")
    before = memory_gb(torch.device("cpu"))
    block = bytearray(300_000_000)
    block[::4096] = b"\1" * len(block[::4096])  # touched, so that it is resident
    after = memory_gb(torch.device("cpu"))
    assert 0.05 < before < 100
    assert before <= after
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    assert after == pytest.approx(int(peak.split()[1]) * 1024 / 1e9, rel=0.02)


def test_the_wait_for_other_ranks_counts_and_evaluations_do_not():
    progress = Progress(0, 10, 1000, 1, torch.device("cpu"), 2)
    assert progress.timed(lambda word: time.sleep(0.2) or word, True)  # between the steps
    progress.begin_step()
    progress.end_step()
    time.sleep(0.2)  # an evaluation
    assert 1000 / 0.35 < progress.figures()["tok_per_sec"] < 1000 / 0.2
