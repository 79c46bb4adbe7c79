"""What generation needs beside the model: rows of different lengths in one batch, and the choice of a token."""

import torch
from torch import Tensor


def padded(padding: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """(position embeddings' indices (B, T), attention mask (B, 1, T, end)) of the positions begin to end of rows that
    start with so much filling. A filling position sees itself, since a softmax over nothing has no value."""
    key = torch.arange(end, device=padding.device)
    place, query = key - padding[:, None], key[begin:, None]
    mask = (place >= 0)[:, None] & (key <= query) | (key == query)
    return place[:, begin:].clamp(min=0), mask[:, None]


def pick(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """Token ids (B, 1) drawn from logits (B, V); top_p keeps the smallest set of tokens with that much probability."""
    if temperature < 1e-6:  # finer than float32 tells logits apart, and soon their quotient overflows
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        ordered[probs.cumsum(dim=-1) - probs >= top_p] = -torch.inf
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
