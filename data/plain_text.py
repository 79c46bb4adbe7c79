"""Small single-file corpora in nanoGPT's layout: headerless train.bin and val.bin, meta.pkl for characters."""

import argparse
import pickle
import urllib.request
from pathlib import Path

import numpy as np

from data import DataError, console
from data.files import expanded, folder_lock, write_atomic
from data.identity import shard_record
from data.meta import mark_incomplete, new_meta, write_meta
from data.sources import MARKS
from data.tokenizers import CharTokenizer, load_tokenizer

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VAL_FRACTION = 0.1


def obtain(source: Path | None, url: str, folder: Path) -> str:
    """The text of a local file, else of the folder's input.txt, else of the address, kept as input.txt."""
    cached = folder / "input.txt"
    path = source or cached
    if source is None and not cached.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                write_atomic(cached, reply.read())
        except OSError as error:
            raise DataError(
                f"cannot download {url} ({getattr(error, 'reason', error)}): get the text some other way and "
                "give it with --input FILE"
            ) from error
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8-sig")
        text = content.decode(encoding)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text ({error}): convert it, e.g. iconv -f latin1 -t utf-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prepare(folder: Path, text: str, name: str, characters: bool) -> dict:
    """Write train.bin (the first 90% of the characters), val.bin and the description; returns the meta."""
    cut = int(len(text) * (1 - VAL_FRACTION))
    if cut == 0:
        raise DataError(
            f"a text of {len(text)} characters is too short to split into training and validation"
        )
    if characters:
        alphabet = sorted(set(text))
        if len(alphabet) > 2**16:
            raise DataError(f"{len(alphabet):,} different characters do not fit into uint16 tokens")
        tokenizer = CharTokenizer(alphabet)
    else:
        tokenizer = load_tokenizer("gpt2")
    meta = new_meta(name, tokenizer)
    parts = {"train": text[:cut], "val": text[cut:]}
    ids = {split: np.array(tokenizer.encode(part), "<u2") for split, part in parts.items()}
    mark_incomplete(folder, meta)  # files of two makings must not pass for a set
    if characters:
        numbers = {c: i for i, c in enumerate(alphabet)}
        plain = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": numbers}
        write_atomic(folder / "meta.pkl", pickle.dumps(plain, protocol=4))
    else:
        (folder / "meta.pkl").unlink(missing_ok=True)
    for split in ids:
        write_atomic(folder / f"{split}.bin", ids[split].tobytes())
    meta["tokens"] = {split: len(ids[split]) for split in ids}
    meta["shards"] = [shard_record(folder / f"{split}.bin", split) for split in ids]
    write_meta(folder, meta)
    return meta


def main(argv: list[str] | None, folder: Path, doc: str, characters: bool) -> None:
    """The command line that the prepare.py of both Shakespeare folders share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=expanded, metavar="FILE", help="any UTF-8 text instead")
    parser.add_argument(
        "--out_dir", "--out-dir", type=expanded, default=folder, help="where it goes (%(default)s)"
    )
    args = parser.parse_args(argv)
    with console.sentences():
        with folder_lock(args.out_dir):
            text = obtain(args.input, SHAKESPEARE, args.out_dir)
            meta = prepare(args.out_dir, text, args.out_dir.resolve().name, characters)
        print(
            f"{len(text):,} characters, vocabulary of {meta['vocab_size']:,}, {meta['tokens']['train']:,} training "
            f"and {meta['tokens']['val']:,} validation tokens: {args.out_dir}"
        )
