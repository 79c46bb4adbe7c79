"""`meta.json`: what the shards beside it are, so that nobody has to be asked again.

    {"format": 1, "dataset": "pydocs", "complete": true,
     "tokenizer": {...}            what data.tokenizers.load_tokenizer takes
     "vocab_size": 4096, "eot": 4095, "dtype": "uint16",
     "documents": 16000, "tokens": {"train": n, "val": n},
     "shards": [{"file", "split", "tokens", "documents", "sha256"}, ...],
     "made": {...}                 source, options and versions that determine the bytes
     "byte_lengths": [1, 1, ...]}  bytes of text behind each token id, 0 for special tokens

`documents` of a shard are those that *start* in it. A set still being prepared says `"complete": false`
and carries a "resume" entry beside these. Nothing in it depends on when, or on how many cores, it was made.
"""

import json
import pickle
from pathlib import Path

from data import DataError
from data.shards import find_shards, write_atomic

META_NAME = "meta.json"


def read_meta(data_dir) -> dict | None:
    """The description of a prepared folder, or None where there is none (published shards).

    nanoGPT's `meta.pkl` (characters) is read too, by an unpickler that knows only plain containers, and is
    returned in the same form. Raises DataError where the file is there but damaged.
    """
    folder = Path(data_dir)
    path = folder / META_NAME
    if path.is_file():
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and prepare the data again") from error
        if not isinstance(meta, dict) or "tokenizer" not in meta or "vocab_size" not in meta:
            raise DataError(f"{path} does not describe prepared data (no tokenizer or vocab_size in it)")
        return meta
    if (folder / "meta.pkl").is_file():
        return _read_nanogpt_meta(folder / "meta.pkl")
    return None


def write_meta(data_dir, meta: dict) -> None:
    """Write `meta.json` whole or not at all. The long list of byte lengths goes on one line of its own."""
    short = {key: value for key, value in meta.items() if key != "byte_lengths"}
    text = json.dumps(short, indent=1)
    if "byte_lengths" in meta:
        lengths = ",".join(str(int(n)) for n in meta["byte_lengths"])
        text = f'{text[:-2]},\n "byte_lengths": [{lengths}]\n}}'
    write_atomic(Path(data_dir) / META_NAME, (text + "\n").encode())


class _PlainUnpickler(pickle.Unpickler):
    """A pickle may run any code when it is read; one that names a class or function is refused here."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_nanogpt_meta(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            raw = _PlainUnpickler(file).load()
        characters = [raw["itos"][i] for i in range(int(raw["vocab_size"]))]
        if not all(isinstance(c, str) for c in characters):
            raise KeyError("itos")
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise DataError(
            f"{path} is not the plain meta.pkl of a nanoGPT character data set ({error}); prepare the "
            f"data again"
        ) from error
    return characters_meta(path.parent.name, characters)


def characters_meta(dataset: str, characters: list[str]) -> dict:
    """The description of a character-level set: id i stands for characters[i]."""
    return {
        "format": 1,
        "dataset": dataset,
        "complete": True,
        "tokenizer": {"kind": "chars", "itos": characters},
        "vocab_size": len(characters),
        "eot": None,
        "dtype": "uint16",
        "byte_lengths": [len(c.encode("utf-8", "surrogatepass")) for c in characters],
    }


def is_prepared(data_dir) -> bool:
    """Whether a folder holds a finished set: both splits, and no preparation still under way."""
    folder = Path(data_dir)
    if not folder.is_dir() or not find_shards(folder, "train") or not find_shards(folder, "val"):
        return False
    meta = read_meta(folder)
    return meta is None or meta.get("complete", True)
