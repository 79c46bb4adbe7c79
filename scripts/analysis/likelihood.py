"""How likely a model finds given continuations, each after its own context."""

from contextlib import nullcontext
from itertools import chain

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.loss import cross_entropy


@torch.no_grad()
def score(
    model,
    pairs: list[tuple[list[int], list[int]]],
    overrides: list[dict[int, bytes]] | None = None,
    batch_tokens: int = 8192,
    autocast=None,
    greedy: bool = False,
    done=lambda tokens, of: None,
) -> tuple[list[np.ndarray], list[bool]]:
    """(nats of every continuation token, is each its position's likeliest token) for (context, continuation) ids.

    The model's own cross-entropy, in float32, of the continuation's positions alone: most of a small model's
    work is the head, and nobody asks for the context's share. Pairs of like length go together, the longest first
    (what does not fit into memory shows at once), padded on the right, which a causal model cannot see. A context too
    long for block_size loses its start; a continuation must fit. `overrides` gives context positions made from
    bytes, {position: bytes} a pair. The second list is empty unless `greedy`. done(tokens so far, of all) after a batch.
    """
    block_size, device = model.config.block_size, model.transformer.wpe.weight.device
    if not all(context and 0 < len(answer) <= block_size for context, answer in pairs):
        what = f"a pair without a context, or without 1 to {block_size} tokens of continuation"
        raise ValueError(f"{what}, cannot be scored")
    rows = [(context + answer[:-1])[-block_size:] for context, answer in pairs]
    nats, likeliest = [np.empty(0)] * len(pairs), [False] * len(pairs) if greedy else []
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    total, seen = sum(map(len, rows)), 0
    while order:
        width = len(rows[order[0]])
        size = max(1, batch_tokens // width)
        batch, order = order[:size], order[size:]
        ids = pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)
        here, slots, answers = [], {}, [pairs[i][1] for i in batch]
        for row, i in enumerate(batch):
            end = len(rows[i])
            here += range(row * width + end - len(answers[row]), row * width + end)
            cut = len(pairs[i][0]) + len(answers[row]) - 1 - end
            slots |= {(row, p - cut): b for p, b in (overrides[i] if overrides else {}).items() if p >= cut}
        wanted = torch.tensor([*chain(*answers)], device=device)
        with autocast or nullcontext():
            x, weight = model.hidden(ids.to(device), byte_overrides=slots or None)
            x = x.flatten(0, 1)[torch.tensor(here, device=device)]
            losses = cross_entropy(x, weight, wanted, "none").cpu().double().numpy()
            if greedy:
                hits = torch.cat([F.linear(part, weight).argmax(1) for part in x.split(1024)]) == wanted
                hits = hits.cpu().numpy()
        ends = np.cumsum([len(answer) for answer in answers])[:-1]
        for i, own in zip(batch, np.split(losses, ends), strict=True):
            nats[i] = own
        for i, own in zip(batch, np.split(hits, ends), strict=True) if greedy else ():
            likeliest[i] = bool(own.all())
        seen += sum(len(rows[i]) for i in batch)
        done(seen, total)
    return nats, likeliest
