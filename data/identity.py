"""Which data this is, from its contents: the SHA-256 and the highest id of each shard, found in one reading.

As this takes minutes, the result is kept beside the shards, in `.contents.json`, and believed as long as a file's size
and both its times of change are the same. (No program sets the second, so a memory that came with the data is not
believed.)
"""

import contextlib
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import DataError
from data.console import cores
from data.files import write_json
from data.meta import read_meta
from data.records import Record, read_record
from data.shards import find_shards, is_whole, open_shard

CONTENTS_NAME = ".contents.json"
SETTLED_SECONDS = 2  # a file changed so lately may change again without another time of change


class Content(Record):
    """What one reading of a shard found. at: position among its tokens where its highest id first stands."""

    size: int
    mtime_ns: int
    ctime_ns: int
    tokens: int
    sha256: str
    highest: int
    at: int

    def top(self) -> str:
        return f"the token id {self.highest:,} at position {self.at:,}"


def read_through(path: Path, eot: int | None = None) -> tuple[Content, int]:
    """What a shard holds, from its first byte to its last; and how many of its tokens are `eot`."""
    shard, stat = open_shard(path), path.stat()
    digest, highest, at, documents, done = hashlib.sha256(), -1, 0, 0, 0
    with open(path, "rb") as file:
        digest.update(file.read(shard.offset))
        while data := file.read(1 << 22):
            digest.update(data)
            tokens = np.frombuffer(data, shard.dtype)
            if (top := int(tokens.max())) > highest:
                highest, at = top, done + int(tokens.argmax())
            if eot is not None:
                documents += int(np.count_nonzero(tokens == eot))
            done += len(tokens)
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    found = {"tokens": shard.n_tokens, "sha256": digest.hexdigest(), "highest": highest, "at": at}
    return Content(size=stat.st_size, **times, **found), documents


def shard_record(path: Path, split: str, eot: int | None = None) -> dict:
    """A shard's entry in meta.json's list, from a reading of the whole; documents are counted where there is an eot."""
    content, documents = read_through(path, eot)
    counts = {"tokens": content.tokens} | ({} if eot is None else {"documents": documents})
    return {"file": path.name, "split": split, **counts, "sha256": content.sha256}


@lru_cache(maxsize=4096)
def _read_once(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> Content:
    return read_through(path)[0]


def _settled(ctime_ns: int) -> bool:
    return time.time() - ctime_ns / 1e9 > SETTLED_SECONDS


def contents(data_dir, split: str) -> dict[Path, Content]:
    """What each shard of a split holds, in their order. DataError for one that is not what meta.json says."""
    folder, paths = Path(data_dir), find_shards(data_dir, split)
    recorded = {record["file"]: record for record in (read_meta(folder) or {}).get("shards", [])}
    found = _read(folder, paths)
    for path, there in found.items():
        record = recorded.get(path.name)
        if record and (record["tokens"], record["sha256"]) != (there.tokens, there.sha256):
            raise DataError(f"{path} is not what was prepared (its SHA-256 differs): prepare it again")
    return found


def lost(data_dir, records: list[dict]) -> list[int]:
    """Numbers of the records of meta.json's list whose shard is not there, or holds something else."""
    folder = Path(data_dir)
    whole = [folder / record["file"] for record in records if is_whole(folder, record)]
    hashes = {path.name: content.sha256 for path, content in _read(folder, whole).items()}
    return [k for k, record in enumerate(records) if hashes.get(record["file"]) != record["sha256"]]


def _read(folder: Path, paths: list[Path]) -> dict[Path, Content]:
    """What shards of a folder hold, as it is remembered or by reading them."""
    try:
        memory = read_record(folder / CONTENTS_NAME, dict[str, dict[str, Content]], "a memory of shards")
    except DataError:  # none yet, or damaged: everything is read again
        memory = {}
    known = memory.get("shards", {})

    def content(path: Path) -> Content:
        open_shard(path)  # says what is wrong with a missing or damaged file
        stat, old = path.stat(), known.get(path.name)
        now = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if not _settled(stat.st_ctime_ns):
            return read_through(path)[0]
        return old if old and (old.size, old.mtime_ns, old.ctime_ns) == now else _read_once(path, *now)

    with ThreadPoolExecutor(min(8, cores())) as threads:  # hashing leaves Python's lock
        found = dict(zip(paths, threads.map(content, paths), strict=True))
    new = known | {path.name: there for path, there in found.items() if _settled(there.ctime_ns)}
    if new != known:
        # a folder that one may only read, or another rank that writes the same
        with contextlib.suppress(OSError):
            write_json(folder / CONTENTS_NAME, {"shards": {name: c.model_dump() for name, c in new.items()}})
    return found


def fingerprint(data_dir) -> str:
    """Hex identity of a folder's training tokens and their order on the disk; arguments and errors of `contents`."""
    digest = hashlib.sha256()
    for content in contents(data_dir, "train").values():
        digest.update(f"{content.tokens} {content.sha256}\n".encode())
    return digest.hexdigest()


def check_fits(data_dir, meta: dict, vocab_size: int) -> None:
    """DataError where a set's description speaks of more ids than the model has."""
    if meta["vocab_size"] > vocab_size:
        raise DataError(
            f"{data_dir} was tokenized with {meta['vocab_size']:,} ids but the model's vocab_size is {vocab_size:,}: "
            f"set vocab_size to {meta['vocab_size']:,} or more, or leave it at 0"
        )


def check_ids(data_dir, vocab_size: int) -> int:
    """The highest token id; DataError where a shard has one that the model, or the data's own tokenizer, lacks."""
    if meta := read_meta(data_dir):
        check_fits(data_dir, meta, vocab_size)
    n_ids, highest = meta["vocab_size"] if meta else vocab_size, 0
    for split in ("train", "val"):
        for path, content in contents(data_dir, split).items():
            if content.highest >= n_ids:
                why = f"its vocabulary ends at {n_ids - 1:,}: it is damaged, so prepare or download it again"
                if not meta:
                    why = (
                        f"vocab_size is {n_ids:,}: set vocab_size to {content.highest + 1:,} or more, or take the data "
                        "of the right tokenizer"
                    )
                raise DataError(f"{path} has {content.top()}, but {why}")
            highest = max(highest, content.highest)
    return highest
