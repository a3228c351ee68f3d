"""The lightning indexer: a light scorer of every earlier token for the current one (V3.2 report, eq. 1)."""

import torch
from torch import nn
from transformers import Cache
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from dsa import kernels
from dsa.config import Qwen2DSAConfig


def index_scores(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """I[t, s] = sum_h weights[t, h] * relu(q[t, h] . k[s]) * D^-0.5 * H^-0.5, in float32.

    Args:
        q: [B, T, H, D] index queries.
        k: [B, S, D] index keys, one a token, shared by the heads.
        weights: [B, T, H].

    Returns:
        float32 [B, T, S]. Differentiable. It holds [B, T, H, S]: call it with a slab of queries, not with all.
    """
    B, T, H, D = q.shape
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, weights))
    if not wanted and kernels.chosen(q, 16, "index scores"):  # any head size: tiles are padded
        from dsa.kernels.indexer import index_scores_triton

        return index_scores_triton(q, k, weights)
    scale = (D * H) ** -0.5  # the indexer's own sizes, not the attention's
    with torch.autocast(q.device.type, enabled=False):
        if T == 1:  # decoding: as [S, D] @ [D, H] a CPU reads the keys once, at twice the speed of the other order
            dots = k.float() @ q[:, 0].float().transpose(1, 2)  # (B, S, H)
            return (dots.relu() @ (weights[:, 0, :, None].float() * scale)).transpose(1, 2)
        dots = (q.float().reshape(B, T * H, D) @ k.float().transpose(1, 2)).view(B * T, H, -1)
        scores = (weights.float() * scale).reshape(B * T, 1, H) @ dots.relu_()  # (B*T, 1, S)
        return scores.view(B, T, -1)


def rotate(x: torch.Tensor, position_ids: torch.Tensor, dim: int, theta: float) -> torch.Tensor:
    """RoPE, half-split, on the first `dim` dims of x[B, T, ..., D], frequencies theta^(-2i/dim)."""
    if dim == 0:
        return x
    frequency = theta ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = position_ids[..., None].float() * frequency  # (B or 1, T, dim/2)
    angle = torch.cat([angle, angle], dim=-1)
    while angle.dim() < x.dim():
        angle = angle.unsqueeze(-2)
    head = x[..., :dim].float()
    head = head * angle.cos() + rotate_half(head) * angle.sin()
    return torch.cat([head.to(x.dtype), x[..., dim:]], dim=-1)


class LightningIndexer(nn.Module):
    """Projects hidden states to index queries, keys and head weights.

    Parameter names are those of transformers' `DeepseekV32Indexer`, with `wq` for `wq_b`: Qwen2 has no query latent, so
    queries come from the hidden state. No Hadamard rotation: it changes no score.
    """

    def __init__(self, config: Qwen2DSAConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.n_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.rope_dim = config.index_rope_dim
        self.rope_theta = config.rope_parameters["rope_theta"]
        self.wq = nn.Linear(config.hidden_size, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.n_heads, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, past_key_values: Cache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Index queries, keys and weights; the keys of earlier calls come from the cache.

        Args:
            hidden_states: [B, T, hidden], what the attention's projections get. Detached here: the indexer learns
                nothing into the backbone.
            position_ids: [B or 1, T].

        Returns:
            q [B, T, H, D], k [B, S, D], weights float32 [B, T, H].
        """
        x = hidden_states.detach()
        B, T, _ = x.shape
        q = rotate(self.wq(x).view(B, T, self.n_heads, self.head_dim), position_ids, self.rope_dim, self.rope_theta)
        k = rotate(self.k_norm(self.wk(x)), position_ids, self.rope_dim, self.rope_theta)
        if past_key_values is not None:
            k = past_key_values.update_indexer(k, self.layer_idx)
        with torch.autocast(x.device.type, enabled=False):  # few numbers that scale every score: full precision
            weights = nn.functional.linear(x.float(), self.weights_proj.weight.float())
        return q, k, weights
