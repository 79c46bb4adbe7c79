"""Weights that others trained: nanoGPT's ckpt.pt, and GPT-2 as transformers writes it. No code in them is run."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.errors import RunError

HUB = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
NANOGPT_SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")


def read(source: str, wte: str) -> tuple[dict, dict]:
    """(state_dict for GPT, config keys that its shape fixes) of a nanoGPT ckpt.pt, a folder, or a GPT-2 name."""
    if wte != "stock":
        raise RunError(f"{source} holds a learned table, which wte={wte!r} has no place for: use wte='stock'")
    path = Path(source)
    if path.is_file():
        return read_nanogpt(path)
    if path.is_dir():
        return read_transformers(path)
    if source in HUB:
        return read_transformers(download(source))
    raise RunError(
        f"init_from={source!r} is nothing known: use scratch, resume, auto, {', '.join(sorted(HUB))}, "
        "a nanoGPT ckpt.pt, or a folder with config.json and model.safetensors"
    )


def read_nanogpt(path: Path) -> tuple[dict, dict]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        weights, shape = saved["model"], saved["model_args"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as e:
        raise RunError(
            f"{path} is no nanoGPT checkpoint, or a damaged one ({str(e).splitlines()[0]})"
        ) from None
    # compiled and wrapped models left these prefixes; attn.bias is the mask of nanoGPT before SDPA
    weights = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.endswith(".attn.bias")}
    tied = "lm_head.weight" not in weights or torch.equal(
        weights["lm_head.weight"], weights["transformer.wte.weight"]
    )
    if tied:
        weights.pop("lm_head.weight", None)
    shape = {k: shape[k] for k in NANOGPT_SHAPE if shape.get(k) is not None}
    return weights, shape | {"tie_weights": tied, "wte": "stock"}


def download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        wanted = ["config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
        return Path(snapshot_download(f"openai-community/{name}", allow_patterns=wanted))
    except ImportError:
        raise RunError("huggingface_hub is not installed: pip install huggingface_hub") from None
    except Exception as e:  # the hub's client raises many kinds, all of them about the way to the file
        raise RunError(
            f"{name} could not be had from the hub ({str(e).splitlines()[0][:120]}): go online once, or give a folder "
            "with its config.json and model.safetensors"
        ) from None


def read_transformers(folder: Path) -> tuple[dict, dict]:
    try:
        config = json.loads((folder / "config.json").read_text())
        files = sorted(folder.glob("model*.safetensors"))
        weights = {k: v for f in files for k, v in load_file(f).items()}
    except (OSError, ValueError) as e:
        raise RunError(f"{folder} cannot be read as a GPT-2 folder of transformers: {e}") from None
    if config.get("model_type") != "gpt2" or not weights:
        raise RunError(
            f"{folder} is no GPT-2: it needs a config.json with model_type gpt2 and a model.safetensors"
        )
    plain = {}
    for name, tensor in weights.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # masks
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.t().contiguous()  # transformers' Conv1D keeps (in, out)
        plain[name] = tensor.float()
    tied = config.get("tie_word_embeddings", True)
    if tied:
        plain.pop("lm_head.weight", None)
    shape = {
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_embd": config["n_embd"],
        "block_size": config.get("n_positions", config.get("n_ctx")),
        "vocab_size": config["vocab_size"],
        "bias": True,
        "gelu": "tanh" if config.get("activation_function", "gelu_new") == "gelu_new" else "none",
    }
    return plain, shape | {"tie_weights": tied, "wte": "stock"}
