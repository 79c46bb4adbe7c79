"""Files that are whole or not there: atomic writes, hashes, locks, and names that stay inside their folder."""

import errno
import fnmatch
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from data import DataError
from data.console import writing


def expanded(path) -> Path:
    """The path that a user typed, with `~` as the shell would have it."""
    return Path(os.path.expanduser(path))


def write_atomic(path, chunks: Iterable) -> None:
    """Write byte chunks to `path` through a temporary file beside it, an fsync and a rename."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link there, in a folder had from others, could lead anywhere
        with writing(path), open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path, text: str) -> None:
    """Write text as UTF-8, whole or not at all; half a surrogate pair is written as an escape."""
    write_atomic(path, [text.encode("utf-8", "backslashreplace")])


def write_json(path, value) -> None:
    """Write a value as JSON, whole or not at all; see `finite` for NaN and infinity."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value):
    """The value with null for every NaN and infinity in it: JSON has no word for these."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def publish(temporary, path) -> None:
    """Rename a finished, flushed file or folder to its real name, and make the rename itself durable."""
    os.replace(temporary, path)
    flush(Path(path).parent)


def flush(path) -> None:
    """fsync a file, or a folder where the system and its file system allow that."""
    folder = os.path.isdir(path)
    if folder and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:
            raise
    finally:
        os.close(descriptor)


def found_below(folder, pattern: str) -> list[Path]:
    """Files at or below a folder whose names fit the pattern, sorted; [] where it is not there. Links to folders count as
    folders, each once.

    OSError where a folder may not be read: what lies in it would be missing without a word.
    """
    found, seen = [], set()
    if not os.path.lexists(folder):
        return found

    def refuse(error: OSError):
        raise error

    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        if (real := os.path.realpath(here)) in seen:
            folders.clear()  # a link back up, or a second way here
            continue
        seen.add(real)
        found += [Path(here, name) for name in names if fnmatch.fnmatch(name, pattern)]
    return sorted(found)


def sha256(path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def plain_name(name: str) -> str:
    """The name, if it is a plain one: a file of this name can only lie in the folder that it is looked for in.

    Names in records come from others. Raises DataError for a path, unprintable characters, and more than 200 bytes.
    """
    if name in ("", ".", "..") or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}:
        raise DataError(f"{name[:80]!r} is not a plain file name")
    if not name.isprintable() or len(name.encode()) > 200:
        raise DataError(f"{name[:80]!r} is too long for a file name or has characters that cannot be printed")
    return name


def folder_lock(folder: Path) -> "Lock":
    """Make a folder and hold it until this process is done or dead; DataError if another one prepares it."""
    refusal = f"another run is preparing {folder} at this moment: wait for it, or take another --out-dir"
    return Lock(folder / "prepare.lock", refusal)


class Lock:
    """Keeps other processes out for as long as this one lives, or until the lock is closed.

    path: the lock's own file, made with its folder if need be and never removed (removing it would let two in).
    refusal: the sentence of the DataError that is raised when another process holds the lock, after so many seconds
    of `patience`.
    """

    def __init__(self, path, refusal: str, patience: float = 0):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+")  # noqa: SIM115 - closing it would release the lock
        end = time.monotonic() + patience
        while not self._take():
            if time.monotonic() >= end:
                self.file.close()
                raise DataError(refusal)
            time.sleep(0.2)

    def _take(self) -> bool:
        try:
            if sys.platform == "win32":
                import msvcrt

                self.file.seek(0)
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                return False
            # a file system without locks, as some clusters have
            print(
                f"note: {self.file.name} cannot be locked ({error.strerror}): let only one process work there"
            )
        return True

    def close(self) -> None:
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
