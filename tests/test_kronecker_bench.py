"""The embedding bench runs from end to end at toy size and says where its figures come from."""

import json

import pytest

pytest.importorskip("kronecker_embeddings")

from scripts.bench import embedding as bench


def test_toy_run_writes_table_and_provenance(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", [(300, 8, 4, (64,))])
    monkeypatch.setattr(bench, "peak_memory", lambda *_: {"step": 10, "extra": 5_000_000})
    monkeypatch.setattr(bench, "copy_bandwidth", lambda _: 1e9)
    monkeypatch.setattr(
        bench,
        "bench_table",
        lambda *a: {
            "V": 300,
            "d": 8,
            "tokens": 64,
            "build_ms": 1.0,
            "max_difference": 0.0,
            "lookup_ms": {"kronecker": 1.0, "embedding": 1.0},
        },
    )
    bench.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "embedding_cpu.json").read_text())
    assert {"command", "commit", "machine", "date", "torch", "threads"} <= set(result)
    row = result["rows"][0]
    assert set(row["fwd_bwd_ms"]) == set(bench.SIDES) and row["tokens"] == 64
    text = (tmp_path / "embedding_cpu.md").read_text()
    assert "Zipf" in text and "| 300 | 8 | 4 | 64 " in text and "| 5.0 | 5.0 | 5.0 |" in text


def test_ids_and_buffers_without_a_text():
    ids = bench.draw_ids("text", 1000, 50, None)
    assert int(ids.min()) >= 0 and int(ids.max()) < 50
    assert (ids == 0).sum() > (ids == 40).sum()  # Zipf-like
    bytes_, lengths = bench.byte_buffers(50, 8, None)
    assert bytes_.shape == (50, 8) and int(lengths.min()) >= 1


def test_missing_text(tmp_path):
    with pytest.raises(SystemExit, match="error: cannot read the tokens"):
        bench.main(["--quick", "--text", str(tmp_path / "none.txt")])
