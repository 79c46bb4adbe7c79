"""The codec times the projection without the codec: a weighted bag of rows of W^T.

    e = W z = scale_L * sum_p W[:, byte_p * pos_dim + p]  -  shift_L * W.sum(1)

(`bag_coefficients` in codec.py gives scale and shift for each length L), so a token costs at most pos_dim
rows of W^T and the (tokens, D) codec never exists. One path per device:

- CPU: each distinct token of the batch is computed once, from a ragged bag that holds only its real bytes,
  and the gradient runs the same two sums backwards, as bags over sorted keys, so that every row is added up
  in one fixed order (deterministic, and parallel over rows). A text batch repeats its tokens: 8,192 hold
  about 2,550.
- every other device: all tokens, bags of a fixed width padded to pos_dim, in plain torch operations. No step
  depends on the data's values, so the host never waits for the device and the whole compiles.

All of it reads W^T as (D, M = d_model) contiguous; KroneckerEmbedding lays its parameter out so by default.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def embed(ids: Tensor, weight_MxD: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Tensor:
    """Embeddings (*ids.shape, M) of int64 ids: weighted bags of their tokens' bytes, differentiable in weight.

    bytes uint8 (V, P), lengths int16 (V,), coef (P + 1, 2): scale and shift of each length, in the dtype to
    sum in. Raises IndexError on CPU for an id outside 0..V-1 (elsewhere, as in nn.Embedding, that is a
    device-side assertion).
    """
    if weight_MxD.device.type == "cpu" and not torch.compiler.is_compiling():
        return _EmbedCPU.apply(ids, weight_MxD, bytes_VxP, lengths_V, coef_Lx2)
    path = torch.ops.kronecker.embed if weight_MxD.device.type == "cpu" else _embed_padded
    e_NxM = path(ids.reshape(-1), weight_MxD.t().contiguous(), bytes_VxP, lengths_V, coef_Lx2)
    return e_NxM.view(*ids.shape, len(weight_MxD))


# ---- every device but the CPU ----


def _embed_padded(ids, wT_DxM, bytes_VxP, lengths_V, coef_Lx2) -> Tensor:
    D, P = len(wT_DxM), bytes_VxP.size(1)
    lengths_N = lengths_V[ids].long()
    position_P = torch.arange(P, device=ids.device)
    flat_NxP = bytes_VxP[ids].long() * P + position_P
    # a row of zeros after the last stands for "no byte here"
    flat_NxP = flat_NxP.masked_fill(position_P >= lengths_N[:, None], D)
    padded_wT = F.pad(wT_DxM, (0, 0, 0, 1))
    bag_NxM = F.embedding_bag(flat_NxP, padded_wT, mode="sum", padding_idx=D).to(coef_Lx2.dtype)
    scale_Nx1, shift_Nx1 = coef_Lx2[lengths_N].unsqueeze(2).unbind(1)
    e_NxM = scale_Nx1 * bag_NxM - shift_Nx1 * wT_DxM.sum(0, dtype=coef_Lx2.dtype)
    return e_NxM.to(wT_DxM.dtype)


# ---- CPU ----


class Plan(NamedTuple):
    """Which rows go where, for a batch of U distinct tokens with K bytes in all (NumPy: small overhead)."""

    inverse_N: np.ndarray | None  # distinct token of each id; None when the ids are 0..V-1 in order
    flat_K: np.ndarray  # row of W^T of each byte, token by token
    lengths_U: np.ndarray
    coef_Ux2: Tensor


def _plan(ids: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Plan:
    ids_N, V, P = ids.numpy(), *bytes_VxP.shape
    low, high = int(ids_N.min()), int(ids_N.max())
    if low < 0 or high >= V:
        raise IndexError(
            f"token id {low if low < 0 else high} is outside 0..{V - 1} of this embedding's vocabulary"
        )
    bytes_, lengths_U = bytes_VxP.numpy(), lengths_V.numpy()
    inverse_N = None
    if not (len(ids_N) == V and low == 0 and high == V - 1 and (np.diff(ids_N) == 1).all()):
        used_V = np.zeros(V, dtype=bool)
        used_V[ids_N] = True
        distinct_U = np.flatnonzero(used_V)
        slot_V = np.empty(V, dtype=np.int64)
        slot_V[distinct_U] = np.arange(len(distinct_U))
        inverse_N = slot_V[ids_N]
        bytes_, lengths_U = bytes_[distinct_U], lengths_U[distinct_U]
    real_UxP = np.arange(P, dtype=np.int16) < lengths_U[:, None]
    flat_K = (bytes_.astype(np.int64) * P + np.arange(P))[real_UxP]
    return Plan(inverse_N, flat_K, lengths_U, coef_Lx2[torch.from_numpy(lengths_U).long()])


def _sum_rows(source: Tensor, index_K: np.ndarray, counts: np.ndarray) -> Tensor:
    """out[i] = sum of source[index] over the i-th run of counts[i] indices; an empty run gives zeros."""
    starts = np.cumsum(counts, dtype=np.int64) - counts
    return F.embedding_bag(torch.from_numpy(index_K), source, torch.from_numpy(starts), mode="sum")


def _sort_by(destination_K: np.ndarray) -> np.ndarray:
    """Stable argsort of non-negative integers: key and position in one int64 sort faster than argsort."""
    key = (destination_K << 32) | np.arange(len(destination_K))
    key.sort()
    return key & 0xFFFFFFFF


def _forward(plan: Plan, wT_DxM: Tensor) -> Tensor:
    scale_Ux1, shift_Ux1 = plan.coef_Ux2.unsqueeze(2).unbind(1)
    e_UxM = _sum_rows(wT_DxM, plan.flat_K, plan.lengths_U).to(plan.coef_Ux2.dtype)
    e_UxM.mul_(scale_Ux1).addcmul_(shift_Ux1, wT_DxM.sum(0, dtype=e_UxM.dtype), value=-1)
    e_UxM = e_UxM.to(wT_DxM.dtype)
    return e_UxM if plan.inverse_N is None else e_UxM.index_select(0, torch.from_numpy(plan.inverse_N))


def _backward(plan: Plan, g_NxM: Tensor, D: int) -> Tensor:
    """Gradient (D, M) of W^T: _forward transposed, in the same two steps."""
    g_UxM = g_NxM.to(plan.coef_Ux2.dtype)
    scale_Ux1, shift_Ux1 = plan.coef_Ux2.unsqueeze(2).unbind(1)
    U = len(plan.lengths_U)
    if plan.inverse_N is not None:
        counts_U = np.bincount(plan.inverse_N, minlength=U)
        g_UxM = _sum_rows(g_UxM.contiguous(), _sort_by(plan.inverse_N), counts_U)
    shared_M = shift_Ux1[:, 0] @ g_UxM
    # the summed copy is ours to scale in place, the caller's gradient is not
    g_UxM = g_UxM * scale_Ux1 if plan.inverse_N is None else g_UxM.mul_(scale_Ux1)
    token_K = np.repeat(np.arange(U), plan.lengths_U)[_sort_by(plan.flat_K)]
    grad_DxM = _sum_rows(g_UxM, token_K, np.bincount(plan.flat_K, minlength=D))
    return grad_DxM.sub_(shared_M).to(g_NxM.dtype)


class _EmbedCPU(torch.autograd.Function):
    """Takes ids and weight in their own shapes: each view outside would be one more node of the graph."""

    @staticmethod
    def forward(ctx, ids, weight_MxD, bytes_VxP, lengths_V, coef_Lx2):
        ctx.shape = weight_MxD.shape
        if ids.numel() == 0:
            ctx.plan = None
            return weight_MxD.new_empty(*ids.shape, len(weight_MxD))
        ctx.plan = _plan(ids.reshape(-1), bytes_VxP, lengths_V, coef_Lx2)
        return _forward(ctx.plan, weight_MxD.t().contiguous()).view(*ids.shape, len(weight_MxD))

    @staticmethod
    def backward(ctx, g):
        M, D = ctx.shape
        if ctx.plan is None:
            return None, g.new_zeros(M, D), None, None, None
        g_NxM = g.reshape(-1, M)
        if torch.is_grad_enabled():  # only with create_graph=True
            grad_DxM = _EmbedGradCPU.apply(g_NxM, ctx.plan, D)
        else:
            grad_DxM = _backward(ctx.plan, g_NxM, D)
        return None, grad_DxM.t(), None, None, None


class _EmbedGradCPU(torch.autograd.Function):
    """The gradient as a function of g, for double backward: linear, and its transpose is _forward again."""

    @staticmethod
    def forward(ctx, g_NxM, plan, D):
        ctx.plan = plan
        return _backward(plan, g_NxM, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gg_DxM):
        return _forward(ctx.plan, gg_DxM.contiguous()), None, None


# The same as opaque operators, so that torch.compile keeps them whole instead of breaking the graph on NumPy.


@torch.library.custom_op("kronecker::embed", mutates_args=(), device_types="cpu")
def _embed_op(ids: Tensor, wT_DxM: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Tensor:
    if ids.numel() == 0:
        return wT_DxM.new_empty(0, wT_DxM.size(1))
    return _forward(_plan(ids, bytes_VxP, lengths_V, coef_Lx2), wT_DxM)


@_embed_op.register_fake
def _(ids, wT_DxM, bytes_VxP, lengths_V, coef_Lx2):
    return wT_DxM.new_empty(ids.shape[0], wT_DxM.shape[1])


@torch.library.custom_op("kronecker::embed_grad", mutates_args=(), device_types="cpu")
def _embed_grad_op(
    g_NxM: Tensor, ids: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int
) -> Tensor:
    if ids.numel() == 0:
        return g_NxM.new_zeros(D, g_NxM.size(1))
    return _backward(_plan(ids, bytes_VxP, lengths_V, coef_Lx2), g_NxM, D)


@_embed_grad_op.register_fake
def _(g_NxM, ids, bytes_VxP, lengths_V, coef_Lx2, D):
    return g_NxM.new_empty(D, g_NxM.shape[1])


def _save(ctx, inputs, output):
    ids, wT_DxM, bytes_VxP, lengths_V, coef_Lx2 = inputs
    ctx.save_for_backward(ids, bytes_VxP, lengths_V, coef_Lx2)
    ctx.D = wT_DxM.shape[0]


def _embed_op_backward(ctx, g_NxM):
    ids, bytes_VxP, lengths_V, coef_Lx2 = ctx.saved_tensors
    grad = torch.ops.kronecker.embed_grad(g_NxM, ids, bytes_VxP, lengths_V, coef_Lx2, ctx.D)
    return None, grad, None, None, None


_embed_op.register_autograd(_embed_op_backward, setup_context=_save)
