"""From blocks of text to a folder of shards: in parallel, resumable, the same bytes every time.

The stream of tokens is defined by the documents' order alone. Threads encode blocks (the libraries that do it leave
Python's lock); this one reads them, puts the results in order, and cuts the stream into shards. After each shard
meta.json says where the next one starts: the position of a block in the source, and how many of its tokens belong to
shards before. A killed run is taken up there, so are shards that were lost later.
"""

import contextlib
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data import DataError, console
from data.encoder import Encoder
from data.files import write_atomic
from data.identity import lost, shard_record
from data.meta import META_NAME, new_meta, read_meta, totals, versions, write_meta
from data.progress import Progress
from data.shards import MAX_TOKENS, header_bytes
from data.sources import SKIP_REASONS, Block, read_block

CHECK_ONE_IN = 100  # of the documents, beside all of the first block, see data.encoder


def checked_of(number: int, n_texts: int) -> range:
    """Which of the texts of the `number`-th block are held against the tokenizer's own library."""
    # 37 and 100 have no factor in common, so blocks of one document get their turn
    return range(-37 * number % CHECK_ONE_IN, n_texts, CHECK_ONE_IN) if number else range(n_texts)


def in_order(blocks: Iterator[Block], work: Callable, workers: int) -> Iterator[tuple]:
    """(block, work(block, number)) in the blocks' order, computed by threads a few blocks ahead."""
    threads, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for number, block in enumerate(blocks):
            waiting.append((block, threads.submit(work, block, number)))
            if len(waiting) > 2 * workers + 2:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        threads.shutdown(cancel_futures=True)


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
) -> dict:
    """Make, or finish, the set of shards in `out_dir`, of which the caller holds the lock; returns its meta.

    blocks_from(position) gives the source's blocks from a position (None: from the start). source: what identifies
    it; a folder made from anything else is refused. val_tokens: length of the validation shard, number 0; None: it
    ends where the source's blocks say "train". max_shards: stop after so many training shards. workers: threads that
    encode. fast: see data.encoder. Raises DataError, with every whole shard and its record on the disk.
    """
    if tokenizer.eot is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no end-of-text token to open documents with")
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
    _take_up(out_dir, meta)
    shards, limit = meta["shards"], None if max_shards is None else max_shards + 1
    missing = lost(out_dir, shards)
    progress = Progress(meta, limit)

    def enough() -> bool:
        ended = bool(shards) and shards[-1].get("next") is None
        return ended or (limit is not None and len(shards) >= limit)

    if meta["complete"] and enough() and not missing:
        progress.end()
        return meta
    meta["complete"] = False
    tokenizer.save(out_dir)
    encoder = Encoder(tokenizer, fast)

    def encode(block: Block, number: int) -> tuple:
        """Tokens of the `number`-th block read, its rows skipped by reason, its documents and characters of text."""
        texts, skipped = read_block(block, column)
        block.content = b""  # read: only the tokens wait for their turn
        tokens, skipped["not_encodable"] = encoder.encode(texts, checked_of(number, len(texts)), block.opens)
        return tokens, skipped, len(texts) * block.opens, sum(map(len, texts))

    def encoded(position) -> Iterator[tuple]:
        with contextlib.closing(blocks_from(position)) as blocks:
            yield from in_order(blocks, encode, workers)

    try:
        for number in missing:
            _make_shards(out_dir, meta, number, number + 1, encoded, progress)
        if not enough():
            _make_shards(out_dir, meta, len(shards), limit, encoded, progress)
    except (DataError, OSError, MemoryError) as error:
        said = console.explain(error) or str(error)
        if shards:  # else there is nothing to go on from, and what was said is the whole of it
            kept = f"{len(shards)} whole shard{'' if len(shards) == 1 else 's'} kept in {out_dir}"
            said += f"; {kept}; once that is mended the same command goes on"
        raise DataError(said) from error
    if len(shards) < 2 and limit != 1:
        (out_dir / shards[0]["file"]).unlink()  # in the way of a run with another --val-tokens
        (out_dir / META_NAME).unlink()
        cure = f"run again with --val-tokens {max(1, shards[0]['tokens'] // 20)}, say"
        raise DataError(
            f"the whole input has {shards[0]['tokens']:,} tokens, all of which went into the validation shard: "
            + (cure if val_tokens else "the training files have no document")
        )
    meta["complete"] = True
    _record(out_dir, meta)
    progress.end()
    return meta


def shard_name(prefix: str, number: int) -> str:
    return f"{prefix}_{'train' if number else 'val'}_{number:06d}.bin"


def _take_up(out_dir: Path, meta: dict) -> None:
    """Take over into `meta` what an earlier run of the same kind has made."""
    old = read_meta(out_dir)
    if old is None:
        unknown = [path.name for path in sorted(out_dir.glob("*.bin"))]
        # a run killed between its first shard and its first record leaves just that shard
        if unknown and unknown != [shard_name(meta["dataset"], 0)]:
            raise DataError(f"{out_dir} holds {unknown[0]} but was not made here: take another --out-dir")
        return
    for key in ("dataset", "made", "tokenizer", "vocab_size"):
        if old.get(key) != meta[key]:
            how = f"another {key} ({_difference(old.get(key), meta[key])})"
            raise DataError(f"{out_dir} holds a set made with {how}: give the same, or another --out-dir")
    for number, record in enumerate(old.get("shards", [])):
        ours = record["file"] == shard_name(meta["dataset"], number) and record.get("documents") is not None
        if not ours or (record.get("next") is None and number + 1 < len(old["shards"])):
            raise DataError(f"{out_dir / META_NAME} lists {record['file']}, not made here: delete the folder")
    meta |= {
        key: old[key]
        for key in ("complete", "skipped", "versions", "shards", "documents", "tokens")
        if key in old
    }


def _difference(old, new) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
        return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"{old!r} there, {new!r} now"[:300]


def _make_shards(out_dir: Path, meta: dict, first: int, stop: int | None, encoded, progress) -> None:
    """Make shards first, first + 1, ... up to stop (None: to the end of the source)."""
    shards, made = meta["shards"], meta["made"]
    start = shards[first - 1]["next"] if first else {"position": None, "tokens": 0, "skipped": {}}
    skip, number, n_tokens = start["tokens"], first, 0
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    skipped = Counter(dict.fromkeys(SKIP_REASONS, 0) | start["skipped"])  # before the block at hand

    def close(following: dict | None) -> bool:
        """Write and record the shard whose tokens wait; whether it was the last one wanted."""
        nonlocal number, n_tokens
        path = out_dir / shard_name(meta["dataset"], number)
        waiting.seek(0)
        write_atomic(path, chain([header_bytes(n_tokens, dtype)], iter(partial(waiting.read, 1 << 22), b"")))
        waiting.seek(0)
        waiting.truncate()
        n_tokens = 0
        record = shard_record(path, "train" if number else "val", meta["eot"]) | {"next": following}
        if number < len(shards) and shards[number]["sha256"] != record["sha256"]:
            raise DataError(f"{path.name} came out different: the source has changed; prepare {out_dir} anew")
        shards[number : number + 1] = [record]  # in its old place, or behind the last
        _record(out_dir, meta)
        number += 1
        return number == stop

    # a shard's tokens wait on the disk, in a file without a name, until their number is known: it stands at the front
    with (
        console.writing(out_dir),
        tempfile.TemporaryFile(dir=out_dir) as waiting,
        contextlib.closing(encoded(start["position"])) as stream,
    ):
        for block, (tokens, block_skipped, documents, characters) in stream:
            used = min(skip, len(tokens))
            skip -= used
            progress.block(block.done, documents, characters, len(tokens) - used)
            here = {"position": block.position, "tokens": 0, "skipped": dict(+skipped)}  # what is not 0
            if number == 0 and made["val_tokens"] is None and block.split == "train":
                if not n_tokens:
                    raise DataError("the validation text has no document: give another")
                if close(here):
                    return
            while used < len(tokens):
                target = made["shard_tokens"] if number else made["val_tokens"] or MAX_TOKENS
                piece = tokens[used : used + target - n_tokens]
                waiting.write(np.ascontiguousarray(piece, dtype).data)
                used, n_tokens = used + len(piece), n_tokens + len(piece)
                if n_tokens == target and close(here | {"tokens": used}):
                    return
            skipped.update(block_skipped)
            if not shards and not n_tokens and sum(skipped.values()) >= 1000:
                break  # not one document among the first thousand rows
        if n_tokens:
            close(None)
        elif not shards:
            raise DataError(_nothing_found(skipped))
        elif number == len(shards):  # the source ended exactly with a shard
            shards[-1]["next"] = None
        else:
            raise DataError(f"the source ended before {shards[number]['file']}, so it has changed")
    meta["skipped"] = dict(skipped)
    _record(out_dir, meta)


def _nothing_found(skipped: dict) -> str:
    reasons = [f"{skipped[reason]:,} {what}" for reason, what in SKIP_REASONS.items() if skipped[reason]]
    return f"no document found: of {sum(skipped.values()):,} rows " + ", ".join(reasons or ["none is there"])


def _record(out_dir: Path, meta: dict) -> None:
    """Write the meta, with its totals brought up to date."""
    meta |= totals(shards := meta["shards"])
    if shards and shards[-1].get("next") is not None:
        meta["skipped"] = dict.fromkeys(SKIP_REASONS, 0) | shards[-1]["next"]["skipped"]
    write_meta(out_dir, meta)
