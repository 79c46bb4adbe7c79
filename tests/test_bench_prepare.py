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


def test_the_whole_bench_compares_both_sides(text, tmp_path, gpt2_encoding, monkeypatch):
    monkeypatch.setattr(prepare, "VAL_TOKENS", 1000)
    packed = tmp_path / "text.jsonl.xz"
    prepare.main([f"--input={packed}", "--workers=1", "--rounds=1", f"--out={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "bench_prepare.json").read_text())
    assert record["tokens"] > 40_000 and record["mb"] == 0.12 and record["documents"] == 40
    assert all(figures["peak_mb"] > 20 for (figures,) in record["rounds"].values())
    assert list(record["rounds"]) == ["ours", "plain", "ours, from the .xz itself"]
    assert "| plain |" in (tmp_path / "out" / "bench_prepare.md").read_text()


def test_the_loaders_bench_compares_the_same_amount_of_rows(tmp_path, monkeypatch):
    # this process keeps its cores
    monkeypatch.setattr("os.sched_setaffinity", lambda *a: None, raising=False)
    for name, value in {"SECONDS": 0.01, "BATCHES": 10, "SHARDS": 1, "SHARD_TOKENS": 1_000_000}.items():
        monkeypatch.setattr(loader, name, value)
    loader.main(["--rounds=2", f"--out={tmp_path}"])
    record = json.loads((tmp_path / "bench_loader.json").read_text())
    assert {"command", "commit", "machine", "date"} < set(record)
    speeds = record["tokens_per_second"]
    assert len(speeds) == 4 and all(min(map(min, sides.values())) > 0 for sides in speeds.values())
    assert len(record["memory_mib"]) == 11
    assert (tmp_path / "bench_loader.md").read_text().count("|") > 20


@pytest.mark.parametrize(
    ("line", "what"), [("no json", "are no JSON objects"), ('{"words": "x"}', "have no text")]
)
def test_lines_that_no_side_takes_are_a_sentence(line, what, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "x"}) + f"\n{line}\n")
    with pytest.raises(SystemExit, match=f"error: some lines of --input {what}"):
        prepare.main([f"--input={path}", f"--out={tmp_path / 'out'}"])
