"""Text in order, in blocks of about a megabyte that a worker can encode, from any place on.

Every source is a generator of `Block`s. A block carries the position of its first document, as plain JSON; the same
source started there gives the same documents again, and the same tokens however it is cut into blocks.

Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. What is neither is never guessed at: a JSON line is left
out and counted, a text file is refused.
"""

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import DataError

try:
    import orjson
except ImportError:
    orjson = None

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 27  # bytes of a JSON line; what is longer is left out, so that memory has a limit
LONGEST_PART = 1 << 22  # bytes of a text without a place for a cut, behind which it is cut all the same
COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
LINES = (".jsonl", ".json", ".ndjson")
KINDS = (
    f"{' '.join(LINES)} (one object a line), .txt (a document a file), all also .gz .zst .xz .bz2; .parquet"
)
SKIP_REASONS = ("empty", "not_text", "not_json", "not_utf8", "too_long", "not_encodable")
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which begins alike
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MAGIC = (
    (".gz", rb"\x1f\x8b"),
    (".zst", rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    (".xz", rb"\xfd7zXZ\0"),
    (".bz2", rb"BZh[1-9]1AY&SY|BZh[1-9]\x17rE8P\x90"),
    (".parquet", rb"PAR1"),
)
# Errors of the hub that another attempt does not mend.
HOPELESS = (
    *("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError", "OfflineModeIsEnabled"),
    *("ModuleNotFoundError", "scripts are no longer"),
)
# Where text can be cut without changing its tokens: between a letter of the commonest alphabets and the space or line
# end behind it. No piece of GPT-2's pattern, nor of its successors', goes across.
SAFE_CUT = re.compile(rb"(?:[A-Za-z]|\xd0[\xb0-\xbf]|\xd1[\x80-\x8f]|[\xe5-\xe8][\x80-\xbf]{2})(?=[ \n])")
LAST_CUT = re.compile(rb"[\x80-\xff](?=[ \n])")


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
    kind, content = payload[:2]
    skipped = dict.fromkeys(SKIP_REASONS, 0)
    if kind == "part":  # of one long document
        return [content], [payload[2]], skipped
    if kind == "lines":
        skipped["too_long"] = payload[2]
        rows = []
        for line in content.split(b"\n"):
            if not line or line.isspace():
                continue
            try:
                row = parsed_json(line.removeprefix(codecs.BOM_UTF8))
            except UnicodeDecodeError:
                skipped["not_utf8"] += 1
            except (ValueError, RecursionError):
                skipped["not_json"] += 1
            else:
                rows.append(row.get(column) if isinstance(row, dict) else None)
    else:
        rows = content
    texts = [text for text in rows if isinstance(text, str) and text]
    skipped["empty"] = sum(1 for text in rows if text == "")
    skipped["not_text"] = len(rows) - len(texts) - skipped["empty"]
    return texts, [True] * len(texts), skipped


def parsed_json(line: bytes):
    """orjson takes part of what json takes, so what it refuses is for json to judge (a lone surrogate, NaN, ...)."""
    if orjson is not None:
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return json.loads(line.decode())


def local_blocks(
    files: list[Path], column: str, position=None, held_out: int = 0, cut: bool = True
) -> Iterator[Block]:
    """Blocks of local files, one file after the other. Position: [number of the file, place in it].

    held_out: how many of the files, from the first on, are validation text (0: the source does not say).
    cut: whether long text files may come in parts, cut where the tokens of most tokenizers end.
    """
    sizes = [path.stat().st_size for path in files]
    total = max(1, sum(sizes))
    position = position or [0, 0]
    if len(position) != 2 or not all(type(n) is int and n >= 0 for n in position):
        raise DataError(
            f"meta.json goes on from {str(position)[:60]}, which is no place in a file: delete the folder"
        )
    first, place = position
    for number in range(first, len(files)):
        before = sum(sizes[:number])
        split = ("val" if number < held_out else "train") if held_out else None
        for at, payload, progress in _file_blocks(files[number], column, place, cut):
            yield Block([number, at], payload, min(1.0, (before + progress) / total), split)
        place = 0


def check_files(files: list[Path]) -> None:
    """Raise DataError where a file is missing or of a kind that is not read here."""
    for path in files:
        if not path.is_file():
            raise DataError(f"no input file {path}")
        kind, packed = _kind(path)
        if kind not in (".parquet", ".txt", *LINES):
            raise DataError(f"{path} is of no known kind; known are {KINDS}")
        with open(path, "rb") as file:
            start = file.read(10)
        found = next((name for name, magic in MAGIC if re.match(magic, start)), "")
        named = packed or (kind if kind == ".parquet" else "")
        if start and found != named:
            raise DataError(
                f"{path} is not {named[1:]}, as its name says: fetch it again, or rename it"
                if named and not found
                else f"{path} holds {found[1:]}, which its name does not say: let its name end in {found}"
            )


def _kind(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of a.jsonl.gz; the second is empty where a file is not packed."""
    *_, kind, packed = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return (kind, packed) if packed in (*COMPRESSED, ".zst") else (packed, "")


def _file_blocks(path: Path, column: str, start: int, cut: bool):
    kind, packed = _kind(path)
    if kind == ".parquet":
        yield from _parquet_blocks(path, column, start)
        return
    with open(path, "rb") as raw:
        pieces = _utf8_pieces(path, raw, packed, start)
        lines = kind in LINES
        blocks = _line_blocks(path, pieces, start) if lines else _text_blocks(path, pieces, start, cut)
        for at, payload in blocks:
            # pyarrow closes what it has read to its end
            yield at, payload, path.stat().st_size if raw.closed else raw.tell()


def _unpacked_pieces(path: Path, raw, packed: str) -> Iterator[bytes]:
    """The contents of a packed file, in pieces of at most BLOCK_BYTES."""
    try:
        if packed == ".zst":
            import pyarrow

            file = pyarrow.CompressedInputStream(raw, "zstd")
        else:
            file = COMPRESSED[packed](raw)
        while data := file.read(BLOCK_BYTES):
            yield data
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the unpacker's
            raise
        if "memory" in str(error):  # zstd --long, xz beyond limits
            raise DataError(
                f"{path} was packed with a larger window than is unpacked here ({error}): unpack it first, e.g. with "
                f"zstd -d --long=31"
            ) from error
        raise DataError(
            f"{path} is damaged or cut short, or has other bytes behind its end ({error}): fetch it again, or unpack "
            "it by hand and give what comes out"
        ) from error


def _utf8_pieces(path: Path, raw, packed: str, start: int) -> Iterator[bytes]:
    """The text of a file as UTF-8, from byte `start` of that on, in pieces; UTF-8's own mark stays where it is."""
    pieces = _unpacked_pieces(path, raw, packed) if packed else iter(lambda: raw.read(BLOCK_BYTES), b"")
    first = next(pieces, b"")
    encoding = next((name for mark, name in MARKS if first.startswith(mark)), None)
    if encoding:
        pieces = _transcoded(path, first, pieces, encoding)
        first = next(pieces, b"")
    elif _looks_like_utf16(first):
        raise DataError(
            f"{path} looks like UTF-16 without a byte-order mark: convert it, e.g. iconv -f utf-16le -t utf-8"
        )
    elif not packed and start:
        raw.seek(start)
        yield from pieces
        return
    while start > len(first):
        start -= len(first)
        first = next(pieces, None)
        if first is None:
            raise DataError(f"{path} became shorter than it was when its preparation began")
    yield first[start:]
    yield from pieces


def _transcoded(path: Path, first: bytes, pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    try:
        for text in codecs.iterdecode(itertools.chain([first], pieces), encoding):
            yield text.encode()
    except UnicodeError as error:
        raise DataError(f"{path} begins like {encoding} text but is none ({error})") from error


def _looks_like_utf16(start: bytes) -> bool:
    """Whether every other byte is zero, as in UTF-16 of Latin text."""
    a, b = (start[k:4096:2].count(0) / max(1, len(start[k:4096:2])) for k in (0, 1))
    return max(a, b) > 0.5 and min(a, b) < 0.1


def _line_blocks(path: Path, pieces: Iterator[bytes], start: int):
    """Whole lines, up to the first that ends beyond BLOCK_BYTES; one longer than LONGEST_LINE is left out and counted.

    Where a block ends depends on where it starts alone, so that an interrupted preparation gives the same record.
    """
    at, buffer, searched, dropped = start, bytearray(), 0, 0

    def block(end: int):  # of the buffer's first bytes, of which the last line may be too long
        line = buffer.rfind(b"\n", 0, end - 1) + 1
        long = end + dropped - line > LONGEST_LINE
        return at, ("lines", bytes(buffer[: line if long else end]), int(long))

    for data in pieces:
        if dropped:  # inside a line that is too long, of which the buffer has the first byte
            end = data.find(b"\n") + 1
            dropped += end or len(data)
            if not end:
                continue
            yield block(len(buffer))
            at, dropped, data = at + len(buffer) + dropped, 0, data[end:]
            buffer.clear()
        elif at == 0 and not buffer and data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(
                f"{path} begins with '[': one JSON array, where one object a line is needed; "
                "jq -c '.[]' FILE > FILE.jsonl makes that of it"
            )
        buffer += data
        while end := buffer.find(b"\n", max(BLOCK_BYTES, searched)) + 1:
            yield block(end)
            at, searched = at + end, 0
            del buffer[:end]
        searched = len(buffer)
        if searched > BLOCK_BYTES + LONGEST_LINE:
            kept = buffer.rfind(b"\n", 0, BLOCK_BYTES) + 2
            dropped, searched = searched - kept, 0
            del buffer[kept:]
    if buffer:
        yield block(len(buffer))


def _text_blocks(path: Path, pieces: Iterator[bytes], start: int, cut: bool):
    """One document; a long one in parts cut where tokens are sure to end.

    As with lines, where a part ends depends on where it starts alone.
    """
    at, buffer, searched = start, bytearray(), 0
    for data in pieces:
        buffer += data
        while cut and searched + BLOCK_BYTES < len(buffer):
            searched += BLOCK_BYTES
            cuts = _cuts(SAFE_CUT, buffer, searched)
            # behind any letter or sign of other scripts, or else anywhere
            if not cuts and searched >= LONGEST_PART:
                character = next((k for k in range(4) if buffer[searched - k] & 0xC0 != 0x80), 0)
                cuts = _cuts(LAST_CUT, buffer, searched) or [searched - character]
            if cuts:
                yield at, ("part", _decoded(path, buffer[: cuts[-1]], at), at == 0)
                at, searched = at + cuts[-1], 0
                del buffer[: cuts[-1]]
        if len(buffer) > LONGEST_LINE:
            raise DataError(
                f"{path} is one document of more than {LONGEST_LINE >> 20} MiB, which this tokenizer cannot take in "
                "parts: give it as JSON lines, or in smaller files"
            )
    if text := _decoded(path, buffer, at):
        yield at, ("part", text, at == 0)


def _cuts(pattern: re.Pattern, buffer: bytearray, end: int) -> list[int]:
    return [match.end() for match in pattern.finditer(buffer, end - 4096, end + 1)]


def _decoded(path: Path, text: bytearray, at: int) -> str:
    try:
        return text.decode("utf-8-sig" if at == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte 0x{text[error.start]:02x} at {at + error.start:,}): convert it, e.g. "
            "iconv -f latin1 -t utf-8"
        ) from error


def _parquet_blocks(path: Path, column: str, start: int):
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # pyarrow.ArrowInvalid and OSError of several kinds
        raise DataError(f"{path} is not a whole parquet file ({error}): fetch it again") from error
    with file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        text = [name for name, kind in types.items() if re.match("(dictionary<values=|large_)?string", kind)]
        if column not in types:
            raise DataError(
                f"{path} has no column {column!r}; it has {', '.join(types)}: choose one with --text-column"
            )
        if column not in text:
            raise DataError(
                f"the column {column!r} of {path} holds {types[column]}, not text; "
                + (f"{', '.join(text)} would: choose with --text-column" if text else "no other column does")
            )
        row, groups = 0, list(range(file.metadata.num_row_groups))
        while groups and row + file.metadata.row_group(groups[0]).num_rows <= start:
            row += file.metadata.row_group(groups.pop(0)).num_rows
        batches = file.iter_batches(128, row_groups=groups, columns=[column])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        texts, at = itertools.islice(texts, start - row, None), start
        while block := _next_texts(texts):
            end = at + len(block)
            yield at, ("texts", block), path.stat().st_size * end / file.metadata.num_rows
            at = end


def _next_texts(rows: Iterator) -> list:
    """The next rows' texts, up to the one that fills a block; none at the end."""
    texts, size = [], 0
    for text in rows:
        texts.append(text)
        size += len(text) if isinstance(text, str) else 0
        if size >= BLOCK_BYTES:
            break
    return texts


def hub_blocks(open_stream, column: str, position=None, retries: int = 8, wait=time.sleep) -> Iterator[Block]:
    """Blocks of a streamed data set. Position: what its state_dict() gave.

    open_stream: makes the stream anew (a datasets.IterableDataset). After an error it is opened again at the
    start of the block that was being read, up to `retries` times in a row, with longer and longer waits.
    """
    failures, started = 0, position is not None

    def text_of(row: dict):
        nonlocal started
        if column not in row:
            raise DataError(
                f"the data set has no column {column!r}; it has {', '.join(row)}: choose with --text-column"
            )
        started = True
        return row[column]

    while True:
        try:
            stream = open_stream()
            if position is not None:
                stream.load_state_dict(position)
            position, texts = stream.state_dict(), map(text_of, stream)
            while block := _next_texts(texts):
                yield Block(position, ("texts", block), None)
                position, failures = stream.state_dict(), 0
            return
        except DataError:
            raise
        except Exception as error:  # of datasets, fsspec, aiohttp, httpx, pyarrow, the operating system
            if not started and isinstance(error, ValueError):
                raise DataError(f"the data set cannot be opened ({in_short(error)})") from error
            # a source that never answered is more likely out of reach than flaky, and each attempt takes long
            failures += 1
            wait_or_give_up(error, failures, retries if started else min(retries, 2), wait)


def in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def wait_or_give_up(error: Exception, failures: int, retries: int, wait=time.sleep) -> None:
    """After the `failures`-th error in a row: wait longer and longer; DataError at once where that cannot help."""
    problem = in_short(error)
    if any(name in problem for name in HOPELESS):
        raise DataError(f"the data set cannot be opened ({problem})") from error
    if failures > retries:
        raise DataError(
            f"the source failed {failures} times in a row ({problem}): check the connection and run the same command "
            "again"
        ) from error
    seconds = min(120, 2 ** (failures - 1))
    print(f"\n{problem}; trying again in {seconds} s ({failures} of {retries})", file=sys.stderr)
    wait(seconds)


def hub_stream(dataset: str, name: str | None, split: str, column: str):
    """A Hugging Face data set as a stream of rows with one column."""
    from datasets import load_dataset

    stream = load_dataset(dataset, name=name, split=split, streaming=True)
    return stream.select_columns([column]) if column in (stream.column_names or ()) else stream
