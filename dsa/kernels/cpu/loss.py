"""`dsa.losses.indexer_kl` of sparse training, over each query's selected keys (target.c, loss.c)."""

from itertools import product

import torch

from dsa.kernels.cpu import build, threads
from dsa.kernels.cpu.attend import DTYPES, HEAD_DIMS, Units, checked, defines, partitions, tokens_first, units_of
from dsa.masks import Visibility

HEADS = range(1, 17)
ROWS = 64  # queries whose targets exist at once

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # index queries, keys and weights


def obstacle(dtype: torch.dtype, Hq: int, Hkv: int, D: int, H: int, DI: int) -> str | None:
    """Why `kl_of_selected` cannot run for q and k of such a type, numbers of heads and head size, and H index heads of
    size DI; None if it can."""
    return (
        unsupported(dtype, D, H, DI)
        or build.obstacle("target.c", **defines(dtype, units_of(Hq, Hkv), D))
        or build.obstacle("loss.c", HQ=H, HKV=1, D=DI)
    )


def unsupported(dtype: torch.dtype, D: int, H: int, DI: int) -> str | None:
    """What of the type or the sizes no loss kernel has been written for."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of {tuple(DTYPES)}"
    if D not in HEAD_DIMS or H not in HEADS or DI not in HEAD_DIMS:
        return f"heads of {D} and {H} index heads of {DI} are not of {HEAD_DIMS}, up to {max(HEADS)}"
    return None


def kl_of_selected(
    index: Index,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: Visibility,
    indices: torch.Tensor,
    valid: torch.Tensor,
    wanted: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """For `dsa.losses.MeanLoss`: the sum of the losses of the `valid` [B, T] queries and, if `wanted`, its gradients.

    Memory beyond the gradients: a few copies of the index keys, and [ROWS, K] for each thread.
    """
    (B, T, H, DI), (S, Hq), K = index[0].shape, (k.shape[2], q.shape[1]), indices.shape[2]
    units, indices = units_of(Hq, k.shape[1]), checked(indices, S)
    target_lib = build.library("target.c", **defines(q.dtype, units, q.shape[3]))
    loss_lib = build.library("loss.c", HQ=H, HKV=1, D=DI)
    q, rows = tokens_first(q), _pack(target_lib, k, units)  # (B, T, Hq, D), (B, sets, S, D, key heads)
    index_q, index_k, weights = (x.float().contiguous() for x in index)
    valid, scale = valid.contiguous(), (H * DI) ** -0.5
    dq, dw = (torch.empty_like(index_q), torch.empty_like(weights)) if wanted else (None, None)
    size = max(target_lib.dsa_target_scratch(K), loss_lib.dsa_loss_scratch(K))

    def partition(b: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum of the losses of some queries, float64 [1], and dk [keys, DI], as far as they selected keys."""
        total, scratch = torch.zeros(1, dtype=torch.float64), torch.empty(size, dtype=torch.uint8)
        dk = torch.zeros(int(indices[b, start:stop].amax()) + 1, DI) if wanted else None
        grads = (dq[b], dw[b], dk) if wanted else (None, None, None)
        index = index_q[b], weights[b], index_k[b]
        for t in range(start, stop, ROWS):
            queries = indices[b], K, t, min(t + ROWS, stop)
            p = torch.zeros(ROWS, -(-K // 16) * 16)
            for s in range(units.sets):
                for heads in units.of(s):
                    call = target_lib.dsa_target, q[b, :, heads], Hq, rows[b, s], *queries, scaling, p, p.stride(0)
                    build.call(*call, scratch)
            build.call(loss_lib.dsa_loss, *index, *queries, valid[b], scale, p, p.stride(0), Hq, total, *grads, scratch)
        return total, dk

    total = torch.zeros(1, dtype=torch.float64)
    dk = torch.zeros(B, S, DI) if wanted else None
    for b in range(B):
        for loss, part in threads.each(partition, [(b, *part) for part in partitions(T)]):
            total += loss
            if wanted:
                dk[b, : len(part)] += part
    return total[0].float(), (dq, dk, dw) if wanted else ()


def _pack(lib, k: torch.Tensor, units: Units) -> torch.Tensor:
    """k [B, Hkv, S, D] -> float32 [B, sets, S, D, key heads]: a token is one row of memory."""
    B, _, S, D = k.shape
    k = k if k.stride(3) == 1 else k.contiguous()
    rows = torch.empty(B, units.sets, S, D, units.key_heads)
    for b, s in product(range(B), range(units.sets)):
        build.call(lib.dsa_pack_keys, k[b, s * units.key_heads], k.stride(1), k.stride(2), 0, S, rows[b, s])
    return rows
