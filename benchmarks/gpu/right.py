"""The Triton kernels, and a model on them, against references in float64: outputs and gradients, awkward shapes."""

import os
from collections.abc import Callable
from unittest.mock import patch

import torch

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM, kernels, reference, select_topk
from dsa.kernels.check import TOLERANCE
from dsa.kernels.triton.attention import sparse_attention_triton
from dsa.kernels.triton.indexer import index_scores_triton
from dsa.losses import indexer_kl
from dsa.masks import Slab, Visibility
from dsa.training.trainer import freeze
from stages.cost import DEVICE

ATTENTION = [  # B, Hq, Hkv, T, S, D, K; queries are the last T of S positions
    (1, 1, 1, 1, 1, 32, 1),
    (2, 7, 1, 1, 37, 64, 20),
    (1, 14, 2, 5, 19, 64, 16),
    (1, 4, 2, 9, 9, 16, 9),
    (2, 2, 2, 5, 13, 128, 6),
]
LARGE_ATTENTION = [
    (1, 14, 2, 300, 300, 64, 128),
    (1, 14, 2, 257, 2049, 64, 2048),
    (3, 14, 2, 1, 5000, 64, 2048),
    (1, 32, 8, 130, 1025, 128, 257),
]
SCORES = [(1, 1, 1, 1, 16), (2, 5, 70, 8, 32), (1, 65, 9, 3, 48)]  # B, T, S, H, D
LARGE_SCORES = [(1, 700, 1300, 4, 64), (1, 1, 30001, 64, 128)]
LOSS = {"B": 2, "T": 13, "Hq": 6, "Hkv": 2, "D": 16, "H": 3, "DI": 24}
LARGE_LOSS = {"B": 2, "T": 417, "Hq": 14, "Hkv": 2, "D": 64, "H": 4, "DI": 64}
MASKS = ("whole", "left padding", "an all-padding row", "packed", "chunked prefill")

Tensors = list[torch.Tensor]


def cases(dtype: torch.dtype, rehearse: bool) -> dict[str, Callable[[], dict]]:
    """The small shapes, and on a GPU the large ones; whole models in float32 only."""
    found: dict[str, Callable[[], dict]] = {}
    for shape in ATTENTION[1:4] if rehearse else ATTENTION + LARGE_ATTENTION:
        found[f"attention {shape}"] = lambda s=shape: attention(dtype, *s)
    for shape in SCORES if rehearse else SCORES + LARGE_SCORES:
        found[f"scores {shape}"] = lambda s=shape: scores(dtype, *s)
    for sizes in (LOSS,) if rehearse else (LOSS, LARGE_LOSS):
        for topk in (None, sizes["T"] // 4):
            for mask in MASKS[1:2] if rehearse else MASKS:
                name = f"loss {tuple(sizes.values())}, {mask}, {topk or 'all'} keys"
                found[name] = lambda s=sizes, m=mask, k=topk: loss(dtype, s, m, k)
    if dtype == torch.float32:
        found["selection"] = selection
        for stage in ("dense", "warmup", "sparse"):
            found[f"model {stage}"] = lambda s=stage: model(s, *(12, 3) if rehearse else (60, 24))
        found["model decoding"] = decoding
    return found


def random(dtype: torch.dtype, *shapes: tuple[int, ...], seed: int = 0) -> Tensors:
    """Normal, the same on every device, with the last two dimensions swapped in memory: no kernel may count on them."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]
    return [torch.randn(shape, generator=g).transpose(-1, -2).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def compared(ours: Tensors, expected: Tensors, names: list[str], tolerance: float) -> dict:
    """Relative root-mean-square errors; absolute ones where zeros are expected."""
    errors = {}
    for name, mine, theirs in zip(names, ours, expected, strict=True):
        mine, theirs = mine.detach().double().cpu(), theirs.detach().double().cpu()
        size = theirs.norm() if theirs.square().mean() > 1e-12 else theirs.numel() ** 0.5
        errors[name] = float(f"{((mine - theirs).norm() / size).item():.2e}")
    right = all(error < tolerance for error in errors.values())  # NaN is not
    return {"right": right, "tolerance": tolerance, "errors": errors}


def with_gradients(call: Callable[..., torch.Tensor], inputs: Tensors) -> Tensors:
    out = call(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def wide(inputs: Tensors) -> Tensors:
    return [x.detach().double().requires_grad_() for x in inputs]


def attention(dtype, B, Hq, Hkv, T, S, D, K) -> dict:
    inputs = random(dtype, (B, Hq, T, D), (B, Hkv, S, D), (B, Hkv, S, D))
    causal = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    chosen = torch.rand(B, T, S, generator=torch.Generator().manual_seed(2))
    indices = reference.select_topk(chosen, K, causal[None])
    if T > 4:
        indices[:, 2] = -1  # a query without any key
        indices[:, 4, ::2] = -1  # with gaps
    indices = indices.to(DEVICE)
    ours = with_gradients(lambda *x: sparse_attention_triton(*x, indices, D**-0.5)[0], inputs)
    expected = with_gradients(lambda *x: reference.sparse_attention(*x, indices, D**-0.5), wide(inputs))
    return compared(ours, expected, ["out", "dq", "dk", "dv"], TOLERANCE[dtype])


def scores(dtype, B, T, S, H, D) -> dict:
    q, k, weights = (x.detach() for x in random(dtype, (B, T, H, D), (B, S, D), (B, T, H)))
    weights = weights.float()
    expected = reference.index_scores(q.double(), k.double(), weights.double())
    return compared([index_scores_triton(q, k, weights)], [expected], ["scores"], TOLERANCE[torch.float32])


def visibility(mask: str, B: int, T: int) -> Visibility:
    position = torch.arange(T, device=DEVICE).expand(B, -1)
    row = torch.arange(B, device=DEVICE)[:, None]
    return {
        "whole": lambda: Visibility(T, T),
        "left padding": lambda: Visibility(T, T, key_mask=position >= row * (T // 3)),
        "an all-padding row": lambda: Visibility(T, T, key_mask=(row > 0).expand(B, T)),
        "packed": lambda: Visibility(T, T, documents=position // (T // 3 + 1)),
        "chunked prefill": lambda: Visibility(T // 4, T, offset=T - T // 4),
    }[mask]()


def loss(dtype, sizes: dict[str, int], mask: str, topk: int | None) -> dict:
    B, S, Hq, Hkv, D, H, DI = sizes.values()
    visible = visibility(mask, B, S)
    T, scaling = visible.length, D**-0.5
    q, k = (x.detach() for x in random(dtype, (B, Hq, T, D), (B, Hkv, S, D)))
    index = random(dtype, (B, T, H, DI), (B, S, DI), (B, T, H), seed=3)
    indices = None
    if topk:
        seen = visible.mask(Slab(0, T, S), q.device).cpu()
        chosen = torch.rand(B, T, S, generator=torch.Generator().manual_seed(2))
        indices = reference.select_topk(chosen, topk, seen).to(DEVICE)
    ours = with_gradients(lambda *x: indexer_kl(*x, q, k, scaling, visible, indices, backend="triton"), index)
    expected = with_gradients(
        lambda *x: reference.indexer_kl(*x, q.double(), k.double(), scaling, visible, indices), wide(index)
    )
    return compared(ours, expected, ["loss", "dq", "dk", "dweights"], TOLERANCE[dtype])


def selection() -> dict:
    """Exactly the reference's keys, whatever the ties: ReLU makes many scores equal."""
    chosen = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(0)).relu()
    chosen[0, 3, ::5] = torch.nan
    chosen[1, :, 600:] = -torch.inf
    causal = torch.arange(700) <= torch.arange(50)[:, None] * 14
    ours = [select_topk(chosen.to(DEVICE), k, causal.to(DEVICE)).cpu() for k in (1, 64, 699, 700)]
    expected = [reference.select_topk(chosen, k, causal[None]) for k in (1, 64, 699, 700)]
    return {"right": all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))}


def small_model(mode: str, topk: int) -> Qwen2DSAForCausalLM:
    torch.manual_seed(0)
    return Qwen2DSAForCausalLM(
        Qwen2DSAConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            initializer_range=0.2,
            index_n_heads=4,
            index_head_dim=16,
            index_topk=topk,
            attention_mode=mode,
            eos_token_id=None,
        )
    )


def model(stage: str, length: int, topk: int) -> dict:
    """Losses, logits and gradients of a step, by the kernels, and on the CPU by PyTorch's operations in float64."""
    ids = torch.randint(2, 97, (2, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor([[length], [2 * length // 3]])).long()

    def results(device: str, dtype: torch.dtype) -> Tensors:
        tested = small_model("sparse" if stage == "sparse" else "dense", topk).to(device, dtype)
        freeze(tested, backbone=stage == "warmup", indexer=stage == "dense")
        x, seen = ids.to(device), mask.to(device)
        labels = None if stage == "warmup" else x.masked_fill(seen == 0, -100)
        out = tested(x, attention_mask=seen, labels=labels, use_cache=False, output_indexer_kl=stage != "dense")
        losses = ([] if labels is None else [out.loss]) + ([] if stage == "dense" else [out.indexer_kl.sum()])
        sum(losses).backward()
        grads = [p.grad.flatten() for p in tested.parameters() if p.requires_grad]
        return [torch.stack(losses), out.logits * seen[..., None], torch.cat(grads)]

    with patch.dict(os.environ, {kernels.VARIABLE: "gather"}):
        expected = results("cpu", torch.float64)
    return compared(results(DEVICE, torch.float32), expected, ["losses", "logits", "gradients"], 1e-4)


@torch.no_grad()
def decoding() -> dict:
    """Tokens one at a time behind a left-padded batch, as the whole row gives them."""
    tested = small_model("sparse", topk=8).to(DEVICE).eval()
    ids = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = (torch.arange(30) >= torch.tensor([[0], [7]])).long().to(DEVICE)
    expected = tested(ids, attention_mask=mask, use_cache=False).logits
    out = tested(ids[:, :20], attention_mask=mask[:, :20], use_cache=True)
    steps = [out.logits]
    for t in range(20, 30):
        out = tested(
            ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=out.past_key_values, use_cache=True
        )
        steps.append(out.logits)
    real = mask[..., None]
    return compared([torch.cat(steps, 1) * real], [expected * real], ["logits"], 1e-4)
