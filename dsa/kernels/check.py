"""A kernel that compiles may still be wrong on a device that nobody has tried: the first use on each compares.

Small tensors, a few milliseconds; a disagreement stops the program rather than spoil a training run.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch

from dsa import kernels, reference
from dsa.kernels.cpu import attend, decode, loss, select, warmup
from dsa.masks import Slab, Visibility

# Of a relative RMS error, against float64: some roundings of the type for sums of this length.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.int8: 1e-4}


@lru_cache
def verify(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise RuntimeError where a Triton kernel does not run here, or does not agree with its reference."""
    for name, compare in (("sparse attention", _attention), ("index scores", _scores), ("indexer loss", _loss)):
        _verify(f"the {name} kernel on {device} in {dtype}", compare, device, dtype, head_dim)


@lru_cache
def verify_cpu(module: ModuleType, dtype: torch.dtype, *sizes: int) -> None:
    """The same of an operation of dsa/kernels/cpu, compiled for such a type and sizes."""
    name, compare = CPU[module]
    kernel = f"the {name} kernel on this processor in {dtype} for {sizes}"
    _verify(kernel, compare, torch.device("cpu"), dtype, *sizes)


def _verify(kernel: str, compare: Callable[..., float], device: torch.device, dtype: torch.dtype, *sizes: int) -> None:
    try:
        # The first use may be within no_grad, inference mode, autocast, or a layer that is recomputed in backward.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            worst = compare(device, dtype, *sizes)
    except Exception as error:
        raise RuntimeError(f"{kernel} does not run: {error}. {HELP}") from error
    if not worst < TOLERANCE[dtype]:
        raise RuntimeError(f"{kernel} is off by {worst:.1e} (relative). {HELP}")


HELP = f"Set {kernels.VARIABLE}=gather to use PyTorch's own operations, and please report this"


def _random(device, dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _error(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    ratios = [(a.double() - b).norm() / b.norm() for a, b in zip(ours, reference, strict=True)]
    return max(ratio.item() for ratio in ratios)


def _with_gradients(call, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    out = call(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def _indices(device) -> torch.Tensor:
    """[1, 40, 16] causal, ascending and without repeats: keys spread over the prefix of each query, -1 for the rest."""
    key, query = torch.arange(16, device=device), torch.arange(40, device=device)[:, None]
    indices = torch.where(key <= query, key * (query + 1) // 16, -1).int()[None]
    return indices.masked_fill(torch.nn.functional.pad(indices.diff(dim=-1) == 0, (1, 0)), -1)


def _compare(fast, slow, inputs: list[torch.Tensor]) -> float:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    return _error(_with_gradients(fast, inputs), _with_gradients(slow, wide))


def _attention(device, dtype, head_dim: int) -> float:
    from dsa.kernels.triton.attention import sparse_attention_triton

    inputs = _random(device, dtype, (1, 4, 40, head_dim), (1, 2, 40, head_dim), (1, 2, 40, head_dim))
    indices, scaling = _indices(device), head_dim**-0.5
    return _compare(
        lambda *x: sparse_attention_triton(*x, indices, scaling)[0],
        lambda *x: reference.sparse_attention(*x, indices, scaling),
        inputs,
    )


def _scores(device, dtype, head_dim: int) -> float:
    from dsa.kernels.triton.indexer import index_scores_triton

    q, k, weights = (x.detach() for x in _random(device, dtype, (1, 40, 3, 32), (1, 40, 32), (1, 40, 3)))
    wide = reference.index_scores(q.double(), k.double(), weights.double())
    return _error([index_scores_triton(q, k, weights)], [wide])


def _loss(device, dtype, head_dim: int) -> float:
    from dsa.kernels.triton.losses import kl_in_tiles

    q, k = (x.detach() for x in _random(device, dtype, (1, 4, 40, head_dim), (1, 2, 40, head_dim)))
    return max(_loss_error(kl_in_tiles, (3, 32), dtype, q, k, indices) for indices in (None, _indices(device)))


def _loss_error(compute, index_shape: tuple[int, int], dtype, q, k, indices) -> float:
    """Of a `compute` of `dsa.losses.MeanLoss`, index tensors in dtype."""
    (H, D), T = index_shape, q.shape[2]
    index = _random(q.device, dtype, (1, T, H, D), (1, T, D), (1, T, H))
    wide = [x.detach().double().requires_grad_() for x in index]
    visible, valid = Visibility(T, T), torch.ones(1, T, dtype=torch.bool, device=q.device)
    scaling = q.shape[3] ** -0.5
    total, grads = compute([x.detach() for x in index], q, k, scaling, visible, indices, valid, True)
    mean = reference.indexer_kl(*wide, q.double(), k.double(), scaling, visible, indices)
    expected = [mean.detach(), *torch.autograd.grad(mean, wide)]
    return _error([x / valid.sum() for x in (total, *grads)], expected)


def _selection(device, dtype, heads: int, head_dim: int) -> float:
    """By the scores that the selected keys have and should have: keys that nearly tie may be others."""
    T, S, topk = 40, 250, 16
    q, k, weights = (
        x.detach() for x in _random(device, torch.float32, (1, T, heads, head_dim), (1, S, head_dim), (1, T, heads))
    )
    if dtype == torch.int8:  # with a scale of one
        q, k = (8 * q).round(), (8 * k).round()
        q[..., 0] = 127
        rows = torch.cat([k.to(dtype), torch.ones(1, S, 1).view(dtype)], dim=-1)
    else:
        q, k = q.to(dtype), k.to(dtype)
        rows = k
    visible = Visibility(T, S, S - T)
    scale = (heads * head_dim) ** -0.5
    keys, scores = select.select(q, rows, weights, scale, topk, visible)
    wide = reference.index_scores(q.double(), k.double(), weights.double())
    best = wide.gather(2, reference.select_topk(wide, topk, visible.mask(Slab(0, T, S), device)).long())
    ours = wide.gather(2, keys.long())
    return _error([scores, ours.sort().values], [ours, best.sort().values])


def _decoding(device, dtype, group: int, head_dim: int) -> float:
    q, k, v = (x.detach() for x in _random(device, dtype, (2, 2 * group, 1, head_dim), *[(2, 2, 90, head_dim)] * 2))
    indices = torch.arange(0, 90, 3, dtype=torch.int32).expand(2, 1, -1)
    expected = reference.sparse_attention(q.double(), k.double(), v.double(), indices, head_dim**-0.5)
    return _error([decode.decode_attention(q, k, v, indices, head_dim**-0.5)], [expected])


def _own_attention(device, dtype, Hq: int, Hkv: int, head_dim: int) -> float:
    inputs = _random(device, dtype, (1, Hq, 40, head_dim), (1, Hkv, 40, head_dim), (1, Hkv, 40, head_dim))
    indices, scaling = _indices(device), head_dim**-0.5
    return _compare(
        lambda *x: attend.sparse_attention_cpu(*x, indices, scaling),
        lambda *x: reference.sparse_attention(*x, indices, scaling),
        inputs,
    )


def _own_loss(device, dtype, Hq: int, Hkv: int, head_dim: int, index_heads: int, index_dim: int) -> float:
    q, k = (x.detach() for x in _random(device, dtype, (1, Hq, 40, head_dim), (1, Hkv, 40, head_dim)))
    return _loss_error(loss.kl_of_selected, (index_heads, index_dim), torch.float32, q, k, _indices(device))


def _warmup_loss(device, dtype, Hq: int, Hkv: int, head_dim: int, index_heads: int, index_dim: int) -> float:
    """Over more keys than a tile has."""
    q, k = (x.detach() for x in _random(device, dtype, (1, Hq, 150, head_dim), (1, Hkv, 150, head_dim)))
    return _loss_error(warmup.kl_of_all, (index_heads, index_dim), torch.float32, q, k, None)


CPU = {
    attend: ("sparse attention", _own_attention),
    decode: ("decoding attention", _decoding),
    loss: ("indexer loss", _own_loss),
    select: ("key selection", _selection),
    warmup: ("dense indexer loss", _warmup_loss),
}
