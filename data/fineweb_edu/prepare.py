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

Interrupted in any way, the same command goes on from the last whole shard, and what comes out in the end is
the same, byte for byte, for any number of workers and interruptions. `python -m data.verify DIR` checks the
result.

Each document is opened by <|endoftext|> and encoded as ordinary text. Shard 0 is the first --val-tokens
tokens (or all of --val-input) and is for validation; the others are for training. Of --input files: .jsonl has one object a line,
.txt is one document a file, and both may be packed (.gz .zst .xz .bz2); .parquet is read column by column.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file: let `import data` find the project
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data import DataError
from data.files import sha256 as sha256_of
from data.meta import read_meta, write_meta
from data.pipeline import folder_lock, prepare_shards
from data.shards import find_shards, open_shard
from data.sources import check_files, hub_blocks, hub_stream, local_blocks
from data.tokenizers import load_tokenizer


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", type=Path, nargs="+", metavar="FILE", help="local files instead of the hub, in this order")
    add(
        "--val-input",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="held-out files: all of shard 0, and nothing else",
    )
    add("--pretokenized", metavar="REPO", help="hub data set of ready shards to download")
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="hub data set to stream (%(default)s)")
    add(
        "--name",
        default=None,
        help="its configuration: sample-10BT (FineWeb-Edu's default here), sample-100BT, ...",
    )
    add("--split", default="train", help="its split (%(default)s)")
    add("--text-column", default="text", help="column or key that holds the text (%(default)s)")
    add(
        "--out-dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="where the shards go (%(default)s)",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenize (%(default)s)")
    add("--tokenizer", default="gpt2", help="tiktoken name, tokenizer folder or file, hub name (%(default)s)")
    add("--shard-size", type=int, default=100_000_000, help="tokens a training shard (%(default)s)")
    add("--val-tokens", type=int, default=None, help="tokens of the validation shard (as --shard-size)")
    add("--max-shards", type=int, default=None, help="stop after so many training shards")
    add("--retries", type=int, default=8, help="attempts after errors of the network, in a row (%(default)s)")
    # --out_dir and --out-dir are the same
    raw = sys.argv[1:] if argv is None else argv
    dashed = [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a) for a in raw]
    args = parser.parse_args(dashed)
    if args.val_input and (args.val_tokens is not None or not args.input):
        parser.error("--val-input goes with --input, and takes the place of --val-tokens")
    if args.val_tokens is None and not args.val_input:
        args.val_tokens = args.shard_size
    lowest_of = {"shard_size": 1, "val_tokens": 1, "max_shards": 1, "workers": 0, "retries": 0}
    for name, lowest in lowest_of.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')} must be at least {lowest}, not {value}")
    if args.input and args.pretokenized:
        parser.error("--input and --pretokenized exclude each other")
    if args.name is None and args.dataset == "HuggingFaceFW/fineweb-edu":
        args.name = "sample-10BT"
    return args


def prepare(args: argparse.Namespace) -> dict:
    """Make the shards of the source that the arguments name; returns the set's meta."""
    tokenizer = load_tokenizer(args.tokenizer)
    prefix = re.sub(r"[^a-z0-9]", "", args.out_dir.resolve().name.lower()) or "tokens"
    if args.input:
        held_out = args.val_input or []
        files = [*held_out, *args.input]
        check_files(files)
        source = {"files": [{"name": path.name, "bytes": path.stat().st_size} for path in files]}
        source |= {"held_out": len(held_out)} if held_out else {}

        def blocks_from(position):
            return local_blocks(files, args.text_column, position, len(held_out))
    else:
        source = {"dataset": args.dataset, "name": args.name, "split": args.split}

        def blocks_from(position):
            stream = hub_stream(args.dataset, args.name, args.split, args.text_column)
            return hub_blocks(stream, args.text_column, position, args.retries)

    return prepare_shards(
        args.out_dir,
        prefix,
        tokenizer,
        blocks_from,
        source | {"text_column": args.text_column},
        column=args.text_column,
        val_tokens=args.val_tokens,
        shard_tokens=args.shard_size,
        max_shards=args.max_shards,
        workers=args.workers,
        say=lambda line: print(line, flush=True),
    )


# ------------------------------------------------------------------------------------------ ready shards


def fetch(args: argparse.Namespace) -> dict:
    """Download a hub data set of ready shards, checking each; returns the set's meta."""
    tokenizer = load_tokenizer(args.tokenizer)
    out_dir = args.out_dir
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        old = read_meta(out_dir)
        if old is not None and old.get("made", {}).get("source") != {"pretokenized": args.pretokenized}:
            raise DataError(f"{out_dir} holds another set already: take another --out-dir")
        if old is None and (find_shards(out_dir, "train") or find_shards(out_dir, "val")):
            print(
                f"{out_dir} has shards without meta.json; each is checked against the hub's checksum",
                flush=True,
            )
        known = {record["file"]: record for record in (old or {}).get("shards", [])}
        same = old is not None and old["complete"] and old["made"]["max_shards"] == args.max_shards
        if same and all(_is_whole(out_dir / name, record) for name, record in known.items()):
            print(f"already complete, nothing to do: {len(known)} shards in {out_dir}", flush=True)
            return old
        remote = _retrying(lambda: remote_files(args.pretokenized), min(args.retries, 2))
        wanted = sorted(name for name in remote if re.fullmatch(r"\w*_val_\d+\.bin", name))
        train = sorted(name for name in remote if re.fullmatch(r"\w*_train_\d+\.bin", name))
        if not wanted or not train:
            raise DataError(f"the data set {args.pretokenized} has no *_val_*.bin and *_train_*.bin shards")
        wanted += train[: args.max_shards]
        meta = {
            "format": 1,
            "dataset": args.pretokenized.rpartition("/")[2],
            "complete": False,
            "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "made": {"source": {"pretokenized": args.pretokenized}, "max_shards": args.max_shards},
            "shards": [],
            "byte_lengths": tokenizer.byte_lengths().tolist(),
        }
        tokenizer.save(out_dir)
        for number, name in enumerate(wanted):
            record = known.get(name)
            if record is None or not _is_whole(out_dir / name, record):
                print(f"{number + 1} of {len(wanted)}: {name}", flush=True)
                record = _retrying(
                    lambda name=name: fetch_one(args.pretokenized, name, remote[name], out_dir, tokenizer),
                    args.retries,
                )
            meta["shards"].append(record)
            shards = meta["shards"]
            meta["dtype"] = open_shard(out_dir / name).dtype.name
            meta["documents"] = sum(record["documents"] for record in shards)
            meta["tokens"] = {
                s: sum(r["tokens"] for r in shards if r["split"] == s) for s in ("train", "val")
            }
            meta["complete"] = number + 1 == len(wanted)
            # fewer records never replace more while old shards are only looked through
            if record is not known.get(name) or meta["complete"]:
                write_meta(out_dir, meta)
        print(f"{len(wanted)} shards, {meta['tokens']['train']:,} training tokens in {out_dir}", flush=True)
        return meta


def _is_whole(path: Path, record: dict) -> bool:
    try:
        return open_shard(path).n_tokens == record["tokens"]
    except DataError:
        return False


def remote_files(repo: str) -> dict[str, str | None]:
    """Names of a hub data set's files, with their SHA-256 where the hub knows it."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_tree(repo, repo_type="dataset")
    return {file.path: file.lfs.sha256 if file.lfs else None for file in files if hasattr(file, "lfs")}


def download(repo: str, name: str, folder: Path) -> None:
    """Bring one file of a hub data set into a folder; it appears there only when whole, and resumes."""
    from huggingface_hub import hf_hub_download

    hf_hub_download(repo, name, repo_type="dataset", local_dir=folder)


def fetch_one(repo: str, name: str, sha256: str | None, folder: Path, tokenizer) -> dict:
    """Download one shard unless the right one is there already; its record for meta.json."""
    path = folder / name
    if not (path.is_file() and sha256 and sha256_of(path) == sha256):
        download(repo, name, folder)
    digest = sha256_of(path)
    try:
        if sha256 and digest != sha256:
            raise DataError(f"{path} differs from the hub's copy")
        tokens = open_shard(path).tokens
    except DataError:
        path.unlink()  # so that the next attempt downloads it again
        raise
    highest, documents = 0, 0
    for start in range(0, len(tokens), 1 << 22):
        piece = tokens[start : start + (1 << 22)]
        highest = max(highest, int(piece.max()))
        documents += int(np.count_nonzero(piece == tokenizer.eot))
    if highest >= tokenizer.n_vocab:
        raise ValueError(
            f"{name} has the token id {highest}, which {tokenizer.name} lacks: name the right one with "
            f"--tokenizer"
        )
    split = "val" if "_val_" in name else "train"
    return {"file": name, "split": split, "tokens": len(tokens), "documents": documents, "sha256": digest}


def _retrying(action, retries: int, wait=time.sleep):
    """Call until it succeeds, with longer and longer waits; after `retries` failures in a row a DataError."""
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:  # of httpx, requests, huggingface_hub, the operating system
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            hopeless = type(error).__name__ in (
                "RepositoryNotFoundError",
                "OfflineModeIsEnabled",
                "GatedRepoError",
            )
            if hopeless or attempt == retries or type(error) is ValueError:
                raise DataError(
                    f"{problem}; check the connection; what is there is kept, the same command goes on"
                ) from error
            seconds = min(120, 2**attempt)
            print(f"{problem}; trying again in {seconds} s ({attempt + 1} of {retries})", file=sys.stderr)
            wait(seconds)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    try:
        fetch(args) if args.pretokenized else prepare(args)
    except KeyboardInterrupt:
        print(f"\nstopped; whole shards are kept in {args.out_dir}, the same command goes on from them")
        sys.exit(130)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
