"""From blocks of text to a folder of shards: in parallel, resumable, the same bytes every time.

The stream of tokens is defined by the documents' order alone. Worker processes encode blocks; this process
puts the results in order, cuts the stream into shards (number 0 has val_tokens, or all that the source holds
out; the others shard_tokens) and renames each when it is whole. After each shard meta.json says where the next one starts: the position
of a block in the source, and how many of its tokens belong to shards before. A killed run is taken up
there, so are shards that were lost later.
"""

import contextlib
import errno
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data import DataError
from data.fast_bpe import FastEncoder
from data.files import publish
from data.files import sha256 as sha256_of
from data.meta import read_meta, write_meta
from data.shards import MAX_TOKENS, dtype_for, header_bytes, open_shard
from data.sources import Block, read_payload
from data.tokenizers import load_tokenizer

SKIP_REASONS = ("empty", "not_text", "not_json", "not_encodable")


# ---------------------------------------------------------------------------------------------- workers

_worker: dict = {}


def _start_worker(spec: dict, folder: str, column: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    parent = multiprocessing.parent_process()
    if parent is not None:  # a parent killed outright cannot say goodbye

        def leave_with_parent():
            parent.join()
            os._exit(1)

        threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker.update(encoder=FastEncoder(load_tokenizer(spec, folder)), column=column)


def _encode_block(payload: tuple) -> tuple[np.ndarray, dict[str, int], int]:
    """Tokens of a block, rows skipped by reason, and bytes of text."""
    encoder: FastEncoder = _worker["encoder"]
    texts, opens, skipped = read_payload(payload, _worker["column"])
    skipped["not_encodable"] = 0
    try:
        tokens = encoder.encode_parts(texts, opens)
    except BaseException as error:  # tiktoken panics on megabytes of mixed white space, outside Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        parts = []
        for text, opening in zip(texts, opens, strict=True):
            try:
                parts.append(encoder.encode_parts([text], [opening]))
            except BaseException as one:
                if isinstance(one, KeyboardInterrupt | SystemExit | MemoryError):
                    raise
                skipped["not_encodable"] += 1
        tokens = np.concatenate([np.empty(0, encoder.dtype), *parts])
    return tokens, skipped, sum(map(len, texts))


def _encoded(blocks: Iterator[Block], pool: ProcessPoolExecutor | None, ahead: int) -> Iterator[tuple]:
    """(block, result) in the blocks' order, with at most `ahead` blocks read but not yet handed out."""
    if pool is None:
        for block in blocks:
            yield block, _encode_block(block.payload)
        return
    waiting: deque[tuple[Block, Future]] = deque()
    for block in blocks:
        waiting.append((block, pool.submit(_encode_block, block.payload)))
        block.payload = ()
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


# --------------------------------------------------------------------------------------------- one shard


class _OpenShard:
    """A shard being written beside its name; its tokens pass through and never pile up in memory."""

    def __init__(self, path: Path, target: int, dtype: np.dtype):
        self.path, self.target, self.dtype = path, target, dtype
        self.n_tokens = 0
        self.temporary = path.with_name(path.name + ".tmp")
        self._file = open(self.temporary, "wb")  # noqa: SIM115
        header = header_bytes(target, dtype)
        self._file.write(header)
        self._hash = hashlib.sha256(header)

    def write(self, tokens: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(tokens)).cast("B")
        self._file.write(data)
        self._hash.update(data)
        self.n_tokens += len(tokens)

    def finish(self) -> str:
        """Flush, rename; the file's SHA-256."""
        if self.n_tokens != self.target:  # the last one: its header was a guess
            self._file.seek(0)
            self._file.write(header_bytes(self.n_tokens, self.dtype))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = self._hash.hexdigest() if self.n_tokens == self.target else sha256_of(self.temporary)
        publish(self.temporary, self.path)
        return digest

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which on a full disk fails again
            self._file.close()
        self.temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the set


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
    say: Callable[[str], None] = print,
) -> dict:
    """Make, or finish, the set of shards in `out_dir`; returns its meta.

    blocks_from(position) gives the source's blocks from a position (None: from the start). source: what
    identifies it; kept in meta.json, and a folder made from anything else is refused. val_tokens: length of
    the validation shard; None: it ends where the source's blocks say "train". max_shards: stop
    after so many training shards (a later call with more goes on). workers: processes that encode; 0: this
    one does. Raises DataError, with every whole shard and its record on the disk.
    """
    if tokenizer.eot is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no end-of-text token to open documents with")
    dtype = dtype_for(tokenizer.n_vocab)
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        for leftover in out_dir.glob("*.tmp"):
            leftover.unlink()
        meta = {
            "format": 1,
            "dataset": prefix,
            "complete": False,
            "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "dtype": dtype.name,
            "documents": 0,
            "tokens": {"train": 0, "val": 0},
            "skipped": dict.fromkeys(SKIP_REASONS, 0),
            "made": {"source": source, "val_tokens": val_tokens, "shard_tokens": shard_tokens},
            "versions": _versions(),
            "shards": [],
            "byte_lengths": tokenizer.byte_lengths().tolist(),
        }
        _take_up(out_dir, meta)
        shards: list[dict] = meta["shards"]
        limit = None if max_shards is None else max_shards + 1
        progress = _Progress(meta, limit, say)
        if meta["complete"] and _next_span(shards, limit) is None:
            progress.end()
            return meta
        meta["complete"] = False
        tokenizer.save(out_dir)
        pool = None
        try:
            while (span := _next_span(shards, limit)) is not None:
                if pool is None and workers:
                    pool = ProcessPoolExecutor(
                        workers,
                        multiprocessing.get_context("spawn"),  # a fork would inherit the lock and any threads
                        _start_worker,
                        (tokenizer.spec, str(out_dir), column),
                    )
                elif not workers:
                    _worker.update(encoder=FastEncoder(tokenizer), column=column)
                _make_span(out_dir, prefix, dtype, meta, *span, blocks_from, pool, 2 * workers + 2, progress)
        except BrokenProcessPool as error:
            raise DataError(
                f"a worker process died, most likely for want of memory; {_kept(shards)}. Run the same command "
                "again, with fewer --workers if it comes back"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DataError(
                    f"no room left on the disk of {out_dir} ({error.strerror}); {_kept(shards)}. Make "
                    f"room and run the same command again"
                ) from error
            raise DataError(f"{error}; {_kept(shards)}. Run the same command again to go on") from error
        except DataError as error:
            raise DataError(f"{error}; {_kept(shards)}") from error
        finally:
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        _finish(out_dir, meta, limit)
        progress.end()
        return meta


def _take_up(out_dir: Path, meta: dict) -> None:
    """Take over the shards of an earlier run of the same kind, marking lost and damaged ones."""
    old = read_meta(out_dir)
    if old is None:
        strangers = [path.name for path in sorted(out_dir.glob("*.bin"))]
        # a run killed between its first shard and its first record leaves just that shard
        if strangers and strangers != [shard_name(meta["dataset"], 0)]:
            raise DataError(
                f"{out_dir} holds {strangers[0]} and no meta.json, so it is somebody else's: take another "
                f"--out-dir"
            )
        return
    for key in ("dataset", "made", "tokenizer", "vocab_size"):
        if old.get(key) != meta[key]:
            raise DataError(
                f"{out_dir} holds a set made with another {key} ({_difference(old.get(key), meta[key])}): "
                f"give the same options to go on with it, or another --out-dir"
            )
    meta |= {key: old[key] for key in ("complete", "skipped", "documents", "tokens", "versions")}
    meta["shards"] = [dict(record) for record in old["shards"]]
    for record in meta["shards"]:
        try:
            record["whole"] = open_shard(out_dir / record["file"]).n_tokens == record["tokens"]
        except DataError:
            record["whole"] = False


def _difference(old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} now"[:300]


def _next_span(shards: list[dict], limit: int | None) -> tuple[int, int | None] | None:
    """The first missing shard and where to stop (None: the source's end); None if none is missing."""
    first = next((k for k, record in enumerate(shards) if not record["whole"]), len(shards))
    if first == len(shards):
        ended = bool(shards) and shards[-1]["next"] is None
        return None if ended or (limit is not None and first >= limit) else (first, limit)
    return first, next((k for k in range(first, len(shards)) if shards[k]["whole"]), len(shards))


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}_{'train' if number else 'val'}_{number:06d}.bin"


def _make_span(out_dir, prefix, dtype, meta, first, stop, blocks_from, pool, ahead, progress) -> None:
    """Make shards first, first + 1, ... up to stop (None: to the end of the source)."""
    shards = meta["shards"]
    made = meta["made"]
    start = shards[first - 1]["next"] if first else {"position": None, "tokens": 0, "skipped": {}}
    skip = start["tokens"]
    skipped = dict.fromkeys(SKIP_REASONS, 0) | start["skipped"]  # before the block at hand
    number, shard, documents = first, None, 0
    blocks = blocks_from(start["position"])

    def close(following: dict | None) -> None:
        nonlocal number, shard, documents
        record = {
            "file": shard.path.name,
            "split": "train" if number else "val",
            "tokens": shard.n_tokens,
            "documents": documents,
            "sha256": shard.finish(),
            "next": following,
            "whole": True,
        }
        shard = None
        if number < len(shards):
            if shards[number]["sha256"] != record["sha256"]:
                raise DataError(
                    f"{record['file']} came out different from its first making, so the source has "
                    f"changed; delete {out_dir} and prepare it anew"
                )
            shards[number] = record
        else:
            shards.append(record)
        _record(out_dir, meta)
        number, documents = number + 1, 0

    try:
        for block, (tokens, block_skipped, n_bytes) in _encoded(blocks, pool, ahead):
            used = min(skip, len(tokens))
            skip -= used
            progress.block(block, n_bytes, tokens[used:], meta["eot"], skipped)
            if number == 0 and made["val_tokens"] is None and block.split == "train":
                if shard is None:
                    raise DataError("the validation text has no document: give another")
                close({"position": block.position, "tokens": 0, "skipped": _nonzero(skipped)})
                if number == stop:
                    return
            while used < len(tokens):
                if shard is None:
                    target = made["shard_tokens"] if number else made["val_tokens"] or MAX_TOKENS
                    shard = _OpenShard(out_dir / shard_name(prefix, number), target, dtype)
                piece = tokens[used : used + shard.target - shard.n_tokens]
                shard.write(piece)
                documents += int(np.count_nonzero(piece == meta["eot"]))
                used += len(piece)
                if shard.n_tokens == shard.target:
                    close({"position": block.position, "tokens": used, "skipped": _nonzero(skipped)})
                    if number == stop:
                        return
            for reason, count in block_skipped.items():
                skipped[reason] += count
            if not shards and shard is None and sum(skipped.values()) >= 1000:
                break  # not one document among the first thousand rows
        if shard is not None:
            close(None)
        elif not shards:
            raise DataError(
                f"no document found: of {sum(skipped.values()):,} rows {skipped['not_json']:,} are no "
                f"JSON objects, "
                f"{skipped['not_text']:,} have no text under the chosen column, {skipped['empty']:,} are "
                f"empty; choose the column with --text-column"
            )
        elif number == len(shards):  # the source ended exactly with a shard
            shards[-1]["next"] = None
        else:
            raise DataError(f"the source ended before {shards[number]['file']}, so it has changed")
        meta["skipped"] = skipped
        _record(out_dir, meta)
    finally:
        if shard is not None:
            shard.abandon()
        blocks.close()


def _versions() -> dict[str, str]:
    """What the tokens may depend on besides the source and the options."""
    return {name: version(name) for name in ("tiktoken", "tokenizers")} | {
        "unicode": unicodedata.unidata_version
    }


def _nonzero(counts: dict) -> dict:
    return {reason: count for reason, count in counts.items() if count}


def _record(out_dir: Path, meta: dict) -> None:
    """Bring the totals up to date and write meta.json."""
    shards = meta["shards"]
    meta["documents"] = sum(record["documents"] for record in shards)
    meta["tokens"] = {
        split: sum(record["tokens"] for record in shards if record["split"] == split)
        for split in ("train", "val")
    }
    if shards[-1]["next"] is not None:
        meta["skipped"] = dict.fromkeys(SKIP_REASONS, 0) | shards[-1]["next"]["skipped"]
    saved = [{key: value for key, value in record.items() if key != "whole"} for record in shards]
    write_meta(out_dir, meta | {"shards": saved})


def _finish(out_dir: Path, meta: dict, limit: int | None) -> None:
    shards = meta["shards"]
    if len(shards) < 2 and limit != 1:
        tokens = shards[0]["tokens"]
        (out_dir / shards[0]["file"]).unlink()  # in the way of a run with another --val-tokens
        (out_dir / "meta.json").unlink(missing_ok=True)
        raise DataError(
            f"the whole input has {tokens:,} tokens, all of which went into the validation shard: "
            + (
                f"run again with --val-tokens {max(1, tokens // 20)}, say"
                if meta["made"]["val_tokens"]
                else "the training files have no document"
            )
        )
    meta["complete"] = True
    _record(out_dir, meta)


def _kept(shards: list[dict]) -> str:
    return f"{len(shards)} whole shard{'' if len(shards) == 1 else 's'} kept"


@contextlib.contextmanager
def folder_lock(folder: Path):
    """Hold a folder until this process is done or dead; DataError if another one has it."""
    with open(folder / "prepare.lock", "a+") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                raise DataError(
                    f"another run is preparing {folder} at this moment: wait for it, or take another --out-dir"
                ) from error
            print(f"note: {folder} cannot be locked ({error.strerror}); run only one preparation there")
        yield


# ----------------------------------------------------------------------------------------------- progress


class _Progress:
    """One line that says how far it is: rewritten on a terminal, every half minute elsewhere."""

    def __init__(self, meta: dict, limit: int | None, say: Callable[[str], None]):
        self.meta, self.limit, self.say = meta, limit, say
        self.live = sys.stdout.isatty()
        self.began = self.shown = time.perf_counter()
        self.documents = self.tokens = self.characters = 0
        self.first_done = None

    def block(self, block: Block, characters: int, tokens: np.ndarray, eot: int, skipped: dict) -> None:
        self.documents += int(np.count_nonzero(tokens == eot))
        self.tokens += len(tokens)
        self.characters += characters
        now = time.perf_counter()
        if self.first_done is None:
            self.first_done = block.done
        if now - self.shown >= (0.5 if self.live else 30):
            self.shown = now
            self._show(self._line(now, block.done, sum(skipped.values())))

    def _line(self, now: float, done: float | None, skipped: int) -> str:
        seconds = now - self.began
        left = "?"
        made, shards = self.meta["made"], len(self.meta["shards"])
        if self.limit is not None:
            all_tokens = (made["val_tokens"] or 0) + (self.limit - 1) * made["shard_tokens"]
            here = sum(self.meta["tokens"].values())
            left = _duration((all_tokens - here) * seconds / max(1, self.tokens))
        elif done is not None and done > self.first_done:
            left = _duration((1 - done) * seconds / (done - self.first_done))
        return (
            f"{self.documents:,} documents  {self.tokens / 1e6:,.1f}M tokens  "
            f"{self.tokens / 1e6 / seconds:.2f}M/s  "
            f"{self.characters / 1e6 / seconds:.1f} MB/s  {shards} shards  {skipped:,} skipped  {left} left"
        )

    def _show(self, line: str) -> None:
        if self.live:
            print("\r\033[K" + line, end="", flush=True)
        else:
            self.say(line)

    def end(self) -> None:
        if self.live and self.shown > self.began:
            print()
        seconds = time.perf_counter() - self.began
        meta = self.meta
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in _nonzero(meta["skipped"]).items())
        what = (
            f"{meta['documents']:,} documents, {meta['tokens']['train']:,} training and "
            f"{meta['tokens']['val']:,} "
            f"validation tokens in {len(meta['shards'])} shards" + (f"; skipped {skipped}" if skipped else "")
        )
        if not self.tokens:
            self.say(f"already complete, nothing to do: {what}")
        else:
            self.say(
                f"done: {what}; {self.tokens:,} tokens in {seconds:.1f} s, "
                f"{self.tokens / 1e6 / seconds:.2f}M a second"
            )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
