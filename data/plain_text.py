"""Small single-file corpora in nanoGPT's layout: headerless train.bin and val.bin, meta.pkl for characters."""

import pickle
import urllib.request
from pathlib import Path

import numpy as np

from data import DataError, console
from data.files import expanded, folder_lock, write_atomic
from data.identity import shard_record
from data.meta import META_NAME, new_meta, read_meta, write_meta
from data.sources import whole_text
from data.tokenizers import CharTokenizer, load_tokenizer

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
VAL_FRACTION = 0.1


def obtain(source: Path | None, url: str, folder: Path) -> str:
    """The text of a local file, else of the folder's input.txt, else of the address, kept as input.txt."""
    path = source or folder / "input.txt"
    if source is None and not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                write_atomic(path, [reply.read()])
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise DataError(f"cannot download {url} ({reason}): give a text with --input FILE") from error
    return whole_text(path).replace("\r\n", "\n").replace("\r", "\n")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds data which was not made here: it would be lost."""
    old = read_meta(folder) if (folder / META_NAME).is_file() else None
    ours = ["train.bin", "val.bin"] if old and "made" not in old else []
    if others := sorted(path.name for path in folder.glob("*.bin") if path.name not in ours):
        raise DataError(
            f"{folder} holds {others[0]}, which was not made here: take another --out_dir, or delete it"
        )


def prepare(folder: Path, text: str, name: str, characters: bool) -> dict:
    """Write train.bin (the first 90% of the characters), val.bin and the description; returns the meta."""
    check_folder(folder)
    cut = int(len(text) * (1 - VAL_FRACTION))
    if cut == 0:
        raise DataError(f"a text of {len(text)} characters is too short for training and validation")
    alphabet = sorted(set(text))
    if characters and len(alphabet) > 2**16:
        raise DataError(f"{len(alphabet):,} different characters do not fit into uint16 tokens")
    tokenizer = CharTokenizer(alphabet) if characters else load_tokenizer("gpt2")
    meta = new_meta(name, tokenizer)
    parts = {"train": text[:cut], "val": text[cut:]}
    ids = {split: np.array(tokenizer.encode(part), "<u2") for split, part in parts.items()}
    about = {key: meta[key] for key in ("format", "dataset", "tokenizer", "vocab_size")}
    write_meta(folder, about | {"complete": False})  # files of two makings must not pass for a set
    if characters:
        numbers = {c: i for i, c in enumerate(alphabet)}
        plain = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": numbers}
        write_atomic(folder / "meta.pkl", [pickle.dumps(plain, protocol=4)])
    else:
        (folder / "meta.pkl").unlink(missing_ok=True)
    for split in ids:
        write_atomic(folder / f"{split}.bin", [ids[split].tobytes()])
    meta["tokens"] = {split: len(ids[split]) for split in ids}
    meta["shards"] = [shard_record(folder / f"{split}.bin", split) for split in ids]
    write_meta(folder, meta)
    return meta


def main(argv: list[str] | None, script: str, doc: str, characters: bool) -> None:
    """The command line that the prepare.py of both Shakespeare folders share; without --out_dir it works beside it."""
    parser, here = console.Parser(doc), Path(script).resolve().parent
    parser.add_argument("--input", type=expanded, metavar="FILE", help="any UTF-8 text instead")
    parser.add_argument("--out_dir", "--out-dir", type=expanded, default=here, help="its place (%(default)s)")
    args = parser.parse_args(argv)
    with console.sentences(), folder_lock(args.out_dir):
        text = obtain(args.input, SHAKESPEARE, args.out_dir)
        meta = prepare(args.out_dir, text, args.out_dir.resolve().name, characters)
        print(
            f"{len(text):,} characters, vocabulary of {meta['vocab_size']:,}, {meta['tokens']['train']:,} training "
            f"and {meta['tokens']['val']:,} validation tokens: {args.out_dir}"
        )
