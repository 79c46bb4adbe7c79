"""The Kronecker embedding inside any transformers causal LM.

    model = AutoModelForCausalLM.from_pretrained(name)
    swap_input_embeddings(model, tokenizer, pos_dim=32, tie="untie")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    model.resize_token_embeddings(len(tokenizer))
    ...train...
    save_pretrained(model, folder)
    model = from_pretrained(folder, tokenizer=tokenizer)

transformers cannot rebuild a module that it does not know, so a swapped model is saved with the bytes of its
tokens beside the weights (kronecker.safetensors) and loaded by from_pretrained here, not by AutoModel.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from kronecker.embedding import KroneckerEmbedding
from kronecker.tokens import build_byte_buffer

BYTES_FILE = "kronecker.safetensors"
TIES = ("untie", "induced")
# What config.json says of the embedding: its options, and what became of the head.
OPTIONS = dict.fromkeys(("pos_dim", "char_dim", "ngrams", "rank"), int)
OPTIONS |= dict.fromkeys(("length_normalize", "z_normalize"), bool) | {
    "byte_extraction": str,
    "init_rms": float,
}


class InducedHead(nn.Module):
    """Output head tied to the Kronecker embedding: x (..., d_model) -> logits scale * x table()^T (..., vocab_size).

    The table's rows have a norm of about sqrt(d_model), fifty times a usual head's: one learned scalar, which
    starts at 0.02, brings the logits back. It is the only parameter here.
    """

    def __init__(self, embedding: KroneckerEmbedding):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.02, dtype=embedding.projection.weight.dtype))
        self._tied_to = [embedding]  # in a list, so that it is not registered a second time

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.scale, self._tied_to[0].table())


def swap_input_embeddings(model, tokenizer=None, pos_dim=32, tie=None, **options) -> KroneckerEmbedding:
    """Put a fresh KroneckerEmbedding where model.get_input_embeddings() was, and return it.

    model: a transformers causal LM, whose resize_token_embeddings becomes the one here, with this tokenizer.
    tie: what becomes of the output head. None leaves a head of its own as it is; one tied to the old table needs
        a choice: "untie" leaves it the old table as its own weight, "induced" ties it to the new embedding
        (InducedHead; also possible for a head that was not tied).
    options: KroneckerEmbedding's. Raises ValueError for a tied head without a choice, or an unknown one.
    """
    if tie not in (None, *TIES):
        raise ValueError(f"tie must be 'untie' or 'induced' (None for a head of its own), not {tie!r}")
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(old, KroneckerEmbedding):
        raise ValueError("the input embedding is a KroneckerEmbedding already: swap a freshly loaded model")
    tied = head is not None and getattr(head, "weight", None) is old.weight
    if tied and tie is None:
        raise ValueError("the output head is tied to the input table: say tie='untie' or tie='induced'")
    if tie == "induced" and getattr(head, "bias", None) is not None:
        raise ValueError("the induced tie has no bias, but the output head has one: use tie='untie'")
    new = KroneckerEmbedding(old.num_embeddings, old.embedding_dim, tokenizer, pos_dim=pos_dim, **options)
    new.to(device=old.weight.device, dtype=old.weight.dtype)
    model.set_input_embeddings(new)
    if tie == "induced":
        model.set_output_embeddings(InducedHead(new).to(old.weight.device))
    elif tied:
        head.weight = nn.Parameter(old.weight.detach().clone())
    _forget_tie(model)
    model.config.kronecker = {name: kind(getattr(new, name)) for name, kind in OPTIONS.items()}
    model.config.kronecker["tie"] = "induced" if tie == "induced" else "untie"
    model.resize_token_embeddings = partial(resize_token_embeddings, model, tokenizer=tokenizer)
    return new


def resize_token_embeddings(
    model,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
    *,
    tokenizer=None,
) -> KroneckerEmbedding:
    """transformers' method of this name, for a swapped model: grow or shrink the vocabulary, and return the embedding.

    The bytes of all ids are read anew from the tokenizer (that of the swap), so that added tokens have theirs; ids
    past its tokens embed to zero, and without one the vocabulary can only shrink. A head of its own is resized by
    transformers (mean_resizing: its new rows are the mean of the old ones).
    Raises ValueError for a tokenizer that gives a token other bytes than it had.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if new_num_tokens is None and pad_to_multiple_of is None:
        return embedding
    n = embedding.vocab_size if new_num_tokens is None else new_num_tokens
    n = -(-n // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    if n < 1:
        raise ValueError(f"a vocabulary of {n} ids is none: give at least 1")
    embedding.set_tokens(*_bytes_of(embedding, n, tokenizer))
    if head is not None and not isinstance(head, InducedHead):
        learns = head.weight.requires_grad
        head = model._get_resized_lm_head(head, n, mean_resizing=mean_resizing).requires_grad_(learns)
        model.set_output_embeddings(head)
    model.config.get_text_config().vocab_size = model.vocab_size = n
    return embedding


def _bytes_of(embedding: KroneckerEmbedding, n: int, tokenizer) -> tuple[Tensor, Tensor]:
    """Byte and length buffers of the first n ids: the tokenizer's, and the embedding's own where it has none."""
    if tokenizer is None and n > embedding.vocab_size:
        raise ValueError(
            f"the vocabulary grows from {embedding.vocab_size} to {n} ids, whose bytes nothing says: give the tokenizer"
        )

    def first_n(buffer: Tensor) -> Tensor:
        padding = (0, 0) * (buffer.dim() - 1) + (0, max(0, n - len(buffer)))
        return nn.functional.pad(buffer[:n].cpu(), padding)

    old_NxP, old_N = first_n(embedding._byte_buffer), first_n(embedding._length_buffer)
    if tokenizer is None:
        return old_NxP, old_N
    new_NxP, new_N = map(first_n, build_byte_buffer(tokenizer, embedding.pos_dim, embedding.byte_extraction))
    changed = (new_N != old_N) | (new_NxP != old_NxP).any(1)
    if other := (changed & (new_N > 0) & (old_N > 0)).nonzero().flatten().tolist():
        raise ValueError(
            f"{len(other)} tokens, the first of id {other[0]}, have other bytes in this tokenizer than in the "
            "embedding: it is not the tokenizer that the model was made with"
        )
    there = new_N > 0
    return torch.where(there[:, None], new_NxP, old_NxP), torch.where(there, new_N, old_N)


def save_pretrained(model, folder) -> None:
    """model.save_pretrained(folder), and the bytes of the tokens beside it."""
    from safetensors.torch import save_file

    embedding = model.get_input_embeddings()
    if not isinstance(embedding, KroneckerEmbedding):
        raise ValueError(f"the model's input embedding is a {type(embedding).__name__}: swap it first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffers = {"bytes": embedding._byte_buffer, "lengths": embedding._length_buffer}
    save_file({name: t.cpu().contiguous() for name, t in buffers.items()}, folder / BYTES_FILE)
    model.save_pretrained(folder)


def from_pretrained(folder, dtype: torch.dtype | None = None, tokenizer=None):
    """The model that save_pretrained wrote, in eval mode, on the CPU; code that lies in the folder is never run.

    tokenizer: for model.resize_token_embeddings; the bytes of the tokens that there are come with the folder.
    Raises ValueError for a folder that save_pretrained of this module did not write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    if not (folder / BYTES_FILE).is_file():
        raise ValueError(f"{folder} holds no {BYTES_FILE}: save the model with kronecker.hf.save_pretrained")
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no model.safetensors")
    try:
        options = _options(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        buffers, weights = load_file(folder / BYTES_FILE), {}
        for file in files:
            weights.update(load_file(file))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        options |= {"byte_buffer": buffers["bytes"], "length_buffer": buffers["lengths"]}
        swap_input_embeddings(model, **options)
        first = next((t.dtype for t in weights.values() if t.is_floating_point()), None)
        model.to(dtype or first).load_state_dict(weights)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        reason = "it needs code of its own, which is never run" if "custom code" in reason else reason
        raise ValueError(f"{folder} is no folder that this module can load: {reason}") from None
    model.resize_token_embeddings = partial(resize_token_embeddings, model, tokenizer=tokenizer)
    return model.eval()


def _options(config) -> dict:
    """Keyword arguments of swap_input_embeddings from a config.json's content; ValueError for another shape."""
    options = config.get("kronecker") if isinstance(config, dict) else None
    kinds = OPTIONS | {"tie": str}
    if not isinstance(options, dict) or {k: type(v) for k, v in options.items()} != kinds:
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise ValueError(f"its config.json needs an entry kronecker with exactly these: {wanted}")
    return options


def _forget_tie(model) -> None:
    """Keep transformers from tying (or, on saving, dropping) a head that is no longer the table."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if hasattr(model, "get_expanded_tied_weights_keys"):  # transformers 5 keeps the ties of the start
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
