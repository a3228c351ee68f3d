"""Sparse grouped-query attention: a program owns one query and one KV head, and with them a group of query heads.

The group's heads share the gathered keys, so they are the rows of one matrix product. Gradients of queries are owned
the same way; those of keys and values by chunks of a key's list of queries (inverse.py).

Offsets are 64 bit: a long batch has more than 2^31 elements. Softmax and all sums are float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsa.kernels import require
from dsa.kernels.triton.decode import merge, split_count
from dsa.kernels.triton.inverse import InversePointers, chunk_bounds, invert, sum_chunks
from dsa.kernels.triton.views import View, view

BLOCK_K = 64  # selected keys at once
MIN_ROWS = 16  # the fewest rows that a matrix product takes; fewer heads are padded
CHUNK_ROWS = 32  # (query, head) pairs at once in the gradient of a key
NUM_WARPS = 4
LOG2E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """What the kernels are compiled for. ROWS: the group's query heads, padded."""

    HKV: int
    GROUP: int
    ROWS: int
    D: int
    BLOCK_K: int


def sparse_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa.attention.sparse_attention`, and the logarithm of each softmax's denominator.

    Args:
        q [B, Hq, T, D], k, v [B, Hkv, S, D]: any strides; D in `HEAD_DIMS`.
        indices: int [B, T, K], -1 for none, not beyond S (unchecked).
        scaling: of the logits.

    Returns:
        out [B, Hq, T, D], differentiable in q, k and v, and LSE float32 [B, Hq, T] (natural logarithm, scaled logits),
        not differentiable. A query without any key gets zeros and -inf.

    Raises:
        ValueError: the kernels cannot run on this device, type or head size.
    """
    require(q, q.shape[3])
    return _SparseAttention.apply(q, k, v, indices, scaling)


class _SparseAttention(torch.autograd.Function):
    """Saves its arguments, the output and the LSE: O(T (Hq D + K)) memory."""

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling):
        with torch.cuda.device_of(q):  # Triton launches on the current device
            out, lse = attend(q, k, v, indices, scaling)
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.scaling = scaling
        lse = lse.transpose(1, 2)
        ctx.mark_non_differentiable(lse)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx, grad_out, _):
        q, k, v, indices, out, lse = ctx.saved_tensors
        dq, delta = _query_gradient(q, k, v, indices, out, lse, grad_out, ctx.scaling)
        dk, dv = _key_gradients(q, k, v, indices, lse, delta, grad_out, ctx.scaling)
        return dq, dk, dv, None, None


def row_lengths(indices: torch.Tensor) -> torch.Tensor:
    """int32 [B, T]: one past the last entry of each row that is a key; early queries see fewer than K keys."""
    ordinal = torch.arange(1, indices.shape[2] + 1, device=indices.device, dtype=torch.int32)
    return (ordinal * (indices >= 0)).amax(-1)


def sizes(q: torch.Tensor, k: torch.Tensor) -> Sizes:
    group = q.shape[1] // k.shape[1]
    return Sizes(k.shape[1], group, max(MIN_ROWS, triton.next_power_of_2(group)), q.shape[3], BLOCK_K)


def attend(q, k, v, indices, scaling) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(out [B, T, Hq, D], LSE [B, T, Hq]); v is None where only the LSE is wanted."""
    B, Hq, T, D = q.shape
    Hkv, K = k.shape[1], indices.shape[2]
    blocks = triton.cdiv(K, BLOCK_K)
    span = triton.cdiv(blocks, split_count(B * T * Hkv, blocks)) * BLOCK_K  # keys of a split
    splits = triton.cdiv(K, span)
    lse = torch.empty(splits, B, T, Hq, dtype=torch.float32, device=q.device)
    if v is None:
        out = lse  # not written
    else:
        out = torch.empty(splits, B, T, Hq, D, dtype=q.dtype if splits == 1 else torch.float32, device=q.device)
    views = view(q), view(k), view(k if v is None else v), view(indices)
    _forward[T, B * Hkv, splits](
        *(*views, row_lengths(indices), out, lse, scaling, B, T, span),
        SIZES=sizes(q, k),
        VALUES=v is not None,
        num_warps=NUM_WARPS,
    )
    if v is None:
        return None, lse.logsumexp(0)
    if splits == 1:
        return out[0], lse[0]
    return merge(out, lse, q.dtype)


@triton.jit
def load_heads(x: View, b, heads, t, live, D: tl.constexpr):
    """x[b, heads, t] of x [B, H, T, D], zeros where not live. heads and t are vectors, or one of them a number."""
    at = b * x.strides[0] + heads * x.strides[1] + t * x.strides[2]
    return tl.load(x.data + at[:, None] + tl.arange(0, D)[None, :] * x.strides[3], mask=live[:, None], other=0.0)


@triton.jit
def load_indices(indices: View, b, t, at, length):
    """Entries `at` of a query's indices, in 64 bit; -1 beyond `length`."""
    place = b * indices.strides[0] + t * indices.strides[1] + at * indices.strides[2]
    return tl.load(indices.data + place, mask=at < length, other=-1).to(tl.int64)


@triton.jit
def _owner(SIZES: tl.constexpr):
    """Whose program this is: b, n, query t, and its rows' heads, with which of the rows are no padding."""
    t = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(1) // SIZES.HKV).to(tl.int64)
    n = (tl.program_id(1) % SIZES.HKV).to(tl.int64)
    row = tl.arange(0, SIZES.ROWS)
    return b, n, t, n * SIZES.GROUP + row, row < SIZES.GROUP


@triton.jit
def _forward(q, k, v, indices, lengths, out, lse, scale, B, T, span, SIZES: tl.constexpr, VALUES: tl.constexpr):
    """Online softmax over the keys [split * span, ...) of one query, for the query heads of one KV head."""
    ROWS: tl.constexpr = SIZES.ROWS
    D: tl.constexpr = SIZES.D
    b, n, t, heads, live = _owner(SIZES)
    split = tl.program_id(2).to(tl.int64)
    queries = load_heads(q, b, heads, t, live, D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, D), tl.float32)
    length = tl.minimum(tl.load(lengths + b * T + t), (split + 1) * span)
    for start in range(split * span, length, SIZES.BLOCK_K):
        s = load_indices(indices, b, t, start + tl.arange(0, SIZES.BLOCK_K), length)
        keys = load_heads(k, b, n, s, s >= 0, D)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)  # base 2: exp2 is cheaper
        logits = tl.where((s >= 0)[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key so far: -inf - -inf is NaN
        p = tl.exp2(logits - finite[:, None])
        decay = tl.exp2(top - finite)
        total = total * decay + tl.sum(p, 1)
        if VALUES:
            values = load_heads(v, b, n, s, s >= 0, D)
            mean = mean * decay[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        top = new_top
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    place = ((split * B + b) * T + t) * (SIZES.HKV * SIZES.GROUP) + heads
    tl.store(lse + place, tl.where(some, top / LOG2E + tl.log(total), float("-inf")), mask=live)
    if VALUES:
        tl.store(out + place[:, None] * D + tl.arange(0, D)[None, :], mean / total[:, None], mask=live[:, None])


def _query_gradient(q, k, v, indices, out, lse, grad_out, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """dq [B, Hq, T, D], and delta float32 [B, T, Hq], the dot product of each output with its gradient."""
    B, Hq, T, D = q.shape
    dq, delta = torch.empty(B, T, Hq, D, dtype=q.dtype, device=q.device), torch.empty_like(lse)
    views = view(q), view(k), view(v), view(grad_out), view(indices)
    _backward_queries[T, B * k.shape[1]](
        *views, row_lengths(indices), out, lse, dq, delta, scaling, T, SIZES=sizes(q, k), num_warps=NUM_WARPS
    )
    return dq.transpose(1, 2), delta


@triton.jit
def _backward_queries(q, k, v, grad, indices, lengths, out, lse, dq, delta, scale, T, SIZES: tl.constexpr):
    ROWS: tl.constexpr = SIZES.ROWS
    D: tl.constexpr = SIZES.D
    b, n, t, heads, live = _owner(SIZES)
    place = (b * T + t) * (SIZES.HKV * SIZES.GROUP) + heads
    element = place[:, None] * D + tl.arange(0, D)[None, :]
    queries = load_heads(q, b, heads, t, live, D)
    grads = load_heads(grad, b, heads, t, live, D)
    row_lse = tl.load(lse + place, mask=live, other=0.0)
    outs = tl.load(out + element, mask=live[:, None], other=0.0)
    row_delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    tl.store(delta + place, row_delta, mask=live)
    total = tl.zeros((ROWS, D), tl.float32)
    length = tl.load(lengths + b * T + t)
    for start in range(0, length, SIZES.BLOCK_K):
        s = load_indices(indices, b, t, start + tl.arange(0, SIZES.BLOCK_K), length)
        keys = load_heads(k, b, n, s, s >= 0, D)
        values = load_heads(v, b, n, s, s >= 0, D)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        p = tl.where((s >= 0)[None, :], tl.exp(logits - row_lse[:, None]), 0.0)
        dp = tl.dot(grads, tl.trans(values), input_precision="ieee")
        d_logits = p * (dp - row_delta[:, None])
        total += tl.dot(d_logits.to(keys.dtype), keys, input_precision="ieee")
    tl.store(dq + element, total * scale, mask=live[:, None])


def _key_gradients(q, k, v, indices, lse, delta, grad_out, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """dk, dv [B, Hkv, S, D]."""
    (B, Hkv, S, D), T, K = k.shape, q.shape[2], indices.shape[2]
    inverse = invert(indices, S)
    rows = max(CHUNK_ROWS, triton.next_power_of_2(q.shape[1] // Hkv))
    dk, dv = torch.empty(2, B, Hkv, inverse.slots, D, dtype=torch.float32, device=q.device)
    _backward_keys[inverse.slots, B * Hkv](
        *(view(q), view(k), view(v), view(grad_out), inverse.pointers, lse, delta, dk, dv, scaling, T, S, K),
        SIZES=sizes(q, k)._replace(ROWS=rows),
        CHUNK=inverse.chunk,
        HEADS=triton.next_power_of_2(q.shape[1] // Hkv),
        num_warps=NUM_WARPS,
    )
    return sum_chunks(dk, inverse, k.dtype), sum_chunks(dv, inverse, v.dtype)


@triton.jit
def _backward_keys(
    q,
    k,
    v,
    grad,
    inverse: InversePointers,
    lse,
    delta,
    dk,
    dv,
    scale,
    T,
    S,
    K,
    SIZES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One key against one chunk of its queries: a row for each query and head, summed over the rows at the end."""
    ROWS: tl.constexpr = SIZES.ROWS
    D: tl.constexpr = SIZES.D
    b = (tl.program_id(1) // SIZES.HKV).to(tl.int64)
    n = (tl.program_id(1) % SIZES.HKV).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64)
    s, first, end = chunk_bounds(inverse, b, slot, S, CHUNK)
    if first < end:
        row, cols = tl.arange(0, ROWS), tl.arange(0, D)
        heads = n * SIZES.GROUP + row % HEADS
        at = b * k.strides[0] + n * k.strides[1] + s * k.strides[2]
        key = tl.load(k.data + at + cols * k.strides[3]).to(tl.float32)
        at = b * v.strides[0] + n * v.strides[1] + s * v.strides[2]
        value = tl.load(v.data + at + cols * v.strides[3]).to(tl.float32)
        key_total = tl.zeros((ROWS, D), tl.float32)
        value_total = tl.zeros((ROWS, D), tl.float32)
        for start in range(first, end, ROWS // HEADS):
            entry = start + row // HEADS
            live = (entry < end) & (row % HEADS < SIZES.GROUP)
            t = tl.load(inverse.entries + b * T * K + entry, mask=live, other=0).to(tl.int64) // K
            place = (b * T + t) * (SIZES.HKV * SIZES.GROUP) + heads
            queries = load_heads(q, b, heads, t, live, D).to(tl.float32)
            grads = load_heads(grad, b, heads, t, live, D).to(tl.float32)
            row_lse = tl.load(lse + place, mask=live, other=float("inf"))  # p is zero in rows that are not live
            p = tl.exp(tl.sum(queries * key[None, :], 1) * scale - row_lse)
            d_logits = p * (tl.sum(grads * value[None, :], 1) - tl.load(delta + place, mask=live, other=0.0))
            key_total += d_logits[:, None] * queries
            value_total += p[:, None] * grads
        place = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + slot) * D + cols
        tl.store(dk + place, tl.sum(key_total, 0) * scale)
        tl.store(dv + place, tl.sum(value_total, 0))
