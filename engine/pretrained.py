"""Pretrained weights: nanoGPT's ckpt.pt, and GPT-2 as transformers writes it. No code in them is run."""

import pickle
import zipfile
from pathlib import Path
from typing import Literal

import torch
from pydantic import AliasChoices, Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file

import data
from data.console import first_line
from data.files import plain_name
from data.meta import read_meta
from data.records import Record, read_record
from data.tokenizers import load_tokenizer
from engine.errors import RunError

# OpenAI's four models by name, so that their shape can be planned with without their weights.
HUB = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# The keys that pretrained weights decide; a run that goes on takes those that are not given from its record.
DECIDED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "gelu", "tie_weights", "wte")
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none", "gelu_python": "none"}


# What readers raise on files that are something else.
DAMAGED = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)


def also_called(default: int, name: str, alias: str):
    return Field(default, ge=1, validation_alias=AliasChoices(name, alias))


class GPT2Config(Record):
    """Every option of transformers' GPT2Config that bears on the logits, with the values that this GPT can do."""

    model_type: Literal["gpt2"]
    vocab_size: int = Field(50257, ge=1)
    n_positions: int = also_called(1024, "n_positions", "max_position_embeddings")
    n_embd: int = also_called(768, "n_embd", "hidden_size")
    n_layer: int = also_called(12, "n_layer", "num_hidden_layers")
    n_head: int = also_called(12, "n_head", "num_attention_heads")
    n_inner: int | None = None
    activation_function: Literal[tuple(GELUS)] = "gelu_new"
    layer_norm_epsilon: float = Field(1e-5, ge=1e-5, le=1e-5)
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True
    quantization_config: None = None
    auto_map: None = None  # code of the folder's own

    @field_validator("n_inner")
    def usual_width(cls, n_inner: int | None, info) -> int | None:
        if n_inner not in (None, 4 * info.data.get("n_embd", 0)):
            raise ValueError("it should be null, or four times n_embd")
        return n_inner


def read(source: str, given: dict | None = None, with_weights: bool = True) -> tuple[dict | None, dict]:
    """(state_dict for GPT, config keys that it fixes) of a nanoGPT ckpt.pt, a folder, or a GPT-2's name.

    given: config keys that the user set. A smaller block_size crops the context, as in nanoGPT; whatever else
    contradicts the weights is refused.
    with_weights: False spares a name's download; the state_dict is then None.
    Raises RunError, also for options that this GPT does not have.
    """
    given = given or {}
    if given.get("wte", "stock") != "stock":
        raise RunError(f"{source} holds a learned table, no place for wte={given['wte']!r}: use wte='stock'")
    path = Path(source).expanduser()
    if path.is_file():
        weights, shape = read_nanogpt(path)
    elif path.is_dir():
        weights, shape = read_transformers(path)
    elif source not in HUB:
        raise RunError(
            f"init_from={source!r} is nothing known: use scratch, resume, auto, {', '.join(sorted(HUB))}, "
            "a nanoGPT ckpt.pt, or a folder with config.json and model.safetensors"
        )
    elif with_weights:
        weights, shape = read_transformers(download(source))
    else:
        weights, shape = None, shape_of(GPT2Config(model_type="gpt2", **HUB[source]))
    for name, theirs in shape.items():
        ours = given.get(name, theirs)
        if ours == theirs or (name == "vocab_size" and ours == 0):  # 0: whatever fits
            continue
        if name != "block_size" or ours > theirs:
            raise RunError(f"{name} is {ours!r}, but that of {source} is {theirs!r}: leave it out")
        shape[name] = ours
        if weights is not None:
            weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:ours]
    return weights, shape


def load(model, weights: dict, source) -> None:
    """model.load_state_dict(weights); a RunError, which names `source`, where they do not fit or are not finite."""
    spoilt = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if spoilt:
        raise RunError(f"{spoilt} in {source} is not finite (NaN or infinite): take an earlier checkpoint")
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as e:  # ValueError: a projection of another width
        why = " ".join(str(e).split())[:300]
        raise RunError(f"the weights in {source} are not those of this model: {why}") from None


def tokenizer(source: str, name: str, vocab_size: int):
    """The tokenizer called `name`: a folder with it or with prepared data, or what load_tokenizer takes.

    "" is the one that lies beside the weights or with the data that a ckpt.pt was trained on, else GPT-2's.
    Raises RunError for one with more than vocab_size tokens.
    """
    place = Path(name or tokenizer_beside(Path(source).expanduser()) or "gpt2").expanduser()
    meta = read_meta(place) if place.is_dir() else None
    if meta is None:
        found = load_tokenizer(place)
    else:  # None: a meta.pkl with vocab_size alone
        found = load_tokenizer(meta["tokenizer"] or "gpt2", base_dir=place)
    if found.n_vocab > vocab_size:
        sizes = f"{source} has {vocab_size} tokens, the tokenizer {found.name} {found.n_vocab}"
        raise RunError(f"{sizes}: name the right one, or the folder of its prepared data, with --tokenizer")
    return found


def check_tokenizer(source: str, ours, vocab_size: int, data_dir) -> None:
    """RunError where the weights' own tokenizer, if one is known, has other tokens than the data's, `ours`: each row of
    the table would stand for another token."""
    try:
        if source not in HUB and tokenizer_beside(Path(source).expanduser()) is None:
            return
        theirs = tokenizer(source, "", vocab_size)
    except data.DataError:  # not to be had here
        return
    for i, (here, there) in enumerate(zip(ours.token_bytes(), theirs.token_bytes(), strict=False)):
        if here != there:
            raise RunError(
                f"{source} knows token {i} as {there!r} (tokenizer {theirs.name}), the data in {data_dir} as {here!r} "
                f"({ours.name}): prepare the data with the tokenizer of the weights"
            )


def tokenizer_beside(path: Path) -> Path | None:
    """The folder of a checkpoint, or that of the data which a nanoGPT one names, if a tokenizer lies there."""
    places = [path] if path.is_dir() else [path.parent] if path.is_file() else []
    if path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        config = saved.get("config")
        if isinstance(config, dict) and isinstance(config.get("dataset"), str):
            try:
                places.append(Path(data.__file__).parent / plain_name(config["dataset"]))
            except data.DataError as e:
                cure = "name the tokenizer that it was trained with, --tokenizer=FOLDER_OR_NAME"
                raise data.DataError(f"the data set in {path}, {e}: {cure}") from None
    known = ("meta.json", "meta.pkl", "tokenizer.json")
    return next((place for place in places if any((place / file).is_file() for file in known)), None)


def read_nanogpt(path: Path) -> tuple[dict, dict]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        # compiled and wrapped models left these prefixes; attn.bias is the mask of nanoGPT before SDPA
        weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in saved["model"].items()}
        weights = {k: v.float() for k, v in weights.items() if not k.endswith(".attn.bias")}
        wte, wpe = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
        head = weights.get("lm_head.weight", wte)
        tied = head.shape == wte.shape and torch.equal(head, wte)
        shape = {
            "n_layer": int(saved["model_args"]["n_layer"]),
            "n_head": int(saved["model_args"]["n_head"]),
            "n_embd": wte.size(1),
            "block_size": wpe.size(0),
            "bias": "transformer.ln_f.bias" in weights,
            "vocab_size": wte.size(0),
        }
    except (pickle.UnpicklingError, EOFError, *DAMAGED) as e:
        # torch's own words advise to run what is in the file
        why = "not only tensors and plain values" if isinstance(e, pickle.UnpicklingError) else first_line(e)
        raise RunError(f"{path} is no nanoGPT checkpoint, or a damaged one ({why})") from None
    if tied:
        weights.pop("lm_head.weight", None)
    return weights, shape | {"tie_weights": tied, "wte": "stock"}


def download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        wanted = ["config.json", "model.safetensors"]
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=wanted))
    except ImportError:
        raise RunError("huggingface_hub is not installed: pip install huggingface_hub") from None
    except Exception as e:  # the hub's client raises many kinds, all of them about the way to the file
        why = first_line(e)
        raise RunError(f"{name} could not be had from the hub ({why}): go online, or give a folder") from None


def read_transformers(folder: Path) -> tuple[dict, dict]:
    config = read_record(folder / "config.json", GPT2Config, "the config.json of a GPT-2 like this one")
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise RunError(f"{folder} has no model.safetensors: save the model there in this format")
    plain = {}
    for file in files:
        for name, tensor in read_weights(file).items():
            name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue  # masks
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                tensor = tensor.t().contiguous()  # transformers' Conv1D keeps (in, out)
            plain[name] = tensor
    if config.tie_word_embeddings:
        plain.pop("lm_head.weight", None)
    return plain, shape_of(config)


def read_weights(file: Path) -> dict:
    """The tensors of a safetensors file by name, in float32."""
    try:
        return {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError, *DAMAGED) as e:
        raise RunError(f"{file} cannot be read as safetensors ({e}): fetch or save it again") from None


def shape_of(config: GPT2Config) -> dict:
    same = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return same | {
        "block_size": config.n_positions,
        "bias": True,
        "gelu": GELUS[config.activation_function],
        "tie_weights": config.tie_word_embeddings,
        "wte": "stock",
    }
