"""The indexer's loss: KL from what attention wants to what the indexer offers (V3.2 report, eq. 3 and 4).

p is the head-sum of the attention, L1-normalised: each head's softmax sums to one, so that is its mean over the heads.
In the dense warm-up p and the indexer's softmax run over all visible keys, in sparse training over the selected ones.
"""

import torch

from dsa import kernels, reference
from dsa.kernels import BACKENDS
from dsa.kernels.cpu import loss, select, warmup
from dsa.masks import Visibility
from dsa.reference import MASKED, attention_logits, mean_softmax


def indexer_kl(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    index_weights: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: Visibility,
    indices: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean over valid query positions of KL(p || softmax(I)).

    Args:
        index_q [B, T, H, D_I], index_k [B, S, D_I], index_weights [B, T, H]: what the indexer returned; the gradient
            goes to these three and to nothing else.
        q [B, Hq, T, D], k [B, Hkv, S, D]: the attention's queries and keys, after RoPE.
        scaling: the attention's.
        visible: which keys each query sees; padding and other documents are no keys, and padding no query position.
        indices: int [B, T, K] from `select_topk`, the keys that attention really used; None for dense attention.
        backend: one of `dsa.kernels.BACKENDS`; "gather" works a slab of queries at a time. When None, "triton" or "cpu"
            where its kernels take such tensors and such a mask and "gather" for all others, unless the environment
            variable DSA_BACKEND says otherwise.

    Returns:
        A scalar. All but the reference compute its gradient on the way: nothing of size T x S is kept.

    Raises:
        ValueError: unknown backend, or one that cannot run on such tensors or with such a mask.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {BACKENDS}")
    index, kernel = (index_q, index_k, index_weights), None
    if q.dtype == k.dtype and (indices is not None or select.fits(visible)):
        module = warmup if indices is None else loss
        kernel = (module, q.dtype, q.shape[1], *k.shape[1::2], *index_q.shape[2:])
    if backend == "cpu":
        kernels.require_cpu(q, kernel)
    elif backend is None:
        backend = kernels.chosen(q, q.shape[3], "indexer loss", kernel)
        if backend == "triton" and visible.explicit is not None:  # it takes no whole mask
            backend = "gather"
    if backend == "reference":
        return reference.indexer_kl(*index, q, k, scaling, visible, indices)
    compute = kl_in_slabs
    if backend == "cpu":
        compute = warmup.kl_of_all if indices is None else loss.kl_of_selected
    elif backend == "triton":
        from dsa.kernels.triton.losses import kl_in_tiles as compute  # needs Triton, which not every platform has

    return MeanLoss.apply(compute, *index, q.detach(), k.detach(), scaling, visible, indices)


class MeanLoss(torch.autograd.Function):
    """Mean over the valid queries of a loss that `compute` sums, together with its gradients: backward scales them.

    compute(index, q, k, scaling, visible, indices, valid [B, T], wanted) returns the sum and, where they are wanted,
    its gradients in the three tensors of `index`.
    """

    @staticmethod
    def forward(ctx, compute, index_q, index_k, index_weights, q, k, scaling, visible, indices):
        index = index_q, index_k, index_weights
        valid = visible.is_query(q.shape[0], q.device)  # (B, T)
        count = valid.sum().clamp(min=1)
        total, grads = compute(index, q, k, scaling, visible, indices, valid, any(ctx.needs_input_grad))
        ctx.save_for_backward(*(g.div_(count) for g in grads))
        ctx.dtypes = [x.dtype for x in index]
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grads = [(g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, *grads, None, None, None, None, None


def kl_in_slabs(index, q, k, scaling, visible, indices, valid, wanted):
    """Per slab: the target p, the scores I, the loss, and by hand its gradient, dL/dI = softmax(I) - p.

    In sparse training both are first gathered to the K selected keys, so that the softmaxes run over K and not over S.
    """
    B, Hq = q.shape[:2]
    index_q, index_k, index_weights = index
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in index] if wanted else []
    total = torch.zeros((), dtype=torch.float32, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for slab in visible.slabs(B, Hq):
            at = slab.queries
            args = index_q[:, at].float(), index_k[:, : slab.keys].float(), index_weights[:, at].float()
            relu, scores = _scores(*args)  # (B, C, H, S), (B, C, S): C queries of the slab, S keys before its end
            logits = attention_logits(q[:, :, at], k[:, :, : slab.keys], scaling)  # (B, Hq, C, S)
            if indices is None:
                chosen, mask = None, visible.mask(slab, q.device).expand_as(scores)  # (B, C, S)
            else:
                chosen, mask = indices[:, at].long().clamp(min=0), indices[:, at] >= 0  # (B, C, K)
                logits = logits.gather(3, chosen[:, None].expand(-1, Hq, -1, -1))  # (B, Hq, C, K)
                scores = scores.gather(2, chosen)  # (B, C, K)
            p = mean_softmax(logits, mask)  # (B, C, S) or (B, C, K), as `scores`
            mass = p.sum(-1)  # (B, C), 1, or 0 in a row without any key
            scores.masked_fill_(~mask, MASKED)
            lse = scores.logsumexp(-1)  # (B, C)
            rows = torch.xlogy(p, p).sum(-1) - (p * scores).sum(-1) + mass * lse  # (B, C)
            total += (rows * valid[:, at]).sum()
            if wanted:
                d_scores = scores.sub_(lse[..., None]).exp_().sub_(p).mul_((mass * valid[:, at])[..., None])
                if chosen is not None:
                    whole = d_scores.new_zeros(*chosen.shape[:2], slab.keys)  # (B, C, S)
                    d_scores = whole.scatter_add_(2, chosen, d_scores)
                dq, dk, dw = _scores_backward(*args, relu, d_scores)  # (B, C, H, DI), (B, S, DI), (B, C, H)
                grads[0][:, at] = dq
                grads[1][:, : slab.keys] += dk
                grads[2][:, at] = dw
    return total, grads


def _scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`index_scores` in float32 that also returns relu(q . k), [B, T, H, S], for its backward."""
    B, T, H, D = q.shape
    relu = (q.reshape(B, T * H, D) @ k.transpose(1, 2)).relu_().view(B * T, H, -1)  # (B * T, H, S)
    scores = (weights * (D * H) ** -0.5).reshape(B * T, 1, H) @ relu  # (B * T, 1, S)
    return relu.view(B, T, H, -1), scores.view(B, T, -1)


def _scores_backward(q, k, weights, relu, d_scores):
    """Gradients (dq, dk, dw) of `_scores`; relu is [B, T, H, S]. The weights multiply what has D columns, not S."""
    B, T, H, D = q.shape
    scale = (D * H) ** -0.5
    dw = (relu.view(B * T, H, -1) @ d_scores.view(B * T, -1, 1)).view(B, T, H) * scale
    # relu's backward by its own kernel: one pass, and no mask of this size.  (B, T * H, S)
    passed = torch.ops.aten.threshold_backward(d_scores[:, :, None].expand_as(relu), relu, 0).view(B, T * H, -1)
    weights = (weights * scale)[..., None]  # (B, T, H, 1)
    dq = (passed @ k).view(B, T, H, D) * weights  # (B, T, H, D)
    dk = passed.transpose(1, 2) @ (q * weights).reshape(B, T * H, D)  # (B, S, D)
    return dq, dk, dw
