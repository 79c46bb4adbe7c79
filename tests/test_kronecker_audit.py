"""The audit counts, by cause and script, and its command line."""

import json

import pytest

from kronecker import audit as module
from kronecker.audit import audit, audit_line, main


@pytest.mark.parametrize(
    ("pos_dim", "extraction", "tokens", "groups"),
    [(16, "bytes", 44, 14), (16, "decode", 384, 21), (32, "bytes", 17, 7), (32, "decode", 357, 14)],
)
def test_gpt2(gpt2_encoding, pos_dim, extraction, tokens, groups):
    report = audit(gpt2_encoding, pos_dim, extraction)
    assert (report["colliding_tokens"], report["collision_groups"]) == (tokens, groups)
    assert sum(row["tokens"] for row in report["by_cause"].values()) == tokens
    assert sum(row["colliding"] for row in report["by_script"].values()) == tokens
    assert sum(row["tokens"] for row in report["by_script"].values()) == 50257
    if extraction == "bytes":
        assert report["by_cause"]["truncation"]["tokens"] == tokens
    else:
        assert report["largest_group"] == 255
    assert report["break_even_vocab"] == 256 * pos_dim
    json.dumps(report)


def test_causes_by_hand():
    pieces = [b"abcd1", b"abcd2", b"\xff", b"\xfe", b"same", b"same", b"own", b""]
    report = audit(pieces, pos_dim=4, byte_extraction="decode", d_model=10, vocab_size=2048)
    counts = {cause: (row["tokens"], row["groups"]) for cause, row in report["by_cause"].items()}
    assert counts == {"truncation": (2, 1), "extraction": (2, 1), "duplicate": (2, 1)}
    assert report["truncated"] == 2 and report["tokens"] == 7 and report["ids_without_bytes"] == 2041
    assert report["parameters"] == 10240 and report["stock_parameters"] == 20480
    assert report["by_script"]["part of a character"]["tokens"] == 2
    line = audit_line(report)
    assert "6 tokens share an embedding in 3 groups" in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" the", "Latin"),
        ("നമ", "Malayalam"),
        ("नम", "Devanagari"),
        ("日", "CJK"),
        (" 12", "digits"),
        ("🙂", "emoji and symbols"),
        (" \n", "spaces and punctuation"),
        ("µ", "spaces and punctuation"),
    ],
)
def test_scripts(text, name):
    assert module.script(text.encode()) == name


def test_command_line(gpt2_encoding, capsys):
    main(["--tokenizer", "gpt2", "--pos-dim", "16"])
    text = capsys.readouterr().out
    assert "44 tokens in 14 groups" in text and "4,096" in text and "Latin" in text
    main(["--tokenizer", "gpt2", "--pos-dim", "32", "--json"])
    assert json.loads(capsys.readouterr().out)["collision_groups"] == 7


def test_folder(shared_dir, capsys):
    pytest.importorskip("transformers")
    main(["--tokenizer", str(shared_dir / "tokenizers" / "gpt2-hf" / "tokenizer.json")])
    assert "44 tokens in 14 groups" in capsys.readouterr().out


def test_nothing_there(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="error: there is no tokenizer"):
        main(["--tokenizer", str(tmp_path / "empty")])
    with pytest.raises(SystemExit, match="error: --pos-dim is 0"):
        main(["--tokenizer", "gpt2", "--pos-dim", "0"])
