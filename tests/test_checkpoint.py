"""engine/checkpoint.py: nothing torn is ever loaded, nothing whole is ever lost."""

import errno
import os

import pytest
import torch

from engine import checkpoint
from engine.errors import RunError


def save(out, step, value=1.0):
    weights = {"w": torch.full((3, 4), value)}
    return checkpoint.save(
        out, step, weights, {"state": {0: {"step": torch.tensor(float(step))}}}, {"best_val": None}
    )


def test_round_trip_and_pointer(tmp_path):
    folder = save(tmp_path, 7, 2.5)
    assert folder.name == "step_000007"
    assert (tmp_path / "latest").read_text() == "step_000007\n"
    weights, optimizer, state = checkpoint.load(checkpoint.newest(tmp_path))
    assert torch.equal(weights["w"], torch.full((3, 4), 2.5))
    assert optimizer["state"][0]["step"] == 7
    assert state["step"] == 7


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "DONE"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(name, damage, tmp_path, capsys):
    good = save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        path.unlink()
    assert checkpoint.newest(tmp_path) == good
    assert "step_000002 is passed over" in capsys.readouterr().out
    with pytest.raises(RunError, match="cannot be used"):
        checkpoint.choose(tmp_path, "2")


def test_a_column_major_weight_is_saved_plainly(tmp_path):
    weights = {"w": torch.arange(12.0).view(4, 3).t()}
    folder = checkpoint.save(tmp_path, 1, weights, {}, {})
    assert torch.equal(checkpoint.load(folder)[0]["w"], weights["w"])


def test_a_failing_write_leaves_the_older_one_and_no_rubbish(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "optimizer.pt")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step_000001"]
    assert (tmp_path / "latest").read_text() == "step_000001\n"


def test_a_damaged_folder_gives_way_to_a_whole_one(tmp_path):
    (save(tmp_path, 3) / "DONE").unlink()
    save(tmp_path, 3, 9.0)
    assert checkpoint.load(checkpoint.newest(tmp_path))[0]["w"][0, 0] == 9


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    checkpoint.point(tmp_path, "best", "step_000002")
    (tmp_path / "ckpt" / ".writing_step_000006").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    assert checkpoint.choose(tmp_path, "best").name == "step_000002"


def test_steps_sort_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step_1000000"


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    """weights_only: the optimiser's file cannot smuggle in a call."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = save(tmp_path, 1)
    torch.save(Evil(), folder / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(folder)
    assert not (tmp_path / "owned").exists()
