"""The line about a preparation: what was done, how fast, what is left."""

from data.progress import Progress


def test_lines_come_every_half_minute_and_the_last_says_what_the_set_holds(monkeypatch, capsys):
    now, lines = [100.0], []

    def said() -> list[str]:
        lines.extend(capsys.readouterr().out.splitlines())
        return lines

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meta = {
        "made": {"val_tokens": 1000, "shard_tokens": 2000},
        "shards": [{}, {}],
        "tokens": {"val": 1000, "train": 2000},
        "documents": 12,
        "skipped": {"empty": 0, "not_text": 3},
    }
    progress = Progress(meta, None)
    progress.live = False
    progress.block(0.0, 10, 4_000_000, 1_000_000)
    assert said() == []
    now[0] += 40
    progress.block(0.25, 10, 4_000_000, 1_000_000)
    assert said() == ["20 documents  2.0M tokens  0.05M/s  0.2 MB/s  2 shards  0:02:00 left"]
    now[0] += 10
    progress.block(0.5, 1, 4, 1)
    assert len(said()) == 1
    progress.end()
    assert said()[1].startswith(
        "done: 12 documents, 2,000 training and 1,000 validation tokens in 2 shards; skipped 3 not_text;"
    )
    assert lines[1].endswith("2,000,001 tokens in 50.0 s, 0.04M a second")
    # with a limit, what is left follows from the tokens still wanted
    limited = Progress(meta, 6)
    limited.live = False
    now[0] += 60
    limited.block(None, 1, 0, 400)
    assert said()[2].endswith("0:20:00 left")  # 8,000 more, at 400 a minute
    idle = Progress(meta, None)
    idle.end()
    assert said()[3].startswith("already complete, nothing to do: 12 documents")
