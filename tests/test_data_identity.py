"""Which data it is follows from every byte of it, is remembered beside it, and is never taken on trust."""

import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest

from data import DataError, identity
from data.identity import CONTENTS_NAME, check_ids, contents, fingerprint
from data.meta import characters_meta, write_meta
from data.shards import write_shard


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Let files pass for settled a moment after they were written."""
    monkeypatch.setattr(identity, "SETTLED_SECONDS", 0.01)


def wait() -> None:
    time.sleep(0.03)  # some ticks of the file system's clock


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
    wait()
    return tmp_path


def shard_of(folder):
    return next(path for path in folder.iterdir() if "train" in path.name)


def test_one_changed_token_anywhere_changes_the_identity_or_is_refused(folder):
    known = fingerprint(folder)
    assert fingerprint(folder) == known
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[len(content) - 30_001] ^= 1
    path.write_bytes(content)
    if (folder / "meta.json").is_file():
        with pytest.raises(DataError, match=r"is not what was prepared \(its SHA-256 differs"):
            fingerprint(folder)
    else:
        assert fingerprint(folder) != known


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
    # the same bytes at another time are read once more, and give the same identity
    os.utime(shard_of(folder))
    wait()
    assert fingerprint(folder) == known and read == [shard_of(folder).name]
    # other bytes are found, whatever has been done to hide them
    stat, path = shard_of(folder).stat(), shard_of(folder)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    wait()
    if (folder / "meta.json").is_file():
        with pytest.raises(DataError, match="not what was prepared"):
            fingerprint(folder)
    else:
        assert fingerprint(folder) != known


def test_a_memory_that_came_with_the_data_is_not_believed(folder, tmp_path_factory):
    known = fingerprint(folder)
    path = shard_of(folder)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    there = tmp_path_factory.mktemp("copy") / "set"
    record = json.loads((folder / CONTENTS_NAME).read_text())
    record["shards"][path.name] |= {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    (folder / CONTENTS_NAME).write_text(json.dumps(record))
    shutil.copytree(folder, there)  # with its times, as cp -a, tar and rsync keep them
    wait()
    if (there / "meta.json").is_file():
        with pytest.raises(DataError, match="not what was prepared"):
            fingerprint(there)
    else:
        assert fingerprint(there) != known


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
