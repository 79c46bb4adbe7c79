"""data/records.py: whatever is wrong with a record, one sentence names file, key and what was expected."""

import pytest
from typing_extensions import TypedDict

from data import DataError
from data.files import write_json
from data.records import STRICT, PlainName, Record, read_record, read_rows


class Shard(Record):
    file: PlainName
    tokens: int


class Set(Record):
    rate: float
    open: bool = False
    best: float | None = None
    shards: list[Shard] = []


Row = TypedDict("Row", {"iter": int, "val/loss": float | None}, total=False)
Row.__pydantic_config__ = STRICT


def read(tmp_path, text, schema=Set):
    path = tmp_path / "r.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_record(path, schema, "a set's record")


def test_what_is_right_is_read_with_what_is_not_named(tmp_path):
    there = read(tmp_path, '{"rate": 2, "newer": [1], "shards": [{"file": "a.bin", "tokens": 3}]}')
    assert (there.rate, there.open, there.shards[0].file) == (2.0, False, "a.bin")
    assert there.model_dump()["newer"] == [1]
    assert read(tmp_path, b'\xef\xbb\xbf{"rate": 2}').rate == 2  # a BOM, as some editors write it
    assert read(tmp_path, '{"rate": 1, "best": NaN, "newer": Infinity}').best is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("1" * 10_000, "is damaged"),
        (b"\xff\xfe{\0}\0", "no UTF-8"),
        (b'{"rate": 1, "x": "\xe9"}', "no UTF-8"),
        ("[]", "it should be a JSON object"),
        ("null", "it should be a JSON object"),
        ("{}", "it has no rate"),
        ('{"rate": "1"}', 'rate is "1": it should be a valid number'),
        ('{"rate": true}', "rate is true"),
        ('{"rate": 1e999}', "finite"),
        ('{"rate": NaN}', "rate is null"),
        ('{"rate": 1, "open": 1}', "open is 1"),
        ('{"rate": 1, "shards": {}}', "shards is {}: it should be a valid list"),
        ('{"rate": 1, "shards": [3]}', "shards.0 is 3: it should be a JSON object"),
        ('{"rate": 1, "shards": [{"file": "a", "tokens": 2.5}]}', "shards.0.tokens is 2.5"),
        (
            '{"rate": 1, "shards": [{"file": "../a", "tokens": 2}]}',
            "shards.0.file is .*not a plain file name",
        ),
        ('{"rate": "' + "x" * 10_000 + '"}', r"rate is \"xxxx.*\.\.\."),
    ],
)
def test_what_is_wrong_is_one_sentence_with_file_and_key(text, words, tmp_path):
    with pytest.raises(DataError, match=words) as refusal:
        read(tmp_path, text)
    sentence = str(refusal.value)
    assert "r.json" in sentence
    assert "\n" not in sentence
    assert len(sentence) < 300


def test_a_file_that_is_not_there_or_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*nowhere.json, which should be a set's record"):
        read_record(tmp_path / "nowhere.json", Set, "a set's record")
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path, Set, "a set's record")


def test_rows_are_told_by_their_number_and_a_torn_last_one_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iter": 1, "val/loss": NaN}\n\n{"iter": 2, "x": 3}\n{"iter": 3, "va')
    assert read_rows(path, Row, "metrics") == [{"iter": 1, "val/loss": None}, {"iter": 2, "x": 3}]
    path.write_text('{"iter": 1}\n{"it\n{"iter": 3}\n')
    with pytest.raises(DataError, match=r"line 2 of .*m.jsonl is damaged"):
        read_rows(path, Row, "metrics")
    path.write_text('{"iter": 1}\n{"iter": "2"}\n')
    with pytest.raises(DataError, match=r'line 2 of .*m.jsonl is not metrics: iter is "2"'):
        read_rows(path, Row, "metrics")


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "a", Set(rate=1.5, shards=[Shard(file="b", tokens=1)]).model_dump())
    assert read_record(tmp_path / "a", Set, "a set's record").shards == [Shard(file="b", tokens=1)]
