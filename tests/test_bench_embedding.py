"""The embedding bench at toy size: what it measures is checked against what is known beforehand."""

import functools
import json
import os
from argparse import Namespace

import pytest

pytest.importorskip("kronecker_embeddings")

from scripts.bench import embedding as bench


def test_toy_run_writes_table_and_provenance(tmp_path, monkeypatch):
    """Real measurements of small tables: only the sizes are others than those of --quick."""
    monkeypatch.setattr(bench, "QUICK", [(300, 8, 4, (64,))])
    small = functools.partial(bench.bench_table, V=300, d=8, pos_dim=4, n=64)
    monkeypatch.setattr(bench, "bench_table", small)
    # memory once kept is kept by the whole process, which runs other tests too
    monkeypatch.setattr(bench, "CONDITIONS", [c for c in bench.CONDITIONS if not c[2]])
    small = functools.partial(bench.bench_conditions, V=300, d=8, pos_dim=4, n=64)
    monkeypatch.setattr(bench, "bench_conditions", small)
    bench.main(["--quick", "--no-memory", "--device", "cpu", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "embedding_cpu.json").read_text())
    assert {"command", "commit", "machine", "date", "torch", "threads"} <= set(result)
    for condition in result["conditions"]:
        medians, over = condition["ms"], condition["over_embedding"]
        assert set(medians) == set(bench.SIDES) and over["low"] <= over["median"] <= over["high"]
    text = (tmp_path / "embedding_cpu.md").read_text()
    assert text.count("| with a loss |") == 2 and text.count("| 1 to 12 random |") == 2
    assert [row["ids"] for row in result["rows"]] == ["text", "uniform"]
    for row in result["rows"]:
        assert 1 < row["distinct"] <= row["tokens"] == 64
        for name in ("fwd_bwd_ms", "fwd_ms"):
            assert set(row[name]) == set(bench.SIDES) and min(row[name].values()) > 0
            times = [row[name][side] for side in bench.SIDES]
            cells = [
                *(f"{t:,.2f}" for t in times),
                f"{times[0] / times[1]:.2f}x",
                f"{times[2] / times[0]:.0f}x",
            ]
            assert " | ".join(cells) in text
    assert result["table"]["max_difference"] < 1e-5  # the table gives what the codec gives
    assert "Zipf" in text


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_peak_memory_of_a_step_is_the_gradient_and_the_output():
    n, V, d = 4096, 30_000, 256
    args = Namespace(device="cpu", dtype="float32", text=None)
    peak = bench.peak_memory("embedding", V, d, 4, n, args)
    known = 4 * (V * d + n * d)
    assert 0.95 * known < peak["step"] < 1.5 * known
    assert peak["extra"] == max(peak["step"] - known, 0)


def test_ids_and_buffers_without_a_text():
    ids = bench.draw_ids("text", 1000, 50, None)
    assert int(ids.min()) >= 0 and int(ids.max()) < 50
    assert (ids == 0).sum() > (ids == 40).sum()  # Zipf-like
    bytes_, lengths = bench.byte_buffers(50, 8, None)
    assert bytes_.shape == (50, 8) and int(lengths.min()) >= 1


def test_missing_text(tmp_path):
    with pytest.raises(SystemExit, match="error: cannot read the tokens"):
        bench.main(["--quick", "--text", str(tmp_path / "none.txt")])


def test_ratio_is_taken_round_by_round():
    """Both sides of the third round were slow together: that is no spread of the ratio."""
    found = bench.ratio([2.0, 2.0, 20.0, 2.0], [1.0, 1.0, 10.0, 1.0])
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0}
