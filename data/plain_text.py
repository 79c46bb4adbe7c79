"""Small single-file corpora in nanoGPT's layout: headerless train.bin and val.bin, meta.pkl for characters."""

import argparse
import pickle
import sys
import urllib.request
from pathlib import Path

import numpy as np

from data import DataError
from data.files import write_atomic
from data.meta import characters_meta, write_meta
from data.shards import dtype_for
from data.tokenizers import load_tokenizer

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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error


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
        meta = characters_meta(name, alphabet)
        numbers = {c: i for i, c in enumerate(alphabet)}
        plain = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": numbers}
        write_atomic(folder / "meta.pkl", pickle.dumps(plain, protocol=4))
    else:
        tokenizer = load_tokenizer("gpt2")
        meta = {
            "format": 1,
            "dataset": name,
            "complete": True,
            "tokenizer": tokenizer.spec,
            "vocab_size": tokenizer.n_vocab,
            "eot": tokenizer.eot,
            "dtype": dtype_for(tokenizer.n_vocab).name,
            "byte_lengths": tokenizer.byte_lengths().tolist(),
        }
    tokenizer = load_tokenizer(meta["tokenizer"])
    meta["tokens"] = {}
    for split, part in (("train", text[:cut]), ("val", text[cut:])):
        ids = np.array(tokenizer.encode(part), "<u2")
        write_atomic(folder / f"{split}.bin", ids.tobytes())
        meta["tokens"][split] = len(ids)
    write_meta(folder, meta)
    return meta


def main(argv: list[str] | None, folder: Path, doc: str, characters: bool) -> None:
    """The command line that the prepare.py of both Shakespeare folders share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=None, metavar="FILE", help="any UTF-8 text instead")
    parser.add_argument(
        "--out_dir", "--out-dir", type=Path, default=folder, help="where it goes (%(default)s)"
    )
    args = parser.parse_args(argv)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        text = obtain(args.input, SHAKESPEARE, args.out_dir)
        meta = prepare(args.out_dir, text, args.out_dir.resolve().name, characters)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{len(text):,} characters, vocabulary of {meta['vocab_size']:,}, {meta['tokens']['train']:,} training and "
        f"{meta['tokens']['val']:,} validation tokens: {args.out_dir}"
    )
