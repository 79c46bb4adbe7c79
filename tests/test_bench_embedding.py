"""The embedding bench at toy size: what it measures is checked against what is known beforehand."""

import json
import os

import pytest

pytest.importorskip("kronecker_embeddings")

from scripts.bench import embedding as bench


def test_toy_run_writes_tables_growth_and_provenance(tmp_path, monkeypatch):
    """Real measurements of small tables, with the sides of a GPU: only the sizes are others than those of a whole run."""
    monkeypatch.setattr(bench, "sides_at", lambda *what: (list(bench.SIDES), ""))
    monkeypatch.setattr(bench, "SETTINGS", [(300, 8, 4, (64,))])
    monkeypatch.setattr(bench, "BASE", {"tokens": 64, "vocabulary": 300, "width": 8})
    monkeypatch.setattr(bench, "GROWTH", {"tokens": [64, 256]})
    monkeypatch.setattr(bench, "CONDITIONED", (300, 8, 4, 64))
    # memory once kept is kept by the whole process, which runs other tests too
    monkeypatch.setattr(bench, "CONDITIONS", [c for c in bench.CONDITIONS if not c[2]])
    monkeypatch.setattr(bench, "peak_memory", lambda *what: {"extra": 3e6, "all": 5e6})
    bench.main(["--rounds=1", "--device=cpu", f"--out={tmp_path}"])
    result = json.loads((tmp_path / "embedding_cpu.json").read_text())
    assert {"command", "commit", "machine", "date"} <= set(result) and "torch" in result["machine"]
    for condition in result["conditions"]:
        sides = {"kronecker", "nn.Embedding", "reference"} | (
            {"loss alone"} if condition["step"] == "with a loss" else set()
        )
        assert set(condition["ms"]) == sides and {len(ms) for ms in condition["ms"].values()} == {1}
    text = (tmp_path / "embedding_cpu.md").read_text()
    assert text.count("| with a loss |") == 2 and text.count("| 1 to 12 random |") == 2
    assert [row["ids"] for row in result["rows"]] == ["text", "uniform"]
    for row in result["rows"]:
        assert 1 < row["distinct"] <= row["tokens"] == 64
        for name in ("step", "forward"):
            ms = row[f"{name}_ms"]
            assert set(ms) == set(bench.SIDES) and min(map(min, ms.values())) > 0
            cells = [bench.bench.median(ms[side]) for side in bench.SIDES]
            cells += [bench.over(ms, side, "nn.Embedding") for side in ("kronecker", "prepared")]
            cells += [bench.over(ms, "reference", "kronecker"), f"{row['prepared_ms'][name]:,.2f}"]
            assert " | ".join(cells) in text and row["prepared_ms"][name] > 0
    assert "Zipf" in text and "| 3.0 | 3.0 | 3.0 | 1.00x |" in text
    assert "Time of a training step by tokens" in text and "log-log slope" in text
    assert "nn.Embedding: slope" in (tmp_path / "growth_tokens_ms.svg").read_text()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_peak_memory_of_a_step_is_the_gradient_and_the_output():
    n, V, d = 4096, 30_000, 256
    peak = bench.peak_memory("nn.Embedding", V, d, 4, n, bench.Corpus())
    known = 4 * (V * d + n * d)
    assert 0.95 * known < peak["step"] < 1.5 * known
    assert peak["extra"] == max(peak["step"] - known, 0) and peak["all"] == peak["step"] + 4 * V * d


def test_ids_and_buffers_without_a_text():
    corpus = bench.Corpus()
    ids = corpus.ids("text", 1000, 50)
    assert int(ids.min()) >= 0 and int(ids.max()) < 50
    assert (ids == 0).sum() > (ids == 40).sum()  # Zipf-like
    bytes_, lengths = corpus.buffers(50, 8)
    assert bytes_.shape == (50, 8) and int(lengths.min()) >= 1


def test_missing_text(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*none\.txt"):
        bench.main(["--text", str(tmp_path / "none.txt")])


def test_what_can_be_wrong_is_said_before_anything_is_measured(tmp_path, monkeypatch, gpt2_encoding):
    monkeypatch.setattr(bench, "bench_setting", lambda *a: pytest.fail("it measures"))
    (tmp_path / "short.txt").write_text("One short sentence.")
    with pytest.raises(SystemExit, match=r"error: .*short\.txt: only .* give a longer --text"):
        bench.main([f"--text={tmp_path / 'short.txt'}"])
    with pytest.raises(SystemExit, match=r"error: --hf-tokenizer .* is no folder of a tokenizer"):
        bench.main([f"--hf-tokenizer={tmp_path}"])
