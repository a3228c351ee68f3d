"""The indexer's loss: KL from what attention wants to what the indexer offers (V3.2 report, eq. 3 and 4).

p is the head-sum of the attention, L1-normalised: each head's softmax sums to one, so that is its mean over the heads.
In the dense warm-up p and the indexer's softmax run over all visible keys, in sparse training over the selected ones.
"""

import torch

from dsa.indexer import index_scores
from dsa.masks import Slab, Visibility, membership

MASKED = -1e30  # finite: a row without any key stays free of NaN, in the loss and in its gradient


def attention_target(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Head-mean of softmax(q . k * scaling) over the keys of `mask`.

    Args:
        q: [B, Hq, T, D]; k: [B, Hkv, S, D]; mask: bool [B or 1, T, S].

    Returns:
        [B, T, S] in float32 or better; a row sums to one, or to zero where the mask has no key.
    """
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = (q.to(wide) * scaling).reshape(B, Hkv, Hq // Hkv * T, D)
        logits = (grouped @ k.to(wide).transpose(2, 3)).view(B, Hq, T, S)
        logits = logits.masked_fill_(~mask[:, None], MASKED)
        return logits.softmax(-1).mean(1) * mask


def kl_rows(p: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(p || softmax(scores)) over the keys of `mask`: [B, T, S] -> [B, T]; zero where the mask has no key."""
    log_q = scores.masked_fill(~mask, MASKED).log_softmax(-1)
    return (torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0)).sum(-1)


def indexer_kl_reference(index_q, index_k, index_weights, q, k, scaling, visible: Visibility, indices=None):
    """`indexer_kl` in whole matrices and plain autograd: O(B H T S) memory, and obviously right."""
    B, _, T, _ = q.shape
    mask = visible.mask(Slab(0, T, k.shape[2]), q.device)
    if indices is not None:
        mask = mask & membership(indices, k.shape[2])
    p = attention_target(q.detach(), k.detach(), mask, scaling)
    rows = kl_rows(p, index_scores(index_q, index_k, index_weights), mask.expand_as(p))
    valid = visible.is_query(B, q.device)
    return (rows * valid).sum() / valid.sum().clamp(min=1)


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: Visibility,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over valid query positions of KL(p || softmax(I)).

    Args:
        index_q [B, T, H, D_I], index_k [B, S, D_I], index_weights [B, T, H]: what the indexer returned; the gradient
            goes to these three and to nothing else.
        q [B, Hq, T, D], k [B, Hkv, S, D]: the attention's queries and keys, after RoPE.
        scaling: the attention's.
        visible: which keys each query sees; padding and other documents are no keys, and padding no query position.
        indices: int [B, T, K] from `select_topk`, the keys that attention really used; None for dense attention.

    Returns:
        A scalar. Works a slab of queries at a time and computes its gradient on the way: nothing of size T x S is kept.
    """
    return _IndexerKL.apply(index_q, index_k, index_weights, q.detach(), k.detach(), scaling, visible, indices)


class _IndexerKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, index_q, index_k, index_weights, q, k, scaling, visible, indices):
        B, Hq = q.shape[:2]
        valid = visible.is_query(B, q.device)
        count = valid.sum().clamp(min=1)
        wanted = any(ctx.needs_input_grad[:3])
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in (index_q, index_k, index_weights)] if wanted else []
        total = torch.zeros((), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for slab in visible.slabs(B, Hq):
            mask = visible.mask(slab, q.device)
            if indices is not None:
                mask = mask & membership(indices[:, slab.queries], slab.keys)
            p = attention_target(q[:, :, slab.queries], k[:, :, : slab.keys], mask, scaling)
            args = [index_q[:, slab.queries], index_k[:, : slab.keys], index_weights[:, slab.queries]]
            args = [x.detach().requires_grad_(wanted) for x in args]
            with torch.set_grad_enabled(wanted):
                rows = kl_rows(p, index_scores(*args), mask.expand_as(p))
                loss = (rows * valid[:, slab.queries]).sum()
            total += loss.detach()
            if wanted:
                for whole, at, part in zip(
                    grads, (slab.queries, slice(slab.keys), slab.queries), torch.autograd.grad(loss, args), strict=True
                ):
                    whole[:, at] += part
        ctx.save_for_backward(*(g / count for g in grads))
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grads = [g * grad for g in ctx.saved_tensors] or [None] * 3
        return *grads, None, None, None, None, None
