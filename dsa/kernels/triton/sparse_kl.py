"""Kernels of the indexer's loss over the selected keys (sparse training): one program a query, as in attention.py.

With K keys a query the gradient dI = softmax(I) - p is small enough to exist, float32 [B, T, K]. Index queries and
weights then take it by query, index keys by their lists of queries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsa.kernels.triton.attention import BLOCK_K, CHUNK_ROWS, MIN_ROWS, attend, load_heads, load_indices, row_lengths
from dsa.kernels.triton.indexer import Index, index_block, index_views, load_index_keys, load_index_queries
from dsa.kernels.triton.inverse import InversePointers, chunk_bounds, invert, sum_chunks
from dsa.kernels.triton.views import View, view

NUM_WARPS = 4


class Attention(NamedTuple):
    """q [B, Hq, T, D], k [B, Hkv, S, D]; lse float32 [B, T, Hq], contiguous."""

    q: View
    k: View
    lse: torch.Tensor
    scale: float


def sparse_rows(index, q, k, scaling: float, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each query, float32 [B, T], and softmax(I) - p of its keys, float32 [B, T, K].

    index: index queries [B, T, H, D_I], keys [B, S, D_I] and weights [B, T, H].
    """
    (B, T, K), (H, index_dim) = indices.shape, index[0].shape[2:]
    group = q.shape[1] // k.shape[1]
    _, lse = attend(q, k, None, indices, scaling)
    rows, index_lse = lse.new_empty(2, B, T)
    p, scores = lse.new_zeros(B, T, K), lse.new_full((B, T, K), -torch.inf)
    _loss_rows[T, B](
        *(index_views(*index), Attention(view(q), view(k), lse, scaling), view(indices), row_lengths(indices)),
        *(rows, index_lse, p, scores, T, K),
        H=H,
        INDEX_ROWS=max(MIN_ROWS, triton.next_power_of_2(H)),
        INDEX_D=index_dim,
        INDEX_BLOCK_D=index_block(index_dim),
        HKV=k.shape[1],
        GROUP=group,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(group)),
        D=q.shape[3],
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
    )
    return rows, scores.sub_(index_lse[..., None]).exp_().sub_(p)


def sparse_gradients(index, indices: torch.Tensor, d_scores: torch.Tensor) -> list[torch.Tensor]:
    """Gradients float32 by index queries, keys and weights, from those by the scores of the selected keys."""
    (B, T, K), S, (H, index_dim) = indices.shape, index[1].shape[1], index[0].shape[2:]
    dq, _, dw = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in index)
    options = {"H": H, "INDEX_D": index_dim, "INDEX_BLOCK_D": index_block(index_dim), "num_warps": NUM_WARPS}
    views = index_views(*index)
    _grad_queries[T, B](
        *(views, view(indices), row_lengths(indices), d_scores, dq, dw, T, K),
        INDEX_ROWS=max(MIN_ROWS, triton.next_power_of_2(H)),
        BLOCK_K=BLOCK_K,
        **options,
    )
    inverse = invert(indices, S)
    parts = d_scores.new_empty(B, 1, inverse.slots, index_dim)
    heads = triton.next_power_of_2(H)
    _grad_keys[inverse.slots, B](
        *(views, inverse.pointers, d_scores, parts, T, S, K),
        CHUNK=inverse.chunk,
        HEADS=heads,
        ROWS=max(CHUNK_ROWS, heads),
        **options,
    )
    return [dq, sum_chunks(parts, inverse, torch.float32)[:, 0], dw]


@triton.jit
def _loss_rows(
    index: Index,
    attention: Attention,
    indices: View,
    lengths,
    rows,
    index_lse,
    p_out,
    scores_out,
    T,
    K,
    H: tl.constexpr,
    INDEX_ROWS: tl.constexpr,
    INDEX_D: tl.constexpr,
    INDEX_BLOCK_D: tl.constexpr,
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One query: p and I of its keys, the loss, and the LSE of its scores (zero for a query without any key)."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, index_head = tl.arange(0, ROWS), tl.arange(0, INDEX_ROWS).to(tl.int64)
    index_q, weight = load_index_queries(index, b, t, index_head, index_head < H, INDEX_D, INDEX_BLOCK_D)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    gain = tl.full((), 0.0, tl.float32)
    length = tl.load(lengths + b * T + t)
    for start in range(0, length, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        s = load_indices(indices, b, t, at, length)
        p = tl.zeros((BLOCK_K,), tl.float32)
        for kv in range(HKV):
            n = tl.cast(kv, tl.int64)
            heads = n * GROUP + row
            queries = load_heads(attention.q, b, heads, t, row < GROUP, D)
            keys = load_heads(attention.k, b, n, s, s >= 0, D)
            logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * attention.scale
            place = (b * T + t) * (HKV * GROUP) + heads
            lse = tl.load(attention.lse + place, mask=row < GROUP, other=float("inf"))
            p += tl.sum(tl.exp(logits - lse[:, None]), 0)
        p = tl.where(s >= 0, p / (HKV * GROUP), 0.0)
        index_k = load_index_keys(index, b, s, s >= 0, INDEX_D, INDEX_BLOCK_D)
        dots = tl.dot(index_q, tl.trans(index_k), input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], 0)
        mass += tl.sum(p, 0)  # one, but for the rounding that must cancel between the sums
        gain += tl.sum(p * (tl.log(tl.where(p > 0.0, p, 1.0)) - scores), 0)
        scores = tl.where(s >= 0, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(scores - finite), 0)
        top = new_top
        tl.store(p_out + (b * T + t) * K + at, p, mask=at < length)
        tl.store(scores_out + (b * T + t) * K + at, scores, mask=at < length)
    some = total > 0.0
    lse = tl.where(some, top, 0.0) + tl.log(tl.where(some, total, 1.0))
    tl.store(rows + b * T + t, gain + mass * lse)
    tl.store(index_lse + b * T + t, lse)


@triton.jit
def _grad_queries(
    index: Index,
    indices: View,
    lengths,
    d_scores,
    dq,
    dw,
    T,
    K,
    H: tl.constexpr,
    INDEX_D: tl.constexpr,
    INDEX_BLOCK_D: tl.constexpr,
    INDEX_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, cols = tl.arange(0, INDEX_ROWS).to(tl.int64), tl.arange(0, INDEX_BLOCK_D)
    queries, weight = load_index_queries(index, b, t, head, head < H, INDEX_D, INDEX_BLOCK_D)
    query_total = tl.zeros((INDEX_ROWS, INDEX_BLOCK_D), tl.float32)
    weight_total = tl.zeros((INDEX_ROWS,), tl.float32)
    length = tl.load(lengths + b * T + t)
    for start in range(0, length, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        s = load_indices(indices, b, t, at, length)
        gain = tl.load(d_scores + (b * T + t) * K + at, mask=at < length, other=0.0)[None, :]
        keys = load_index_keys(index, b, s, s >= 0, INDEX_D, INDEX_BLOCK_D)
        dots = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        weight_total += tl.sum(gain * tl.maximum(dots, 0.0), 1)
        d_dots = tl.where(dots > 0.0, gain * weight[:, None], 0.0)
        query_total += tl.dot(d_dots.to(keys.dtype), keys, input_precision="ieee")
    place = (b * T + t) * H + head
    mask = (head < H)[:, None] & (cols < INDEX_D)[None, :]
    tl.store(dq + place[:, None] * INDEX_D + cols[None, :], query_total, mask=mask)
    tl.store(dw + place, weight_total * index.scale, mask=head < H)


@triton.jit
def _grad_keys(
    index: Index,
    inverse: InversePointers,
    d_scores,
    parts,
    T,
    S,
    K,
    H: tl.constexpr,
    INDEX_D: tl.constexpr,
    INDEX_BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One key against one chunk of the queries that selected it: a row for each query and index head."""
    slot, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    s, first, end = chunk_bounds(inverse, b, slot, S, CHUNK)
    if first < end:
        row, cols = tl.arange(0, ROWS), tl.arange(0, INDEX_BLOCK_D)
        head = (row % HEADS).to(tl.int64)
        at = b * index.k.strides[0] + s * index.k.strides[1] + cols * index.k.strides[2]
        key = tl.load(index.k.data + at, mask=cols < INDEX_D, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS, INDEX_BLOCK_D), tl.float32)
        for start in range(first, end, ROWS // HEADS):
            entry = start + row // HEADS
            live = (entry < end) & (head < H)
            entry = tl.load(inverse.entries + b * T * K + entry, mask=live, other=0).to(tl.int64)
            gain = tl.load(d_scores + b * T * K + entry, mask=live, other=0.0)
            queries, weight = load_index_queries(index, b, entry // K, head, live, INDEX_D, INDEX_BLOCK_D)
            queries = queries.to(tl.float32)
            passed = tl.sum(queries * key[None, :], 1) > 0.0
            total += tl.where(passed, gain * weight, 0.0)[:, None] * queries
        place = (b * tl.num_programs(0) + slot) * INDEX_D + cols
        tl.store(parts + place, tl.sum(total, 0), mask=cols < INDEX_D)
