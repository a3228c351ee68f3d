"""`dsa.losses.indexer_kl` of the dense warm-up, over all the keys that a query sees (warmup.c)."""

from itertools import pairwise

import torch

from dsa.kernels.cpu import build, select, threads
from dsa.kernels.cpu.attend import tokens_first
from dsa.kernels.cpu.loss import Index, unsupported
from dsa.masks import Visibility

ROWS = 16  # queries whose targets exist at once
PARTITIONS = 8  # of a row's queries, whatever the number of threads: so many sums of dk, added up in order


def obstacle(dtype: torch.dtype, Hq: int, Hkv: int, D: int, H: int, DI: int) -> str | None:
    """Why `kl_of_all` cannot run for q and k of such a type, numbers of heads and head size, and H index heads of size
    DI; None if it can."""
    return unsupported(dtype, D, H, DI) or build.obstacle("warmup.c", D=D, H=H) or build.obstacle("warmup.c", D=DI, H=H)


def kl_of_all(
    index: Index,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: Visibility,
    indices: None,
    valid: torch.Tensor,
    wanted: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """For `dsa.losses.MeanLoss`: the sum of the losses of the `valid` [B, T] queries and, if `wanted`, its gradients.

    Memory beyond the gradients: a few copies of the queries and keys, and for each thread [ROWS, S] targets and
    [8 heads, 4, S] logits.

    Args:
        visible: what `select.fits`.
    """
    (H, DI), (B, Hkv, S, D), Hq = index[0].shape[2:], k.shape, q.shape[1]
    target_lib, loss_lib = (build.library("warmup.c", D=size, H=H) for size in (D, DI))
    index_q, index_k, weights = (x.float().contiguous() for x in index)
    q, valid = tokens_first(q.float()), valid.contiguous()  # (B, T, Hq, D)
    first, real = select.first_keys(visible, B), select.real_keys(visible, B)
    each_head = None if real is None else real.repeat_interleave(Hkv, dim=0)
    keys = select.pack(target_lib, k.float().contiguous().flatten(0, 1), each_head).unflatten(0, (B, Hkv))
    index_keys = select.pack(loss_lib, index_k, real)
    tiles, tile_keys, scale = index_keys.shape[1], loss_lib.dsa_tile_keys(), (H * DI) ** -0.5
    dq, dw = (torch.empty_like(index_q), torch.empty_like(weights)) if wanted else (None, None)
    size = max(target_lib.dsa_target_scratch(tiles), loss_lib.dsa_loss_scratch(tiles))

    def partition(b: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum of the losses of some queries, float64 [1], and their part of dk, in tiles [tiles, DI, tile_keys]."""
        total, scratch = torch.zeros(1, dtype=torch.float64), torch.empty(size, dtype=torch.uint8)
        p = torch.empty(ROWS, tiles * tile_keys)
        dk = torch.zeros(-(-(visible.offset + stop) // tile_keys), DI, tile_keys) if wanted else None
        grads = (dq[b], dw[b], dk) if wanted else (None, None, None)
        for t in range(start, stop, ROWS):
            queries = tiles, first[b], visible.offset, t, min(t + ROWS, stop)
            build.call(target_lib.dsa_target, q[b], Hq, Hq // Hkv, keys[b], *queries, scaling, p, scratch)
            call = loss_lib.dsa_loss, index_q[b], weights[b], index_keys[b], index_k[b], S, *queries, valid[b]
            build.call(*call, scale, p, Hq, total, *grads, scratch)
        return total, dk

    total, dk = torch.zeros(1, dtype=torch.float64), torch.zeros(B, tiles, DI, tile_keys) if wanted else None
    for b in range(B):
        for loss, part in threads.each(partition, [(b, *part) for part in partitions(visible)]):
            total += loss
            if wanted:
                dk[b, : len(part)] += part
    if not wanted:
        return total[0].float(), ()
    return total[0].float(), (dq, dk.transpose(2, 3).flatten(1, 2)[:, :S].contiguous(), dw)


def partitions(visible: Visibility) -> list[tuple[int, int]]:
    """(start, stop) of queries that see about as many keys in each part, if all see what came before; none is empty."""
    T, offset = visible.length, visible.offset
    share = ((offset + T) ** 2 - offset**2) / PARTITIONS
    cuts = [round((offset**2 + i * share) ** 0.5) - offset for i in range(PARTITIONS + 1)]
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]
