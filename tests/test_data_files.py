"""data/files.py: what is written is whole or not there; names stay inside their folder; one process at a time."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from data import DataError, files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_that_every_parser_reads(tmp_path):
    """No NaN or Infinity, which json.dumps writes by itself and other languages' parsers refuse."""
    files.write_json(tmp_path / "a", {"x": [float("nan"), -float("inf"), 1.5], "y": {"z": "\ud800é"}})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"x": [None, None, 1.5], "y": {"z": "\ud800é"}}
    files.write_text(tmp_path / "b", "half a pair \ud800")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "half a pair \\ud800"


def test_files_are_found_through_links_each_once(tmp_path):
    for name in ("here/a/run.json", "far/b/run.json", "here/c/other.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "here" / "b").symlink_to(tmp_path / "far" / "b")
    (tmp_path / "here" / "a" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "far" / "b")
    found = files.found_below(tmp_path / "here", "run.json")
    assert [p.resolve().parent.name for p in found] == ["a", "b"]
    assert files.found_below(tmp_path / "nowhere", "*") == []


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything
    with pytest.raises(PermissionError):
        files.found_below(tmp_path, "*.json")


def test_sha256_is_the_hash_of_the_bytes(tmp_path):
    raw = os.urandom(5 << 20)
    (tmp_path / "a").write_bytes(raw)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("name", ["x_train_000001.bin", "a b", "é", "..a", "step_000001", "._x"])
def test_plain_names(name):
    assert files.plain_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/a", "a/", "a\\b", "C:a", "a\0", "a\nb", "\x1b[31m", "\u202ea", "a" * 201]
)  # fmt: skip
def test_names_that_are_not_plain(name):
    with pytest.raises(DataError, match="file name"):
        files.plain_name(name)


def test_a_lock_keeps_other_processes_out_until_it_is_closed(tmp_path):
    path = tmp_path / "lock"
    code = f"from data.files import Lock; Lock({str(path)!r}, 'somebody works here')"

    def other():
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    with files.Lock(path, "x"):
        assert "DataError: somebody works here" in other().stderr
        with pytest.raises(DataError, match="twice"):
            files.Lock(path, "twice")
    assert other().returncode == 0


def test_a_lock_can_be_waited_for(tmp_path):
    held = files.Lock(tmp_path / "lock", "x")
    with pytest.raises(DataError, match="still held"):
        files.Lock(tmp_path / "lock", "still held", patience=0.1)
    threading.Timer(0.3, held.close).start()
    files.Lock(tmp_path / "lock", "never free", patience=60).close()
