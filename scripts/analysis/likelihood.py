"""How likely a model finds given continuations, each after its own context."""

from contextlib import nullcontext

import numpy as np
import torch
from torch.nn import functional as F

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
    rows = []
    for context, answer in pairs:
        if not context or not 0 < len(answer) <= block_size:
            raise ValueError(
                f"a continuation of {len(answer)} tokens after {len(context)} cannot be scored at block_size {block_size}"
            )
        rows.append((context + answer[:-1])[-block_size:])
    nats, likeliest = [np.empty(0)] * len(pairs), [False] * len(pairs) if greedy else []
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    total, seen = sum(map(len, rows)), 0
    while order:
        width = len(rows[order[0]])
        batch, order = order[: max(1, batch_tokens // width)], order[max(1, batch_tokens // width) :]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        here, targets, slots = [], [], {}
        for row, i in enumerate(batch):
            (context, answer), n = pairs[i], len(rows[i])
            ids[row, :n] = torch.tensor(rows[i])
            here += [row * width + n - len(answer) + k for k in range(len(answer))]
            targets += answer
            cut = len(context) + len(answer) - 1 - n
            slots |= {(row, p - cut): b for p, b in (overrides[i] if overrides else {}).items() if p >= cut}
        wanted = torch.tensor(targets, device=device)
        with autocast or nullcontext():
            x, weight = model.hidden(ids.to(device), byte_overrides=slots or None)
            x = x.flatten(0, 1)[torch.tensor(here, device=device)]
            losses = cross_entropy(x, weight, wanted, "none").cpu().double().numpy()
            hits = []
            if greedy:
                hits = (torch.cat([F.linear(a, weight).argmax(1) for a in x.split(1024)]) == wanted).tolist()
        start = 0
        for i in batch:
            end = start + len(pairs[i][1])
            nats[i] = losses[start:end]
            if greedy:
                likeliest[i] = all(hits[start:end])
            start = end
            seen += len(rows[i])
        done(seen, total)
    return nats, likeliest
