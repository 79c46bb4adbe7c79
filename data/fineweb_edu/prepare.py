"""FineWeb-Edu, or any text of yours, as token shards.

    python data/fineweb_edu/prepare.py
        streams the 10B-token sample from the hub
    python data/fineweb_edu/prepare.py --max-shards 25
        2.5B tokens of it, and no more
    python data/fineweb_edu/prepare.py --pretokenized kjj0/finewebedu10B-gpt2
        downloads ready shards instead
    python data/fineweb_edu/prepare.py --input a.jsonl.zst b.parquet --out-dir data/mine --val-tokens 1000000
        takes text of yours, the first million tokens of it for validation
    python data/fineweb_edu/prepare.py --input a.jsonl.xz b.jsonl.xz --val-input held_out.jsonl --out-dir data/mine
        takes all of another text for validation

Interrupted in any way, the same command goes on from the last whole shard, and what comes out is the same, byte for
byte, for any number of workers and interruptions. `python -m data.verify DIR` checks it.

Each document is opened by <|endoftext|> and encoded as ordinary text. Shard 0 is for validation, the others for
training. Of --input files .jsonl has one object a line, .txt is one document, and both may be packed (.gz .zst .xz .bz2).
"""

import argparse
import filecmp
import functools
import hashlib
import re
import sys
from pathlib import Path

if not __package__:  # run as a file: let `import data` find the project
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data import DataError, console, ready_made
from data.console import whole
from data.encoder import may_cut
from data.files import expanded, folder_lock
from data.pipeline import prepare_shards
from data.sources import check_files, hub_blocks, hub_stream, local_blocks
from data.tokenizers import load_tokenizer


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser, here = console.Parser(__doc__), Path(__file__).resolve().parent
    add, files = parser.add_argument, {"type": expanded, "nargs": "+", "metavar": "FILE"}
    add("--input", **files, help="local files instead of the hub, in this order")
    add("--val-input", **files, help="held-out files: all of shard 0, nothing else")
    add("--pretokenized", metavar="REPO", help="hub data set of ready shards to download")
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="hub data set to stream (%(default)s)")
    add("--name", help="its configuration: sample-10BT (FineWeb-Edu's default here), sample-100BT, ...")
    add("--split", default="train", help="its split (%(default)s)")
    add("--text-column", default="text", help="column or key that holds the text (%(default)s)")
    add("--out-dir", type=expanded, default=here, help="where the shards go (%(default)s)")
    add("--workers", type=whole(1), default=console.cores(), help="threads that tokenize (%(default)s)")
    add("--plain", action="store_true", help="tokenize without gigatoken, by the tokenizer's own library")
    add("--tokenizer", default="gpt2", help="tiktoken name, tokenizer folder or file, hub name (%(default)s)")
    add("--shard-size", type=whole(1), default=100_000_000, help="tokens a training shard (%(default)s)")
    add("--val-tokens", type=whole(1), help="tokens of the validation shard (as --shard-size)")
    add("--max-shards", type=whole(1), help="stop after so many training shards")
    add("--retries", type=whole(0), default=8, help="attempts after network errors in a row (%(default)s)")
    # --out_dir and --out-dir are the same
    raw = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in raw])
    if args.val_input and (args.val_tokens is not None or not args.input):
        parser.error("--val-input goes with --input, and takes the place of --val-tokens")
    if args.input and args.pretokenized:
        parser.error("--input and --pretokenized exclude each other")
    if args.val_tokens is None and not args.val_input:
        args.val_tokens = args.shard_size
    if args.name is None and args.dataset == "HuggingFaceFW/fineweb-edu":
        args.name = "sample-10BT"
    return args


def prepare(args: argparse.Namespace) -> dict:
    """Make the shards of the source that the arguments name; returns the set's meta."""
    held_out = args.val_input or []
    if args.input:
        check_inputs(args.input, held_out)
    tokenizer, column = load_tokenizer(args.tokenizer), args.text_column
    prefix = re.sub(r"[^a-z0-9]", "", args.out_dir.resolve().name.lower()) or "tokens"
    if args.input:
        files = [*held_out, *args.input]
        source = {"files": [facts_of(path) for path in files]}
        source |= {"held_out": len(held_out)} if held_out else {}

        def blocks_from(position):
            return local_blocks(files, column, position, len(held_out), may_cut(tokenizer))
    else:
        source = {"dataset": args.dataset, "name": args.name, "split": args.split}
        stream = functools.partial(hub_stream, **source, column=column)

        def blocks_from(position):
            return hub_blocks(stream, column, position, args.retries)

    with folder_lock(args.out_dir):
        return prepare_shards(
            args.out_dir,
            prefix,
            tokenizer,
            blocks_from,
            source | {"text_column": column},
            column=column,
            val_tokens=args.val_tokens,
            shard_tokens=args.shard_size,
            max_shards=args.max_shards,
            workers=args.workers,
            fast=not args.plain,
        )


def facts_of(path: Path) -> dict:
    """What tells an input from another of its name: its size, and SHA-256 of its first and its last 64 KiB."""
    size, part = path.stat().st_size, 1 << 16
    with open(path, "rb") as file:
        ends = file.read(part)
        file.seek(max(0, size - part))
        ends += file.read(part)
    return {"name": path.name, "bytes": size, "ends_sha256": hashlib.sha256(ends).hexdigest()}


def check_inputs(inputs: list[Path], held_out: list[Path]) -> None:
    """DataError for a file that cannot be read, or whose text would be both trained on and held out."""
    check_files([*held_out, *inputs])
    for number, path in enumerate(inputs):
        if any(filecmp.cmp(path, other, shallow=False) for other in held_out):
            raise DataError(f"{path} is held out, but also trained on: take it out of --input")
        if not held_out and any(filecmp.cmp(path, other, shallow=False) for other in inputs[:number]):
            raise DataError(f"{path} is given twice: name it once, or hold files out with --val-input")


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    with console.sentences():
        if args.pretokenized:
            tokenizer = load_tokenizer(args.tokenizer)
            ready_made.fetch(args.pretokenized, args.out_dir, tokenizer, args.max_shards, args.retries)
        else:
            prepare(args)


if __name__ == "__main__":
    main()
