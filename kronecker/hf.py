"""The Kronecker embedding inside any transformers causal LM.

    model = AutoModelForCausalLM.from_pretrained(name)
    swap_input_embeddings(model, tokenizer, pos_dim=32, tie="untie")
    ...train...
    save_pretrained(model, folder)
    model = from_pretrained(folder)

transformers cannot rebuild a module that it does not know, so a swapped model is saved with the bytes of its
tokens beside the weights (kronecker.safetensors) and loaded by from_pretrained here, not by AutoModel.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from kronecker.embedding import KroneckerEmbedding

BYTES_FILE = "kronecker.safetensors"
TIES = ("untie", "induced")


class InducedHead(nn.Module):
    """Output head tied to the Kronecker embedding: logits = scale * x E^T with E = embedding.table().

    The table's rows have a norm of about sqrt(d_model), fifty times a usual head's, so one learned scalar,
    started at 0.02, brings the logits back. The embedding's weight stays the embedding's: only the scalar is
    a parameter here. x (..., d_model) -> logits (..., vocab_size).
    """

    def __init__(self, embedding: KroneckerEmbedding, scale: float = 0.02):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=embedding.projection.weight.dtype))
        self._tied_to = [embedding]  # in a list, so that it is not registered a second time
        self.in_features, self.out_features = embedding.d_model, embedding.vocab_size

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x * self.scale, self._tied_to[0].table())


def swap_input_embeddings(
    model, tokenizer=None, pos_dim: int = 32, tie: str | None = None, **options
) -> KroneckerEmbedding:
    """Put a fresh KroneckerEmbedding where model.get_input_embeddings() was, and return it.

    model: a transformers causal LM, or anything with get/set_input_embeddings and get/set_output_embeddings.
    tie: what becomes of the output head. None is for heads of their own, which stay as they are; a head tied to
        the old table needs a choice: "untie" leaves it the old table as its own weight, "induced" ties it to the
        new embedding (InducedHead; also possible for a head that was not tied).
    options: KroneckerEmbedding's, for instance byte_extraction or byte_buffer and length_buffer.
    Raises ValueError for a tied head without a choice, or an unknown one.
    """
    if tie not in (None, *TIES):
        raise ValueError(
            f"tie must be 'untie' or 'induced' (or None for a head of its own), but it is {tie!r}"
        )
    old, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is old.weight
    if tied and tie is None:
        raise ValueError(
            "the output head is tied to the input table: say tie='untie' (the head keeps that table as its own "
            "weight) or tie='induced' (the head is tied to the new embedding)"
        )
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
    model.config.kronecker = {
        "pos_dim": new.pos_dim,
        "char_dim": new.char_dim,
        "length_normalize": new.length_normalize,
        "z_normalize": new.z_normalize,
        "byte_extraction": new.byte_extraction,
        "init_rms": new.init_rms,
        "ngrams": new.ngrams,
        "rank": new.rank,
        "tie": "induced" if tie == "induced" else "untie",
    }
    return new


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


def from_pretrained(folder, dtype: torch.dtype | None = None):
    """The model that save_pretrained wrote, in eval mode, on the CPU.

    Raises ValueError for a folder that save_pretrained of this module did not write.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / BYTES_FILE).is_file():
        raise ValueError(f"{folder} holds no {BYTES_FILE}: save the model with kronecker.hf.save_pretrained")
    config = AutoConfig.from_pretrained(folder)
    options = dict(config.kronecker)
    model = AutoModelForCausalLM.from_config(config)
    buffers = load_file(folder / BYTES_FILE)
    options.update(byte_buffer=buffers["bytes"], length_buffer=buffers["lengths"])
    swap_input_embeddings(model, **options)
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(file))
    if not weights:
        raise ValueError(f"{folder} holds no model*.safetensors")
    first = next((t.dtype for t in weights.values() if t.is_floating_point()), None)
    model.to(dtype or first).load_state_dict(weights)
    return model.eval()


def _forget_tie(model) -> None:
    """Keep transformers from tying (or, on saving, dropping) a head that is no longer the table."""
    configs = [model.config]
    if hasattr(model.config, "get_text_config"):
        configs.append(model.config.get_text_config())
    for config in configs:
        config.tie_word_embeddings = False
    if hasattr(
        model, "get_expanded_tied_weights_keys"
    ):  # transformers 5 keeps the ties it found at the start
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
