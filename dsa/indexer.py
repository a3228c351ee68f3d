"""The lightning indexer: a light scorer of every earlier token for the current one (V3.2 report, eq. 1)."""

import torch
from torch import nn
from transformers import Cache

from dsa import kernels
from dsa.config import DSAConfig
from dsa.kernels.cpu import select
from dsa.masks import Slab, Visibility
from dsa.selector import DeferredScores

TILE = 16384  # keys at a time in decoding on a CPU
SCALE_BYTES = 4  # of an int8 key's float32 scale


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D] -> int8 [..., D] and float32 scales [..., 1], the largest of a vector being 127 times its scale."""
    x = x.detach().float()
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # (..., 1)
    return (x / scale).round().to(torch.int8), scale


def pack_int8(k: torch.Tensor) -> torch.Tensor:
    """Index keys [B, S, D] -> int8 [B, S, D + 4]: each key and the bytes of its scale, one tensor for the cache."""
    values, scale = quantize(k)
    return torch.cat([values, scale.view(torch.int8)], dim=-1)


def unpack_int8(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pack_int8` made -> int8 [B, S, D] and float32 scales [B, S, 1], both views: D is a multiple of 4."""
    return k[..., :-SCALE_BYTES], k.view(torch.float32)[..., -1:]


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """I[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]) * D^-0.5 * H^-0.5, in float32.

    Args:
        q: [B, T, H, D] index queries.
        k: [B, S, D] index keys, one a token, shared by the heads; or `pack_int8` of them. The queries are then rounded
            to int8 too, each head by its own scale, and the products are exact, whatever the device and the shape.
        weights: [B, T, H].

    Returns:
        float32 [B, T, S]. Differentiable, but for int8 keys. It holds [B, T, H, S]: call it with a slab of queries, not
        with all.
    """
    if k.dtype != torch.int8:
        return _scores(q, k, weights)
    (q, q_scale), (k, k_scale) = quantize(q), unpack_int8(k)
    weights = weights.detach() * q_scale.squeeze(-1)  # (B, T, H)
    if not _decoding(q):
        q, k = q.float(), k.float()  # where sums of a thousand products of int8 are exact too
    return _scores(q, k, weights).mul_(k_scale.transpose(1, 2))


class IndexScores(DeferredScores):
    """`index_scores` of all queries and keys for `select_topk`; with the CPU kernel no score is ever stored.

    q, k, weights: as for `index_scores`; visible, heads: as for `DeferredScores`, where heads are at least those of q.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, visible: Visibility, heads: int = 1):
        super().__init__(self.of_slab, visible, q, max(heads, q.shape[2]))
        self.q, self.k, self.weights = q, k, weights

    def of_slab(self, slab: Slab) -> torch.Tensor:
        return index_scores(self.q[:, slab.queries], self.k[:, : slab.keys], self.weights[:, slab.queries])

    def select(self, topk: int) -> torch.Tensor:
        H, D = self.q.shape[2:]
        kernel = (select, self.k.dtype, H, D) if select.fits(self.visible) else None
        backend = kernels.chosen(self.q, 16, "key selection", kernel)
        if backend == "triton":
            self.heads = 1  # its kernel keeps no number for each head: slabs of more queries
        if backend != "cpu":
            return super().select(topk)
        return select.select_keys(self.q, self.k, self.weights.float(), (D * H) ** -0.5, topk, self.visible)


def _decoding(q: torch.Tensor) -> bool:
    return q.shape[1] == 1 and q.device.type == "cpu"


def _scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`index_scores` of q and k of one type, float or, for decoding on a CPU, int8."""
    B, T, H, D = q.shape
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, weights))
    if not wanted and q.dtype != torch.int8 and kernels.chosen(q, 16, "index scores") == "triton":
        from dsa.kernels.triton.indexer import index_scores_triton

        return index_scores_triton(q, k, weights)
    scale = (D * H) ** -0.5  # the indexer's own sizes, not the attention's
    with torch.autocast(q.device.type, enabled=False):
        if _decoding(q) and not wanted:
            return _decoding_scores(q, k, weights.float() * scale)
        dots = (q.float().reshape(B, T * H, D) @ k.float().transpose(1, 2)).view(B * T, H, -1)  # (B * T, H, S)
        scores = (weights.float() * scale).reshape(B * T, 1, H) @ dots.relu_()  # (B*T, 1, S)
        return scores.view(B, T, -1)


def _decoding_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q [B, 1, H, D], k [B, S, D], weights [B, 1, H] -> [B, 1, S]. Reads the keys once; no float32 copy of all is made,
    and as [S, D] @ [D, H], a row of the batch at a time, a CPU is several times as fast as in other orders."""
    B, S = k.shape[:2]
    scores = torch.empty(B, 1, S, dtype=torch.float32, device=k.device)
    for b in range(B):
        if k.dtype == torch.int8:
            dots = torch._int_mm(q[b, 0], k[b].T).float()  # (H, S)
            torch.mv(dots.relu_().T, weights[b, 0], out=scores[b, 0])
            continue
        queries = q[b, 0].float().T  # (D, H)
        for start in range(0, S, TILE):
            tile = slice(start, start + TILE)
            dots = k[b, tile].float() @ queries  # (TILE, H)
            torch.mv(dots.relu_(), weights[b, 0], out=scores[b, 0, tile])
    return scores


Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, float32 [B or 1, T, 1, dim / 2]


def rotation(position_ids: torch.Tensor, config: DSAConfig) -> Rotation | None:
    """What RoPE turns index queries and keys by, frequencies theta^(-2i/dim), in all layers. None for dim 0."""
    dim, theta = config.index_rope_dim, config.rope_parameters["rope_theta"]
    if dim == 0:
        return None
    frequency = theta ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angle = position_ids[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, by: Rotation | None) -> torch.Tensor:
    """RoPE, half-split, on the first dims of x [B, T, H, D]."""
    if by is None:
        return x
    cos, sin = by
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()  # (B, T, H, dim / 2) each
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, T, H, dim)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


class LightningIndexer(nn.Module):
    """Projects hidden states to index queries, keys and head weights.

    Parameter names are those of transformers' `DeepseekV32Indexer`, with `wq` for `wq_b`: Qwen2 has no query latent, so
    queries come from the hidden state. No Hadamard rotation: it changes no score.
    """

    def __init__(self, config: DSAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.wq = nn.Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.n_heads, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        by: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index queries, keys and weights; the keys of earlier calls come from the cache.

        Args:
            hidden_states: [B, T, hidden], what the attention's projections get. Detached here: the indexer learns
                nothing into the backbone.
            position_ids: [B or 1, T].
            by: their `rotation`, where the caller has it: a decoded token has little else to compute.

        Returns:
            q [B, T, H, D], k [B, S, D], weights float32 [B, T, H]. Where the config says int8 and this is no training,
            k is int8 [B, S, D + 4], see `pack_int8`.
        """
        x = hidden_states.detach()  # (B, T, hidden)
        B, T, _ = x.shape
        by = rotation(position_ids, self.config) if by is None else by
        q = rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim), by)  # (B, T, H, D)
        k = rotate(self.k_norm(self.wk(x)).unsqueeze(2), by).squeeze(2)  # (B, T, D)
        if self.config.index_key_dtype == "int8" and not self.training:  # without a cache too: the same keys selected
            k = pack_int8(k)
        if past_key_values is not None:
            k = past_key_values.update_indexer(k, self.layer_idx)  # (B, S, D), or D + 4 in int8
        with torch.autocast(x.device.type, enabled=False):  # few numbers that scale every score: full precision
            weights = nn.functional.linear(x.float(), self.weights_proj.weight.float())  # (B, T, H)
        return q, k, weights
