"""Other ways to compute the same embedding on a GPU; scripts/bench/embedding.py measures them beside the package's own.

    python scripts/gpu/candidates.py table FLAGS   train.py, its embedding going this way (as scripts/bench/train.py does)

kronecker/bag.py learns from the device how many of a batch's tokens are distinct, so the host waits for it: twice in
the forward pass and, compiled, twice in the backward one. The ways here have fixed shapes and never wait:

table   the embeddings of the whole vocabulary, then a lookup; the sums of the backward pass follow an order that is
        made once, since the bytes of a vocabulary do not change. Long runs (the rows that many tokens share) are cut
        into pieces of CHUNK, or one thread would add up thousands of rows.
slots   the distinct tokens, like the package, in as many slots as there could be at most; empty slots cost little.

Whichever is fastest in the training step should become the package's way; until it is measured, nothing is changed.
"""

import copy
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run by its path: the root takes the place of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    import scripts.by_path  # noqa: F401 - Ctrl-C

import torch
import torch.nn.functional as F
from torch import Tensor

from kronecker import KroneckerEmbedding

CHUNK = 64


def weighted(bag_TxM: Tensor, wT_DxM: Tensor, scale_Tx1: Tensor, shift_Tx1: Tensor) -> Tensor:
    """Embeddings (T, M) of T tokens whose rows of W^T are summed up in bag."""
    total_M = wT_DxM.sum(0, dtype=scale_Tx1.dtype)
    e_TxM = torch.addcmul(scale_Tx1 * bag_TxM.to(scale_Tx1.dtype), shift_Tx1, total_M, value=-1)
    return e_TxM.to(wT_DxM.dtype)


class TableWay:
    """W^T (D, M) -> embeddings (N, M) through the table of all V tokens. coef (P + 1, 2) as in kronecker/bag.py."""

    def __init__(self, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int):
        V, P = bytes_VxP.shape
        count = partial(torch.arange, device=bytes_VxP.device)
        self.flat_K = (bytes_VxP.long() * P + count(P))[count(P) < lengths_V[:, None]]
        lengths = lengths_V.long()
        self.starts_V = lengths.cumsum(0) - lengths
        self.scale_Vx1, self.shift_Vx1 = coef_Lx2[lengths].unsqueeze(2).unbind(1)
        # the same sums backwards: for each row of W^T the tokens that have it, in pieces of CHUNK
        token_K = torch.repeat_interleave(count(V), lengths)
        self.token_K = token_K[torch.argsort(self.flat_K, stable=True)]
        counts_D = torch.bincount(self.flat_K, minlength=D)
        pieces_D = (counts_D + CHUNK - 1) // CHUNK
        self.starts_D = pieces_D.cumsum(0) - pieces_D
        row_C = torch.repeat_interleave(count(D), pieces_D)
        self.all_C = count(len(row_C))
        self.starts_C = (counts_D.cumsum(0) - counts_D)[row_C] + (self.all_C - self.starts_D[row_C]) * CHUNK

    def __call__(self, ids_N: Tensor, wT_DxM: Tensor) -> Tensor:
        bag_VxM = _Bags.apply(wT_DxM, self)
        return F.embedding(ids_N, weighted(bag_VxM, wT_DxM, self.scale_Vx1, self.shift_Vx1))


class _Bags(torch.autograd.Function):
    """The sums of a TableWay, (V, M) in the precision of its weights, and their gradient."""

    @staticmethod
    def forward(ctx, wT_DxM, way):
        ctx.way, ctx.dtype = way, wT_DxM.dtype
        return F.embedding_bag(way.flat_K, wT_DxM, way.starts_V, mode="sum").to(way.scale_Vx1.dtype)

    @staticmethod
    def backward(ctx, g_VxM):
        piece_CxM = F.embedding_bag(ctx.way.token_K, g_VxM, ctx.way.starts_C, mode="sum")
        return F.embedding_bag(ctx.way.all_C, piece_CxM, ctx.way.starts_D, mode="sum").to(ctx.dtype), None


class Slots:
    """The same through min(N, V) slots for the distinct tokens of the batch."""

    def __init__(self, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int):
        self.bytes_VxP, self.lengths_V, self.coef_Lx2, self.D = bytes_VxP, lengths_V.long(), coef_Lx2, D

    def __call__(self, ids_N: Tensor, wT_DxM: Tensor) -> Tensor:
        V, P = self.bytes_VxP.shape
        S = min(len(ids_N), V)
        all_V, position_P = (torch.arange(n, device=ids_N.device) for n in (V, P))
        used_V = torch.zeros_like(all_V, dtype=torch.bool).index_fill_(0, ids_N, True)
        slot_V = used_V.cumsum(0) - 1
        # slot S is the bin of all tokens that are not there
        token_S = all_V.new_zeros(S + 1).scatter_(0, torch.where(used_V, slot_V, S), all_V)[:S]
        lengths_S = self.lengths_V[token_S] * (all_V[:S] < used_V.sum())
        flat_SxP = self.bytes_VxP[token_S].long() * P + position_P
        flat_SxP = flat_SxP.masked_fill(position_P >= lengths_S[:, None], self.D)  # a row of zeros
        bag_SxM = F.embedding_bag(flat_SxP, F.pad(wT_DxM, (0, 0, 0, 1)), mode="sum", padding_idx=self.D)
        scale_Sx1, shift_Sx1 = self.coef_Lx2[lengths_S].unsqueeze(2).unbind(1)
        return F.embedding(slot_V[ids_N], weighted(bag_SxM, wT_DxM, scale_Sx1, shift_Sx1))


WAYS = {"table": TableWay, "slots": Slots}


class Candidate(KroneckerEmbedding):
    """A KroneckerEmbedding whose sums go its `way`."""

    way = TableWay

    def _place_constants(self) -> None:
        super()._place_constants()
        if self.projection.weight.device.type != "meta":
            self._way = self.way(self._byte_buffer, self._length_buffer, self._coef, self.D)

    def forward(self, ids: Tensor) -> Tensor:
        return self._way(ids.reshape(-1), self.projection.weight.t().contiguous()).view(*ids.shape, -1)

    def plan_ahead(self, input_ids: Tensor) -> None:
        """Nothing follows from the ids alone."""


def going(way, module: KroneckerEmbedding) -> Candidate:
    """The same embedding, with the same weight, whose sums go another way."""
    other = copy.copy(module)
    other.__class__, other.way = Candidate, way
    other._place_constants()
    return other


def main() -> None:
    way, *words = sys.argv[1:] or [""]
    if way == "--help":
        return print(__doc__)
    if way not in WAYS:
        raise SystemExit(f"error: there is no way {way!r}: choose from {', '.join(WAYS)}")
    import model
    import train

    Candidate.way = WAYS[way]
    model.KroneckerEmbedding = Candidate
    sys.exit(train.cli(words))


if __name__ == "__main__":
    main()
