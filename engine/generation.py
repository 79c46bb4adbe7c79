"""What generation needs beside the model: rows of different lengths in one batch, the choice of a token, and a linear
layer that is quick with one position of each row at a time."""

import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


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


class Linear(nn.Linear):
    """nn.Linear, by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (B, T, K), weight (N, K), bias (N) -> (B, T, N).

    With one position a row, as in generation, time goes into reading the weight, and on a CPU torch reads it with one
    thread. Cut into a piece for each thread it is read by all of them: about twice as fast with two.
    """
    B, T, K = x.shape
    usual = T > 1 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
    pieces = 1 if usual or torch.compiler.is_compiling() else math.gcd(len(weight), torch.get_num_threads())
    if pieces == 1:
        return F.linear(x, weight, bias)
    y_PxBxN = torch.bmm(x.view(1, B, K).expand(pieces, B, K), weight.view(pieces, -1, K).mT)
    y = y_PxBxN.transpose(0, 1).reshape(B, 1, -1)
    return y if bias is None else y + bias
