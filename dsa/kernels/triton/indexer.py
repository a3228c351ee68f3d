"""Index scores in tiles: ReLU, head weights and the sum over heads never leave the chip."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dsa.kernels import require
from dsa.kernels.triton.views import View, same_dtype, view

BLOCK_T, BLOCK_S = 64, 64
NUM_WARPS = 4


class Index(NamedTuple):
    """What the indexer returned: q [B, T, H, D], k [B, S, D], weights [B, T, H]; and D^-0.5 * H^-0.5."""

    q: View
    k: View
    weights: View
    scale: float


def index_views(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> Index:
    H, D = q.shape[2:]
    return Index(view(q), view(k), view(weights), (D * H) ** -0.5)


def index_block(head_dim: int) -> int:
    """Head size of the tiles: a power of two that a matrix product takes."""
    return triton.next_power_of_2(max(head_dim, 16))


def index_scores_triton(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, offset: int | None = None
) -> torch.Tensor:
    """`dsa.indexer.index_scores` without its [B, T, H, S]; for selection, hence without gradient.

    Args:
        q [B, T, H, D], k [B, S, D], weights [B, T, H]: any strides; q and k of one type, or they are promoted.
        offset: position of the first query. Keys after a query then get -inf, and tiles of such keys cost nothing.

    Returns:
        float32 [B, T, S].

    Raises:
        ValueError: the kernel cannot run on this device or type, or a gradient would be lost.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, weights)):
        raise ValueError("index_scores_triton has no gradient: call it under torch.no_grad()")
    q, k = same_dtype(q, k)
    require(q, index_block(D))
    scores = torch.empty(B, T, S, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _index_scores[triton.cdiv(S, BLOCK_S), triton.cdiv(T, BLOCK_T), B](
            *(index_views(q, k, weights), scores, T, S, H, 0 if offset is None else offset),
            CAUSAL=offset is not None,
            D=D,
            BLOCK_D=index_block(D),
            BLOCK_T=BLOCK_T,
            BLOCK_S=BLOCK_S,
            num_warps=NUM_WARPS,
        )
    return scores


@triton.jit
def load_index_queries(index: Index, b, t, head, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Index queries [N, BLOCK_D] of N pairs (t, head), and their weights [N] with the scale; zeros where not live."""
    cols = tl.arange(0, BLOCK_D)
    at = b * index.q.strides[0] + t * index.q.strides[1] + head * index.q.strides[2]
    at = at[:, None] + cols[None, :] * index.q.strides[3]
    queries = tl.load(index.q.data + at, mask=live[:, None] & (cols < D)[None, :], other=0.0)
    at = b * index.weights.strides[0] + t * index.weights.strides[1] + head * index.weights.strides[2]
    return queries, tl.load(index.weights.data + at, mask=live, other=0.0).to(tl.float32) * index.scale


@triton.jit
def load_index_keys(index: Index, b, s, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Index keys [N, BLOCK_D]; zeros where not live."""
    cols = tl.arange(0, BLOCK_D)
    at = (b * index.k.strides[0] + s * index.k.strides[1])[:, None] + cols[None, :] * index.k.strides[2]
    return tl.load(index.k.data + at, mask=live[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def _index_scores(
    index: Index,
    scores,
    T,
    S,
    H,
    offset,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    t0, s0 = tl.program_id(1).to(tl.int64) * BLOCK_T, tl.program_id(0).to(tl.int64) * BLOCK_S
    t, s = t0 + tl.arange(0, BLOCK_T), s0 + tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    if not CAUSAL or s0 < offset + t0 + BLOCK_T:  # some query of the tile sees its first key
        keys = tl.trans(load_index_keys(index, b, s, s < S, D, BLOCK_D))
        for h in range(H):
            queries, weight = load_index_queries(index, b, t, tl.cast(h, tl.int64), t < T, D, BLOCK_D)
            total += tl.maximum(tl.dot(queries, keys, input_precision="ieee"), 0.0) * weight[:, None]
    if CAUSAL:
        total = tl.where(s[None, :] <= offset + t[:, None], total, float("-inf"))
    tl.store(scores + (b * T + t)[:, None] * S + s[None, :], total, mask=(t < T)[:, None] & (s < S)[None, :])
