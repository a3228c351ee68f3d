"""`dsa.indexer.index_scores` and `dsa.selector.select_topk` in one pass that keeps no scores (select.c)."""

import torch

from dsa.kernels.cpu import build, threads
from dsa.masks import Visibility

HEADS = range(1, 17)
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = {torch.float32: {}, torch.bfloat16: {"BF16": 1}, torch.int8: {"INT8": 1}}  # of keys
ROWS = 64  # queries a job
PACKED = 64  # tiles a job
SPLIT = 16384  # keys that are worth a thread of their own in decoding: one scores them in some 120 microseconds


def obstacle(dtype: torch.dtype, heads: int, head_dim: int) -> str | None:
    """Why `select` cannot run for index keys of such a type, number of heads and head size; None if it can."""
    if dtype not in DTYPES:
        return f"index keys of {dtype} are not one of {tuple(DTYPES)}"
    if heads not in HEADS or head_dim not in HEAD_DIMS:
        return f"{heads} index heads of {head_dim} are not 1 to 16 of {HEAD_DIMS}"
    return build.obstacle("select.c", H=heads, D=head_dim, **DTYPES[dtype])


def fits(visible: Visibility) -> bool:
    """Whether each query sees a range of keys, but for padding: no explicit mask, and documents one after the other."""
    ordered = visible.documents is None or bool((visible.documents.diff(dim=-1) >= 0).all())
    return visible.explicit is None and ordered and visible.offset + visible.length <= visible.keys


def select(
    q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor, scale: float, topk: int, visible: Visibility
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of each query with the largest sum_h scale * weights[h] * relu(q[h] . key).

    Args:
        q: [B, T, H, D], float; rounded here where the keys are int8, each head by its own scale.
        k: float32 or bfloat16 [B, S, D], or int8 [B, S, D + 4], see `dsa.indexer.pack_int8`.
        weights: float32 [B, T, H].
        visible: what `fits`.

    Returns:
        int32 [B, T, min(topk, S)] as `select_topk`, and float32 scores of the same shape, 0 where there is no key.
        The same bits whatever the number of threads, and for a query whatever is beside it in the call.
    """
    scores = torch.empty(*q.shape[:2], min(topk, k.shape[1]))
    return _select(q, k, weights, scale, topk, visible, scores), scores


def select_keys(q, k, weights, scale: float, topk: int, visible: Visibility) -> torch.Tensor:
    """`select` without the scores, which queries that see no more than topk keys then do not need at all."""
    return _select(q, k, weights, scale, topk, visible, None)


def _select(q, k, weights, scale, topk, visible, scores):
    B, T, H, D = q.shape
    S = k.shape[1]
    lib = build.library("select.c", H=H, D=D, **DTYPES[k.dtype])
    k = k if k.stride(2) == 1 else k.contiguous()
    index = q.float().contiguous(), k, weights.contiguous(), scale
    keys = torch.empty(B, T, min(topk, S), dtype=torch.int32)
    real = real_keys(visible, B)
    run = _one_query if T == 1 and visible.documents is None else _all_queries
    run(lib, *index, visible, real, keys, scores)
    return keys


def real_keys(visible: Visibility, B: int) -> torch.Tensor | None:
    """[B, S] bool, False at padding; None if there is none."""
    return None if visible.key_mask is None else visible.key_mask.expand(B, visible.keys).contiguous()


def first_keys(visible: Visibility, B: int) -> torch.Tensor | list[None]:
    """int32 [B, T], where each query's document begins; a None for each row if there is but one."""
    if visible.documents is None:
        return [None] * B
    documents = visible.documents.expand(B, visible.keys).contiguous()
    return torch.searchsorted(documents, documents[:, : visible.length].contiguous(), out_int32=True)


def pack(lib, k: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """k [B, S, D], a key's numbers side by side, in tiles (tile.h): uint8 [B, tiles, bytes]. real: see `real_keys`."""
    B, S, _ = k.shape
    tiles = torch.empty(B, -(-S // lib.dsa_tile_keys()), lib.dsa_tile_bytes(), dtype=torch.uint8)

    def some(b: int, start: int) -> None:
        stop, mask = min(start + PACKED, tiles.shape[1]), None if real is None else real[b]
        build.call(lib.dsa_pack, k[b], k.stride(1) * k.itemsize, mask, S, start, stop, tiles[b])

    threads.each(some, [(b, start) for b in range(B) for start in range(0, tiles.shape[1], PACKED)])
    return tiles


def _all_queries(lib, q, k, weights, scale, visible, real, keys, scores):
    """Keys are packed into tiles once, then slabs of queries run over them."""
    (B, T, topk), S = keys.shape, k.shape[1]
    first, tiles = first_keys(visible, B), pack(lib, k, real)
    cap = _capacity(topk, S, lib.dsa_tile_keys())

    def slab(b: int, start: int) -> None:
        stop, found = min(start + ROWS, T), None if scores is None else scores[b]
        scratch = _scratch(2 * lib.dsa_block() + 4, cap)
        build.call(
            *(lib.dsa_select, q[b], weights[b], scale, tiles[b], first[b], visible.offset),
            *(start, stop, topk, cap, keys[b], found, scratch),
        )

    threads.each(slab, [(b, start) for start in reversed(range(0, T, ROWS)) for b in range(B)])


def _one_query(lib, q, k, weights, scale, visible, real, keys, scores):
    """Decoding: keys are read where they are, by several threads, and what these found is merged."""
    (B, _, topk), S = keys.shape, k.shape[1]
    tile_keys, seen = lib.dsa_tile_keys(), visible.offset + 1
    parts = max(1, min(torch.get_num_threads() // max(1, B), seen // SPLIT))
    length = -(-seen // (parts * tile_keys)) * tile_keys
    cap = _capacity(topk, length, tile_keys)
    some_keys, some_scores = keys, scores
    if parts > 1:
        some_keys, some_scores = keys.new_empty(B, parts, topk), torch.empty(B, parts, topk)

    def run(start: int, stop: int) -> None:
        build.call(
            *(lib.dsa_select_one, q, weights, scale, k, k.stride(0) * k.itemsize, k.stride(1) * k.itemsize, real, S),
            *(visible.offset, parts, length, start, stop, topk, cap, some_keys, some_scores, _scratch(6, cap)),
        )

    threads.shares(run, B * parts, least=max(1, SPLIT // length))
    if parts > 1:
        scratch = _scratch(6, parts * topk)
        build.call(lib.dsa_merge, some_keys, some_scores, B, parts, topk, keys, scores, scratch)


def _capacity(topk: int, keys: int, tile_keys: int) -> int:
    """Of a query's list, filled before it is cut back to its k best: as seldom as the cache of a core allows."""
    return max(topk, min(keys, topk * (8 if topk <= 512 else 3))) + tile_keys


def _scratch(rows: int, cap: int) -> torch.Tensor:
    return torch.empty(rows, cap + 16)  # a vector of slack
