"""Check a folder of token shards: headers, sizes, checksums, range of ids, documents, and a sample to look at.

    python -m data.verify data/fineweb_edu

Checksums and document counts are compared where there is a meta.json; --quick leaves them out. Shards without one
(published sets, nanoGPT's train.bin) are checked against --tokenizer, GPT-2's unless told otherwise.
Exits with 1 and one sentence a fault.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import DataError
from data.files import sha256 as sha256_of
from data.meta import read_meta
from data.shards import find_shards, open_shard
from data.tokenizers import load_tokenizer


def check_shard(path: Path, record: dict | None, n_vocab: int, eot: int | None, quick: bool) -> dict:
    """Facts of one shard: tokens, documents, highest id, and `faults`, a list of sentences."""
    faults = []
    try:
        shard = open_shard(path)
    except DataError as error:
        return {"tokens": 0, "documents": 0, "highest": 0, "faults": [str(error)]}
    highest = documents = 0
    tokens = shard.tokens
    for start in range(0, len(tokens), 1 << 22):
        piece = tokens[start : start + (1 << 22)]
        highest = max(highest, int(piece.max()))
        documents += int(np.count_nonzero(piece == eot)) if eot is not None else 0
    if highest >= n_vocab:
        faults.append(f"{path} has the token id {highest:,}, but the vocabulary ends at {n_vocab - 1:,}")
    if record is not None:
        if record["tokens"] != len(tokens):
            faults.append(f"{path} has {len(tokens):,} tokens, meta.json says {record['tokens']:,}")
        if record.get("documents") != documents:
            faults.append(f"{path} has {documents:,} documents, meta.json says {record['documents']:,}")
        if not quick and sha256_of(path) != record["sha256"]:
            faults.append(
                f"{path} is not what was written: its SHA-256 differs from meta.json's; make it again"
            )
    return {"tokens": len(tokens), "documents": documents, "highest": highest, "faults": faults}


def verify(folder: Path, tokenizer_name: str = "gpt2", quick: bool = False, say=print) -> list[str]:
    """Check a folder, saying what is there; returns the faults, one sentence each."""
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta["tokenizer"] if meta else tokenizer_name, folder)
    n_vocab = meta["vocab_size"] if meta else tokenizer.n_vocab
    records = {record["file"]: record for record in (meta or {}).get("shards", [])}
    paths = find_shards(folder, "val") + find_shards(folder, "train")
    faults = []
    if not paths:
        return [f"{folder} holds no shards"]
    if not find_shards(folder, "train"):
        faults.append(f"{folder} has no training shards")
    if not find_shards(folder, "val"):
        faults.append(f"{folder} has no validation shard")
    if meta is not None and not meta.get("complete", True):
        faults.append(f"{folder} is not finished: run its prepare.py again with the same options")
    if meta is not None and len(meta.get("byte_lengths", [])) != n_vocab:
        faults.append(
            f"{folder}/meta.json has {len(meta.get('byte_lengths', []))} byte lengths for {n_vocab} ids"
        )
    for name in records:
        if not (folder / name).is_file():
            faults.append(f"{folder / name} is missing")
    if records:
        faults += [f"{path} is not in meta.json" for path in paths if path.name not in records]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # reading and hashing leave Python's lock
        results = threads.map(
            lambda path: check_shard(path, records.get(path.name), n_vocab, tokenizer.eot, quick), paths
        )
        totals = [0, 0]
        for path, result in zip(paths, results, strict=True):
            faults += result["faults"]
            totals = [totals[0] + result["tokens"], totals[1] + result["documents"]]
            say(
                f"{path.name:32} {result['tokens']:>13,} tokens  {result['documents']:>9,} documents  "
                f"ids to {result['highest']:>6,}  {'FAULT' if result['faults'] else 'ok'}"
            )
    first = open_shard(paths[0]) if not faults else None
    if (
        first is not None
        and records
        and first.n_tokens
        and first.tokens[0] != tokenizer.eot
        and tokenizer.eot
    ):
        faults.append(f"{paths[0]} does not begin with end-of-text")
    say(f"{len(paths)} shards, {totals[0]:,} tokens, {totals[1]:,} documents, tokenizer {tokenizer.name}")
    if first is not None and first.n_tokens:
        for name, path in (("first", paths[0]), ("last", paths[-1])):
            sample = open_shard(path).tokens[:60] if name == "first" else open_shard(path).tokens[-60:]
            say(f"{name} tokens: {tokenizer.decode(sample.tolist())!r}")
    return faults


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--tokenizer", default="gpt2", help="of shards without meta.json (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="leave out the checksums")
    args = parser.parse_args(argv)
    try:
        faults = verify(args.folder, args.tokenizer, args.quick)
    except (DataError, OSError) as error:
        faults = [str(error)]
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    if faults:
        sys.exit(f"error: {len(faults)} fault{'' if len(faults) == 1 else 's'} in {args.folder}")
    print("all is well")


if __name__ == "__main__":
    main()
