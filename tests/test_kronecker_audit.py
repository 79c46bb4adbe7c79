"""The audit counts, by cause and script, and its command line."""

import io
import json
import subprocess
import sys

import pytest
from conftest import ROOT

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
    report = audit(pieces, pos_dim=4, byte_extraction="decode", d_model=10)
    counts = {cause: (row["tokens"], row["groups"]) for cause, row in report["by_cause"].items()}
    assert counts == {"truncation": (2, 1), "extraction": (2, 1), "duplicate": (2, 1)}
    assert report["truncated"] == 2 and report["tokens"] == 7 and report["ids_without_bytes"] == 1
    assert report["parameters"] == 10240 and report["stock_parameters"] == 80
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


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_folder_and_file(name, shared_dir, capsys):
    main(["--tokenizer", str(shared_dir / "tokenizers" / "gpt2-hf" / name), "--byte-extraction=decode"])
    assert "384 tokens in 21 groups" in capsys.readouterr().out


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*empty is no readable tokenizer"):
        main(["--tokenizer", str(tmp_path / "empty")])


@pytest.mark.parametrize("flag", ["--pos-dim=0", "--char-dim=-1", "--d-model=x", "--pos-dim=9999999999"])
def test_ranges(flag, capsys):
    with pytest.raises(SystemExit):
        main(["--tokenizer", "gpt2", flag])
    assert f"argument {flag.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"[]", b"7", b"{}", b'"config vocab"', b"\xff", b'{"model": 3}', b'{"version": "1.0", "model": []}',
        b'{"config": 1, "vocab": 2}', b'{"config": {}, "vocab": []}',
        b'{"config": {"default_vocab_size": 9, "default_num_special_tokens": 2}, "vocab": [1]}',
        b'{"config": {"default_vocab_size": 1, "default_num_special_tokens": 0}, "vocab": [{"rank": 0}]}',
        b'{"config": {"default_vocab_size": 1e18, "default_num_special_tokens": 1e18}, "vocab": []}',
    ],
)  # fmt: skip
def test_a_file_of_another_shape(content, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^error: .*t\.json is no"):
        main(["--tokenizer", str(tmp_path / "t.json")])


def test_an_absurd_id(tmp_path):
    from tokenizers import Tokenizer, models

    content = Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str().replace('"b":1', '"b":4000000000')
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(SystemExit, match="error: the tokenizer has 2 tokens, but ids up to 4000000000"):
        main(["--tokenizer", str(tmp_path / "t.json")])


def test_code_that_comes_with_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    (tmp_path / "mine.py").write_text("raise SystemExit('the code was run')")
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    with pytest.raises(SystemExit, match=r"error: .* is no readable tokenizer"):
        main(["--tokenizer", str(tmp_path)])


TEKKEN = '{"config": {"default_vocab_size": 2, "default_num_special_tokens": 1}, "vocab": [{"rank": 0, "token_bytes": "5pel"}]}'


def test_bytes_that_the_embedding_would_refuse(tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: token \d+ has byte \d+ at 0, outside 0..char_dim-1=4: raise char_dim"
    ):
        (tmp_path / "t.json").write_text(TEKKEN)
        main(["--tokenizer", str(tmp_path / "t.json"), "--char-dim=5"])


def test_a_narrow_terminal_shows_question_marks(tmp_path, monkeypatch):
    (tmp_path / "t.json").write_text(TEKKEN)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(module, "script", lambda piece: "日本")
    main(["--tokenizer", str(tmp_path / "t.json")])
    assert b"??" in raw.getvalue()


def test_by_path_from_any_folder_without_docstrings(tmp_path):
    (tmp_path / "t.json").write_text(TEKKEN)
    command = [sys.executable, "-OO", str(ROOT / "kronecker" / "audit.py"), "--tokenizer=t.json", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 2
