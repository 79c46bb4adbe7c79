"""From blocks of text to a folder of shards: in parallel, resumable, the same bytes every time.

The stream of tokens is defined by the documents' order alone. Threads encode blocks (the libraries that do it leave
Python's lock); this one reads them, puts the results in order, cuts the stream into shards (number 0 has val_tokens,
or all that the source holds out; the others shard_tokens) and renames each when it is whole. After each shard
meta.json says where the next one starts: the position of a block in the source, and how many of its tokens belong to
shards before. A killed run is taken up there, so are shards that were lost later.
"""

import contextlib
import errno
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import DataError
from data.encoder import Encoder
from data.files import flush, folder_lock, publish, sha256
from data.meta import META_NAME, new_meta, read_meta, totals, versions, write_meta
from data.progress import Progress
from data.shards import MAX_TOKENS, header_bytes, open_shard
from data.sources import SKIP_REASONS, Block, read_payload

CHECK_ONE_IN = 100  # of the documents, beside all of the first block, see data.encoder


def encode_block(encoder: Encoder, payload: tuple, column: str, number: int) -> tuple:
    """Tokens of the `number`-th block read, its rows skipped by reason, and its characters of text."""
    texts, opens, skipped = read_payload(payload, column)
    # 37 and 100 have no factor in common, so blocks of one document get their turn
    checked = range(-37 * number % CHECK_ONE_IN, len(texts), CHECK_ONE_IN) if number else range(len(texts))
    tokens, skipped["not_encodable"] = encoder.encode(texts, opens, checked)
    return tokens, skipped, sum(map(len, texts))


def in_order(blocks: Iterator[Block], work: Callable, workers: int) -> Iterator[tuple]:
    """(block, work(payload, number)) in the blocks' order, computed by threads a few blocks ahead; 0: by this one."""
    if not workers:
        for number, block in enumerate(blocks):
            yield block, work(block.payload, number)
        return
    threads, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for number, block in enumerate(blocks):
            waiting.append((block, threads.submit(work, block.payload, number)))
            block.payload = ()
            if len(waiting) > 2 * workers + 2:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        threads.shutdown(cancel_futures=True)


class OpenShard:
    """A shard being written beside its name; its tokens pass through and never pile up in memory."""

    def __init__(self, path: Path, target: int, dtype: np.dtype):
        self.path, self.target, self.dtype = path, target, dtype
        self.n_tokens = self.documents = 0
        self.temporary = path.with_name(path.name + ".tmp")
        self._file = open(self.temporary, "xb")  # noqa: SIM115
        header = header_bytes(target, dtype)
        self._file.write(header)
        self._hash = hashlib.sha256(header)

    def take(self, tokens: np.ndarray, eot: int) -> int:
        """Write as many of the tokens as there is room for; how many that was."""
        piece = tokens[: self.target - self.n_tokens]
        data = memoryview(np.ascontiguousarray(piece)).cast("B") if len(piece) else b""
        self._file.write(data)
        self._hash.update(data)
        self.n_tokens += len(piece)
        self.documents += int(np.count_nonzero(piece == eot))
        return len(piece)

    def finish(self) -> str:
        """Flush, rename; the file's SHA-256."""
        if self.n_tokens != self.target:  # the last one: its header was a guess
            self._file.seek(0)
            self._file.write(header_bytes(self.n_tokens, self.dtype))
        self._file.close()
        flush(self.temporary)
        digest = self._hash.hexdigest() if self.n_tokens == self.target else sha256(self.temporary)
        publish(self.temporary, self.path)
        return digest

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails again
            self._file.close()
        self.temporary.unlink(missing_ok=True)


def prepare_shards(
    out_dir: Path,
    prefix: str,
    tokenizer,
    blocks_from: Callable[[object], Iterator[Block]],
    source: dict,
    *,
    column: str = "text",
    val_tokens: int | None = 100_000_000,
    shard_tokens: int = 100_000_000,
    max_shards: int | None = None,
    workers: int = 1,
    fast: bool = True,
    say: Callable[[str], None] = print,
) -> dict:
    """Make, or finish, the set of shards in `out_dir`; returns its meta.

    blocks_from(position) gives the source's blocks from a position (None: from the start). source: what
    identifies it; kept in meta.json, and a folder made from anything else is refused. val_tokens: length of
    the validation shard; None: it ends where the source's blocks say "train". max_shards: stop
    after so many training shards (a later call with more goes on). workers: threads that encode; 0: this
    one does. fast: see data.encoder. Raises DataError, with every whole shard and its record on the disk.
    """
    if tokenizer.eot is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no end-of-text token to open documents with")
    with folder_lock(out_dir):
        for leftover in out_dir.glob(f"{prefix}_*_*.bin.tmp"):
            leftover.unlink()
        meta = new_meta(
            prefix,
            tokenizer,
            complete=False,
            **totals([]),
            skipped=dict.fromkeys(SKIP_REASONS, 0),
            made={"source": source, "val_tokens": val_tokens, "shard_tokens": shard_tokens},
            versions=versions("tiktoken", "tokenizers", "gigatoken"),
            shards=[],
        )
        lost = _take_up(out_dir, meta)
        limit = None if max_shards is None else max_shards + 1
        progress = Progress(meta, limit, say)
        if meta["complete"] and _next_span(meta["shards"], lost, limit) is None:
            progress.end()
            return meta
        meta["complete"] = False
        tokenizer.save(out_dir)
        encoder = Encoder(tokenizer, fast)

        def encode(payload: tuple, number: int) -> tuple:
            return encode_block(encoder, payload, column, number)

        def encoded(position):
            with contextlib.closing(blocks_from(position)) as blocks:
                yield from in_order(blocks, encode, workers)

        try:
            while (span := _next_span(meta["shards"], lost, limit)) is not None:
                _make_span(out_dir, meta, lost, *span, encoded, progress)
        except MemoryError as error:
            raise DataError(
                f"the machine is out of memory; {_kept(meta)}. Run the same command with fewer --workers"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"no room left on the disk of {out_dir} ({error.strerror}); {_kept(meta)}. Make "
                    f"room and run the same command again"
                ) from error
            raise DataError(f"{error}; {_kept(meta)}. Run the same command again to go on") from error
        except DataError as error:
            raise DataError(f"{error}; {_kept(meta)}") from error
        _finish(out_dir, meta, limit)
        progress.end()
        return meta


def _take_up(out_dir: Path, meta: dict) -> set[str]:
    """Take over the shards of an earlier run of the same kind; the names of the lost and damaged ones."""
    old = read_meta(out_dir)
    if old is None:
        unknown = [path.name for path in sorted(out_dir.glob("*.bin"))]
        # a run killed between its first shard and its first record leaves just that shard
        if unknown and unknown != [shard_name(meta["dataset"], 0)]:
            raise DataError(
                f"{out_dir} holds {unknown[0]} and no meta.json, so it was not made here: take another --out-dir"
            )
        return set()
    for key in ("dataset", "made", "tokenizer", "vocab_size"):
        if old.get(key) != meta[key]:
            raise DataError(
                f"{out_dir} holds a set made with another {key} ({_difference(old.get(key), meta[key])}): "
                f"give the same options to go on with it, or another --out-dir"
            )
    for number, record in enumerate(old.get("shards", [])):
        ours = record["file"] == shard_name(meta["dataset"], number) and record.get("documents") is not None
        if not ours or (record.get("next") is None and number + 1 < len(old["shards"])):
            raise DataError(
                f"{out_dir / META_NAME} lists {record['file']} as this command never would: delete the folder"
            )
    meta |= {key: old[key] for key in ("complete", "skipped", "versions", "shards") if key in old}
    _count(meta)
    return {record["file"] for record in meta["shards"] if not is_whole(out_dir, record)}


def is_whole(folder: Path, record: dict) -> bool:
    """Whether a shard of meta.json's list is there, with as many tokens as the list says."""
    try:
        return open_shard(folder / record["file"]).n_tokens == record["tokens"]
    except DataError:
        return False


def _difference(old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} now"[:300]


def _next_span(shards: list[dict], lost: set[str], limit: int | None) -> tuple[int, int | None] | None:
    """The first missing shard and where to stop (None: the source's end); None if none is missing."""
    missing = [k for k, record in enumerate(shards) if record["file"] in lost]
    if missing:
        first = missing[0]
        return first, next((k for k in range(first, len(shards)) if k not in missing), len(shards))
    ended = bool(shards) and shards[-1].get("next") is None
    return None if ended or (limit is not None and len(shards) >= limit) else (len(shards), limit)


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}_{'train' if number else 'val'}_{number:06d}.bin"


def _make_span(out_dir: Path, meta: dict, lost: set, first: int, stop: int | None, encoded, progress) -> None:
    """Make shards first, first + 1, ... up to stop (None: to the end of the source)."""
    shards, made, eot = meta["shards"], meta["made"], meta["eot"]
    start = shards[first - 1]["next"] if first else {"position": None, "tokens": 0, "skipped": {}}
    skip = start["tokens"]
    skipped = Counter(dict.fromkeys(SKIP_REASONS, 0) | start["skipped"])  # before the block at hand
    number, shard = first, None

    def close(following: dict | None) -> bool:
        """Record the shard that is full; whether it was the last one wanted."""
        nonlocal number, shard
        record = {
            "file": shard.path.name,
            "split": "train" if number else "val",
            "tokens": shard.n_tokens,
            "documents": shard.documents,
            "sha256": shard.finish(),
            "next": following,
        }
        shard = None
        if number < len(shards) and shards[number]["sha256"] != record["sha256"]:
            raise DataError(
                f"{record['file']} came out different from its first making, so the source has "
                f"changed; delete {out_dir} and prepare it anew"
            )
        shards[number : number + 1] = [record]  # in its old place, or behind the last
        lost.discard(record["file"])
        write_meta(out_dir, _count(meta))
        number += 1
        return number == stop

    stream = encoded(start["position"])
    try:
        for block, (tokens, block_skipped, characters) in stream:
            used = min(skip, len(tokens))
            skip -= used
            opened = int(np.count_nonzero(tokens[used:] == eot))
            progress.block(block.done, characters, len(tokens) - used, opened, sum(skipped.values()))
            here = {"position": block.position, "tokens": 0, "skipped": dict(+skipped)}  # what is not 0
            if number == 0 and made["val_tokens"] is None and block.split == "train":
                if shard is None:
                    raise DataError("the validation text has no document: give another")
                if close(here):
                    return
            while used < len(tokens):
                if shard is None:
                    target = made["shard_tokens"] if number else made["val_tokens"] or MAX_TOKENS
                    name, dtype = shard_name(meta["dataset"], number), np.dtype(meta["dtype"])
                    shard = OpenShard(out_dir / name, target, dtype.newbyteorder("<"))
                used += shard.take(tokens[used:], eot)
                if shard.n_tokens == shard.target and close(here | {"tokens": used}):
                    return
            skipped.update(block_skipped)
            if not shards and shard is None and sum(skipped.values()) >= 1000:
                break  # not one document among the first thousand rows
        if shard is not None:
            close(None)
        elif not shards:
            raise DataError(_nothing_found(skipped))
        elif number == len(shards):  # the source ended exactly with a shard
            shards[-1]["next"] = None
        else:
            raise DataError(f"the source ended before {shards[number]['file']}, so it has changed")
        meta["skipped"] = dict(skipped)
        write_meta(out_dir, _count(meta))
    finally:
        if shard is not None:
            shard.abandon()
        stream.close()


def _nothing_found(skipped: dict) -> str:
    said = {
        "not_json": "are no JSON objects, one a line",
        "not_text": "have no text under the chosen column (choose it with --text-column)",
        "not_utf8": "are no UTF-8 (convert them, e.g. iconv -f latin1 -t utf-8)",
        "too_long": "are too long",
        "not_encodable": "are beyond the tokenizer",
        "empty": "are empty",
    }
    reasons = [f"{skipped[reason]:,} {what}" for reason, what in said.items() if skipped[reason]]
    return f"no document found: of {sum(skipped.values()):,} rows " + ", ".join(reasons or ["none is there"])


def _count(meta: dict) -> dict:
    """The meta, with its totals brought up to date."""
    meta |= totals(shards := meta["shards"])
    if shards and shards[-1].get("next") is not None:
        meta["skipped"] = dict.fromkeys(SKIP_REASONS, 0) | shards[-1]["next"]["skipped"]
    return meta


def _finish(out_dir: Path, meta: dict, limit: int | None) -> None:
    shards = meta["shards"]
    if len(shards) < 2 and limit != 1:
        tokens = shards[0]["tokens"]
        (out_dir / shards[0]["file"]).unlink()  # in the way of a run with another --val-tokens
        (out_dir / META_NAME).unlink(missing_ok=True)
        raise DataError(
            f"the whole input has {tokens:,} tokens, all of which went into the validation shard: "
            + (
                f"run again with --val-tokens {max(1, tokens // 20)}, say"
                if meta["made"]["val_tokens"]
                else "the training files have no document"
            )
        )
    meta["complete"] = True
    write_meta(out_dir, _count(meta))


def _kept(meta: dict) -> str:
    n = len(meta["shards"])
    return f"{n} whole shard{'' if n == 1 else 's'} kept"
