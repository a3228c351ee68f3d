"""`dsa.attention.sparse_attention` over each query's own keys, forward and backward (attend.c)."""

from itertools import chain, pairwise, product
from typing import NamedTuple

import torch

from dsa.kernels.cpu import build, threads

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = {torch.float32: {}, torch.bfloat16: {"BF16": 1}}
LANES = 16  # query heads at once
ROWS = 256  # queries a job
PACKED = 4096  # tokens a job of packing
PARTITIONS = 4  # of the queries, whatever the number of threads: so many sums of dk and dv, added up in order


class Units(NamedTuple):
    """How the heads of a shape are dealt out to calls of a kernel.

    heads, key_heads: what one call takes, whole groups or a share of one; count: calls; sets: of key heads that are
    packed together, each for count // sets calls, one after the other.
    """

    heads: int
    key_heads: int
    count: int
    sets: int

    def of(self, s: int) -> list[slice]:
        """The query heads of each call for set s."""
        share = self.count // self.sets
        return [slice(u * self.heads, (u + 1) * self.heads) for u in range(s * share, (s + 1) * share)]


def units_of(Hq: int, Hkv: int) -> Units:
    group = Hq // Hkv
    if group > LANES:
        heads, n = max(g for g in range(1, LANES + 1) if group % g == 0), 1
    else:
        n = max(n for n in (1, 2, 4, 8) if Hkv % n == 0 and n * group <= LANES)
        heads = n * group
    return Units(heads, n, Hq // heads, Hkv // n)


def obstacle(dtype: torch.dtype, Hq: int, Hkv: int, D: int) -> str | None:
    """Why `sparse_attention_cpu` cannot run for q, k and v of such a type, numbers of heads and head size; None if it
    can."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of {tuple(DTYPES)}"
    if D not in HEAD_DIMS:
        return f"head size {D} is not one of {HEAD_DIMS}"
    return build.obstacle("attend.c", **defines(dtype, units_of(Hq, Hkv), D))


def sparse_attention_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Arguments and result of `dsa.attention.sparse_attention`, q, k and v of one of `DTYPES`.

    Raises:
        IndexError: an index beyond the last key.
    """
    return Attend.apply(q, k, v, checked(indices, k.shape[2]), scaling)


def checked(indices: torch.Tensor, S: int) -> torch.Tensor:
    """As the kernels read them, int32; IndexError where one is beyond the last key."""
    if indices.numel() and int(indices.amax()) >= S:
        raise IndexError(f"indices: {int(indices.amax())} of {S} keys")
    return indices.int().contiguous()


class Attend(torch.autograd.Function):
    """Saves q, indices, out and lse, and keys and values as the kernels read them."""

    @staticmethod
    def forward(ctx, q, k, v, indices, scaling):
        (B, Hq, T, D), (Hkv, S), K = q.shape, k.shape[1:3], indices.shape[2]
        units = units_of(Hq, Hkv)
        lib = build.library("attend.c", **defines(q.dtype, units, D))
        q, kv = tokens_first(q), _pack(lib, k, v, units)  # (B, T, Hq, D), (B, sets, S, 2, D, key heads)
        out, lse = torch.empty_like(q), torch.empty(B, T, Hq)
        scratch = lib.dsa_attend_scratch(K)

        def slab(b: int, s: int, heads: slice, start: int) -> None:
            call = lib.dsa_attend, q[b, :, heads], Hq, kv[b, s], indices[b], K, S, start, min(start + ROWS, T), scaling
            build.call(*call, out[b, :, heads], lse[b, :, heads], torch.empty(scratch, dtype=torch.uint8))

        calls = [(b, s, heads) for b in range(B) for s in range(units.sets) for heads in units.of(s)]
        threads.each(slab, [(*call, start) for start in reversed(range(0, T, ROWS)) for call in calls])
        ctx.save_for_backward(q, kv, indices, out, lse)
        ctx.scaling, ctx.units, ctx.lib = scaling, units, lib
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad_out):
        q, kv, indices, out, lse = ctx.saved_tensors
        units, lib, (B, T, Hq, D), S, K = ctx.units, ctx.lib, q.shape, kv.shape[2], indices.shape[2]
        Hkv = units.sets * units.key_heads
        grad_out = tokens_first(grad_out)
        dq, dk, dv = torch.empty_like(q), q.new_empty(B, S, Hkv, D), q.new_empty(B, S, Hkv, D)

        def partition(b: int, s: int, start: int, stop: int) -> torch.Tensor:
            """dkv [keys, 2, D, key heads] of some queries, as far as they selected keys."""
            dkv = torch.zeros(int(indices[b, start:stop].amax()) + 1, *kv.shape[3:])
            for heads in units.of(s):
                tensors = (x[b, :, heads] for x in (q, out, lse, grad_out))
                call = lib.dsa_backward, *tensors, Hq, kv[b, s], indices[b], K, start, stop, ctx.scaling
                build.call(*call, dq[b, :, heads], dkv, torch.empty(scratch, dtype=torch.uint8))
            return dkv

        scratch = lib.dsa_backward_scratch(K)
        for b, s in product(range(B), range(units.sets)):
            dkv = torch.zeros(kv.shape[2:])
            for part in threads.each(partition, [(b, s, *part) for part in partitions(T)]):
                dkv[: len(part)] += part
            at = slice(s * units.key_heads, (s + 1) * units.key_heads)
            build.call(lib.dsa_unpack, dkv, Hkv, S, dk[b, :, at], dv[b, :, at])
        return *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B, T, H, D] in memory, which is how projections leave it."""
    return x.transpose(1, 2).contiguous()


def _pack(lib, k: torch.Tensor, v: torch.Tensor, units: Units) -> torch.Tensor:
    """k, v [B, Hkv, S, D] -> float32 [B, sets, S, 2, D, key heads]: a token is one row of memory."""
    B, _, S, D = k.shape
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    kv = torch.empty(B, units.sets, S, 2, D, units.key_heads)

    def slab(b: int, s: int, start: int) -> None:
        views = ((x[b, s * units.key_heads], x.stride(1), x.stride(2)) for x in (k, v))
        build.call(lib.dsa_pack, *chain(*views), start, min(start + PACKED, S), kv[b, s])

    threads.each(slab, product(range(B), range(units.sets), range(0, S, PACKED)))
    return kv


def partitions(T: int) -> list[tuple[int, int]]:
    """(start, stop) of the queries whose gradients in keys are summed together, none of them empty."""
    cuts = [i * T // PARTITIONS for i in range(PARTITIONS + 1)]
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


def defines(dtype: torch.dtype, units: Units, D: int) -> dict[str, int]:
    """What a kernel is compiled with."""
    return {"HQ": units.heads, "HKV": units.key_heads, "D": D, **DTYPES[dtype]}
