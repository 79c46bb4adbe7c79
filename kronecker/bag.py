"""The codec times the projection without the codec: a weighted bag of rows of W^T.

    e = W z = scale_L * sum_p W[:, byte_p * pos_dim + p]  -  shift_L * W.sum(1)

(`bag_coefficients` in codec.py gives scale and shift for each length L), so a token costs at most pos_dim
rows of W^T and the (tokens, D) codec never exists. Each distinct token of a batch is computed once, from a
ragged bag that holds only its real bytes: a text batch repeats its tokens (8,192 hold about 2,550), and a
token has five bytes, not pos_dim. The gradient runs the same two sums backwards, always in the same order.

The rule: on the CPU the index work is NumPy's (a fifth of torch's overhead) and both backward sums are bags
over sorted keys, parallel over rows; on every other device all of it is torch's, with its segmented
backward kernels, because there one row that half of the tokens share must not be summed by one thread. To
know how many tokens are distinct the host waits for the device twice a call.

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
    if not torch.compiler.is_compiling():
        return _Embed.apply(ids, weight_MxD, bytes_VxP, lengths_V, coef_Lx2)
    wT_DxM = weight_MxD.t().contiguous()
    e_NxM = torch.ops.kronecker.embed(ids.reshape(-1), wT_DxM, bytes_VxP, lengths_V, coef_Lx2)
    return e_NxM.view(*ids.shape, len(weight_MxD))


class Plan(NamedTuple):
    """Which rows go where, for a batch of N ids: U distinct tokens with K bytes in all."""

    inverse_N: Tensor | None  # distinct token of each id; None when the ids are 0..V-1 in order
    flat_K: Tensor  # row of W^T of each byte, token by token
    lengths_U: Tensor
    coef_Ux2: Tensor


def _plan(ids_N: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Plan:
    make = _plan_cpu if ids_N.device.type == "cpu" else _plan_device
    return make(ids_N, bytes_VxP, lengths_V, coef_Lx2)


def _forward(plan: Plan, wT_DxM: Tensor) -> Tensor:
    """Embeddings (N, M)."""
    scale_Ux1, shift_Ux1 = plan.coef_Ux2.unsqueeze(2).unbind(1)
    starts_U = plan.lengths_U.cumsum(0) - plan.lengths_U
    e_UxM = F.embedding_bag(plan.flat_K, wT_DxM, starts_U, mode="sum").to(plan.coef_Ux2.dtype)
    e_UxM.mul_(scale_Ux1).addcmul_(shift_Ux1, wT_DxM.sum(0, dtype=e_UxM.dtype), value=-1)
    e_UxM = e_UxM.to(wT_DxM.dtype)
    return e_UxM if plan.inverse_N is None else e_UxM.index_select(0, plan.inverse_N)


def _backward(plan: Plan, g_NxM: Tensor, D: int) -> Tensor:
    """Gradient (D, M) of W^T from the output's (N, M): _forward transposed, in the same two steps."""
    per_token, per_row = (_sum_by_token, _sum_by_row) if g_NxM.device.type == "cpu" else _DEVICE_SUMS
    g_UxM = g_NxM.to(plan.coef_Ux2.dtype).contiguous()
    if plan.inverse_N is not None:
        g_UxM = per_token(g_UxM, plan)
    scale_Ux1, shift_Ux1 = plan.coef_Ux2.unsqueeze(2).unbind(1)
    shared_M = shift_Ux1[:, 0] @ g_UxM
    # the summed copy is ours to scale in place, the caller's gradient is not
    g_UxM = g_UxM * scale_Ux1 if plan.inverse_N is None else g_UxM.mul_(scale_Ux1)
    return per_row(g_UxM, plan, D).sub_(shared_M).to(g_NxM.dtype)


# ---- CPU ----


def _plan_cpu(ids: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Plan:
    ids_N, V, P = ids.numpy(), *bytes_VxP.shape
    low, high = int(ids_N.min()), int(ids_N.max())
    if low < 0 or high >= V:
        wrong = low if low < 0 else high
        raise IndexError(f"token id {wrong} is outside 0..{V - 1} of this embedding's vocabulary")
    bytes_, lengths_U = bytes_VxP.numpy(), lengths_V.numpy()
    inverse_N = None
    if not (len(ids_N) == V and low == 0 and high == V - 1 and (np.diff(ids_N) == 1).all()):
        used_V = np.zeros(V, dtype=bool)
        used_V[ids_N] = True
        distinct_U = np.flatnonzero(used_V)
        slot_V = np.empty(V, dtype=np.int64)
        slot_V[distinct_U] = np.arange(len(distinct_U))
        inverse_N = torch.from_numpy(slot_V[ids_N])
        bytes_, lengths_U = bytes_[distinct_U], lengths_U[distinct_U]
    real_UxP = np.arange(P, dtype=np.int16) < lengths_U[:, None]
    flat_K = torch.from_numpy((bytes_.astype(np.int64) * P + np.arange(P))[real_UxP])
    lengths = torch.from_numpy(lengths_U.astype(np.int64))
    return Plan(inverse_N, flat_K, lengths, coef_Lx2[lengths])


def _sum_by_token(g_NxM: Tensor, plan: Plan) -> Tensor:
    order_N, starts_U = _runs(plan.inverse_N, len(plan.lengths_U))
    return F.embedding_bag(order_N, g_NxM, starts_U, mode="sum")


def _sum_by_row(g_UxM: Tensor, plan: Plan, D: int) -> Tensor:
    order_K, starts_D = _runs(plan.flat_K, D)
    token_K = np.repeat(np.arange(len(plan.lengths_U)), plan.lengths_U.numpy())[order_K.numpy()]
    return F.embedding_bag(torch.from_numpy(token_K), g_UxM, starts_D, mode="sum")


def _runs(destination: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The stable order that sorts destinations 0..n-1, and where each one's run starts in it."""
    destination_K = destination.numpy()
    key = (destination_K << 32) | np.arange(len(destination_K))  # sorts faster than a stable argsort
    key.sort()
    counts = np.bincount(destination_K, minlength=n)
    return torch.from_numpy(key & 0xFFFFFFFF), torch.from_numpy(np.cumsum(counts) - counts)


# ---- every other device, in torch operations that any of them has ----


def _plan_device(ids_N: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor) -> Plan:
    P = bytes_VxP.size(1)
    distinct_U, inverse_N = torch.unique(ids_N, return_inverse=True)
    lengths_U = lengths_V[distinct_U].long()
    position_P = torch.arange(P, device=ids_N.device)
    flat_UxP = bytes_VxP[distinct_U].long() * P + position_P
    return Plan(inverse_N, flat_UxP[position_P < lengths_U[:, None]], lengths_U, coef_Lx2[lengths_U])


def _sum_by_token_device(g_NxM: Tensor, plan: Plan) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(g_NxM, plan.inverse_N, len(plan.lengths_U), -1, False)


def _sum_by_row_device(g_UxM: Tensor, plan: Plan, D: int) -> Tensor:
    """The backward kernel of embedding_bag: bag U, of lengths_U, was the sum of rows flat_K."""
    U, K = len(plan.lengths_U), len(plan.flat_K)
    bag_K = torch.repeat_interleave(torch.arange(U, device=g_UxM.device), plan.lengths_U, output_size=K)
    return torch.ops.aten._embedding_bag_dense_backward(
        g_UxM, plan.flat_K, bag_K, plan.lengths_U, plan.lengths_U, D, False, 0, None, -1
    )


_DEVICE_SUMS = (_sum_by_token_device, _sum_by_row_device)


# ---- autograd ----


class _Embed(torch.autograd.Function):
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
            grad_DxM = _EmbedGrad.apply(g_NxM, ctx.plan, D)
        else:
            grad_DxM = _backward(ctx.plan, g_NxM, D)
        return None, grad_DxM.t(), None, None, None


class _EmbedGrad(torch.autograd.Function):
    """The gradient as a function of g, for double backward: linear, and its transpose is _forward again."""

    @staticmethod
    def forward(ctx, g_NxM, plan, D):
        ctx.plan = plan
        return _backward(plan, g_NxM, D)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gg_DxM):
        return _forward(ctx.plan, gg_DxM.contiguous()), None, None


# The same as opaque operators: torch.compile keeps them whole instead of breaking the graph on data that
# decides shapes. The backward makes its plan again, since an operator's outputs must be tensors of known shape.


@torch.library.custom_op("kronecker::embed", mutates_args=())
def _embed_op(
    ids_N: Tensor, wT_DxM: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor
) -> Tensor:
    if ids_N.numel() == 0:
        return wT_DxM.new_empty(0, wT_DxM.size(1))
    return _forward(_plan(ids_N, bytes_VxP, lengths_V, coef_Lx2), wT_DxM)


@_embed_op.register_fake
def _(ids_N, wT_DxM, bytes_VxP, lengths_V, coef_Lx2):
    return wT_DxM.new_empty(ids_N.shape[0], wT_DxM.shape[1])


@torch.library.custom_op("kronecker::embed_grad", mutates_args=())
def _embed_grad_op(
    g_NxM: Tensor, ids_N: Tensor, bytes_VxP: Tensor, lengths_V: Tensor, coef_Lx2: Tensor, D: int
) -> Tensor:
    if ids_N.numel() == 0:
        return g_NxM.new_zeros(D, g_NxM.size(1))
    return _backward(_plan(ids_N, bytes_VxP, lengths_V, coef_Lx2), g_NxM, D)


@_embed_grad_op.register_fake
def _(g_NxM, ids_N, bytes_VxP, lengths_V, coef_Lx2, D):
    return g_NxM.new_empty(D, g_NxM.shape[1])


def _save(ctx, inputs, output):
    ids_N, wT_DxM, bytes_VxP, lengths_V, coef_Lx2 = inputs
    ctx.save_for_backward(ids_N, bytes_VxP, lengths_V, coef_Lx2)
    ctx.D = wT_DxM.shape[0]


def _embed_op_backward(ctx, g_NxM):
    grad_DxM = torch.ops.kronecker.embed_grad(g_NxM, *ctx.saved_tensors, ctx.D)
    return None, grad_DxM, None, None, None


_embed_op.register_autograd(_embed_op_backward, setup_context=_save)
