"""DeepSeek Sparse Attention in plain PyTorch: every equation once, in whole matrices, slow and obviously right.

Each fast path is tested against this file, and the kernels are compared with it on their first use on a device. The
equations are those of the V3.2 report. All of it runs in float32, or in float64 for inputs of that type.

B batch, T query positions, S key positions, K selected keys; Hq query heads and Hkv key-value heads of size D, the
group Hq / Hkv sharing a key; H index heads of size DI, all on one index key a token.
"""

import torch

from dsa.masks import Slab, Visibility, membership

MASKED = -1e30  # finite: a row without any key stays free of NaN, in the loss and in its gradient


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Equation 1: I[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]) * DI^-0.5 * H^-0.5.

    q [B, T, H, DI], k [B, S, DI], weights [B, T, H] -> [B, T, S].
    """
    H, DI = q.shape[2:]
    dots = torch.einsum("bthd,bsd->bths", wide(q), wide(k))  # (B, T, H, S)
    return torch.einsum("bth,bths->bts", wide(weights), dots.relu()) * (DI * H) ** -0.5  # (B, T, S)


def select_topk(scores: torch.Tensor, topk: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Equation 2's set {s : I[t, s] in Top-k(I[t, :])}; equal scores go to the lower index, NaN counts as -inf.

    scores [B, T, S], mask bool [B, T, S], True where a key is allowed -> int [B, T, min(topk, S)], ascending, then -1.
    """
    S = scores.shape[-1]
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)  # (B, T, S)
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # (B, T, S)
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # (B, T, S)
    behind = (~allowed).gather(-1, order).sort(dim=-1, stable=True).indices  # (B, T, S), the forbidden keys last
    best = order.gather(-1, behind)[..., :topk]  # (B, T, K)
    chosen = best.masked_fill(~allowed.gather(-1, best), S).sort(dim=-1).values  # (B, T, K)
    return chosen.masked_fill(chosen == S, -1).int()  # (B, T, K)


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Equation 2: softmax over the selected keys of q . k * scaling, times v; zeros for a query without any key.

    q [B, Hq, T, D], k and v [B, Hkv, S, D], indices int [B, T, K] with -1 for no key -> [B, Hq, T, D], in q's type.
    """
    B, Hq, T, D = q.shape
    Hkv = k.shape[1]
    batch = torch.arange(B, device=q.device)[:, None, None]  # (B, 1, 1)
    present = indices >= 0  # (B, T, K)
    at = indices.long().clamp(min=0)  # (B, T, K)
    k_sel = wide(k.transpose(1, 2)[batch, at])  # (B, T, K, Hkv, D)
    v_sel = wide(v.transpose(1, 2)[batch, at])  # (B, T, K, Hkv, D)
    grouped = wide(q).view(B, Hkv, Hq // Hkv, T, D)  # (B, Hkv, Hq / Hkv, T, D)
    logits = torch.einsum("bngtd,btknd->bngtk", grouped, k_sel) * scaling  # (B, Hkv, Hq / Hkv, T, K)
    logits = logits.masked_fill(~present[:, None, None], -torch.inf)  # (B, Hkv, Hq / Hkv, T, K)
    some = present.any(-1)[:, None, None, :, None]  # (B, 1, 1, T, 1)
    p = torch.where(some, logits, 0.0).softmax(-1) * some  # (B, Hkv, Hq / Hkv, T, K)
    out = torch.einsum("bngtk,btknd->bngtd", p, v_sel)  # (B, Hkv, Hq / Hkv, T, D)
    return out.reshape(B, Hq, T, D).to(q.dtype)  # (B, Hq, T, D)


def attention_logits(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """q [B, Hq, T, D] . k [B, Hkv, S, D] * scaling -> [B, Hq, T, S]."""
    B, Hq, T, D = q.shape
    Hkv, S = k.shape[1:3]
    grouped = (wide(q) * scaling).reshape(B, Hkv, Hq // Hkv * T, D)  # (B, Hkv, Hq / Hkv * T, D)
    return (grouped @ wide(k).transpose(2, 3)).view(B, Hq, T, S)  # (B, Hq, T, S)


def mean_softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The target p: the heads' attention summed and L1-normalised. Each head sums to one, so that is the heads' mean.

    logits [B, Hq, T, S], overwritten; mask bool [B or 1, T, S] -> [B, T, S], whose rows sum to one, or to zero where
    the mask has no key.
    """
    return logits.masked_fill_(~mask[:, None], MASKED).softmax(-1).mean(1).mul_(mask)  # (B, T, S)


def attention_target(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """What attention over the keys of `mask` wants, [B, T, S]. Arguments as in the two functions above."""
    with torch.autocast(q.device.type, enabled=False):
        return mean_softmax(attention_logits(q, k, scaling), mask)  # (B, T, S)


def kl_rows(p: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(p || softmax(scores)) over the keys of `mask`: three of [B, T, S] -> [B, T]; zero where there is no key."""
    log_q = scores.masked_fill(~mask, MASKED).log_softmax(-1)  # (B, T, S)
    return (torch.xlogy(p, p) - p * log_q.masked_fill(~mask, 0.0)).sum(-1)  # (B, T)


def indexer_kl(index_q, index_k, index_weights, q, k, scaling, visible: Visibility, indices=None) -> torch.Tensor:
    """Equation 3, the warm-up's loss over all visible keys, and 4, the sparse stage's over the selected `indices`:
    the mean over the valid queries of KL(p || softmax(I)). A scalar; arguments as in `dsa.losses.indexer_kl`."""
    B, _, T, _ = q.shape
    S = k.shape[2]
    mask = visible.mask(Slab(0, T, S), q.device)  # (B or 1, T, S)
    if indices is not None:
        mask = mask & membership(indices, S)  # (B, T, S)
    p = attention_target(q.detach(), k.detach(), mask, scaling)  # (B, T, S)
    rows = kl_rows(p, index_scores(index_q, index_k, index_weights), mask.expand_as(p))  # (B, T)
    valid = visible.is_query(B, q.device)  # (B, T)
    return (rows * valid).sum() / valid.sum().clamp(min=1)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
