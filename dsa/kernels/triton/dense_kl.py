"""Kernels of the indexer's loss over all visible keys (dense warm-up), by tiles of BLOCK_T queries and BLOCK_S keys.

Heads are stacked into the rows of one matrix product, row r = head * BLOCK_T + query, and summed by a reshape: a tile
holds [heads, BLOCK_T, BLOCK_S], and nothing larger exists.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsa.kernels.triton.attention import load_heads
from dsa.kernels.triton.indexer import Index, index_block, index_views, load_index_keys, load_index_queries
from dsa.kernels.triton.views import View, view

BLOCK_T, BLOCK_S = 16, 32
NUM_WARPS = 8
NUM_STAGES = 1  # more would keep several tiles of stacked queries in shared memory, and large heads would not fit


class Spans(NamedTuple):
    """Query t sees key s if s <= offset + t and query_start[t] == key_start[s].

    query_start: int32 [B, T], the first key of the query's document; S for a query that counts in no loss.
    key_start: int32 [B, S], the first key of the key's document; -1 for padding.
    """

    query_start: torch.Tensor
    key_start: torch.Tensor
    T: int
    S: int
    offset: int


class Attention(NamedTuple):
    """q [B, Hq, T, D], k [B, Hkv, S, D]; lse float32 [B, Hq, T], contiguous."""

    q: View
    k: View
    lse: torch.Tensor
    scale: float


class Sizes(NamedTuple):
    """What the kernels are compiled for. INDEX_ROWS, ROWS: rows of the stacked heads, of the indexer and of a group."""

    H: int
    INDEX_ROWS: int
    INDEX_D: int
    INDEX_BLOCK_D: int
    HKV: int
    GROUP: int
    ROWS: int
    D: int
    BLOCK_T: int
    BLOCK_S: int


def sizes(index_q: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Sizes:
    (H, index_dim), group = index_q.shape[2:], q.shape[1] // k.shape[1]
    rows, index_rows = (BLOCK_T * triton.next_power_of_2(heads) for heads in (group, H))
    index = H, index_rows, index_dim, index_block(index_dim)
    return Sizes(*index, k.shape[1], group, rows, q.shape[3], BLOCK_T, BLOCK_S)


def dense_rows(index, q, k, scaling: float, spans: Spans) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """KL of each query, float32 [B, T], and what the gradient needs: LSE of attention [B, Hq, T], of scores [B, T].

    index: index queries [B, T, H, D_I], keys [B, S, D_I] and weights [B, T, H].
    """
    B, Hq, T, _ = q.shape
    lse = torch.empty(B, Hq, T, dtype=torch.float32, device=q.device)
    rows, index_lse = lse.new_empty(2, B, T)
    attention = Attention(view(q), view(k), lse, scaling)
    options = {"SIZES": sizes(index[0], q, k), "num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    _attention_lse[triton.cdiv(T, BLOCK_T), B, k.shape[1]](attention, spans, **options)
    _loss_rows[triton.cdiv(T, BLOCK_T), B](index_views(*index), attention, spans, rows, index_lse, **options)
    return rows, (lse, index_lse)


def dense_gradients(
    index, q, k, scaling: float, spans: Spans, lse: torch.Tensor, index_lse: torch.Tensor
) -> list[torch.Tensor]:
    """Gradients float32 of the sum of `dense_rows` by index queries, keys and weights."""
    dq, dk, dw = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in index)
    args = index_views(*index), Attention(view(q), view(k), lse, scaling), spans, index_lse
    options = {"SIZES": sizes(index[0], q, k), "num_warps": NUM_WARPS, "num_stages": NUM_STAGES}
    _grad_queries[triton.cdiv(q.shape[2], BLOCK_T), q.shape[0]](*args, dq, dw, **options)
    _grad_keys[triton.cdiv(k.shape[2], BLOCK_S), q.shape[0]](*args, dk, **options)
    return [dq, dk, dw]


@triton.jit
def _visible(spans: Spans, b, t, s):
    """bool [len(t), len(s)]."""
    query_start = tl.load(spans.query_start + b * spans.T + t, mask=t < spans.T, other=spans.S)
    key_start = tl.load(spans.key_start + b * spans.S + s, mask=s < spans.S, other=-1)
    return (query_start[:, None] == key_start[None, :]) & (s[None, :] <= spans.offset + t[:, None])


@triton.jit
def _key_range(spans: Spans, b, t):
    """[first, end): no query of t sees a key outside."""
    first = tl.min(tl.load(spans.query_start + b * spans.T + t, mask=t < spans.T, other=spans.S), 0)
    return first, tl.minimum(spans.offset + tl.max(t, 0) + 1, spans.S)


@triton.jit
def _rows(t0, T, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of the stacked rows: head, query, and whether both exist."""
    row = tl.arange(0, ROWS)
    head, t = (row // BLOCK_T).to(tl.int64), t0 + row % BLOCK_T
    return head, t, (head < HEADS) & (t < T)


@triton.jit
def _index_rows(index: Index, b, t0, T, SIZES: tl.constexpr):
    """Index queries [INDEX_ROWS, INDEX_BLOCK_D] and weights of the stacked index heads."""
    INDEX_D: tl.constexpr = SIZES.INDEX_D
    INDEX_BLOCK_D: tl.constexpr = SIZES.INDEX_BLOCK_D
    H: tl.constexpr = SIZES.H
    INDEX_ROWS: tl.constexpr = SIZES.INDEX_ROWS
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    head, t, live = _rows(t0, T, H, INDEX_ROWS, BLOCK_T)
    return load_index_queries(index, b, t, head, live, INDEX_D, INDEX_BLOCK_D)


@triton.jit
def _logits(attention: Attention, b, n, heads, t, live, s, S, D: tl.constexpr):
    """Logits of rows (head, query) against the keys s of KV head n."""
    queries = load_heads(attention.q, b, heads, t, live, D)
    keys = load_heads(attention.k, b, n, s, s < S, D)
    return tl.dot(queries, tl.trans(keys), input_precision="ieee") * attention.scale


@triton.jit
def _target(attention: Attention, spans: Spans, b, t0, s, seen, SIZES: tl.constexpr):
    """p [BLOCK_T, BLOCK_S], the mean over the heads of what attention gives to the keys s; zero where not seen."""
    D: tl.constexpr = SIZES.D
    GROUP: tl.constexpr = SIZES.GROUP
    ROWS: tl.constexpr = SIZES.ROWS
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    BLOCK_S: tl.constexpr = SIZES.BLOCK_S
    HEADS: tl.constexpr = SIZES.HKV * SIZES.GROUP
    p = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    head, t, live = _rows(t0, spans.T, GROUP, ROWS, BLOCK_T)
    for kv in range(SIZES.HKV):
        n = tl.cast(kv, tl.int64)
        heads = n * GROUP + head
        logits = _logits(attention, b, n, heads, t, live, s, spans.S, D)
        lse = tl.load(attention.lse + (b * HEADS + heads) * spans.T + t, mask=live, other=float("inf"))
        # of keys that are not seen the exponential may overflow
        p += tl.sum(tl.reshape(tl.exp(logits - lse[:, None]), (ROWS // BLOCK_T, BLOCK_T, BLOCK_S)), 0)
    return tl.where(seen, p / HEADS, 0.0)


@triton.jit
def _scores(dots, weight, BLOCK_T: tl.constexpr):
    """The stacked heads' dot products [INDEX_ROWS, BLOCK_S] -> index scores [BLOCK_T, BLOCK_S]."""
    ROWS: tl.constexpr = dots.shape[0]
    BLOCK_S: tl.constexpr = dots.shape[1]
    return tl.sum(tl.reshape(tl.maximum(dots, 0.0) * weight[:, None], (ROWS // BLOCK_T, BLOCK_T, BLOCK_S)), 0)


@triton.jit
def _d_scores(attention: Attention, spans: Spans, index_lse, dots, weight, b, t0, s, seen, SIZES: tl.constexpr):
    """softmax(I) - p, once for each of the stacked index heads, [INDEX_ROWS, BLOCK_S]."""
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    BLOCK_S: tl.constexpr = SIZES.BLOCK_S
    INDEX_ROWS: tl.constexpr = SIZES.INDEX_ROWS
    t = t0 + tl.arange(0, BLOCK_T)
    lse = tl.load(index_lse + b * spans.T + t, mask=t < spans.T, other=0.0)
    offered = tl.where(seen, tl.exp(_scores(dots, weight, BLOCK_T) - lse[:, None]), 0.0)
    d_scores = (offered - _target(attention, spans, b, t0, s, seen, SIZES))[None]
    return tl.reshape(tl.broadcast_to(d_scores, (INDEX_ROWS // BLOCK_T, BLOCK_T, BLOCK_S)), (INDEX_ROWS, BLOCK_S))


@triton.jit
def _attention_lse(attention: Attention, spans: Spans, SIZES: tl.constexpr):
    """First sweep: the log of each head's softmax denominator over the visible keys."""
    D: tl.constexpr = SIZES.D
    GROUP: tl.constexpr = SIZES.GROUP
    ROWS: tl.constexpr = SIZES.ROWS
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    b, n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head, t, live = _rows(t0, spans.T, GROUP, ROWS, BLOCK_T)
    heads = n * GROUP + head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first, end = _key_range(spans, b, t)
    for start in range(first, end, SIZES.BLOCK_S):
        s = start + tl.arange(0, SIZES.BLOCK_S)
        logits = _logits(attention, b, n, heads, t, live, s, spans.S, D)
        logits = tl.where(_visible(spans, b, t, s), logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        top = new_top
    lse = top + tl.log(tl.where(total > 0.0, total, 1.0))
    tl.store(attention.lse + (b * SIZES.HKV * GROUP + heads) * spans.T + t, lse, mask=live)


@triton.jit
def _loss_rows(index: Index, attention: Attention, spans: Spans, rows, index_lse, SIZES: tl.constexpr):
    """First sweep, with the attention's LSE at hand: the loss of each query and the LSE of its scores."""
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    t0, b = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(1).to(tl.int64)
    t = t0 + tl.arange(0, BLOCK_T)
    queries, weight = _index_rows(index, b, t0, spans.T, SIZES)
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    mass = tl.zeros((BLOCK_T,), tl.float32)
    gain = tl.zeros((BLOCK_T,), tl.float32)
    first, end = _key_range(spans, b, t)
    for start in range(first, end, SIZES.BLOCK_S):
        s = start + tl.arange(0, SIZES.BLOCK_S)
        seen = _visible(spans, b, t, s)
        p = _target(attention, spans, b, t0, s, seen, SIZES)
        keys = load_index_keys(index, b, s, s < spans.S, SIZES.INDEX_D, SIZES.INDEX_BLOCK_D)
        scores = _scores(tl.dot(queries, tl.trans(keys), input_precision="ieee"), weight, BLOCK_T)
        mass += tl.sum(p, 1)  # one, but for the rounding that must cancel between the sums
        gain += tl.sum(p * (tl.log(tl.where(p > 0.0, p, 1.0)) - scores), 1)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(scores - finite[:, None]), 1)
        top = new_top
    some = total > 0.0
    lse = tl.where(some, top, 0.0) + tl.log(tl.where(some, total, 1.0))
    tl.store(rows + b * spans.T + t, gain + mass * lse, mask=t < spans.T)
    tl.store(index_lse + b * spans.T + t, lse, mask=t < spans.T)


@triton.jit
def _grad_queries(index: Index, attention: Attention, spans: Spans, index_lse, dq, dw, SIZES: tl.constexpr):
    """Second sweep, owned by the queries: gradients of index queries and weights."""
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    INDEX_BLOCK_D: tl.constexpr = SIZES.INDEX_BLOCK_D
    INDEX_ROWS: tl.constexpr = SIZES.INDEX_ROWS
    t0, b = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(1).to(tl.int64)
    t = t0 + tl.arange(0, BLOCK_T)
    queries, weight = _index_rows(index, b, t0, spans.T, SIZES)
    query_total = tl.zeros((INDEX_ROWS, INDEX_BLOCK_D), tl.float32)
    weight_total = tl.zeros((INDEX_ROWS,), tl.float32)
    first, end = _key_range(spans, b, t)
    for start in range(first, end, SIZES.BLOCK_S):
        s = start + tl.arange(0, SIZES.BLOCK_S)
        seen = _visible(spans, b, t, s)
        keys = load_index_keys(index, b, s, s < spans.S, SIZES.INDEX_D, INDEX_BLOCK_D)
        dots = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        d_scores = _d_scores(attention, spans, index_lse, dots, weight, b, t0, s, seen, SIZES)
        weight_total += tl.sum(d_scores * tl.maximum(dots, 0.0), 1)
        d_dots = tl.where(dots > 0.0, d_scores * weight[:, None], 0.0)
        query_total += tl.dot(d_dots.to(keys.dtype), keys, input_precision="ieee")
    head, row_t, live = _rows(t0, spans.T, SIZES.H, INDEX_ROWS, BLOCK_T)
    place, cols = (b * spans.T + row_t) * SIZES.H + head, tl.arange(0, INDEX_BLOCK_D)
    mask = live[:, None] & (cols < SIZES.INDEX_D)[None, :]
    tl.store(dq + place[:, None] * SIZES.INDEX_D + cols[None, :], query_total, mask=mask)
    tl.store(dw + place, weight_total * index.scale, mask=live)


@triton.jit
def _grad_keys(index: Index, attention: Attention, spans: Spans, index_lse, dk, SIZES: tl.constexpr):
    """Second sweep, owned by the keys: the gradient of index keys, over the queries in order."""
    BLOCK_T: tl.constexpr = SIZES.BLOCK_T
    BLOCK_S: tl.constexpr = SIZES.BLOCK_S
    INDEX_BLOCK_D: tl.constexpr = SIZES.INDEX_BLOCK_D
    s0, b = tl.program_id(0).to(tl.int64) * BLOCK_S, tl.program_id(1).to(tl.int64)
    s, cols = s0 + tl.arange(0, BLOCK_S), tl.arange(0, INDEX_BLOCK_D)
    keys = load_index_keys(index, b, s, s < spans.S, SIZES.INDEX_D, INDEX_BLOCK_D)
    total = tl.zeros((BLOCK_S, INDEX_BLOCK_D), tl.float32)
    for t0 in range(tl.maximum(s0 - spans.offset, 0), spans.T, BLOCK_T):
        seen = _visible(spans, b, t0 + tl.arange(0, BLOCK_T), s)
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:  # not all of another document
            queries, weight = _index_rows(index, b, t0, spans.T, SIZES)
            dots = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            d_scores = _d_scores(attention, spans, index_lse, dots, weight, b, t0, s, seen, SIZES)
            d_dots = tl.where(dots > 0.0, d_scores * weight[:, None], 0.0)
            total += tl.dot(tl.trans(d_dots.to(queries.dtype)), queries, input_precision="ieee")
    at = (b * spans.S + s)[:, None] * SIZES.INDEX_D + cols[None, :]
    tl.store(dk + at, total, mask=(s < spans.S)[:, None] & (cols < SIZES.INDEX_D)[None, :])
