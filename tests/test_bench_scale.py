"""scripts/bench/scale.py at toy size: what is measured, and where it is written."""

import json

import configurator
import train
from scripts.bench import scale


def in_process(command, work):
    """train.py's own arguments, without torchrun."""
    train.main(configurator.load([*map(str, command[command.index(scale.ROOT / "train.py") + 1 :])]))


def test_one_rank_and_two_numbers_of_shards(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scale.bench, "run", in_process)
    flags = ["--setting=toy", "--ranks=1", "--steps=5", "--rounds=1", f"--out={tmp_path}"]
    scale.main([*flags, "--shards", "1", "3"])
    record = json.loads((tmp_path / "growth.json").read_text())
    assert list(record["ranks"]) == ["1"] and list(record["shards"]) == ["1", "3"]
    assert record["ranks"]["1"][0]["memory of a rank, MB"] > 50
    assert all(min(f["batch, ms"], f["memory of the loader, KB"]) > 0 for (f,) in record["shards"].values())
    page = (tmp_path / "growth.md").read_text()
    assert "log-log slope" in page and record["machine"] in page
    for name in ("ranks_step", "ranks_memory", "shards_start", "shards_batch", "shards_memory"):
        assert (tmp_path / f"growth_{name}.svg").is_file() and f"](growth_{name}.svg)" in page
