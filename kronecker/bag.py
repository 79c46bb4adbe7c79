"""The codec times the projection without the codec: a weighted bag of rows of W^T.

    e = W z = scale_L * sum_p W[:, byte_p * pos_dim + p]  -  shift_L * W.sum(1)

(scale and shift: `bag_coefficients` in codec.py), so a token costs one row of W^T for each of its real bytes,
about five in text. The gradient runs the same two sums backwards, always in the same order: the slots of a
token into one row, then the tokens of a byte into one row of W^T.

What is summed to what follows from the ids alone: the plan of a batch, which a loader's thread may make ahead
(`plan_ahead`), since in a small model it takes as long as the sums. On the CPU it is NumPy's (a fifth of torch's
overhead), and the batch's counts decide:

- Where at least every second slot repeats a token (N >= 2 U, as in text, where 8,192 slots hold about 2,550
  tokens) the U distinct tokens are computed and looked up. Where fewer do, the bag of each of the N slots goes
  straight into the output: a bag, whose rows the caches hold, costs about two look-ups, which they do not. The
  whole table is one such batch.
- The gradient of the slots of a token is summed first in either case, as each of its bytes would have to
  fetch all of them.
- What lies between input and output is made in pieces of a tenth of the output (column parts; in the second
  case blocks of rows). A CPU's kernel clears fresh memory page by page, which takes longer than the sums, and a
  piece is used over and over and stays in the caches.

Every call reads the whole of W for its sum W.sum(1), which takes longer than some hundred bags. Where the weights
stand still, a look-up in the table spares all of it: KroneckerEmbedding's mode="cached".

On every other device all of it is torch's, on the distinct tokens, with its segmented backward kernels, because
there one row that half of the tokens share must not be summed by one thread. To know how many tokens are
distinct the host waits for the device twice a call.

All of it reads W^T as (D, M = d_model) contiguous, as KroneckerEmbedding lays its parameter out by default.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A vocabulary: bytes uint8 (V, P), lengths int16 (V,), and coef (P + 1, 2), scale and shift of each length, in the
# dtype to sum in.
Tokens = tuple[Tensor, Tensor, Tensor]


def embed(ids: Tensor, weight_MxD: Tensor, tokens: Tokens) -> Tensor:
    """Embeddings (*ids.shape, M) of int64 ids: weighted bags of their tokens' bytes, differentiable in weight.

    Raises IndexError on CPU for an id outside 0..V-1 (elsewhere, as in nn.Embedding, that is a device-side
    assertion).
    """
    if torch.compiler.is_compiling():
        e_NxM = torch.ops.kronecker.embed(ids.reshape(-1), weight_MxD.t().contiguous(), *tokens)
        return e_NxM.view(*ids.shape, len(weight_MxD))
    if ids.numel() == 0:
        return weight_MxD.new_zeros(*ids.shape, weight_MxD.size(1)) @ weight_MxD.t()
    return _Embed.apply(ids, weight_MxD, _plan(ids, tokens, weight_MxD.size(1)))


def plan_ahead(ids: Tensor, tokens: Tokens, D: int) -> None:
    """Make the plan of a batch of int64 ids on the CPU, for the embed() that is called with this very tensor."""
    if ids.numel():
        plan = CpuPlan(ids.reshape(-1), tokens, D)
        plan.slots, plan.gradient  # noqa: B018 - made now
        ids._kronecker_plan = ids._version, plan


def _plan(ids: Tensor, tokens: Tokens, D: int) -> CpuPlan | DevicePlan:
    version, plan = getattr(ids, "_kronecker_plan", (None, None))
    if plan is not None and version == ids._version and plan.is_for(tokens, D):
        return plan
    return (CpuPlan if ids.device.type == "cpu" else _plan_device)(ids.reshape(-1), tokens, D)


# ---- CPU ----


class CpuPlan:
    """What is summed to what for the ids of a batch (N,), U of them distinct."""

    def __init__(self, ids_N: Tensor, tokens: Tokens, D: int):
        self.tokens, self.D = tokens, D
        self.bytes_VxP, self.lengths_V, self.coef = tokens[0].numpy(), tokens[1].numpy(), tokens[2]
        ids, V = ids_N.numpy(), len(self.lengths_V)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= V:
            wrong = low if low < 0 else high
            raise IndexError(f"token id {wrong} is outside 0..{V - 1} of this embedding's vocabulary")
        used_V = np.zeros(V, dtype=bool)
        used_V[ids] = True
        self.distinct_U = np.flatnonzero(used_V)
        place_V = np.empty(V, dtype=np.int64)
        place_V[self.distinct_U] = np.arange(len(self.distinct_U))
        # Where each slot's token stands among the distinct ones. The ids themselves are not kept: the caller may
        # overwrite them before the backward pass.
        self.place_N = place_V[ids]

    def is_for(self, tokens: Tokens, D: int) -> bool:
        return self.D == D and all(a is b for a, b in zip(self.tokens, tokens, strict=True))

    @cached_property
    def distinct(self) -> Bags:
        return self._bags(self.distinct_U)

    @cached_property
    def slots(self) -> Bags | None:
        few_repeat = len(self.place_N) < 2 * len(self.distinct_U)
        return self._bags(self.distinct_U[self.place_N]) if few_repeat else None

    def _bags(self, tokens_T: np.ndarray) -> Bags:
        lengths_T, P = self.lengths_V[tokens_T], self.bytes_VxP.shape[1]
        flat_TxP = np.multiply(self.bytes_VxP[tokens_T], P, dtype=np.int32) + np.arange(P, dtype=np.int32)
        bounds_T1 = np.zeros(len(tokens_T) + 1, dtype=np.int32)
        lengths_T.cumsum(out=bounds_T1[1:])
        coef_Tx2 = torch.from_numpy(self.coef.numpy()[lengths_T])
        row_K = flat_TxP[np.arange(P, dtype=np.int16) < lengths_T[:, None]]
        return Bags(row_K, bounds_T1, coef_Tx2[:, :1], coef_Tx2[:, 1:])

    @cached_property
    def gradient(self) -> tuple[np.ndarray, ...]:
        """The sums of the backward pass: slots of each distinct token, then distinct tokens of each row of W^T.

        Every row loses the shared vector, too: it comes as one more token, the last, without slots.
        """
        U = len(self.distinct_U)
        slot_N, bounds_U1 = _runs(self.place_N, U + 1)
        token_K = np.repeat(np.arange(U, dtype=np.int32), np.diff(self.distinct.bounds_T1))
        token_K = np.concatenate((token_K, np.full(self.D, U, dtype=np.int32)))
        order_K, bounds_D1 = _runs(np.concatenate((self.distinct.row_K, np.arange(self.D))), self.D)
        return slot_N, bounds_U1, token_K[order_K], bounds_D1

    def forward(self, wT_DxM: Tensor) -> Tensor:
        """Embeddings (N, M)."""
        N, M = len(self.place_N), wT_DxM.size(1)
        total_M = wT_DxM.sum(0, dtype=self.coef.dtype)
        if bags := self.slots:
            e_NxM = wT_DxM.new_empty(N, M)
            for block in _slices(N, (1 << 18) // M):  # a megabyte
                bounds = bags.bounds_T1[block.start : block.stop + 1]
                sums_BxM = _sums(bags.row_K, bounds, wT_DxM).to(total_M.dtype).mul_(bags.scale_Tx1[block])
                torch.addcmul(sums_BxM, bags.shift_Tx1[block], total_M, value=-1, out=e_NxM[block])
            return e_NxM
        bags, place_N = self.distinct, torch.from_numpy(self.place_N)
        parts = _column_parts(len(self.distinct_U), N, M)
        e_NxM = wT_DxM.new_empty(N, M)
        for i, columns in enumerate(_slices(M, M // parts)):
            e_Uxm = _sums(bags.row_K, bags.bounds_T1, wT_DxM, i, parts).to(total_M.dtype)
            e_Uxm.mul_(bags.scale_Tx1).addcmul_(bags.shift_Tx1, total_M[columns], value=-1)
            torch.index_select(e_Uxm.to(wT_DxM.dtype), 0, place_N, out=e_NxM[:, columns])
        return e_NxM

    def backward(self, g_NxM: Tensor) -> Tensor:
        """Gradient (D, M) of W^T from the output's (N, M): forward transposed, in the same two steps."""
        slot_N, bounds_U1, token_K, bounds_D1 = self.gradient
        N, M, U = *g_NxM.shape, len(bounds_U1) - 2
        parts, grad_DxM = _column_parts(U, N, M), None
        for i, columns in enumerate(_slices(M, M // parts)):
            g_U1xm = _sums(slot_N, bounds_U1, g_NxM, i, parts)
            torch.neg(self.distinct.shift_Tx1[:, 0] @ g_U1xm[:U], out=g_U1xm[U])
            g_U1xm[:U].mul_(self.distinct.scale_Tx1)
            if parts == 1:
                return _sums(token_K, bounds_D1, g_U1xm)
            grad_DxM = g_NxM.new_empty(self.D, M) if grad_DxM is None else grad_DxM
            for rows in _slices(self.D, _piece(N, M) * parts // M):
                grad_DxM[rows, columns] = _sums(token_K, bounds_D1[rows.start : rows.stop + 1], g_U1xm)
        return grad_DxM


class Bags(NamedTuple):
    """What T tokens are sums of: their K bytes, token by token."""

    row_K: np.ndarray  # row of W^T of each byte, int32
    bounds_T1: np.ndarray  # where each token's bytes begin and end, int32
    scale_Tx1: Tensor
    shift_Tx1: Tensor


def _sums(row_K: np.ndarray, bounds_B1: np.ndarray, matrix: Tensor, part: int = 0, parts: int = 1) -> Tensor:
    """B sums, in order, of rows of one column part of a matrix; sum b: rows row_K[bounds[b] : bounds[b + 1]]."""
    first, last = bounds_B1[0], bounds_B1[-1]
    if first or last < len(row_K):
        row_K, bounds_B1 = row_K[first:last], bounds_B1 - first
    if parts > 1:  # part i of row r is row r * parts + i of a matrix so much narrower
        row_K, matrix = row_K * np.int32(parts) + np.int32(part), matrix.view(-1, matrix.size(1) // parts)
    rows, bounds = torch.from_numpy(row_K), torch.from_numpy(bounds_B1)
    # F.embedding_bag's own call: mode 0 is the sum, and the last True says that bounds end with the last bag's end
    return torch.embedding_bag(matrix, rows, bounds, False, 0, False, None, True)[0]


def _column_parts(T: int, N: int, M: int) -> int:
    """Into how many parts to cut M columns so that T rows of each make a piece; narrower ones than 32 cost more."""
    parts = 1
    while parts * _piece(N, M) < T * M and M % (64 * parts) == 0:
        parts *= 2
    return parts


def _piece(N: int, M: int) -> int:
    """Numbers worked on at a time: a tenth of the output (N, M), or 2 MB, since a call costs time too."""
    return max(N * M // 10, 1 << 19)


def _slices(n: int, step: int) -> list[slice]:
    step = max(step, 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _runs(destination_K: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The stable order (K,) that sorts destinations 0..n-1, and where each one's run begins and ends (n + 1,)."""
    key_K = (destination_K.astype(np.int64) << 32) | np.arange(len(destination_K))
    key_K.sort()  # faster than a stable argsort
    bounds_n1 = np.zeros(n + 1, dtype=np.int32)
    np.bincount(destination_K, minlength=n).cumsum(out=bounds_n1[1:])
    return key_K.astype(np.int32), bounds_n1


# ---- every other device, in torch operations that any of them has ----


class DevicePlan(NamedTuple):
    """Which rows go where, for a batch of N ids: U distinct tokens with K bytes in all."""

    inverse_N: Tensor  # distinct token of each id
    flat_K: Tensor  # row of W^T of each byte, token by token
    lengths_U: Tensor
    coef: Tensor  # (U, 2)
    D: int

    def forward(self, wT_DxM: Tensor) -> Tensor:
        """Embeddings (N, M)."""
        scale_Ux1, shift_Ux1 = self.coef.split(1, dim=1)
        starts_U = self.lengths_U.cumsum(0) - self.lengths_U
        e_UxM = F.embedding_bag(self.flat_K, wT_DxM, starts_U, mode="sum").to(self.coef.dtype)
        e_UxM.mul_(scale_Ux1).addcmul_(shift_Ux1, wT_DxM.sum(0, dtype=e_UxM.dtype), value=-1)
        return e_UxM.to(wT_DxM.dtype).index_select(0, self.inverse_N)

    def backward(self, g_NxM: Tensor) -> Tensor:
        """The backward kernels of embedding and embedding_bag: bag U, of lengths_U, was the sum of rows flat_K."""
        flat_K, lengths_U, U = self.flat_K, self.lengths_U, len(self.lengths_U)
        scale_Ux1, shift_Ux1 = self.coef.split(1, dim=1)
        g_UxM = torch.ops.aten.embedding_dense_backward(g_NxM, self.inverse_N, U, -1, False)
        shared_M = shift_Ux1[:, 0] @ g_UxM
        bag_U = torch.arange(U, device=g_UxM.device)
        bag_K = torch.repeat_interleave(bag_U, lengths_U, output_size=len(flat_K))
        grad_DxM = torch.ops.aten._embedding_bag_dense_backward(
            g_UxM.mul_(scale_Ux1), flat_K, bag_K, lengths_U, lengths_U, self.D, False, 0, None, -1
        )
        return grad_DxM.sub_(shared_M)


def _plan_device(ids_N: Tensor, tokens: Tokens, D: int) -> DevicePlan:
    bytes_VxP, lengths_V, coef_Lx2 = tokens
    P = bytes_VxP.size(1)
    distinct_U, inverse_N = torch.unique(ids_N, return_inverse=True)
    lengths_U = lengths_V[distinct_U].long()
    position_P = torch.arange(P, device=ids_N.device)
    flat_UxP = bytes_VxP[distinct_U].long() * P + position_P
    return DevicePlan(inverse_N, flat_UxP[position_P < lengths_U[:, None]], lengths_U, coef_Lx2[lengths_U], D)


# ---- autograd ----


def _backward(plan: CpuPlan | DevicePlan, g_NxM: Tensor) -> Tensor:
    """Gradient (D, M) of W^T in the dtype of the output's (N, M), summed in that of the coefficients."""
    return plan.backward(g_NxM.to(plan.coef.dtype).contiguous()).to(g_NxM.dtype)


class _Embed(torch.autograd.Function):
    """Takes ids and weight in their own shapes: each view outside would be one more node of the graph."""

    @staticmethod
    def forward(ctx, ids, weight_MxD, plan):
        ctx.plan = plan
        return plan.forward(weight_MxD.t().contiguous()).view(*ids.shape, len(weight_MxD))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return None, _backward(ctx.plan, g.reshape(-1, g.size(-1))).t(), None


# The same as opaque operators: torch.compile keeps them whole instead of breaking the graph on data that
# decides shapes. The backward makes its plan again, since an operator's outputs must be tensors of known shape.


@torch.library.custom_op("kronecker::embed", mutates_args=())
def _embed_op(ids_N: Tensor, wT_DxM: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef: Tensor) -> Tensor:
    if ids_N.numel() == 0:
        return wT_DxM.new_empty(0, wT_DxM.size(1))
    return _plan(ids_N, (bytes_VxP, lengths_V, coef), len(wT_DxM)).forward(wT_DxM)


@_embed_op.register_fake
def _(ids_N, wT_DxM, bytes_VxP, lengths_V, coef_Lx2):
    return wT_DxM.new_empty(ids_N.shape[0], wT_DxM.shape[1])


@torch.library.custom_op("kronecker::embed_grad", mutates_args=())
def _embed_grad_op(
    g_NxM: Tensor, ids_N: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int
) -> Tensor:
    if ids_N.numel() == 0:
        return g_NxM.new_zeros(D, g_NxM.size(1))
    return _backward(_plan(ids_N, (bytes_VxP, lengths_V, coef_Lx2), D), g_NxM)


@_embed_grad_op.register_fake
def _(g_NxM, ids_N, bytes_VxP, lengths_V, coef_Lx2, D):
    return g_NxM.new_empty(D, g_NxM.shape[1])


def _save(ctx, inputs, output):
    ids_N, wT_DxM, *tokens = inputs
    ctx.save_for_backward(ids_N, *tokens)
    ctx.D = wT_DxM.shape[0]


def _embed_op_backward(ctx, g_NxM):
    return None, torch.ops.kronecker.embed_grad(g_NxM, *ctx.saved_tensors, ctx.D), None, None, None


_embed_op.register_autograd(_embed_op_backward, setup_context=_save)
