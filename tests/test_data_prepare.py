"""Preparing shards: against a ten-line pipeline, for every source, worker count, interruption and fault."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from data import DataError, pipeline, ready_made, sources, verify
from data.files import folder_lock
from data.fineweb_edu import prepare as fineweb
from data.meta import read_meta
from data.pipeline import prepare_shards
from data.shards import find_shards, is_prepared, open_shard, write_shard
from data.tokenizers import END_OF_TEXT, clean_text, load_tokenizer
from kronecker.tokens import byte_level_alphabet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A BPE of 600 ids with GPT-2's pattern, read by tiktoken."""
    import tokenizers

    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=599, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    folder = tmp_path_factory.mktemp("bpe")
    model.save(str(folder / "tokenizer.json"))
    model.add_special_tokens([END_OF_TEXT])  # for the command line, as people's own tokenizers come
    (folder / "hf").mkdir()
    model.save(str(folder / "hf" / "tokenizer.json"))
    return load_tokenizer({"kind": "bytebpe", "file": "tokenizer.json"}, folder)


def words(seed: int, n: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("etaoinshrdlu'.,\n", k=rng.randint(1, 9))) for _ in range(n))


DOCUMENTS = [
    "a plain one",
    f"with {END_OF_TEXT} written out",
    "  leading and trailing \n\n ",
    "don't 'tis they'll've 's ''s 're\u00a0x",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 \u0645\u0631\u062d\u0628\u0627 \U0001e900",
    "lone \ud83d surrogate",
    "\x00 zero \x00",
    *(words(k, 40 + 13 * k) for k in range(20)),
]
ROWS = [*DOCUMENTS[:4], "", None, 17, *DOCUMENTS[4:], ["a", "list"]]


def reference(texts, tokenizer) -> np.ndarray:
    """The plain pipeline: one document after the other."""
    ids = []
    for text in texts:
        ids.append(tokenizer.eot)
        ids.extend(tokenizer.backend.encode_ordinary(text))
    return np.array(ids)


def stream_of(folder) -> np.ndarray:
    return np.concatenate([open_shard(p).tokens for s in ("val", "train") for p in find_shards(folder, s)])


def digests(folder) -> dict:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).glob("[!.]*"))
        if p.name != "prepare.lock"
    }


def jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps({"id": k, "text": row}) + "\n" for k, row in enumerate(rows)))
    return path


def make(out, tokenizer, files, workers=1, val=100, shard=900, column="text", blocks=None, **more):
    """prepare_shards of local files with small shards and small blocks."""
    files = [Path(f) for f in files]
    blocks = blocks or (lambda position: sources.local_blocks(files, column, position))
    more |= {"column": column, "val_tokens": val, "shard_tokens": shard, "workers": workers}
    with folder_lock(Path(out)):
        source = {"files": [f.name for f in files]}
        return prepare_shards(Path(out), "set", tokenizer, blocks, source, **more)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 700)


# ------------------------------------------------------------------------------------------ right


def hand_made_bpe(folder: Path):
    """A BPE whose every token is written here, so that its ids depend on no trainer."""
    pairs = [b" t", b"he", b" the", b"th", b"in", b"an", b" a", b"e ", b"ing"]
    pairs += [b"\xc3\xa9", b"\xe6\x97", b"\xe6\x97\xa5", b"''", b"  ", b"    ", b"ll", b"'ll"]
    tokens = [bytes([b]) for b in range(256)] + pairs
    vocab = {"".join(byte_level_alphabet()[b] for b in token): i for i, token in enumerate(tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    return load_tokenizer({"kind": "bytebpe", "file": "tokenizer.json"}, folder)


def sha256_of_shards(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("fast", [True, False])
def test_shards_are_those_of_earlier_versions_byte_for_byte(tmp_path, small_blocks, fast):
    """Recorded before gigatoken encoded: change it only on purpose, since sets of both makings are compared."""
    meta = make(
        tmp_path / "set", hand_made_bpe(tmp_path), [jsonl(tmp_path / "a.jsonl")], 2, shard=300, fast=fast
    )
    recorded = "6253f5421fa5946eb9235675df2e6211302393104e34de144efc7bf80b4b6ca4"
    assert sha256_of_shards(tmp_path / "set") == recorded and meta["tokens"] == {"train": 19066, "val": 100}


def test_shards_of_real_text_are_those_of_earlier_versions(tmp_path, shared_dir, gpt2_encoding):
    text = shared_dir / "data" / "edu-mix-val.jsonl.xz"
    meta = make(tmp_path / "set", load_tokenizer("gpt2"), [text], 2, val=50_000, shard=100_000)
    recorded = "1501eb5bb3067bed42c11a19830c9b711d021376db01faccba809b56ecce9f5a"
    assert sha256_of_shards(tmp_path / "set") == recorded and meta["tokens"] == {
        "train": 293736,
        "val": 50000,
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_plain_pipelines_tokens(tmp_path, bpe, small_blocks, workers):
    meta = make(tmp_path / "o", bpe, [jsonl(tmp_path / "a.jsonl")], workers)
    expected = reference(DOCUMENTS, bpe)
    assert stream_of(tmp_path / "o").tolist() == expected.tolist()
    sizes = [record["tokens"] for record in meta["shards"]]
    assert sizes[:-1] == [100] + [900] * (len(sizes) - 2) and 0 < sizes[-1] <= 900 and len(sizes) > 5
    assert {reason: n for reason, n in meta["skipped"].items() if n} == {"empty": 1, "not_text": 3}
    assert meta["documents"] == len(DOCUMENTS) == int((expected == bpe.eot).sum())
    make(tmp_path / "alone", bpe, [tmp_path / "a.jsonl"], 1)
    assert digests(tmp_path / "o") == digests(tmp_path / "alone")
    assert is_prepared(tmp_path / "o") and verify.verify(tmp_path / "o") == []
    lengths = np.array(meta["byte_lengths"])
    assert lengths[expected].sum() == sum(len(clean_text(text).encode()) for text in DOCUMENTS)


def packed(path: Path, data: bytes) -> Path:
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    if path.suffix == ".zst":
        pa = pytest.importorskip("pyarrow")
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
            file.write(data)
    else:
        with openers[path.suffix](path, "wb") as file:
            file.write(data)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_packed_lines_give_the_same_tokens(tmp_path, bpe, small_blocks, suffix):
    plain = jsonl(tmp_path / "a.jsonl")
    path = packed(tmp_path / f"b.jsonl{suffix}", plain.read_bytes())
    make(tmp_path / "o", bpe, [path, plain])
    assert stream_of(tmp_path / "o").tolist() == reference([*DOCUMENTS, *DOCUMENTS], bpe).tolist()


def test_parquet_with_several_row_groups(tmp_path, bpe, small_blocks):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [clean_text(text) for text in DOCUMENTS]
    rows.insert(3, None)
    pq.write_table(
        pa.table({"body": rows, "n": list(range(len(rows)))}), tmp_path / "a.parquet", row_group_size=7
    )
    meta = make(tmp_path / "o", bpe, [tmp_path / "a.parquet"], column="body")
    assert stream_of(tmp_path / "o").tolist() == reference(DOCUMENTS, bpe).tolist()
    assert meta["skipped"]["not_text"] == 1
    with pytest.raises(DataError, match=r"no text 'text', but body \(\w*string\), n \(int64\)"):
        make(tmp_path / "p", bpe, [tmp_path / "a.parquet"])
    # from any block on, the same rows follow
    blocks = list(sources.local_blocks([tmp_path / "a.parquet"], "body"))
    assert len(blocks) > 4
    for block in blocks:
        again = list(sources.local_blocks([tmp_path / "a.parquet"], "body", block.position))
        assert [b.content for b in again] == [b.content for b in blocks[blocks.index(block) :]]


def test_text_files_are_one_document_each_however_long(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 5000)
    long = words(9, 4000)
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.txt").write_text("\u65e5\u672c\u8a9e" * 4000)  # nowhere to cut
    packed(tmp_path / "c.txt.gz", b"short \xff\xfe bad bytes")
    files = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt.gz"]
    with pytest.raises(DataError, match=r"c\.txt\.gz is no UTF-8 text \(byte 0xff at 6\).*iconv"):
        make(tmp_path / "refused", bpe, files, shard=7000)
    packed(tmp_path / "c.txt.gz", b"\xef\xbb\xbfshort")  # behind a byte-order mark
    meta = make(tmp_path / "o", bpe, files, shard=7000)
    texts = [long, "\u65e5\u672c\u8a9e" * 4000, "short"]
    assert stream_of(tmp_path / "o").tolist() == reference(texts, bpe).tolist() and meta["documents"] == 3


def test_broken_lines_and_bad_bytes_are_survived(tmp_path, bpe):
    path = tmp_path / "a.jsonl"
    deep = b'{"text": ' + b"[" * 100_000 + b"\n"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n  \n{"text": "tw\xff"}\n{"text": "cut\n[1]\n"x"\n'
        + deep
        + b'{"text": "last"}'
    )
    meta = make(tmp_path / "o", bpe, [path], val=2, shard=1000)
    assert stream_of(tmp_path / "o").tolist() == reference(["one", "last"], bpe).tolist()
    assert {reason: n for reason, n in meta["skipped"].items() if n} == {
        "not_utf8": 1,
        "not_json": 2,
        "not_text": 2,
    }


def test_documents_of_megabytes_survive(tmp_path, bpe):
    big = words(5, 600_000)
    assert len(big) > 3_000_000
    rows = ["small", big, " \n" * 1_000_000, "x" * 500_000, "small"]
    make(tmp_path / "o", bpe, [jsonl(tmp_path / "a.jsonl", rows)], workers=1, val=10, shard=10**8)
    stream = stream_of(tmp_path / "o")
    starts = np.flatnonzero(stream == bpe.eot)
    # tiktoken itself cannot take the mixed white space at once; its bytes tell whether it was encoded
    assert bpe.decode(stream[starts[2] + 1 : starts[3]].tolist()) == rows[2]
    assert stream[starts[1] + 1 : starts[2]].tolist() == bpe.backend.encode_ordinary(big)
    assert stream[starts[3] + 1 : starts[4]].tolist() == bpe.backend.encode_ordinary(rows[3])


def test_other_tokenizers_and_uint32(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {f"unused{k}": 256 + k for k in range(70_000)}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer, model.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    model.add_special_tokens([END_OF_TEXT])
    (tmp_path / "hf").mkdir()
    model.save(str(tmp_path / "hf" / "tokenizer.json"))
    jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "wide"
    arguments = [
        "--input",
        tmp_path / "a.jsonl",
        "--out_dir",
        out,
        "--tokenizer",
        tmp_path / "hf",
        "--workers",
        1,
    ]
    fineweb.main([str(a) for a in [*arguments, "--val_tokens", 100, "--shard_size=2000"]])
    shard = open_shard(find_shards(out, "train")[0])
    assert (
        shard.dtype == np.uint32 and shard.path.read_bytes()[:8] == np.array([20240801, 7], "<i4").tobytes()
    )
    meta = read_meta(out)
    tokenizer = load_tokenizer(meta["tokenizer"], out)  # from the folder alone
    by_path = [
        sys.executable,
        str(ROOT / "data" / "verify.py"),
        "wide",
    ]  # its folder's names must hide no library
    assert subprocess.run(by_path, cwd=tmp_path, capture_output=True).returncode == 0
    assert meta["eot"] == 70_256 == tokenizer.eot and stream_of(out)[0] == 70_256
    texts = tokenizer.decode(stream_of(out).tolist()).split(END_OF_TEXT)[1:]
    expected = "".join(END_OF_TEXT + clean_text(text) for text in DOCUMENTS).split(END_OF_TEXT)[1:]
    assert texts == expected and (stream_of(out) == 70_256).sum() == len(DOCUMENTS)
    assert verify.verify(out) == []


# ------------------------------------------------------------------------------------------ unbreakable


class Cut(Exception):
    pass


def cut_after(path, n):
    """Blocks that end in an error after n of them: a stand-in for a kill, at every place."""

    def blocks(position):
        for k, block in enumerate(sources.local_blocks([path], "text", position)):
            if k >= n:
                raise Cut
            yield block

    return blocks


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_interrupted_anywhere_the_set_is_the_same(tmp_path, bpe, small_blocks, suffix):
    path = jsonl(tmp_path / "a.jsonl")
    path = packed(tmp_path / "a.jsonl.gz", path.read_bytes()) if suffix else path
    make(tmp_path / "whole" / "set", bpe, [path])
    expected = digests(tmp_path / "whole" / "set")
    total = len(list(sources.local_blocks([path], "text")))
    assert total > 10
    for first in range(0, total, 3):
        out = tmp_path / f"cut{first}" / "set"
        for n in (first, first // 2 + 1, 4):
            try:
                make(out, bpe, [path], blocks=cut_after(path, n))
                break
            except Cut:
                assert not list(out.glob("*.tmp"))
        make(out, bpe, [path])
        assert digests(out) == expected


def test_a_complete_set_is_left_alone_and_a_lost_shard_remade(tmp_path, bpe, small_blocks):
    path, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "set"
    make(out, bpe, [path])
    expected = digests(out)
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")}
    make(out, bpe, [path], blocks=lambda position: pytest.fail("read its source again"))
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("[!.]*")} == times
    with open(out / "set_train_000004.bin", "r+b") as file:  # other tokens, as many as there were
        file.seek(-4, 2)
        file.write(b"\x01\x00\x02\x00")
    (out / "set_train_000003.bin").unlink()
    with open(out / "set_train_000005.bin", "ab") as file:
        file.write(b"xx")
    positions = []

    def blocks(position):
        positions.append(position)
        return sources.local_blocks([path], "text", position)

    make(out, bpe, [path], blocks=blocks)
    assert digests(out) == expected and len(positions) == 3
    assert (out / "set_train_000002.bin").stat().st_mtime_ns == times["set_train_000002.bin"]
    # a source that has changed in the meantime is noticed
    (out / "set_train_000003.bin").unlink()
    jsonl(path, [text + "!" for text in DOCUMENTS])
    with pytest.raises(DataError, match="the source has changed"):
        make(out, bpe, [path])


def test_max_shards_stops_and_a_larger_one_goes_on(tmp_path, bpe, small_blocks):
    path = jsonl(tmp_path / "a.jsonl")
    make(tmp_path / "all" / "set", bpe, [path])
    out = tmp_path / "some" / "set"
    assert len(make(out, bpe, [path], max_shards=2)["shards"]) == 3 and is_prepared(out)
    val = digests(out)["set_val_000000.bin"]
    assert len(make(out, bpe, [path], max_shards=2)["shards"]) == 3
    assert len(make(out, bpe, [path], max_shards=4)["shards"]) == 5
    make(out, bpe, [path])
    assert digests(out) == digests(tmp_path / "all" / "set") and digests(out)["set_val_000000.bin"] == val


def test_a_shards_tokens_do_not_pile_up_in_memory(tmp_path, bpe, monkeypatch):
    made, alive = [], []

    def encode(encoder, texts, *more):
        tokens = np.full(1000, 7, np.uint16)
        made.append(weakref.ref(tokens))
        alive.append(sum(ref() is not None for ref in made))
        return tokens, 0

    monkeypatch.setattr(pipeline.Encoder, "encode", encode)
    blocks = [sources.Block(i, ["text"], split="val" if i < 200 else "train") for i in range(400)]
    meta = make(tmp_path, bpe, [], val=None, shard=10**9, blocks=lambda position: (b for b in blocks))
    assert meta["tokens"] == {"train": 200_000, "val": 200_000}
    assert len(alive) == 400 and max(alive) < 20


def test_held_out_files_fill_the_validation_shard_and_nothing_else(tmp_path, bpe, small_blocks):
    train, held = jsonl(tmp_path / "a.jsonl"), [words(500 + k, 60) for k in range(9)]
    files = [jsonl(tmp_path / "v.jsonl", held[:4]), jsonl(tmp_path / "w.jsonl", held[4:]), train]

    def held_out(position, n=10**9):
        for k, block in enumerate(sources.local_blocks(files, "text", position, held_out=2)):
            if k >= n:
                raise Cut
            yield block

    for n in (1, 3, 5, 10**9):  # interrupted inside the held-out text, at its end, behind it
        try:
            meta = make(tmp_path / "o", bpe, files, blocks=lambda p, n=n: held_out(p, n), val=None)
        except Cut:
            continue
    val, training = (
        np.concatenate([open_shard(p).tokens for p in find_shards(tmp_path / "o", s)])
        for s in ("val", "train")
    )
    assert val.tolist() == reference(held, bpe).tolist()
    assert training.tolist() == reference(DOCUMENTS, bpe).tolist()
    assert meta["complete"] and meta["tokens"] == {"train": len(training), "val": len(val)}
    assert verify.verify(tmp_path / "o") == []
    empty = jsonl(tmp_path / "empty.jsonl", ["", None])
    blocks = lambda p: sources.local_blocks([empty, train], "text", p, held_out=1)  # noqa: E731
    with pytest.raises(DataError, match="validation text has no document"):
        make(tmp_path / "e", bpe, [], blocks=blocks, val=None)
    with pytest.raises(SystemExit):
        fineweb.main(["--input", str(train), "--val-input", str(train), "--val-tokens", "5"])
    with pytest.raises(SystemExit, match=r"is held out, but also trained on: take it out of --input"):
        same = tmp_path / "linked.jsonl"
        same.symlink_to(train)
        fineweb.main(["--input", str(train), "--val-input", str(same), "--out-dir", str(tmp_path / "leak")])
    with pytest.raises(SystemExit, match=r"linked.jsonl is given twice: name it once, or"):
        fineweb.main(["--input", str(train), str(same), "--out-dir", str(tmp_path / "leak")])
    with pytest.raises(SystemExit, match=r"is a folder: give its files"):
        fineweb.main(["--input", str(tmp_path), "--out-dir", str(tmp_path / "leak")])
    assert not (tmp_path / "leak").exists()


def test_a_source_that_ends_exactly_with_a_shard(tmp_path, bpe):
    path = jsonl(tmp_path / "a.jsonl")
    n = len(reference(DOCUMENTS, bpe))
    for workers in (1, 2):
        meta = make(tmp_path / f"o{workers}", bpe, [path], workers, val=100, shard=n - 100)
        assert [r["tokens"] for r in meta["shards"]] == [100, n - 100] and meta["shards"][-1]["next"] is None
    again = lambda position: pytest.fail("read its source again")  # noqa: E731
    make(tmp_path / "o1", bpe, [path], blocks=again, val=100, shard=n - 100)
    (tmp_path / "o1" / "set_train_000001.bin").unlink()
    assert make(tmp_path / "o1", bpe, [path], val=100, shard=n - 100) == meta


def test_a_record_that_names_files_elsewhere_deletes_nothing(tmp_path, bpe):
    """Somebody's folder, whose meta.json lists a file outside, or another file inside, as its shard."""
    path, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "set"
    precious = tmp_path / "precious.dat"
    precious.write_bytes(b"precious")
    for name, hint in (("../precious.dat", "plain file name"), (str(precious), "plain file name"),
                       ("notes.txt", "lists notes.txt, not made here")):  # fmt: skip
        make(out, bpe, [path], max_shards=1)
        meta = read_meta(out)
        meta["shards"] = [meta["shards"][0] | {"file": name, "next": None}]
        (out / "meta.json").write_text(json.dumps(meta | {"complete": False}))
        (out / "notes.txt").write_text("mine")
        for arguments in ({}, {"max_shards": 0}, {"val": 10**6}):
            with pytest.raises(DataError, match=hint if "val" not in arguments else "."):
                make(out, bpe, [path], **arguments)
        assert precious.read_bytes() == b"precious" and (out / "notes.txt").read_text() == "mine"
        shutil.rmtree(out)


def test_a_place_that_is_none_and_links_that_lead_elsewhere(tmp_path, bpe):
    path, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "set"
    make(out, bpe, [path], max_shards=1)
    meta = read_meta(out)
    for position in (["a", 0], [0], {"x": 1}, [-1, 5]):
        meta["shards"][-1]["next"]["position"] = position
        (out / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(DataError, match="no place in a file"):
            make(out, bpe, [path])
    shutil.rmtree(out)
    out.mkdir()
    precious = tmp_path / "precious.dat"
    precious.write_bytes(b"precious")
    for name in ("meta.json.tmp", "tokenizer.json.tmp", "set_val_000000.bin.tmp", "set_train_000001.bin.tmp"):
        (out / name).symlink_to(precious)
    make(out, bpe, [path])
    assert precious.read_bytes() == b"precious" and not list(out.glob("*.tmp"))


def test_files_of_others_in_the_folder_are_left_alone(tmp_path, bpe):
    out = tmp_path / "set"
    out.mkdir()
    (out / "thesis.tmp").write_text("mine")
    (out / "set_train_000007.bin.tmp").write_text("left behind by a kill")
    make(out, bpe, [jsonl(tmp_path / "a.jsonl")])
    assert (out / "thesis.tmp").read_text() == "mine" and len(list(out.glob("*.tmp"))) == 1


def test_paths_are_expanded_and_a_folder_below_a_file_is_a_sentence(tmp_path, bpe, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl")
    shutil.copytree(bpe._path.parent / "hf", tmp_path / "hf")
    flags = ["--input=~/a.jsonl", "--tokenizer=~/hf", "--val_tokens=100", "--workers=1"]
    fineweb.main([*flags, "--out_dir=~/made"])
    assert not (tmp_path / "~").exists() and is_prepared(tmp_path / "made")
    verify.main(["~/made"])
    with pytest.raises(SystemExit, match=r"error: .*a part of this path is a file"):
        fineweb.main([*flags, "--out_dir=~/a.jsonl/made"])


def test_a_tokenizer_that_loses_text_stops_before_anything_is_written(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.Unigram())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    model.train_from_iterator(["only plain letters here"] * 9, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "a.jsonl", ["only plain letters", "caf\u00e9 \u65e5\u672c"])
    with pytest.raises(DataError, match=r"does not give the text back: .*; take another, a byte-level one"):
        make(tmp_path / "o", load_tokenizer(str(tmp_path / "tokenizer.json")), [path], val=2)
    assert not list((tmp_path / "o").glob("*.bin*")) and not (tmp_path / "o" / "meta.json").exists()


def test_two_runs_into_one_folder(tmp_path, bpe):
    path = jsonl(tmp_path / "a.jsonl")
    out = tmp_path / "set"
    out.mkdir()
    code = (
        "import sys, time; from data.files import Lock\n"
        "with Lock(sys.argv[1] + '/prepare.lock', ''): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(SystemExit, match="another run is preparing"):
            fineweb.main([f"--input={path}", f"--out-dir={out}", f"--tokenizer={bpe._path.parent / 'hf'}"])
        assert [p.name for p in out.iterdir()] == ["prepare.lock"]
    finally:
        holder.kill()
        holder.communicate()
    make(out, bpe, [path])  # a killed holder holds nothing
    with folder_lock(out):
        pass


def test_a_file_size_limit_of_the_system_is_a_sentence_and_the_same_command_goes_on(tmp_path, bpe):
    resource = pytest.importorskip("resource")
    path = jsonl(tmp_path / "a.jsonl", [words(k, 300) for k in range(100)])
    make(tmp_path / "whole" / "set", bpe, [path], val=1000, shard=50_000)
    out = tmp_path / "limited" / "set"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(DataError, match=r"larger than allowed here.*1 whole shard kept.*same command"):
            make(out, bpe, [path], 1, val=1000, shard=50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.tmp"))
    make(out, bpe, [path], val=1000, shard=50_000)
    assert digests(out) == digests(tmp_path / "whole" / "set")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_really_full(tmp_path, bpe):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        path = jsonl(tmp_path / "a.jsonl", [words(k, 300) for k in range(100)])
        with pytest.raises(DataError, match=r"disk is full.*same command"):
            make(tmp_path / "disk" / "set", bpe, [path], 1, val=1000, shard=20_000)
        names = sorted(p.name for p in (tmp_path / "disk" / "set").iterdir())
        assert "meta.json" in names and not [name for name in names if name.endswith(".tmp")]
        assert all(open_shard(p).n_tokens for p in (tmp_path / "disk" / "set").glob("*.bin"))
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_damaged_and_missing_input(tmp_path, bpe, small_blocks):
    whole = gzip.compress(jsonl(tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz is damaged or cut short.*kept"):
        make(tmp_path / "o", bpe, [tmp_path / "b.jsonl.gz"])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a whole parquet file"):
        make(tmp_path / "p", bpe, [tmp_path / "b.parquet"])
    for name in ("absent.jsonl", "a.doc"):
        (tmp_path / "a.doc").touch()
        with pytest.raises(DataError, match=name):
            sources.check_files([tmp_path / name])


def test_foreign_folders_other_options_and_useless_input_are_refused(tmp_path, bpe):
    path, out = jsonl(tmp_path / "a.jsonl"), tmp_path / "o"
    make(out, bpe, [path])
    before = digests(out)
    with pytest.raises(DataError, match="shard_tokens: 900 there, 400 now"):
        make(out, bpe, [path], shard=400)
    assert digests(out) == before
    (tmp_path / "f").mkdir()
    write_shard(tmp_path / "f" / "other_train_000001.bin", np.array([1], np.uint16))
    with pytest.raises(DataError, match="not made here"):
        make(tmp_path / "f", bpe, [path])
    with pytest.raises(DataError, match="--text-column"):
        make(tmp_path / "c", bpe, [path], column="body")
    with pytest.raises(DataError, match="--val-tokens"):
        make(tmp_path / "v", bpe, [path], val=10**6)
    make(tmp_path / "v", bpe, [path], val=50)  # nothing in the way
    with pytest.raises(DataError, match="no end-of-text"):
        make(tmp_path / "e", load_tokenizer({"kind": "chars", "itos": ["a"]}), [path])


def test_a_set_does_not_go_on_with_other_text_of_the_same_name_and_size(tmp_path, bpe, capsys):
    text = "".join(json.dumps({"text": words(k, 40)}) + "\n" for k in range(400))
    paths = [tmp_path / folder / "a.jsonl" for folder in ("one", "two")]
    for path, more in zip(paths, ("ab", "ba"), strict=True):
        path.parent.mkdir()
        path.write_text(text + json.dumps({"text": more}) + "\n")
    out = tmp_path / "o"
    flags = [
        f"--out-dir={out}",
        f"--tokenizer={bpe._path.parent / 'hf'}",
        "--val-tokens=50",
        "--shard-size=900",
    ]
    fineweb.main([f"--input={paths[0]}", "--max-shards=1", *flags])
    before = digests(out)
    with pytest.raises(
        SystemExit, match=r"holds a set made with another made \(source: files: .*ends_sha256"
    ):
        fineweb.main([f"--input={paths[1]}", *flags])
    assert digests(out) == before
    copied = tmp_path / "copy.jsonl"
    copied.write_bytes(paths[0].read_bytes())
    for held_out in ([f"--val-input={copied}"], [str(copied)]):
        with pytest.raises(SystemExit, match=r"is held out, but also trained on|is given twice"):
            fineweb.main(["--input", str(paths[0]), *held_out, f"--out-dir={tmp_path / 'leak'}"])
    fineweb.main([f"--input={paths[0]}", *flags])


# ------------------------------------------------------------------------------------------ the hub


class Flaky:
    """A real streamed data set whose link breaks every few rows."""

    def __init__(self, stream, every):
        self.stream, self.every = stream, every

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)

    def __iter__(self):
        for k, row in enumerate(self.stream):
            if self.every and k == self.every:
                raise ConnectionError("connection reset by peer")
            yield row


@pytest.fixture
def open_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for k in range(3):
        jsonl(tmp_path / f"hub{k}.jsonl", [words(100 * k + n, 30) for n in range(30)])
    files = [str(tmp_path / f"hub{k}.jsonl") for k in range(3)]

    def open_stream():
        return datasets.load_dataset("json", data_files=files, split="train", streaming=True)

    return open_stream


def test_a_stream_over_a_flaky_link_is_complete(tmp_path, bpe, open_hub, small_blocks):
    waits = []
    texts = [words(100 * k + n, 30) for k in range(3) for n in range(30)]

    def blocks(every):
        def flaky():
            # the link lets fewer rows through after each break
            return Flaky(open_hub(), every and max(8, every - 3 * len(waits)))

        return lambda position: sources.hub_blocks(flaky, "text", position, retries=4, wait=waits.append)

    make(tmp_path / "a" / "set", bpe, [], blocks=blocks(0), shard=2000)
    assert stream_of(tmp_path / "a" / "set").tolist() == reference(texts, bpe).tolist() and waits == []
    make(tmp_path / "b" / "set", bpe, [], blocks=blocks(20), shard=2000)
    assert stream_of(tmp_path / "b" / "set").tolist() == reference(texts, bpe).tolist() and waits.count(1) > 3
    json.dumps(read_meta(tmp_path / "b" / "set"))
    # a dead link: growing waits, then a sentence; the next run finishes
    waits.clear()
    state = {"rows": 40}

    def dying():
        state["rows"] -= 40
        return Flaky(open_hub(), max(1, state["rows"] + 40))

    with pytest.raises(DataError, match=r"failed 5 times in a row \(ConnectionError: connection reset.*kept"):
        make(
            tmp_path / "c" / "set", bpe, [], shard=2000,
            blocks=lambda position: sources.hub_blocks(dying, "text", position, retries=4, wait=waits.append),
        )  # fmt: skip
    assert waits == [1, 2, 4, 8]
    make(tmp_path / "c" / "set", bpe, [], blocks=blocks(0), shard=2000)
    tokens = ("set_val_000000.bin", "set_train_000001.bin", "set_train_000002.bin")
    assert all(digests(tmp_path / "c" / "set")[n] == digests(tmp_path / "a" / "set")[n] for n in tokens)


def test_hopeless_hub_errors_are_not_retried(open_hub):
    with pytest.raises(DataError, match="no column 'body'; there are id, text"):
        list(sources.hub_blocks(open_hub, "body", wait=lambda s: pytest.fail("waited")))

    def unknown():
        raise ValueError("BuilderConfig 'sample-11BT' not found. Available: ['default', 'sample-10BT']")

    with pytest.raises(DataError, match="sample-11BT"):
        list(sources.hub_blocks(unknown, "text", wait=lambda s: pytest.fail("waited")))


def test_no_code_of_a_data_set_or_a_tokenizer_is_ever_run(tmp_path, monkeypatch, bpe):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(evil)
    stream = lambda: sources.hub_stream(str(tmp_path / "evil"), None, "train", "text")  # noqa: E731
    with pytest.raises(DataError, match="cannot be opened"):
        list(sources.hub_blocks(stream, "text", wait=lambda s: pytest.fail("waited")))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenization_evil.py").write_text(evil)
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"no tokenizer\.json in"):
        load_tokenizer(str(folder))
    shutil.copy(bpe._path.parent / "hf" / "tokenizer.json", folder)
    assert load_tokenizer(str(folder)).encode("a") and not (tmp_path / "ran").exists()


def test_ready_shards_are_fetched_checked_and_resumed(tmp_path, bpe, monkeypatch, capsys):
    bpe.save(tmp_path)
    remote = tmp_path / "remote"
    remote.mkdir()
    make(tmp_path / "made", bpe, [jsonl(tmp_path / "a.jsonl")])
    for path in (tmp_path / "made").glob("*.bin"):
        (remote / path.name).write_bytes(path.read_bytes())
    names = sorted(p.name for p in remote.iterdir())
    sha = {n: hashlib.sha256((remote / n).read_bytes()).hexdigest() for n in names}
    monkeypatch.setattr(ready_made, "remote_files", lambda repo: sha | {"README.md": None})
    monkeypatch.setattr(sources.retrying, "__defaults__", (lambda s: None,))
    downloads = []

    def download(repo, name, folder):
        downloads.append(name)
        if len(downloads) == 2:
            raise ConnectionError("reset")
        data = (remote / name).read_bytes()
        (folder / name).write_bytes(data[:-2] if len(downloads) == 4 else data)  # once it comes short

    monkeypatch.setattr(ready_made, "download", download)
    out = tmp_path / "set"
    options = [
        "--pretokenized",
        "x/set",
        "--out_dir",
        str(out),
        "--tokenizer",
        str(tmp_path / "tokenizer.json"),
    ]
    monkeypatch.setattr(fineweb, "load_tokenizer", lambda name: bpe)
    fineweb.main([*options, "--max-shards", "2"])
    assert downloads == [names[-1], names[0], names[0], names[1], names[1]]
    assert {p.name for p in out.glob("*.bin")} == {names[-1], *names[:2]} and read_meta(out)["complete"]
    fineweb.main(options)
    assert sorted(downloads[5:]) == names[2:-1] and verify.verify(out) == []
    count = len(downloads)
    with monkeypatch.context() as offline:
        offline.setattr(ready_made, "remote_files", lambda repo: pytest.fail("asked the hub again"))
        fineweb.main(options)
    assert len(downloads) == count and "already complete" in capsys.readouterr().out
    write_shard(remote / names[3], np.array([599, 600], np.uint16))
    sha[names[3]] = hashlib.sha256((remote / names[3]).read_bytes()).hexdigest()
    (out / names[3]).unlink()
    with pytest.raises(SystemExit, match="token id 600"):
        fineweb.main(options)


# ------------------------------------------------------------------------------------------ verify, flags


def test_verify_finds_every_kind_of_fault(tmp_path, bpe, small_blocks, capsys):
    path = jsonl(tmp_path / "a.jsonl")
    pristine = tmp_path / "o"
    make(pristine, bpe, [path])
    verify.main([str(pristine)])
    assert "all is well" in capsys.readouterr().out
    shard = pristine / "set_train_000002.bin"
    good = shard.read_bytes()

    def fault(content: bytes | None) -> str:
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(SystemExit, match="fault"):
            verify.main([str(pristine)])
        shard.write_bytes(good)
        return capsys.readouterr().err

    flipped = bytearray(good)
    flipped[1500] ^= 1
    assert "SHA-256 differs" in fault(bytes(flipped))
    assert "promises" in fault(good[:-2])
    assert "cannot read" in fault(None)
    (pristine / "set_train_000099.bin").write_bytes(good)
    assert "set_train_000099.bin is not in meta.json" in fault(good)
    (pristine / "set_train_000099.bin").unlink()
    outside = bytearray(good)
    outside[1024:1026] = (60_000).to_bytes(2, "little")
    assert "token id 60,000" in fault(bytes(outside))
    with pytest.raises(SystemExit, match="error: no folder"):
        verify.main([str(tmp_path / "absent")])


def test_command_line_errors_are_sentences(tmp_path, monkeypatch):
    for arguments, hint in (
        (["--shard-size", "0"], "no whole number from 1"),
        (["--input", "a.jsonl", "--pretokenized", "x/y"], "exclude each other"),
        (["--inputt", "a"], "unrecognized arguments"),
        (["--input", str(tmp_path / "absent.jsonl"), "--tokenizer", "gpt2"], "no input file"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{hint}"):
            fineweb.main([*arguments, "--out-dir", str(tmp_path / "o")])
