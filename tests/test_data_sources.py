"""Text from files as people have them: every encoding, packing and mistake either read right or refused by name."""

import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import os
import subprocess
import tracemalloc

import pytest

from data import DataError, sources
from data.sources import check_files, local_blocks, read_block

TEXT = "naïve caf\u00e9 日本語 \U0001f642 one two three.\n" * 5


def read(path, column="text", position=None, cut=True):
    """All documents of a file, and what was skipped, by reason."""
    texts, skipped = [], {}
    for block in local_blocks([path], column, position, cut=cut):
        more, counts = read_block(block, column)
        texts += more if block.opens else [texts.pop() + more[0]]
        skipped = {reason: skipped.get(reason, 0) + n for reason, n in counts.items()}
    return texts, {reason: n for reason, n in skipped.items() if n}


ENCODINGS = {
    "utf-8": TEXT.encode(),
    "utf-8 with mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 big-endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_text_in_any_unicode_encoding_is_the_same_text(tmp_path, monkeypatch, encoding, packed):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    pack = gzip.compress if packed else bytes
    plain = tmp_path / f"a.txt{packed}"
    plain.write_bytes(pack(ENCODINGS[encoding]))
    check_files([plain])
    assert read(plain) == ([TEXT], {})
    lines = "".join(json.dumps({"text": TEXT + str(k)}, ensure_ascii=False) + "\n" for k in range(9))
    mark = {
        "utf-8": b"",
        "utf-8 with mark": codecs.BOM_UTF8,
        "utf-16": codecs.BOM_UTF16_LE,
        "utf-16 big-endian": codecs.BOM_UTF16_BE,
        "utf-32": codecs.BOM_UTF32_LE,
    }
    codec = {"utf-16": "utf-16-le", "utf-16 big-endian": "utf-16-be", "utf-32": "utf-32-le"}.get(
        encoding, "utf-8"
    )
    rows = tmp_path / f"a.jsonl{packed}"
    rows.write_bytes(pack(mark[encoding] + lines.encode(codec)))
    assert read(rows) == ([TEXT + str(k) for k in range(9)], {})
    for path in (plain, rows):  # from any block on, the same blocks follow
        blocks = list(local_blocks([path], "text"))
        assert len(blocks) > 1
        for k, block in enumerate(blocks):
            again = list(local_blocks([path], "text", block.position))
            assert again == blocks[k:]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("characters", ["ab c", "\u00e9 \u4e16\u754c", "\U0001f600 x"])
def test_no_character_is_lost_where_the_parts_of_a_long_text_meet(tmp_path, encoding, characters):
    text = characters * (3 * sources.BLOCK_BYTES // len(characters.encode()) + 1)
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode(encoding))
    assert read(path) == ([text], {})
    for size in (1, 2, 3, 5, 8191):  # however it is read
        with open(path, "rb") as raw:
            file = sources._utf8(path, raw, "")
            parts = iter(lambda: file.read(size), b"")  # noqa: B023 - called in this turn
            assert b"".join(itertools.islice(parts, 3 * 8192)) == text.encode()[: 3 * 8192 * size]


def test_what_is_no_unicode_is_refused_or_counted(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("plain, then caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is no UTF-8 text \(byte 0xe9 at 15\): convert it"):
        read(latin)
    unmarked = tmp_path / "unmarked.txt"
    unmarked.write_bytes("some English text".encode("utf-16-le"))
    with pytest.raises(DataError, match="looks like UTF-16 without its mark"):
        read(unmarked)
    cut = tmp_path / "cut.txt"
    cut.write_bytes("odd".encode("utf-16") + b"x")
    with pytest.raises(DataError, match="begins like UTF-16 or UTF-32 text but is none"):
        read(cut)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(
        b'{"text": "one"}\n' + '{"text": "caf\u00e9"}\n'.encode("latin-1") + b'{"text": "two"}\n'
    )
    assert read(rows) == (["one", "two"], {"not_utf8": 1})


def test_lines_end_at_newlines_only(tmp_path):
    rows = [f"a{c}b" for c in "\u2028\u2029\x0b\x0c\x1c\x85"]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in rows), encoding="utf-8"
    )
    assert read(path) == (rows, {})


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def zst(data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_files_that_are_cut_padded_or_mislabelled(tmp_path, suffix):
    data = json.dumps({"text": os.urandom(30_000).hex()}).encode() + b"\n"
    whole = PACKERS.get(suffix, zst)(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole)
    check_files([path])
    assert len(read(path)[0]) == 1
    for damaged in (whole[: len(whole) // 2], whole[:20] + b"\0" * 40 + whole[60:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is damaged or cut short.*fetch it again"):
            read(path)
    if suffix == ".zst":  # the other libraries take what follows for padding, as their commands do
        path.write_bytes(whole + b"\0" * 100)
        with pytest.raises(DataError, match="other bytes behind its end"):
            read(path)
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"is not {suffix[1:]}, as its name says"):
        check_files([path])
    other = ".gz" if suffix != ".gz" else ".xz"
    path.write_bytes(PACKERS[other](data))
    with pytest.raises(DataError, match=rf"holds {other[1:]}.*let its name end in \{other}"):
        check_files([path])
    unlabelled = tmp_path / "b.jsonl"
    unlabelled.write_bytes(whole)
    with pytest.raises(DataError, match=rf"let its name end in \{suffix}"):
        check_files([unlabelled])


def test_zst_with_a_long_window_names_the_cure(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    command = ["zstd", "-q", "--ultra", "-1", "--long=31", "-o", str(path)]
    try:
        subprocess.run(command, input=b'{"text": "a"}\n' * 100, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no zstd command here")
    with pytest.raises(DataError, match=r"larger window.*zstd -d --long=31"):
        read(path)


def test_a_json_array_and_a_column_of_another_type_get_a_hint(tmp_path):
    for content in (json.dumps([{"text": "a"}]), json.dumps([{"text": "a"}], indent=1), "\ufeff [\n]"):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=r"one JSON array.*jq -c"):
            read(tmp_path / "a.json")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": [1, 2], "body": ["a", "b"], "parts": [["a"], ["b"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet has no text 'text', but .*body \(\w*string\)"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no text 'parts', but .*parts \(list"):
        read(tmp_path / "a.parquet", "parts")
    assert read(tmp_path / "a.parquet", "body")[0] == ["a", "b"]


def test_a_line_that_is_too_long_is_left_out_wherever_the_reading_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    monkeypatch.setattr(sources, "LONGEST_LINE", 400)
    rows = ["a", "b" * 30, "c" * 500, "d", "e" * 900, "f" * 380, "g" * 500]
    lines = [json.dumps({"text": row}) for row in rows]
    assert max(len(line) for line in lines if len(line) <= 400) > 390
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    kept = [row for row in rows if len(row) < 400]
    assert read(path) == (kept, {"too_long": 3})
    blocks = list(local_blocks([path], "text"))
    for k, block in enumerate(blocks):
        again = list(local_blocks([path], "text", block.position))
        assert again == blocks[k:]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_nothing_but_nulls_takes_time_in_proportion_and_bounded_memory(tmp_path, monkeypatch, suffix):
    """40 MB in one line: 40 times over the limits set here. A line is left out, a text refused."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(sources, "LONGEST_LINE", 1 << 20)
    path = tmp_path / f"a{suffix}.xz"
    path.write_bytes(lzma.compress(bytes(40_000_000), preset=0))
    refused = pytest.raises(DataError, match=r"a\.txt\.xz has more than 1 MiB without a place")
    tracemalloc.start()
    try:
        with refused if suffix == ".txt" else contextlib.nullcontext():
            assert not any(block.content for block in local_blocks([path], "text"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_text_is_cut_behind_words_of_any_alphabet_and_only_where_cuts_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(sources, "LONGEST_LINE", 9000)
    path = tmp_path / "a.txt"
    text = "\u0928\u092e\u0938\u094d\u0924\u0947\u0964 " * 300
    path.write_text(text, encoding="utf-8")
    parts = [block.content[0] for block in local_blocks([path], "text")]
    assert len(parts) > 2 and "".join(parts) == text
    assert all(part.startswith(" ") and not part.endswith(" ") for part in parts[1:-1])
    assert [block.content[0] for block in local_blocks([path], "text", cut=False)] == [text]
    path.write_text(text * 2, encoding="utf-8")
    assert len(list(local_blocks([path], "text"))) > 2
    with pytest.raises(DataError, match="without a place where this tokenizer"):
        list(local_blocks([path], "text", cut=False))
