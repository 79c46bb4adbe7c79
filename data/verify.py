"""Check a folder of token shards: headers, sizes, checksums, range of ids, documents, and a sample to look at.

    python -m data.verify data/fineweb_edu

Everything is compared with meta.json where there is one. Folders without (published sets, nanoGPT's train.bin) are
checked against --tokenizer, GPT-2's unless another is named. Exits with 1 and one sentence a fault.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import DataError, console
from data.files import expanded
from data.identity import read_through
from data.meta import read_meta
from data.shards import find_shards, open_shard
from data.tokenizers import load_tokenizer


def check_shard(path: Path, record: dict, n_vocab: int, eot: int | None) -> tuple[str, int, int, list[str]]:
    """(a line about it, tokens, documents, faults in one sentence each) of one shard, read from end to end."""
    try:
        content, documents = read_through(path, eot)
    except DataError as error:
        return f"{path.name:32} FAULT", 0, 0, [str(error)]
    faults = []
    if content.highest >= n_vocab:
        faults.append(f"{path} has {content.top()}, but the vocabulary ends at {n_vocab - 1:,}")
    for what, there in (("tokens", content.tokens), ("documents", documents)):
        if record.get(what) not in (None, there):
            faults.append(f"{path} has {there:,} {what}, meta.json says {record[what]:,}")
    if record.get("sha256") not in (None, content.sha256):
        faults.append(f"{path} is not what was written: its SHA-256 differs from meta.json's; make it again")
    line = f"{path.name:32} {content.tokens:>13,} tokens  {documents:>9,} documents  ids to {content.highest:>6,}  "
    return line + ("FAULT" if faults else "ok"), content.tokens, documents, faults


def verify(folder: Path, tokenizer_name: str = "gpt2") -> list[str]:
    """Check a folder, saying what is there; returns the faults, one sentence each."""
    meta = read_meta(folder) or {}
    val, train = find_shards(folder, "val"), find_shards(folder, "train")
    if not (paths := val + train):
        return [f"{folder} holds no shards"]
    tokenizer = load_tokenizer(meta.get("tokenizer", tokenizer_name), folder)
    n_vocab = meta.get("vocab_size", tokenizer.n_vocab)
    records = {record["file"]: record for record in meta.get("shards", [])}
    kinds = {"training": train, "validation": val}
    faults = [f"{folder} has no {kind} shards" for kind, found in kinds.items() if not found]
    if not meta.get("complete", True):
        faults.append(f"{folder} is not finished: run its prepare.py again with the same options")
    if meta and (n := len(meta.get("byte_lengths", []))) != n_vocab:
        faults.append(f"{folder}/meta.json has {n} byte lengths for {n_vocab} ids")
    for path in sorted(folder.glob("[!.]*.bin")):
        if records and path.name not in records:
            faults.append(f"{path} is not in meta.json, so nothing reads it")
    tokens = documents = 0
    with ThreadPoolExecutor(console.cores()) as threads:  # reading and hashing leave Python's lock
        there = [records.get(path.name, {}) for path in paths]
        checks = threads.map(lambda *shard: check_shard(*shard, n_vocab, tokenizer.eot), paths, there)
        for line, n_tokens, n_documents, wrong in checks:
            print(line)
            faults += wrong
            tokens, documents = tokens + n_tokens, documents + n_documents
    print(f"{len(paths)} shards, {tokens:,} tokens, {documents:,} documents, tokenizer {tokenizer.name}")
    if not faults and tokens:
        first, last = open_shard(paths[0]).tokens, open_shard(paths[-1]).tokens
        if "documents" in records.get(paths[0].name, {}) and first[0] != tokenizer.eot:
            faults.append(f"{paths[0]} does not begin with end-of-text")
        for name, sample in (("first", first[:60]), ("last", last[-60:])):
            print(f"{name} tokens: {tokenizer.decode(sample.tolist())!r}")
    return faults


def main(argv: list[str] | None = None) -> None:
    parser = console.Parser(__doc__)
    parser.add_argument("folder", type=expanded, metavar="DIR")
    parser.add_argument("--tokenizer", default="gpt2", help="of shards without meta.json (%(default)s)")
    args = parser.parse_args(argv)
    with console.sentences():
        faults = verify(args.folder, args.tokenizer)
        for fault in faults:
            print(f"fault: {fault}", file=sys.stderr)
        if faults:
            raise DataError(f"{len(faults)} fault{'' if len(faults) == 1 else 's'} in {args.folder}")
        print("all is well")


if __name__ == "__main__":
    main()
