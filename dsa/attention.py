"""Sparse attention over selected keys: one call, several backends, one reference.

The reference gathers the selected keys of every query; it is slow and obviously right. The `gather` backend needs no
kernel: a slab of neighbouring queries selects overlapping keys, so it runs plain attention of the slab over the union
of its keys, masked by membership.
"""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F

from dsa.masks import SLAB_ELEMENTS, membership

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "gather")
UNION_SHARE = 0.7  # with more of the prefix in the union, slicing the prefix is cheaper than gathering from it
GATHER_ROWS = 256  # queries a slab


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    scaling: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(q . k_s * scaling) v_s over the keys s in `indices`, the same ones for every head of a query.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, S, D]; Hq is a multiple of Hkv (grouped-query attention).
        indices: int [B, T, K], key indices without repeats; -1 is no key. A query without any key gets zeros.
        scaling: D^-0.5 by default.
        backend: "reference" or "gather"; chosen by device and shape when None.

    Returns:
        [B, Hq, T, D] in the dtype of q. Differentiable in q, k and v.

    Raises:
        ValueError: unknown backend, or shapes that do not fit.
    """
    B, Hq, T, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or Hq % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if indices.shape[:2] != (B, T):
        raise ValueError(f"indices {tuple(indices.shape)} do not fit q {tuple(q.shape)}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {BACKENDS}")
    backend = backend or "gather"
    log_backend(backend, q.device.type)
    scaling = D**-0.5 if scaling is None else scaling
    if backend == "reference":
        return sparse_attention_reference(q, k, v, indices, scaling)
    return GatherAttention.apply(q, k, v, indices, scaling)


@lru_cache
def log_backend(backend: str, device: str) -> None:
    """Say once which backend runs: a silent fall-back is a bug that costs days."""
    logger.info("sparse attention: backend %s on %s", backend, device)


def sparse_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Gather K keys and values for every query, then softmax in float32. Arguments as in `sparse_attention`."""
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    batch = torch.arange(B, device=q.device)[:, None, None]
    present = indices >= 0  # (B, T, K)
    at = indices.long().clamp(min=0)
    wide = torch.promote_types(q.dtype, torch.float32)
    k_sel = k.transpose(1, 2)[batch, at].to(wide)  # (B, T, K, Hkv, D)
    v_sel = v.transpose(1, 2)[batch, at].to(wide)
    grouped = q.to(wide).view(B, Hkv, Hq // Hkv, T, D)
    logits = torch.einsum("bngtd,btknd->bngtk", grouped, k_sel) * scaling
    logits = logits.masked_fill(~present[:, None, None], -torch.inf)
    some = present.any(-1)[:, None, None, :, None]
    p = torch.where(some, logits, 0.0).softmax(-1) * some
    out = torch.einsum("bngtk,btknd->bngtd", p, v_sel)
    return out.reshape(B, Hq, T, D).to(q.dtype)


def _slab_attention(q, k, v, mask, some, scaling):
    """q [1, Hq, C, D] over k, v [1, Hkv, N, D], mask [C, N]; rows that are not in some [C] give zeros."""
    mask = mask | ~some[:, None]  # a softmax over nothing is NaN, and so would be its gradient
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=scaling, enable_gqa=True)
    return out * some[None, None, :, None].to(out.dtype)


class GatherAttention(torch.autograd.Function):
    """Attention of a slab of queries over the union of its keys; nothing of a slab is kept for backward, which runs the
    slab again. Memory: O(L (Hq D + K)) saved, one slab at work."""

    @staticmethod
    def slabs(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor):
        """Yield (batch row, query slice, key selector, mask [C, N], some [C]) over the whole batch."""
        B, Hq, T, _ = q.shape
        S = k.shape[2]
        rows = max(1, min(GATHER_ROWS, SLAB_ELEMENTS // (Hq * S)))
        for b in range(B):
            for start in range(0, T, rows):
                chosen = indices[b, start : start + rows]
                present = chosen >= 0
                prefix = int(chosen.max()) + 1 if chosen.numel() else 0
                if prefix == 0:
                    continue
                mask = membership(chosen, prefix)
                union = mask.any(0).nonzero().squeeze(-1)
                if len(union) < UNION_SHARE * prefix:
                    yield b, slice(start, start + rows), union, mask[:, union], present.any(-1)
                else:
                    yield b, slice(start, start + rows), slice(0, prefix), mask, present.any(-1)

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling):
        ctx.save_for_backward(q, k, v, indices)
        ctx.scaling = scaling
        out = torch.zeros_like(q)
        for b, queries, keys, mask, some in GatherAttention.slabs(q, k, indices):
            args = q[b, None, :, queries], k[b, None, :, keys], v[b, None, :, keys]
            out[b, :, queries] = _slab_attention(*args, mask, some, scaling)[0]
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, indices = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for b, queries, keys, mask, some in GatherAttention.slabs(q, k, indices):
            args = [
                x.detach().requires_grad_() for x in (q[b, None, :, queries], k[b, None, :, keys], v[b, None, :, keys])
            ]
            with torch.enable_grad():
                out = _slab_attention(*args, mask, some, ctx.scaling)
            gq, gk, gv = torch.autograd.grad(out, args, grad_out[b, None, :, queries])
            dq[b, :, queries] = gq[0]
            dk[b, :, keys] += gk[0]
            dv[b, :, keys] += gv[0]
        return dq, dk, dv, None, None
