"""Sparse attention over selected keys: one call, several backends.

The `reference` backend is that of dsa/reference.py. The `gather` backend needs no kernel: a slab of neighbouring
queries selects overlapping keys, so it runs plain attention of the slab over the union of its keys, masked by
membership. Where a long context leaves little overlap, and no gradient is wanted, each query gathers its own keys
instead. The `triton` backend (dsa/kernels/triton) is the one for CUDA, and `cpu` (dsa/kernels/cpu) the one for CPUs.
"""

import logging
from functools import lru_cache

import torch
import torch.nn.functional as F

from dsa import kernels, reference
from dsa.kernels import BACKENDS
from dsa.kernels.cpu import attend, decode
from dsa.masks import SLAB_ELEMENTS

logger = logging.getLogger(__name__)

UNION_SHARE = 0.7  # with more of the prefix in the union, slicing the prefix is cheaper than gathering from it
GATHER_ROWS = 256  # queries a slab
# A union of more keys than both costs a CPU more than each query's own keys do (reports/log.md, 2026-11-21). The second
# bound leaves every row of up to so many tokens with the union.
OWN_UNION, OWN_LENGTH = 4, 4096  # times K; keys
OWN_ROWS = 4  # queries whose own keys are gathered at once


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
        backend: one of `dsa.kernels.BACKENDS`. When None, "triton" for CUDA tensors and "cpu" for those on a CPU whose
            type and sizes its kernels take, "gather" for all others, unless DSA_BACKEND says otherwise. Few queries of
            a long row are left to "gather": "cpu" packs all keys first.

    Returns:
        [B, Hq, T, D] in the dtype of q. Differentiable in q, k and v.

    Raises:
        ValueError: unknown backend, or one that cannot run on such tensors, or shapes that do not fit.
    """
    B, Hq, T, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or Hq % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if indices.shape[:2] != (B, T):
        raise ValueError(f"indices {tuple(indices.shape)} do not fit q {tuple(q.shape)}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {BACKENDS}")
    decoding = T == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))
    kernel = None
    if q.dtype == k.dtype == v.dtype:
        kernel = (decode, q.dtype, Hq // k.shape[1], D) if decoding else (attend, q.dtype, Hq, k.shape[1], D)
    if backend is None:
        few = not decoding and 2 * T * indices.shape[2] < k.shape[2]
        backend = kernels.chosen(q, D, cpu=None if few else kernel)
    elif backend == "triton":
        kernels.require(q, D)
    elif backend == "cpu":
        kernels.require_cpu(q, kernel)
    log_backend(backend, q.device.type)
    scaling = D**-0.5 if scaling is None else scaling
    if backend == "reference":
        return reference.sparse_attention(q, k, v, indices, scaling)
    if backend == "triton":
        from dsa.kernels.triton.attention import sparse_attention_triton  # needs Triton, which not every platform has

        return sparse_attention_triton(q, k, v, indices, scaling)[0]
    if backend == "cpu":
        run = decode.decode_attention if decoding else attend.sparse_attention_cpu
        return run(q, k, v, indices, scaling)
    if decoding:
        return decode_attention(q, k, v, indices, scaling)
    return GatherAttention.apply(q, k, v, indices, scaling)


@lru_cache
def log_backend(backend: str, device: str) -> None:
    """Say once which backend runs: a silent fall-back is a bug that costs days."""
    logger.info("sparse attention: backend %s on %s", backend, device)


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The `gather` backend for a single query, T = 1: reads its K rows of the cache and nothing else. No gradient."""
    B, Hq, _, D = q.shape
    Hkv, S = k.shape[1:3]
    out = torch.zeros_like(q)  # (B, Hq, T, D)
    for b in range(B):
        at = indices[b, 0]  # (K)
        if at.amin() < 0:
            at = at[at >= 0]  # (K), or fewer
        if len(at) == 0:
            continue
        k_sel, v_sel = k[b], v[b]  # (Hkv, S, D)
        if len(at) < S:  # a head at a time: on a CPU several times faster than from both at once
            k_sel, v_sel = k.new_empty(Hkv, len(at), D), v.new_empty(Hkv, len(at), D)  # (Hkv, K, D)
            for h in range(Hkv):
                torch.index_select(k[b, h], 0, at, out=k_sel[h])
                torch.index_select(v[b, h], 0, at, out=v_sel[h])
        logits = (q[b].view(Hkv, -1, D) * scaling) @ k_sel.transpose(1, 2)  # (Hkv, Hq / Hkv, K)
        out[b] = (logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v_sel).view(Hq, 1, D)
    return out


def own_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Some queries of a row, each over its own K gathered keys: q [Hq, T, D], k and v [Hkv, S, D], indices [T, K] ->
    [Hq, T, D]. No gradient. A few queries and one head of k and v at a time, which a cache can hold."""
    T, D = q.shape[1:]
    Hkv, K = k.shape[0], indices.shape[1]
    out = q.new_empty(q.shape)
    grouped, result = q.unflatten(0, (Hkv, -1)), out.view(Hkv, -1, T, D)  # (Hkv, Hq / Hkv, T, D)
    for start in range(0, T, OWN_ROWS):
        queries = slice(start, start + OWN_ROWS)
        at = indices[queries]  # (C, K), C = OWN_ROWS queries
        absent = at < 0 if at.amin() < 0 else None
        at = at.clamp(min=0).view(-1)  # (C * K)
        for h in range(Hkv):
            k_sel, v_sel = (x[h].index_select(0, at).view(-1, K, D) for x in (k, v))  # (C, K, D)
            logits = (grouped[h, :, queries].transpose(0, 1) * scaling) @ k_sel.transpose(1, 2)  # (C, Hq / Hkv, K)
            if absent is not None:
                logits.masked_fill_(absent[:, None], -torch.inf)
            p = logits.softmax(-1, dtype=torch.float32).to(v.dtype)  # (C, Hq / Hkv, K)
            if absent is not None:  # a query without any key: softmax over nothing is NaN
                p.masked_fill_(absent[:, None], 0.0)
            result[h, :, queries] = (p @ v_sel).transpose(0, 1)
    return out


# The fused attention that SDPA itself runs on a CPU. Called by name it also returns the log-sum-exp, with which the
# backward need not run the forward again.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class GatherAttention(torch.autograd.Function):
    """Attention of a slab of queries over the union of its keys. Memory: O(L (Hq D + K)) saved, one slab at work.

    On other devices than a CPU the backward runs the slab again.
    """

    @staticmethod
    def slabs(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, own: bool = False):
        """Yield (batch row, query slice, key selector, bias [1, 1, C, N], some [C, 1]) over the whole batch: C queries
        of a slab, N keys in their union.

        With `own`, the last three are None where the slab's union is so large that each query had better gather its
        own keys.

        The bias is what SDPA adds to the logits: 0 at a query's keys, else -inf. A query without any key sees
        everything, for a softmax over nothing is NaN, and so would be its gradient: `some` sets it to zero afterwards.
        """
        B, Hq, T, _ = q.shape
        S = k.shape[2]
        rows = max(1, min(GATHER_ROWS, SLAB_ELEMENTS // (Hq * S)))
        for b in range(B):
            for start in range(0, T, rows):
                chosen = indices[b, start : start + rows]  # (C, K)
                prefix = int(chosen.max()) + 1 if chosen.numel() else 0
                if prefix == 0:
                    continue
                at = chosen.long() % (prefix + 1)  # (C, K); -1, no key, goes to an extra column
                used = chosen.new_zeros(prefix + 1, dtype=torch.bool)  # (prefix + 1)
                used[at] = True
                keys, count = used[:prefix].nonzero().squeeze(-1), prefix  # (N), the union
                if own and len(keys) > max(OWN_UNION * chosen.shape[-1], OWN_LENGTH):
                    yield b, slice(start, start + rows), None, None, None
                    continue
                if len(keys) < UNION_SHARE * prefix:
                    count = len(keys)
                    at = (used.cumsum(0) - 1).index_fill_(0, used.new_tensor([prefix], dtype=torch.long), count)[at]
                else:
                    keys = slice(0, prefix)
                bias = q.new_full((len(chosen), count + 1), -torch.inf).scatter_(1, at, 0.0)[:, :count]  # (C, N)
                some = (chosen >= 0).any(-1, keepdim=True)  # (C, 1)
                yield b, slice(start, start + rows), keys, bias.masked_fill_(~some, 0.0)[None, None], some

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling):
        # `_flash` takes the numbers of a head for neighbours, and does not look.
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.zeros_like(q)  # (B, Hq, T, D)
        lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))  # (B, Hq, T)
        own = q.device.type == "cpu" and not any(ctx.needs_input_grad)
        for b, queries, keys, bias, some in GatherAttention.slabs(q, k, indices, own):
            if keys is None:
                out[b, :, queries] = own_attention(q[b, :, queries], k[b], v[b], indices[b, queries], scaling)
                continue
            args = q[b, None, :, queries], k[b, None, :, keys], v[b, None, :, keys]  # (1, Hq, C, D), (1, Hkv, N, D) x2
            if q.device.type == "cpu":
                slab, lse[b, :, queries] = _flash(*args, 0.0, False, attn_mask=bias, scale=scaling)  # (1, Hq, C, D)
            else:
                slab = F.scaled_dot_product_attention(*args, attn_mask=bias, scale=scaling, enable_gqa=True)
            out[b, :, queries] = slab[0] * some
        ctx.save_for_backward(q, k, v, indices, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, indices, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for b, queries, keys, bias, some in GatherAttention.slabs(q, k, indices):
            args = q[b, None, :, queries], k[b, None, :, keys], v[b, None, :, keys]  # (1, Hq, C, D), (1, Hkv, N, D) x2
            grad = grad_out[b, None, :, queries] * some  # (1, Hq, C, D)
            if q.device.type == "cpu":
                saved = out[b, None, :, queries], lse[b, None, :, queries]
                gq, gk, gv = _flash_backward(grad, *args, *saved, 0.0, False, attn_mask=bias, scale=ctx.scaling)
            else:
                args = [x.detach().requires_grad_() for x in args]
                with torch.enable_grad():
                    slab = F.scaled_dot_product_attention(*args, attn_mask=bias, scale=ctx.scaling, enable_gqa=True)
                gq, gk, gv = torch.autograd.grad(slab, args, grad)
            dq[b, :, queries] = gq[0]
            dk[b, :, keys] += gk[0]
            dv[b, :, keys] += gv[0]
        return dq, dk, dv, None, None
