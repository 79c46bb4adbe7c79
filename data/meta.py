"""`meta.json`: what the shards beside it are, so that nobody has to be asked again.

Nothing in it depends on when, or on how many cores, it was made.
"""

import io
import json
import pickle
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from data import DataError
from data.files import write_text
from data.records import Count, PlainName, Record, read_record
from data.tokenizers import CharTokenizer

META_NAME = "meta.json"


class NextSchema(Record):
    """Where the shard behind this one starts: a block of the source, and its tokens that belong to earlier shards."""

    position: list | dict | None
    tokens: Count
    skipped: dict[str, Count]


class ShardSchema(Record):
    """One shard in meta.json's list. documents: those that start in it. next: None behind the last; absent where nobody goes on."""

    file: PlainName
    split: Literal["train", "val"]
    tokens: Count
    documents: Count | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    next: NextSchema | None = None


class TokenizerSchema(Record):
    """What data.tokenizers.load_tokenizer takes."""

    kind: Literal["tiktoken", "hf", "bytebpe", "chars"]
    name: str = ""
    file: PlainName = ""
    itos: list[str] = []
    eot: Count | None = None


class MetaSchema(Record):
    """meta.json."""

    format: Literal[1]
    dataset: str = ""
    complete: bool = True  # false while the set is being made
    tokenizer: TokenizerSchema | None
    vocab_size: Annotated[int, Field(ge=1)]
    eot: Count | None = None
    dtype: Literal["uint16", "uint32"] = "uint16"
    documents: Count = 0
    tokens: dict[str, Count] = {}  # of each split
    skipped: dict[str, Count] = {}  # rows of the source, by reason
    made: dict = {}  # source and options, which determine the bytes
    versions: dict = {}
    shards: list[ShardSchema] = []
    byte_lengths: list[Count] = []  # bytes of text behind each token id, 0 for special tokens


def read_meta(data_dir) -> dict | None:
    """The description of a prepared folder, or None where there is none (published shards).

    nanoGPT's `meta.pkl` (characters) is returned in the same form. Raises DataError where the file is damaged.
    """
    path, pickled = Path(data_dir) / META_NAME, Path(data_dir) / "meta.pkl"
    if not path.is_file():
        return _read_nanogpt_meta(pickled) if pickled.is_file() else None
    return read_record(path, MetaSchema, "the description of prepared data").model_dump(exclude_unset=True)


def describe(data_dir, vocab_size: int = 0, highest: int = 0) -> dict:
    """`read_meta`; without a description shards are taken for GPT-2's, unless a smaller `vocab_size` or the highest id in
    them says that they cannot be: then the tokenizer is None, as it is where meta.pkl gives only a number of ids."""
    if (meta := read_meta(data_dir)) is not None:
        return meta
    if 0 < vocab_size < 50257 or highest >= 50257:
        return {"tokenizer": None, "vocab_size": vocab_size}
    return {"tokenizer": "gpt2", "vocab_size": 50257}


def write_meta(data_dir, meta: dict) -> None:
    """Write `meta.json` whole or not at all. The long list of byte lengths goes on one line of its own."""
    text = json.dumps({key: value for key, value in meta.items() if key != "byte_lengths"}, indent=1)
    if "byte_lengths" in meta:
        lengths = json.dumps(meta["byte_lengths"], separators=(",", ":"))
        text = f'{text[:-2]},\n "byte_lengths": {lengths}\n}}'
    write_text(Path(data_dir) / META_NAME, text + "\n")


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of packages on which a set's bytes may depend, None for those that are not here."""
    installed = {name: list(metadata.distributions(name=name)) for name in packages}
    return {name: found[0].version if found else None for name, found in installed.items()}


class _PlainUnpickler(pickle.Unpickler):
    """A pickle may run any code when it is read; one that names a class or function is refused here."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_nanogpt_meta(path: Path) -> dict:
    dataset = path.parent.name
    try:
        raw = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        n = int(raw["vocab_size"])
        if "itos" not in raw and n > 0:  # all that nanoGPT's train.py asks for
            return {"format": 1, "dataset": dataset, "tokenizer": None, "vocab_size": n}
        characters = [raw["itos"][i] for i in range(n)]
        if not characters or not all(isinstance(c, str) for c in characters):
            raise KeyError("itos")
    except Exception as error:  # a hostile or damaged pickle may raise anything
        raise DataError(
            f"{path} is not the plain meta.pkl of a nanoGPT character data set ({error}); prepare the data again"
        ) from error
    return characters_meta(dataset, characters)


def dtype_for(n_vocab: int) -> np.dtype:
    """The narrowest token type that holds every id of a vocabulary."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def new_meta(dataset: str, tokenizer, **more) -> dict:
    """The beginning of a set's description, with what its tokenizer says. more: further keys, or others' values."""
    return {
        "format": 1,
        "dataset": dataset,
        "complete": True,
        "tokenizer": tokenizer.spec,
        "vocab_size": tokenizer.n_vocab,
        "eot": tokenizer.eot,
        "dtype": dtype_for(tokenizer.n_vocab).name,
        "byte_lengths": tokenizer.byte_lengths().tolist(),
    } | more


def characters_meta(dataset: str, characters: list[str]) -> dict:
    """The description of a character-level set: id i stands for characters[i]."""
    return new_meta(dataset, CharTokenizer(characters))


def totals(shards: list[dict]) -> dict:
    """`documents` and `tokens` of a set, from its shards' records."""
    tokens = {s: sum(r["tokens"] for r in shards if r["split"] == s) for s in ("train", "val")}
    return {"documents": sum(record["documents"] for record in shards), "tokens": tokens}
