"""Text in order, in blocks of about a megabyte that a worker can encode, from any place on.

Every source is a generator of `Block`s. A block carries the position of its first document, as plain JSON,
and the same source started there gives the same documents again. How a source is cut into blocks never
matters for the tokens that come out.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import DataError

BLOCK_BYTES = 1 << 20
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
KINDS = (
    ".jsonl .json .ndjson (one object a line), .txt (a document a file), all also .gz .zst .xz .bz2; .parquet"
)


@dataclass
class Block:
    """position: where it starts; payload: for `read_payload`; done: 0..1 of the source, or None.

    split: "val" or "train" where the source itself says what is held out, else None.
    """

    position: object
    payload: tuple
    done: float | None
    split: str | None = None


def read_payload(payload: tuple, column: str) -> tuple[list[str], list[bool], dict[str, int]]:
    """Texts of a block, which of them open a document, and rows without text, by reason."""
    kind = payload[0]
    skipped = {"empty": 0, "not_text": 0, "not_json": 0}
    if kind == "part":  # of one long document
        return [payload[1]], [payload[2]], skipped
    if kind == "texts":
        rows = payload[1]
    else:
        if kind == "range":
            _, path, begin, end = payload
            with open(path, "rb") as file:
                file.seek(begin)
                lines = file.read(end - begin).split(b"\n")
        else:
            lines = payload[1].split(b"\n")
        rows = []
        for line in lines:
            if not line or line.isspace():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                row = _lenient_json(line)
            except (ValueError, RecursionError):
                row = _NOT_JSON
            if row is _NOT_JSON:
                skipped["not_json"] += 1
            else:
                rows.append(row.get(column) if isinstance(row, dict) else None)
    texts = [text for text in rows if isinstance(text, str) and text]
    skipped["empty"] = sum(1 for text in rows if text == "")
    skipped["not_text"] = len(rows) - len(texts) - skipped["empty"]
    return texts, [True] * len(texts), skipped


_NOT_JSON = object()


def _lenient_json(line: bytes):
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return _NOT_JSON


def local_blocks(files: list[Path], column: str, position=None, held_out: int = 0) -> Iterator[Block]:
    """Blocks of local files, one file after the other. Position: [number of the file, place in it].

    held_out: how many of the files, from the first on, are validation text (0: the source does not say).
    """
    sizes = [path.stat().st_size for path in files]
    total = max(1, sum(sizes))
    first, place = position or (0, 0)
    for number in range(first, len(files)):
        path = files[number]
        start = place if number == first else 0
        before = sum(sizes[:number])
        try:
            for at, payload, progress in _file_blocks(path, column, start):
                split = ("val" if number < held_out else "train") if held_out else None
                yield Block([number, at], payload, min(1.0, (before + progress) / total), split)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _file_blocks(path: Path, column: str, start: int):
    suffixes = [s.lower() for s in path.suffixes]
    packed = suffixes[-1] if suffixes and suffixes[-1] in (*COMPRESSED, ".zst") else ""
    kind = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        yield from _parquet_blocks(path, column, start)
    elif kind in (".jsonl", ".json", ".ndjson"):
        yield from _line_blocks(path, packed, start)
    elif kind == ".txt":
        yield from _text_blocks(path, packed, start)
    else:
        raise DataError(f"{path} is of no known kind; known are {KINDS}")


def check_files(files: list[Path]) -> None:
    """Raise DataError where a file is missing or of a kind that is not read here."""
    for path in files:
        if not path.is_file():
            raise DataError(f"no input file {path}")
        suffixes = [s.lower() for s in path.suffixes]
        known = {".parquet", ".jsonl", ".json", ".ndjson", ".txt"}
        if not suffixes or suffixes[-1] not in known | {*COMPRESSED, ".zst"}:
            raise DataError(f"{path} is of no known kind; known are {KINDS}")


def _open(path: Path, packed: str, start: int):
    """The unpacked bytes from `start` on, and a file whose tell() shows progress."""
    raw = open(path, "rb")  # noqa: SIM115
    if not packed:
        raw.seek(start)
        return raw, raw
    if packed == ".zst":
        try:
            import pyarrow

            file = pyarrow.CompressedInputStream(raw, "zstd")
        except ImportError as error:
            raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    else:
        file = COMPRESSED[packed](raw)
    while start > 0:
        skipped = len(file.read(min(start, BLOCK_BYTES)))
        if not skipped:
            raise DataError(f"{path} became shorter than it was when its preparation began")
        start -= skipped
    return file, raw


def _line_blocks(path: Path, packed: str, start: int):
    file, raw = _open(path, packed, start)
    with raw:
        at = start
        if not packed:  # workers read it themselves
            size = os.fstat(raw.fileno()).st_size
            while at < size:
                raw.seek(min(size, at + BLOCK_BYTES))
                raw.readline()
                end = raw.tell()
                yield at, ("range", str(path), at, end), end
                at = end
            return
        buffer = b""
        while True:
            cut = buffer.find(b"\n", BLOCK_BYTES) + 1
            data = b"" if cut else file.read(BLOCK_BYTES)
            if data:
                buffer += data
                continue
            cut = cut or len(buffer)
            if not cut:
                return
            yield at, ("lines", buffer[:cut]), raw.tell()
            at, buffer = at + cut, buffer[cut:]


def _text_blocks(path: Path, packed: str, start: int):
    """One document; a long one in parts cut where tokens are sure to end."""
    file, raw = _open(path, packed, start)
    with raw:
        at, buffer, searched = start, b"", 0
        while True:
            cut = 0
            while not cut and searched + BLOCK_BYTES < len(buffer):
                searched += BLOCK_BYTES
                cuts = [match.end() for match in SAFE_CUT.finditer(buffer, searched - 4096, searched + 1)]
                cut = cuts[-1] if cuts else 0
            data = b"" if cut else file.read(BLOCK_BYTES)
            if data:
                buffer += data
                continue
            cut = cut or len(buffer)
            if not cut:
                return
            yield at, ("part", buffer[:cut].decode("utf-8", "replace"), at == 0), raw.tell()
            at, buffer, searched = at + cut, buffer[cut:], 0


# Where fast_bpe.safe_cut would cut, in UTF-8.
SAFE_CUT = re.compile(rb"(?:[A-Za-z]|\xd0[\xb0-\xbf]|\xd1[\x80-\x8f]|[\xe5-\xe8][\x80-\xbf]{2})(?=[ \n])")


def _parquet_blocks(path: Path, column: str, start: int):
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # pyarrow.ArrowInvalid and OSError of several kinds
        raise DataError(f"{path} is not a whole parquet file ({error}): fetch it again") from error
    with file:
        if column not in file.schema_arrow.names:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(file.schema_arrow.names)}: "
                "choose one with --text-column"
            )
        rows = max(1, file.metadata.num_rows)
        at = 0
        groups = file.metadata.num_row_groups
        first = 0
        while first < groups and at + file.metadata.row_group(first).num_rows <= start:
            at += file.metadata.row_group(first).num_rows
            first += 1
        texts, begin, size = [], start, 0
        batches = file.iter_batches(128, row_groups=list(range(first, groups)), columns=[column])
        for batch in batches:
            for text in batch.column(0).to_pylist():
                at += 1
                if at <= start:
                    continue
                texts.append(text)
                size += len(text) if isinstance(text, str) else 0
                if size >= BLOCK_BYTES:
                    yield begin, ("texts", texts), path.stat().st_size * at / rows
                    texts, begin, size = [], at, 0
        if texts:
            yield begin, ("texts", texts), path.stat().st_size


def hub_blocks(open_stream, column: str, position=None, retries: int = 8, wait=time.sleep) -> Iterator[Block]:
    """Blocks of a streamed data set. Position: what its state_dict() gave.

    open_stream: makes the stream anew (a datasets.IterableDataset). After an error it is opened again at the
    start of the block that was being read, up to `retries` times in a row, with longer and longer waits.
    """
    failures, started = 0, position is not None
    while True:
        try:
            stream = open_stream()
            if position is not None:
                stream.load_state_dict(position)
            texts, size = [], 0
            position = stream.state_dict()
            for row in stream:
                if column not in row:
                    raise DataError(
                        f"the data set has no column {column!r}; it has {', '.join(row)}: choose with "
                        f"--text-column"
                    )
                text, started = row[column], True
                texts.append(text)
                size += len(text) if isinstance(text, str) else 0
                if size >= BLOCK_BYTES:
                    following = stream.state_dict()
                    yield Block(position, ("texts", texts), None)
                    texts, size, position = [], 0, following
                    failures = 0
            if texts:
                yield Block(position, ("texts", texts), None)
            return
        except DataError:
            raise
        except Exception as error:  # of datasets, fsspec, aiohttp, httpx, pyarrow, the operating system
            failures += 1
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            hopeless = ("DatasetNotFoundError", "ModuleNotFoundError", "OfflineModeIsEnabled")
            named = any(name in f"{type(error).__name__} {problem}" for name in hopeless)
            if named or (not started and isinstance(error, ValueError)):
                raise DataError(f"the data set cannot be opened ({problem})") from error
            # a source that never answered is more likely out of reach than flaky, and each attempt takes long
            if failures > (retries if started else min(retries, 2)):
                raise DataError(
                    f"the source failed {failures} times in a row ({problem}): check the connection and run the "
                    "same command again"
                ) from error
            seconds = min(120, 2 ** (failures - 1))
            print(f"\n{problem}; trying again in {seconds} s", file=sys.stderr)
            wait(seconds)


def hub_stream(dataset: str, name: str | None, split: str, column: str):
    """A function that opens a Hugging Face data set as a stream of rows with one column."""

    def open_stream():
        from datasets import load_dataset

        stream = load_dataset(dataset, name=name, split=split, streaming=True)
        if stream.column_names and column in stream.column_names:
            stream = stream.select_columns([column])
        return stream

    return open_stream
