"""Text in order, in blocks of about a megabyte that a thread can encode, from any place on.

Every source is a generator of `Block`s. A block carries the position of its first document, as plain JSON; the same
source started there gives the same documents again, and the same tokens however it is cut into blocks.

Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark; of anything else a JSON line is counted, a file refused.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from data import DataError
from data.console import first_line

BLOCK_BYTES = 1 << 20
LONGEST_LINE = 1 << 27  # bytes of a JSON line, or of text without a place for a cut, for memory's sake
LINES = (".jsonl", ".json", ".ndjson")
KINDS = f"{' '.join(LINES)} (an object a line), .txt (a document a file), also .gz .zst .xz .bz2, .parquet"
# Why a row is left out, and what is said where all of them are.
SKIP_REASONS = {
    "empty": "are empty",
    "not_text": "have no text under the chosen column (choose it with --text-column)",
    "not_json": "are no JSON objects, one a line",
    "not_utf8": "are no UTF-8 (convert them, e.g. iconv -f latin1 -t utf-8)",
    "too_long": "are too long",
    "not_encodable": "are beyond the tokenizer",
}
# UTF-32's first: UTF-16's begin alike
MARKS = [(getattr(codecs, f"BOM_UTF{n}_{end}"), f"utf-{n}") for n in (32, 16) for end in ("LE", "BE")]
MAGIC = {
    ".gz": rb"\x1f\x8b",
    ".zst": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    ".xz": rb"\xfd7zXZ\0",
    ".bz2": rb"BZh[1-9]1AY&SY|BZh[1-9]\x17rE8P\x90",
    ".parquet": rb"PAR1",
}
# Errors of the hub that another attempt does not mend.
HOPELESS = (
    *("DatasetNotFoundError", "RepositoryNotFoundError", "GatedRepoError", "OfflineModeIsEnabled"),
    *("ModuleNotFoundError", "scripts are no longer"),
)
# Where text can be cut without changing its tokens: between a letter of the commonest alphabets and the space or line
# end behind it, or any other character (but white space) and the space. No piece of GPT-2's pattern, nor of its
# successors', goes across.
SAFE_CUT = re.compile(
    rb"(?:[A-Za-z]|\xd0[\xb0-\xbf]|\xd1[\x80-\x8f]|[\xe5-\xe8][\x80-\xbf]{2})(?=[ \n])"
    rb"|(?:[\xc3-\xdf]|[\xe0\xe4-\xed][\x80-\xbf])[\x80-\xbf](?= )"
)


@dataclass
class Block:
    """position: where it starts; content: JSON lines, or a list of texts and of what stands where one should.

    done: 0..1 of the source, or None. split: "val" or "train" where the source itself says what is held out.
    opens: whether its texts open documents: later parts of a long one do not. too_long: lines that were left out.
    """

    position: object
    content: bytes | list
    done: float | None = None
    split: str | None = None
    opens: bool = True
    too_long: int = 0


def read_block(block: Block, column: str) -> tuple[list[str], dict[str, int]]:
    """Texts of a block, and how many of its rows have none, by reason."""
    skipped = dict.fromkeys(SKIP_REASONS, 0) | {"too_long": block.too_long}
    rows = block.content
    if isinstance(rows, bytes):
        lines, rows = rows.split(b"\n"), []
        for line in lines:
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
    texts = [text for text in rows if isinstance(text, str) and text]
    skipped["empty"] = sum(1 for text in rows if text == "")
    skipped["not_text"] = len(rows) - len(texts) - skipped["empty"]
    return texts, skipped


def parsed_json(line: bytes):
    """orjson takes part of what json takes, so what it refuses is for json to judge (a lone surrogate, NaN, ...)."""
    try:
        return orjson.loads(line)
    except ValueError:
        return json.loads(line.decode())


def local_blocks(files: list[Path], column: str, position=None, held_out=0, cut=True) -> Iterator[Block]:
    """Blocks of local files, one file after the other. Position: [number of the file, place in it].

    held_out: how many of the files, from the first on, are validation text (0: the source does not say).
    cut: whether long text files may come in parts, cut where the tokens of most tokenizers end.
    """
    sizes = [path.stat().st_size for path in files]
    match position or [0, 0]:
        case [int(first), int(place)] if first >= 0 and place >= 0:
            pass
        case _:
            raise DataError(f"meta.json has {str(position)[:60]}, no place in a file: delete the folder")
    for number, path in enumerate(files[first:], first):
        for block in _file_blocks(path, column, place, cut):
            block.position = [number, block.position]
            block.done = min(1.0, (sum(sizes[:number]) + block.done) / max(1, sum(sizes)))
            block.split = ("val" if number < held_out else "train") if held_out else None
            yield block
        place = 0


def check_files(files: list[Path]) -> None:
    """Raise DataError where a file is missing or of a kind that is not read here."""
    for path in files:
        if path.is_dir():
            raise DataError(f"{path} is a folder: give its files, e.g. {path / '*.jsonl'}")
        if not path.is_file():
            raise DataError(f"no input file {path}: check the path")
        kind, packed = _kind(path)
        if kind not in (".parquet", ".txt", *LINES):
            raise DataError(f"{path} is of no known kind; known are {KINDS}")
        with open(path, "rb") as file:
            start = file.read(10)
        found = next((name for name, magic in MAGIC.items() if re.match(magic, start)), "")
        named = packed or (kind if kind == ".parquet" else "")
        if start and found != named:
            raise DataError(
                f"{path} is not {named[1:]}, as its name says: fetch it again, or rename it"
                if named and not found
                else f"{path} holds {found[1:]}, which its name does not say: let its name end in {found}"
            )


def whole_text(path: Path) -> str:
    """The text of a file, which may be packed, in memory."""
    with open(path, "rb") as raw, _unreadable(path):
        return _decoded(path, _utf8(path, raw, _kind(path)[1]).read(), 0)


def _kind(path: Path) -> tuple[str, str]:
    """(".jsonl", ".gz") of a.jsonl.gz; the second is empty where a file is not packed."""
    *_, kind, packed = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    return (kind, packed) if packed in UNPACKERS and packed else (packed, "")


def _file_blocks(path: Path, column: str, start: int, cut: bool) -> Iterator[Block]:
    """Blocks of one file. Position: the place in it; done: its bytes that have been read."""
    kind, packed = _kind(path)
    if kind == ".parquet":
        yield from _parquet_blocks(path, column, start)
        return
    with open(path, "rb") as raw, _unreadable(path):
        file = _utf8(path, raw, packed, start)
        blocks = _line_blocks(path, file, start) if kind in LINES else _text_blocks(path, file, start, cut)
        for block in blocks:
            # pyarrow closes what it has read to its end
            block.done = path.stat().st_size if raw.closed else raw.tell()
            yield block


def _unzst(raw):
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BLOCK_BYTES)


UNPACKERS = {"": lambda raw: raw, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _unzst}


@contextlib.contextmanager
def _unreadable(path: Path):
    """Errors of reading and unpacking as sentences about the file."""
    try:
        yield
    except DataError:
        raise
    except UnicodeError as error:
        raise DataError(f"{path} begins like UTF-16 or UTF-32 text but is none ({error})") from error
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


class _Recoded(io.RawIOBase):
    """A file of text in UTF-16 or UTF-32 as one of UTF-8."""

    def __init__(self, file, encoding: str):
        self._text = io.TextIOWrapper(file, encoding, newline="")
        self._left = b""  # read and recoded, but more than the last buffer could take

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        # at most four bytes a character, but at least one: none would mean the file's end
        data = self._left or self._text.read(max(1, len(buffer) // 4)).encode()
        n = min(len(buffer), len(data))
        buffer[:n], self._left = data[:n], data[n:]
        return n


def _utf8(path: Path, raw, packed: str, start: int = 0):
    """The text of an open file as a file of UTF-8, from byte `start` of that on; UTF-8's own mark stays where it is."""
    with open(path, "rb") as first:
        head = UNPACKERS[packed](first).read(4096)
    file = UNPACKERS[packed](raw)
    zeros = [half.count(0) / max(1, len(half)) for half in (head[::2], head[1::2])]
    if encoding := next((name for mark, name in MARKS if head.startswith(mark)), None):
        file = io.BufferedReader(_Recoded(file, encoding))
    elif max(zeros) > 0.5 and min(zeros) < 0.1:  # every other byte, as in UTF-16 of Latin text
        raise DataError(f"{path} looks like UTF-16 without its mark: iconv -f utf-16le -t utf-8 converts it")
    elif not packed:
        file.seek(start)
        return file
    while start:
        if not (passed := len(file.read(min(start, BLOCK_BYTES)))):
            raise DataError(f"{path} became shorter than it was when its preparation began")
        start -= passed
    return file


def _line_blocks(path: Path, file, at: int) -> Iterator[Block]:
    """Whole lines, up to the first that ends beyond BLOCK_BYTES; one longer than LONGEST_LINE is left out and counted.

    Where a block ends depends on where it starts alone, for the sake of interrupted preparations.
    """
    while data := file.read(BLOCK_BYTES):
        if at == 0 and data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(
                f"{path} begins with '[': one JSON array, where one object a line is needed; "
                "jq -c '.[]' FILE > FILE.jsonl makes that of it"
            )
        data += (rest := file.readline(LONGEST_LINE + 1))
        last, size = data.rfind(b"\n", 0, len(data) - 1) + 1, len(data)
        while rest and not rest.endswith(b"\n"):
            size += len(rest := file.readline(BLOCK_BYTES))
        too_long = size - last > LONGEST_LINE
        yield Block(at, data[:last] if too_long else data, too_long=int(too_long))
        at += size


def _text_blocks(path: Path, file, at: int, cut: bool) -> Iterator[Block]:
    """One document; a long one in parts cut where tokens are sure to end.

    As with lines, where a part ends depends on where it starts alone.
    """
    part, searched = bytearray(), BLOCK_BYTES
    while True:
        part += file.read(max(0, searched + 1 - len(part)))
        if len(part) <= searched:
            break
        cuts = SAFE_CUT.finditer(part, searched - 4096, searched + 1) if cut else ()
        if ends := [match.end() for match in cuts]:
            yield Block(at, [_decoded(path, part[: ends[-1]], at)], opens=at == 0)
            at, searched = at + ends[-1], 0
            del part[: ends[-1]]
        searched += BLOCK_BYTES
        if len(part) > LONGEST_LINE:
            raise DataError(
                f"{path} has more than {LONGEST_LINE >> 20} MiB without a place where this tokenizer could take it in "
                "parts: give it as JSON lines, or in smaller files"
            )
    if text := _decoded(path, part, at):  # what is left at the file's end
        yield Block(at, [text], opens=at == 0)


def _decoded(path: Path, text: bytes | bytearray, at: int) -> str:
    try:
        return text.decode("utf-8-sig" if at == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte 0x{text[error.start]:02x} at {at + error.start:,}): convert it, e.g. "
            "iconv -f latin1 -t utf-8"
        ) from error


def _parquet_blocks(path: Path, column: str, start: int) -> Iterator[Block]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except Exception as error:  # pyarrow.ArrowInvalid and OSError of several kinds
        raise DataError(f"{path} is not a whole parquet file ({error}): fetch it again") from error
    with file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        text = [name for name, kind in types.items() if re.match("(dictionary<values=|large_)?string", kind)]
        if column not in text:
            there = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise DataError(f"{path} has no text {column!r}, but {there}: choose with --text-column")
        row, groups = 0, list(range(file.metadata.num_row_groups))
        while groups and row + file.metadata.row_group(groups[0]).num_rows <= start:
            row += file.metadata.row_group(groups.pop(0)).num_rows
        batches = file.iter_batches(128, row_groups=groups, columns=[column])
        texts = (text for batch in batches for text in batch.column(0).to_pylist())
        texts, at = itertools.islice(texts, start - row, None), start
        while block := _next_texts(texts):
            end = at + len(block)
            yield Block(at, block, path.stat().st_size * end / file.metadata.num_rows)
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

    open_stream: makes the stream (a datasets.IterableDataset), and makes it anew after an error.
    """
    stream, texts, answered = None, None, position is not None

    def text_of(row: dict):
        if column not in row:
            raise DataError(f"no column {column!r}; there are {', '.join(row)}: choose with --text-column")
        return row[column]

    def next_block() -> Block:
        nonlocal stream, texts, position
        if texts is None:
            stream = open_stream()
            if position is not None:
                stream.load_state_dict(position)
        rows, texts = texts or map(text_of, stream), None
        position = stream.state_dict()
        block = Block(position, _next_texts(rows))
        texts = rows  # nothing has failed
        return block

    # a source that never answered is more likely out of reach than flaky, and each attempt takes long
    while (block := retrying(next_block, retries if answered else min(retries, 2), wait)).content:
        yield block
        answered = True


def retrying(action: Callable, retries: int, wait=time.sleep):
    """What `action` returns, called up to `retries` times more after errors, with longer and longer waits.

    Raises a DataError after the last, at once where another attempt does not help; those of `action` go through.
    """
    for failures in itertools.count(1):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # of datasets, fsspec, httpx, pyarrow, the hub, the operating system
            problem = f"{type(error).__name__}: {first_line(error)}"
            if type(error) is ValueError or any(name in problem for name in HOPELESS):
                raise DataError(f"the data set cannot be opened ({problem})") from error
            if failures > retries:
                raise DataError(
                    f"the source failed {failures} times in a row ({problem}): check the connection and run the same "
                    "command again"
                ) from error
            seconds = min(120, 2 ** (failures - 1))
            print(f"\n{problem}; trying again in {seconds} s ({failures} of {retries})", file=sys.stderr)
            wait(seconds)


def hub_stream(dataset: str, name: str | None, split: str, column: str):
    """A Hugging Face data set as a stream of rows with one column."""
    from datasets import load_dataset

    stream = load_dataset(dataset, name=name, split=split, streaming=True)
    return stream.select_columns([column]) if column in (stream.column_names or ()) else stream
