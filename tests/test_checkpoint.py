"""engine/checkpoint.py: nothing torn is ever loaded, nothing whole is ever lost."""

import os
import resource
import shutil

import pytest
import torch

from data.files import sha256
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


def names(out) -> list[str]:
    return sorted(p.name for p in (out / "ckpt").iterdir())


@pytest.mark.parametrize("size", ["2m", "3m", "4m"])
def test_a_disk_that_is_full_leaves_the_older_one_and_no_rubbish(size, small_disk):
    """A real one: torch and safetensors hide the system's error behind errors of their own."""
    disk = small_disk(size)
    weights, moments = {"w": torch.ones(200_000)}, {"state": {0: {"m": torch.ones(200_000)}}}
    checkpoint.save(disk, 1, weights, moments, {})
    with pytest.raises(RunError, match=r"step_000002 could not be written .*disk is full.* untouched"):
        for _ in range(3):
            checkpoint.save(disk, 2, weights, {"state": {0: {"m": torch.ones(700_000)}}}, {})
    assert names(disk) == ["step_000001"]
    assert checkpoint.newest(disk).name == "step_000001"
    assert (disk / "latest").read_text() == "step_000001\n"


def test_a_file_over_the_limit_of_the_shell(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        for weights, moments in (({"w": torch.ones(9_000)}, {}), ({}, {"m": torch.ones(9_000)})):
            with pytest.raises(RunError, match="see ulimit -f"):
                checkpoint.save(tmp_path, 2, weights, moments, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_000001"]


def test_a_folder_that_is_removed_is_not_made_again(tmp_path):
    with pytest.raises(RunError, match="not there"):
        save(tmp_path / "gone", 1)
    assert not (tmp_path / "gone").exists()


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


def test_prune_keeps_the_last_one_before_steps_were_skipped(tmp_path):
    for step, streak in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 3)):
        checkpoint.save(tmp_path, step, {}, {}, {"streak": streak})
        checkpoint.prune(tmp_path, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    assert checkpoint.newest(tmp_path).name == "step_000005"
    assert checkpoint.newest(tmp_path, good_before=6).name == "step_000002"
    assert checkpoint.newest(tmp_path, good_before=2) is None


def test_what_is_no_checkpoint_is_neither_taken_nor_pruned(tmp_path):
    save(tmp_path, 15)
    for name in ("step_000015_keep", "step_15", "step_", "step_00001\u00b2"):
        shutil.copytree(tmp_path / "ckpt" / "step_000015", tmp_path / "ckpt" / name)
    (tmp_path / "ckpt" / "step_000030").write_text("a note")
    assert checkpoint.newest(tmp_path).name == "step_000015"
    save(tmp_path, 20)
    save(tmp_path, 30, 3.0)
    checkpoint.prune(tmp_path, keep=1)
    assert checkpoint.load(checkpoint.newest(tmp_path))[0]["w"][0, 0] == 3
    assert names(tmp_path) == sorted(
        ["step_000030", "step_000030.displaced", "step_000015_keep", "step_15", "step_", "step_00001\u00b2"]
    )
    assert (tmp_path / "ckpt" / "step_000030.displaced").read_text() == "a note"


@pytest.mark.parametrize("which", ["\u00b2", "\u0663", "1" * 5000, "-1", "step_", "", "../../x"])
def test_a_step_that_is_no_number(which, tmp_path):
    save(tmp_path, 2)
    with pytest.raises(RunError, match="checkpoint: train it first"):
        checkpoint.choose(tmp_path, which)


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "a\nb", ""])
def test_a_pointer_out_of_the_folder_is_refused(name, tmp_path):
    save(tmp_path, 2)
    (tmp_path / "best").write_text(name)
    with pytest.raises(RunError, match="best names no checkpoint"):
        checkpoint.choose(tmp_path, "best")


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"step": "2", "sha256": {}}', '{"step": 2, "sha256": []}', "\xff"]
)
def test_a_state_that_is_none_is_said(text, tmp_path, capsys):
    folder = save(tmp_path, 2)
    (folder / "state.json").write_text(text, encoding="latin-1")
    (folder / "DONE").write_text(sha256(folder / "state.json"))
    assert checkpoint.newest(tmp_path) is None
    assert "step_000002 is passed over: " in capsys.readouterr().out


def test_steps_sort_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.newest(tmp_path).name == "step_1000000"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("raw", [b"", b"junk", b"\xff" * 64, b'\x08\0\0\0\0\0\0\0{"a":[]}'])
def test_files_of_another_kind_under_right_hashes(name, raw, tmp_path):
    """As a folder had from somebody may hold: hashes show that a file is whole, not what it is."""
    folder = save(tmp_path, 1)
    (folder / name).write_bytes(raw)
    with pytest.raises(RunError, match="holds no checkpoint of this project"):
        checkpoint.load(folder)


def test_a_checkpoint_of_another_model_or_optimizer(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RunError, match=r"not those of this model: .*Missing key"):
        checkpoint.restore(model, optimizer, ({"w": torch.ones(1)}, optimizer.state_dict(), {}))
    for moments in ({}, {"state": {}, "param_groups": 3}, {"state": {}, "param_groups": []}):
        with pytest.raises(RunError, match="other groups of parameters"):
            checkpoint.restore(model, optimizer, (model.state_dict(), moments, {}))


def test_a_later_checkpoint_that_is_damaged_does_not_outlive_newer_ones(tmp_path):
    """It sorts newest: kept as that, it would have the checkpoints after the resume deleted."""
    save(tmp_path, 10)
    (save(tmp_path, 30) / "optimizer.pt").write_bytes(b"")
    shutil.copytree(
        tmp_path / "ckpt" / "step_000010", tmp_path / "ckpt" / "step_000099"
    )  # under a wrong name
    there = checkpoint.newest(tmp_path)
    assert there.name == "step_000010"
    checkpoint.recover(tmp_path, there)
    save(tmp_path, 20)
    checkpoint.prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step_000020", "step_000030.damaged", "step_000099.damaged"]


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    """weights_only: the optimiser's file cannot smuggle in a call."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = save(tmp_path, 1)
    torch.save(Evil(), folder / "optimizer.pt")
    with pytest.raises(RunError, match="holds no checkpoint of this project"):
        checkpoint.load(folder)
    assert not (tmp_path / "owned").exists()
