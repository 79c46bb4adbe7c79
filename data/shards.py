"""Token shards: the llm.c / modded-nanogpt layout, and the older ones that people have on their disks.

| layout | header | tokens |
|---|---|---|
| GPT-2 shard `*_train_000001.bin` | 256 int32: 20240520, 1, n | uint16 |
| Llama-3 shard (same names) | 256 int32: 20240801, 7, n | uint32 |
| nanoGPT `train.bin`, `val.bin` | none | uint16 |
| build-nanogpt `*_train_000001.npy` | NumPy's own | uint16 |

Everything is little-endian. A shard is written beside its name, flushed to the disk and renamed.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import DataError
from data.files import write_atomic
from data.meta import read_meta

HEADER_BYTES = 4 * 256
# (magic, version) -> dtype of the tokens
LAYOUTS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
MAX_TOKENS = 2**31 - 1  # the header's count is an int32


@dataclass(frozen=True)
class Shard:
    """One file of tokens: where they start, how many there are, and of which type. Nothing is kept open."""

    path: Path
    offset: int  # bytes before the first token
    n_tokens: int
    dtype: np.dtype  # little-endian uint16 or uint32

    @property
    def tokens(self) -> np.ndarray:
        """All tokens as a read-only memory map, (n_tokens,), uint16 or uint32."""
        if self.n_tokens == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.n_tokens,))


def find_shards(data_dir, split: str) -> list[Path]:
    """The files of a split ("train" or "val") in order; an empty list where there are none.

    Those that meta.json lists, whether they are there or not. Without such a list `*_{split}_<digits>.bin`, else
    `{split}.bin`, else `*_{split}_<digits>.npy`; hidden files never. Raises DataError where the folder does not exist
    or holds shards of two data sets.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}: prepare a data set first, e.g. python data/pydocs/prepare.py")
    if listed := (read_meta(folder) or {}).get("shards"):
        return [folder / shard["file"] for shard in listed if shard["split"] == split]
    names = [path.name for path in folder.iterdir() if path.is_file()]
    numbered = rf"([^.].*)_{split}_([0-9]+)"
    for pattern in (rf"{numbered}\.bin", rf"()(){split}\.bin", rf"{numbered}\.npy"):
        found = [match for name in names if (match := re.fullmatch(pattern, name))]
        if not found:
            continue
        prefixes = sorted({match[1] for match in found})
        if len(prefixes) > 1:
            sets = ", ".join(prefixes)
            raise DataError(f"{folder} holds shards of several sets ({sets}): give each a folder of its own")
        # by number, so that a set written without leading zeros is in order too
        return [folder / m[0] for m in sorted(found, key=lambda m: (int(m[2] or 0), m[0]))]
    return []


def is_prepared(data_dir) -> bool:
    """Whether a folder holds a finished set: both splits, and no preparation still under way."""
    if not Path(data_dir).is_dir() or not (read_meta(data_dir) or {}).get("complete", True):
        return False
    splits = [find_shards(data_dir, split) for split in ("train", "val")]
    return all(paths and all(path.is_file() for path in paths) for paths in splits)


def is_whole(folder: Path, record: dict) -> bool:
    """Whether a shard of meta.json's list is there, with as many tokens as the list says."""
    try:
        return open_shard(folder / record["file"]).n_tokens == record["tokens"]
    except DataError:
        return False


def open_shard(path) -> Shard:
    """Check a file's header and size and describe it. Raises DataError with a hint at the cure."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if path.suffix == ".npy":
            return _open_npy(path)
        with open(path, "rb") as file:
            magic, version, count = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    dtype = LAYOUTS.get((magic, version))
    if dtype is not None:
        expected = HEADER_BYTES + count * dtype.itemsize
        if count < 0 or size != expected:
            raise DataError(
                f"{path} is damaged: its header promises {count:,} tokens ({expected:,} bytes) but the "
                f"file has {size:,} bytes; delete it and prepare or download it again"
            )
        return Shard(path, HEADER_BYTES, count, dtype)
    if magic in {known for known, _ in LAYOUTS}:
        raise DataError(f"{path} is a token shard of the unknown version {version}; prepare the data again")
    if re.search(r"_(train|val)_", path.name):
        raise DataError(
            f"{path} has no token-shard header (it starts with {magic}, not 20240520): an interrupted "
            f"download, a Git LFS pointer or another format; fetch it again. Headerless files must be named "
            "train.bin, val.bin"
        )
    if size % 2:
        raise DataError(f"{path} has an odd number of bytes ({size:,}), so it is no file of uint16 tokens")
    return Shard(path, 0, size // 2, np.dtype("<u2"))


def _open_npy(path: Path) -> Shard:
    try:
        tokens = np.load(path, mmap_mode="r")  # pickles are refused
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is no whole NumPy array file ({error}); prepare it again") from error
    if getattr(tokens, "ndim", 0) != 1 or tokens.dtype not in LAYOUTS.values():
        raise DataError(f"{path} is no row of uint16 or uint32 tokens; prepare it again")
    return Shard(path, tokens.offset, len(tokens), tokens.dtype)


def header_bytes(n_tokens: int, dtype) -> bytes:
    """The 1,024 bytes in front of `n_tokens` tokens of a type."""
    if n_tokens > MAX_TOKENS:
        raise DataError(f"a shard of {n_tokens:,} tokens is over the limit of {MAX_TOKENS:,}: make more")
    layout = next((key for key, known in LAYOUTS.items() if known == np.dtype(dtype)), None)
    if layout is None:
        raise DataError(f"tokens must be uint16 or uint32, not {np.dtype(dtype)}")
    return struct.pack("<3i", *layout, n_tokens).ljust(HEADER_BYTES, b"\0")


def write_shard(path, tokens: np.ndarray) -> None:
    """Write (n,) uint16 or uint32 tokens as one shard, whole or not at all."""
    dtype = tokens.dtype.newbyteorder("<")
    write_atomic(path, [header_bytes(len(tokens), dtype), np.ascontiguousarray(tokens, dtype).data])
