"""The benches of preparation and loader at toy size: both sides give the same tokens, and each stage is timed."""

import json
import lzma
import random

import numpy as np
import pytest

from data.fineweb_edu import prepare as fineweb
from scripts.bench import loader, prepare


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    rows = ["".join(rng.choices("etaoin shrdlu,.\n", k=3000)) for _ in range(40)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "text.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    return path


def test_the_plain_side_gives_our_tokens_and_every_stage_takes_time(text, tmp_path, gpt2_encoding):
    prepare.plain(text, tmp_path / "plain", 1, 20_000)
    fineweb.main(
        ["--input", str(text), "--out-dir", str(tmp_path / "ours"), "--shard-size", "20000", "--workers=1"]
    )
    ours = prepare.all_tokens(tmp_path / "ours")
    assert np.array_equal(prepare.all_tokens(tmp_path / "plain"), ours) and len(ours) > 40_000
    seconds = prepare.stages(text, [tmp_path / "text.jsonl.xz"], tmp_path)
    assert {"start", "reading", "parsing", "encoding", "checking", "writing", "unpacking"} == set(seconds)
    assert seconds["start"] > 0 and not list(tmp_path.glob("*.tmp"))


def test_the_loaders_bench_compares_the_same_amount_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "os.sched_setaffinity", lambda *a: None, raising=False
    )  # this process keeps its cores
    flags = "--seconds=0.01 --repeats=1 --batches=10 --shards=1 --shard-tokens=1000000 --json".split()
    loader.main([*flags, str(tmp_path / "loader.json")])
    report = json.loads((tmp_path / "loader.json").read_text())
    assert {"command", "commit", "machine", "date"} < set(report)
    assert all(row["tokens_per_second"] > 0 and row["ratio"] > 0 for row in report["speed"])
    assert (tmp_path / "loader.md").read_text().count("|") > 20
