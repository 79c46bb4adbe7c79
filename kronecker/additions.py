"""Two additions to the codec and its projection, off by default.

Hashed n-grams, which are no part of the paper's method: the codec ties a byte to its position, so "ing" in "sing" and
in "string" share nothing; a bag of hashed byte pairs and triples does not see positions.

The regulariser on the projection's row distribution (section 3.4 of the paper, which gives no formula): the d_model
rows w_i of the projection share its energy as p_i = ||w_i||^2 / sum_j ||w_j||^2, and

    R(W) = 1 - H(p) / ln d_model,    H(p) = -sum_i p_i ln p_i

is 0 when all rows have the same norm and 1 when a single output dimension holds everything.
"""

import math

import torch
from torch import Tensor

EMPTY = 0  # the bucket of "no n-gram here", kept out of the sums


def ngram_buckets(bytes_NxP: Tensor, lengths_N: Tensor, n_buckets: int) -> Tensor:
    """Buckets int64 (N, 2P - 3) of each token's byte 2-grams, then 3-grams; EMPTY where the token has none.

    Real n-grams hash to 1..n_buckets-1 (multiplicative hashing of 2-gram and 3-gram keys that never coincide).
    """
    b_NxP = bytes_NxP.long()
    pair = b_NxP[:, :-1] * 256 + b_NxP[:, 1:]
    triple = (1 << 24) + pair[:, :-1] * 256 + b_NxP[:, 2:]
    key_NxG = torch.cat((pair, triple), dim=1)
    hashed = (key_NxG * 2654435761) & 0xFFFFFFFF
    bucket_NxG = 1 + (hashed ^ (hashed >> 15)) % (n_buckets - 1)
    P = bytes_NxP.size(1)
    from_2_G = torch.arange(2, P + 1, device=b_NxP.device)
    ends_G = torch.cat((from_2_G, from_2_G[1:]))
    return bucket_NxG.masked_fill(ends_G > lengths_N.long()[:, None], EMPTY)


def row_entropy_penalty(weight_MxD: Tensor) -> Tensor:
    """R(W), a scalar in [0, 1] in float32 (float64 for float64 weights), differentiable."""
    if weight_MxD.dim() != 2 or weight_MxD.size(0) < 2:
        raise ValueError(f"the projection needs two rows or more, but has shape {tuple(weight_MxD.shape)}")
    dtype = torch.float64 if weight_MxD.dtype == torch.float64 else torch.float32
    energy_M = weight_MxD.to(dtype).square().sum(1)
    p_M = energy_M / energy_M.sum().clamp(min=torch.finfo(dtype).tiny)
    return 1 - torch.special.entr(p_M).sum() / math.log(len(p_M))
