"""The embedding table and the tokens of a public model, read without the rest of it: from a folder or from the hub."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from pydantic import Field
from tokenizers import Tokenizer

from data.console import first_line
from data.records import PlainName, Record, parsed, validated
from engine.errors import RunError
from kronecker import token_bytes
from scripts.analysis.report import progress

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The input table's name in the families of models, best first, and the head's.
TABLE_NAMES = "embed_tokens wte tok_embeddings embed_in word_embeddings shared (token_)?embeddings?".split()
HEAD_NAMES = "lm_head embed_out output".split()
OTHERS = r"position|token_type|segment|vision|visual|audio"  # tables of these are no input tables
CHUNK = 32 * 2**20  # bytes of one request
HELP = "check the name; a gated or private model needs its licence accepted and HF_TOKEN, a local folder no network"


class TensorEntry(Record):
    """A tensor's entry in the header of a safetensors file; offsets count from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: Annotated[list[int], Field(min_length=2, max_length=2)]


class Index(Record):
    weight_map: dict[str, PlainName]


class ModelConfig(Record):
    tie_word_embeddings: bool | None = None
    text_config: dict | None = None


@dataclass
class Source:
    """A model's files, on disk or on the hub; only the bytes that are asked for are read."""

    files: AbstractFileSystem
    root: str
    name: str
    bytes_read: int = 0

    def read(self, file: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Bytes of a file, from start up to end; None where there is no such file."""
        try:
            # cat_file() would read ahead by megabytes
            with self.files.open(f"{self.root}/{file}", "rb", cache_type="none") as f:
                f.seek(start)
                data = f.read(-1 if end is None else end - start)
        except FileNotFoundError:
            return None
        except Exception as e:  # the hub's client passes on errors of several packages
            raise RunError(f"cannot read {file} of {self.name} ({first_line(e)}): {HELP}") from None
        if end is not None and len(data) != end - start:
            raise RunError(f"{file} of {self.name} is damaged: bytes {start:,} to {end:,} are not all there")
        self.bytes_read += len(data)
        return data

    def json(self, file: str, schema, start: int = 0, end: int | None = None):
        """A JSON file, or part of a file, as a schema describes it; None where there is no such file."""
        content, where = self.read(file, start, end), f"{file} of {self.name}"
        if content is None:
            return None
        value = parsed(content.decode("utf-8", "surrogateescape"), where)
        return validated(value, schema, where, "what a model has there")

    def header(self, file: str) -> tuple[dict, int]:
        """Header of a safetensors file and where its data begin; ({}, 0) where there is no such file."""
        size = self.read(file, 0, 8)
        n = int.from_bytes(size or b"", "little")
        if size and not 2 <= n <= 100_000_000:
            raise RunError(f"{file} of {self.name} is not a safetensors file")
        return (self.json(file, dict, 8, 8 + n), 8 + n) if size else ({}, 0)


def open_model(name: str, revision: str) -> Source:
    """The files of a local folder, or of a repository on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(LocalFileSystem(), str(path), path.resolve().name)
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise RunError(f"there is no folder {name}, and it is not a name of the hub (owner/name)")
    hub = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN") or False)
    return Source(hub, f"{name}@{revision}", name.split("/")[-1])


def find_table(source: Source, tensor: str | None = None) -> dict:
    """Where the input embedding lies: {"file", "tensor", "dtype", "shape", "start", "length"} (bytes)."""
    index, header = source.json(INDEX, Index), None
    if index is None:
        header = source.header(SINGLE)
    weight_map = index.weight_map if index else dict.fromkeys(header[0].keys() - {"__metadata__"}, SINGLE)
    if not weight_map:
        cure = "convert its weights to safetensors first"
        raise RunError(f"{source.name} has no {SINGLE} and no index; {cure}")
    name = tensor or choose_table(source, weight_map)
    if name not in weight_map:
        near = ", ".join(sorted(n for n in weight_map if "emb" in n or "wte" in n)[:6])
        raise RunError(f"{source.name} has no tensor {name}; its embeddings: {near or 'none'}")
    file = weight_map[name]
    where = f"{name} in {file} of {source.name}"
    entries, begin = header or source.header(file)
    if name not in entries:
        raise RunError(f"there is no {where}, where the index says it is")
    entry = validated(entries[name], TensorEntry, where, "a tensor's entry")
    first, last = entry.data_offsets
    if entry.dtype not in DTYPES or len(entry.shape) != 2 or min(entry.shape) < 1:
        what = f"{entry.dtype} {entry.shape}, not a matrix of floats"
        raise RunError(f"{where} is {what}; name another tensor (--tensor)")
    if first < 0 or last - first != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
        raise RunError(f"{where} is damaged: its bytes are not those of its shape")
    place = {"start": begin + first, "length": last - first}
    return {"file": file, "tensor": name, "dtype": entry.dtype, "shape": entry.shape} | place


def choose_table(source: Source, weight_map: dict) -> str:
    """The input table by its name; the head where the two are tied and only the head was saved."""
    for name in (*TABLE_NAMES, *HEAD_NAMES):
        form = re.compile(rf"(.*\.)?{name}\.weight", re.DOTALL)
        found = [n for n in weight_map if form.fullmatch(n) and not re.search(OTHERS, n)]
        config = found and name in HEAD_NAMES and source.json("config.json", ModelConfig)
        if (
            config
            and (config.text_config or {}).get("tie_word_embeddings", config.tie_word_embeddings) is False
        ):
            break  # a head of its own is no input table
        if found:
            return min(found, key=lambda n: (n.count("."), n))
    raise RunError(f"no embedding table under a known name in {source.name}; give its name with --tensor")


def load_table(source: Source, info: dict) -> torch.Tensor:
    """(rows, width) in the file's own dtype."""
    data, length = bytearray(), info["length"]
    while len(data) < length:
        start = info["start"] + len(data)
        data += source.read(info["file"], start, min(start + CHUNK, info["start"] + length))
        progress(f"{source.name}: {len(data) / 2**20:,.0f} of {length / 2**20:,.0f} MiB")
    return torch.frombuffer(data, dtype=DTYPES[info["dtype"]]).reshape(info["shape"])


def load_tokens(source: Source) -> list[bytes]:
    """True bytes of every token, from the model's tokenizer.json."""
    content, what = source.read("tokenizer.json"), f"tokenizer.json of {source.name}"
    if content is None:
        how = "save its tokenizer there in the fast format (transformers' AutoTokenizer(...).save_pretrained)"
        raise RunError(f"there is no {what}; {how}")
    try:
        return token_bytes(Tokenizer.from_buffer(content))
    except Exception as e:  # tokenizers raises nothing narrower
        raise RunError(f"{what} cannot be read ({first_line(e)})") from None
