"""`dsa.attention.sparse_attention` of a single query a row, read from the cache as it is (decode.c). No gradient."""

import torch

from dsa.kernels.cpu import build, threads

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = {torch.float32: {}, torch.bfloat16: {"BF16": 1}}
GROUPS = range(1, 33)
SPLIT = 1024  # keys and heads of keys that are worth a thread of their own


def obstacle(dtype: torch.dtype, group: int, head_dim: int) -> str | None:
    """Why `decode_attention` cannot run for caches of such a type, query heads on a key head and head size."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of {tuple(DTYPES)}"
    if group not in GROUPS or head_dim not in HEAD_DIMS:
        return f"{group} query heads of {head_dim} on a key head are not 1 to 32 of {HEAD_DIMS}"
    return build.obstacle("decode.c", G=group, D=head_dim, **DTYPES[dtype])


def decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Arguments and result of `dsa.attention.sparse_attention` with T = 1, all of one of `DTYPES`.

    Raises:
        IndexError: an index beyond the last key.
    """
    (B, Hq, _, D), (Hkv, S), K = q.shape, k.shape[1:3], indices.shape[2]
    lib = build.library("decode.c", G=Hq // Hkv, D=D, **DTYPES[q.dtype])
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    q, indices = q.contiguous(), indices.int().contiguous()
    count = -(-K // lib.dsa_share_keys())  # of shares for each head of keys
    shares = torch.empty(B * Hkv * count, lib.dsa_share_bytes(), dtype=torch.uint8)

    def run(start: int, stop: int) -> int:
        caches = k, *k.stride()[:3], v, *v.stride()[:3]
        return build.call(lib.dsa_decode, q, scaling, *caches, Hkv, S, indices, K, start, stop, shares)

    if sum(threads.shares(run, len(shares), least=max(1, SPLIT * count // K))):
        raise IndexError(f"indices: {int(indices.amax())} of {S} keys")
    out = torch.empty_like(q)
    build.call(lib.dsa_merge_shares, shares, B * Hkv, count, out)
    return out
