"""Which data it is follows from every byte of it, is remembered beside it, and is never taken on trust."""

import hashlib
import json
import os

import numpy as np
import pytest

from data import DataError, identity
from data.identity import CONTENTS_NAME, check_ids, contents, fingerprint
from data.meta import characters_meta, write_meta
from data.shards import write_shard


def age(folder, seconds=60):
    """Let the files look as if they had been written a while ago."""
    for path in folder.iterdir():
        then = path.stat().st_mtime_ns - seconds * 10**9
        os.utime(path, ns=(then, then))


@pytest.fixture(params=["headered", "described", "nanogpt", "npy"])
def folder(request, tmp_path):
    """Each kind of set that people have, with 30,000 training tokens."""
    tokens = np.random.default_rng(0).integers(0, 100, 30_000).astype(np.uint16)
    if request.param == "nanogpt":
        tokens.tofile(tmp_path / "train.bin")
        tokens[:500].tofile(tmp_path / "val.bin")
    elif request.param == "npy":
        np.save(tmp_path / "edu_train_000001.npy", tokens)
        np.save(tmp_path / "edu_val_000000.npy", tokens[:500])
    else:
        write_shard(tmp_path / "x_train_000001.bin", tokens)
        write_shard(tmp_path / "x_val_000000.bin", tokens[:500])
    if request.param == "described":
        records = [
            {
                "file": path.name,
                "split": "val" if "val" in path.name else "train",
                "tokens": n,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path, n in ((tmp_path / "x_train_000001.bin", 30_000), (tmp_path / "x_val_000000.bin", 500))
        ]
        write_meta(tmp_path, characters_meta("x", ["a"] * 100) | {"shards": records})
    age(tmp_path)
    return tmp_path


def shard_of(folder):
    return next(path for path in folder.iterdir() if "train" in path.name)


def test_one_changed_token_anywhere_changes_the_identity_or_is_refused(folder):
    known = fingerprint(folder)
    assert fingerprint(folder) == known == fingerprint(folder, fresh=True)
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[len(content) - 30_001] ^= 1
    path.write_bytes(content)
    for fresh in (False, True):
        if (folder / "meta.json").is_file():
            with pytest.raises(DataError, match="is not what was prepared: its SHA-256 differs"):
                fingerprint(folder, fresh)
        else:
            assert fingerprint(folder, fresh) != known


def test_the_reading_is_remembered_until_size_or_time_change(folder, monkeypatch):
    known, read = fingerprint(folder), []
    real = identity.read_through

    def counting(path, eot=None):
        read.append(path.name)
        return real(path, eot)

    monkeypatch.setattr(identity, "read_through", counting)
    identity._read_once.cache_clear()
    assert fingerprint(folder) == known and read == []
    record = json.loads((folder / CONTENTS_NAME).read_text())["shards"][shard_of(folder).name]
    assert record["sha256"] == hashlib.sha256(shard_of(folder).read_bytes()).hexdigest()
    # the same bytes with a later time are read once more, and give the same identity
    age(folder, seconds=-10)
    assert fingerprint(folder) == known and read == [shard_of(folder).name]
    # fresh believes nothing: not even a memory that was planted together with the bytes
    stat, path = shard_of(folder).stat(), shard_of(folder)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(folder) == known
    if (folder / "meta.json").is_file():
        with pytest.raises(DataError, match="not what was prepared"):
            fingerprint(folder, fresh=True)
    else:
        assert fingerprint(folder, fresh=True) != known


@pytest.mark.parametrize("damage", ["{", "[]", '{"shards": {"x_train_000001.bin": {"sha256": 5}}}'])
def test_a_damaged_memory_is_read_anew_and_an_unwritable_folder_does_without(folder, damage, monkeypatch):
    known = fingerprint(folder)
    (folder / CONTENTS_NAME).write_text(damage)
    assert fingerprint(folder) == known
    (folder / CONTENTS_NAME).unlink()

    def read_only(path, value):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(identity, "write_json", read_only)
    assert fingerprint(folder) == known and not (folder / CONTENTS_NAME).exists()


def test_an_id_above_the_vocabulary_is_found_wherever_it_stands(folder):
    check_ids(folder, 100)
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    at = 12_345
    offset = len(content) - 60_000 + 2 * at
    content[offset : offset + 2] = (60_000).to_bytes(2, "little")
    path.write_bytes(content)
    hint = (
        "not what was prepared" if (folder / "meta.json").is_file() else "token id 60,000 at position 12,345"
    )
    with pytest.raises(DataError, match=hint) as caught:
        check_ids(folder, 50_304)
    assert path.name in str(caught.value)


def test_a_shard_that_is_gone_is_a_sentence(folder):
    if not (folder / "meta.json").is_file():
        pytest.skip("only a description says what should be there")
    shard_of(folder).unlink()
    with pytest.raises(DataError, match=r"cannot read .*x_train_000001\.bin"):
        contents(folder, "train")
