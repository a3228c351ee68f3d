"""A constructed induction circuit (Olsson et al. 2022), from which a small model's pre-training may start.

Trained from plain random weights, a model of a few million parameters had not found the circuit after two million
tokens (reports/log.md); with it the training has only to keep and to sharpen what is there.
"""

import math

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def induction(model: PreTrainedModel, heads: int = 2, back=(1, 2), peak=14.0, match=2.5, copy=2.0) -> None:
    """Write an induction circuit into the random weights of a Qwen2 (its q and k have biases).

    Layer 0: heads that look exactly so many tokens back, by the biases of q and k alone: in RoPE's fast pairs q is k's
    bias turned by the distance. Later layers: `heads` query heads of each key-value head, and its key, begin with one
    shared projection in the slow pairs, q of the token itself and k of what layer 0 wrote about the token before; layer
    1 also copies what it finds.

    Args:
        peak: the logit of the distance looked for, above the mean of the others.
        match, copy: the size of the shared projections beside the random ones.
    """
    config, layers = model.config, [layer.self_attn for layer in model.model.layers]
    D, hidden = config.head_dim, config.hidden_size
    half, group = D // 2, config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    generator = torch.Generator().manual_seed(0)
    reads, writes, copied = (torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0] for _ in range(3))
    for name, p in model.named_parameters():
        if "embed" in name:
            p.mul_(hidden**-0.5 / config.initializer_range)  # tied: at 0.02 the largest logit would be about 5

    fast, first = min(10, half), layers[0]
    amplitude = min(12.0, math.sqrt(peak * math.sqrt(D) / (1 - frequency[:fast].cos()).sum().item()))
    first.k_proj.bias[:fast] = amplitude
    first.k_proj.weight[:D] *= 0.3
    first.v_proj.weight[:D] = reads[:D]
    for head, distance in enumerate(back):
        angle, rows = -frequency[:fast] * distance, slice(head * D, (head + 1) * D)
        first.q_proj.bias[rows.start : rows.start + fast] = amplitude * angle.cos()
        first.q_proj.bias[rows.start + half : rows.start + half + fast] = amplitude * angle.sin()
        first.q_proj.weight[rows] *= 0.3
        first.o_proj.weight[:, rows] = writes[:, rows] * (0.04 * math.sqrt(hidden / D))
    slow = torch.arange(half)[int(half * 3 / 8) :]
    slow = torch.cat([slow, slow + half])
    for number, layer in enumerate(layers[1:], 1):
        for kv in range(config.num_key_value_heads):
            layer.k_proj.weight[kv * D + slow] += match * writes[:, : len(slow)].T
            if number == 1:
                layer.v_proj.weight[kv * D : (kv + 1) * D] += copy / 2 * copied[kv * D : (kv + 1) * D]
            for head in range(kv * group, kv * group + heads):
                layer.q_proj.weight[head * D + slow] += match * reads[: len(slow)]
                if number == 1:
                    layer.o_proj.weight[:, head * D : (head + 1) * D] += copy / 4 * copied[kv * D : (kv + 1) * D].T
