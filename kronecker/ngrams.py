"""An optional second look at a token's bytes: hashed byte pairs and triples, wherever in the token they stand.

The codec ties a byte to its position, so "ing" in "sing" and in "string" share nothing. A bag of hashed n-grams
does not see positions. It is an addition of this package, not part of the paper's method, and is off by default.
"""

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
    ends_G = torch.cat((torch.arange(2, P + 1), torch.arange(3, P + 1))).to(b_NxP.device)
    return bucket_NxG.masked_fill(ends_G > lengths_N.long()[:, None], EMPTY)
