"""The top-k selector, and the scores of the control arms that stand in for the indexer's.

V3.2 report, eq. 2: attention runs over the keys whose index score is among the k largest.
"""

from collections.abc import Callable

import numpy as np
import torch

from dsa.masks import Slab, Visibility

LOWEST = torch.iinfo(torch.int64).min
STRIDE = 64  # one score in so many is looked at to guess the k-th largest


class DeferredScores:
    """Scores [B, T, S] and their mask, too large to exist at once: computed a slab of queries at a time.

    Args:
        rows: computes the scores of a slab, float [B, queries, keys].
        visible: which keys a query may select.
        like: a tensor of B rows, on the device of the scores.
        heads: how many numbers the score of a query and a key takes while it is computed.
    """

    def __init__(self, rows: Callable[[Slab], torch.Tensor], visible: Visibility, like: torch.Tensor, heads: int):
        self.rows, self.visible, self.heads = rows, visible, heads
        self.batch, self.device = len(like), like.device

    def select(self, topk: int) -> torch.Tensor:
        """`select_topk` of all."""
        visible, width, chosen = self.visible, min(topk, self.visible.keys), []
        for slab in visible.slabs(self.batch, self.heads):
            mask = None if visible.sees_all(slab) else visible.mask(slab, self.device)
            if slab.keys <= topk:  # nothing to rank
                scores = torch.zeros((), device=self.device).expand(self.batch, slab.stop - slab.start, slab.keys)
            else:
                scores = self.rows(slab)
            keys = select_topk(scores, topk, mask)  # (B, C, K): C queries of the slab
            chosen.append(torch.nn.functional.pad(keys, (0, width - keys.shape[-1]), value=-1))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)


def select_topk(scores: torch.Tensor | DeferredScores, topk: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The keys with the largest scores of each query: exact, and bitwise the same on every call and device.

    Args:
        scores: float [B, T, S]; or deferred ones, which know their mask.
        topk: k; more than S keys are never returned.
        mask: bool, broadcastable to [B, T, S]; False forbids a key. A forbidden key loses even to a score of -inf.

    Returns:
        int32 [B, T, min(topk, S)]: key indices, ascending, then -1 where fewer than topk keys are allowed. Equal scores
        go to the lower index; NaN counts as -inf.
    """
    if topk < 1:
        raise ValueError(f"topk: {topk} is less than 1")
    if isinstance(scores, DeferredScores):
        return scores.select(topk)
    keys = scores.shape[-1]
    k = min(topk, keys)
    if k == keys:  # every allowed key is taken: nothing to rank
        index = torch.arange(keys, device=scores.device)  # (S)
        chosen = index if mask is None else torch.where(mask, index, keys)  # (S), or as the mask
        chosen = chosen.expand(scores.shape)  # (B, T, S), which here is (B, T, K)
    else:
        scores = scores.detach().float()
        if scores.shape[1] == 1 and scores.device.type == "cpu":
            masked = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            rows = [_row_topk(row, k) for row in masked[:, 0]]  # B of (K)
            if rows and all(row is not None for row in rows):
                return torch.stack(rows)[:, None]  # (B, 1, K)
        if mask is None:
            mask = scores.new_ones((), dtype=torch.bool)
        masked = scores.masked_fill(~mask, -torch.inf)
        values, chosen = masked.topk(k, dim=-1, sorted=False)  # (B, T, K)
        # `topk` may take any of the entries that tie with the smallest it took. Where it took them all, the set is
        # unique; elsewhere (and for NaN, or fewer than k allowed keys) rank by a key that no two entries share.
        ambiguous = (masked >= values.amin(-1, keepdim=True)).sum(-1) != k  # (B, T)
        if ambiguous.any():
            rows = mask.expand(scores.shape)[ambiguous]  # (N, S), the N ambiguous rows
            chosen[ambiguous] = _rank_topk(scores[ambiguous], k, rows)  # (N, K)
    chosen = ascending(chosen.int())
    return chosen.masked_fill(chosen == keys, -1)


def _row_topk(scores: torch.Tensor, k: int) -> torch.Tensor | None:
    """`select_topk` of one row, [S] -> int32 [k], for decoding on a CPU; None where fewer than k scores exceed -inf.

    The m-th largest of a sample bounds the k-th largest score from below, but for bad luck; the keys above it are few,
    in order, and hold all that tie with the k-th. With bad luck they are fewer than k, and all keys are ranked.
    NumPy has less to do around so few numbers than PyTorch.
    """
    scores = scores.numpy()
    expected = k / STRIDE  # of the k best, in the sample
    m = int(expected + 4 * expected**0.5) + 1
    candidates = None
    if 2 * m * STRIDE <= len(scores):
        bound = _largest(scores[::STRIDE], m)
        candidates = np.flatnonzero(scores >= bound)  # (keys that may be among the k), ascending
        if len(candidates) < k:
            candidates = None
        else:
            scores = scores[candidates]
    least = _largest(scores, k)
    if not least > -np.inf:  # or NaN
        return None
    chosen = np.flatnonzero(scores >= least)  # (k, and more where some tie with the k-th)
    surplus = len(chosen) - k
    if surplus:  # of the keys that tie with the last, those with the highest index go
        tied = np.flatnonzero(scores[chosen] == least)
        chosen = np.delete(chosen, tied[-surplus:])
    if candidates is not None:
        chosen = candidates[chosen]
    return torch.from_numpy(chosen.astype(np.int32))


def _largest(values: np.ndarray, n: int) -> np.floating:
    """The n-th largest; NaN if one is among the n, for NaN ranks above everything."""
    return np.partition(values, len(values) - n)[len(values) - n :].min()


def ascending(indices: torch.Tensor) -> torch.Tensor:
    """Sorted along the last dimension. NumPy sorts int32 ten times as fast as PyTorch does on a CPU."""
    if indices.device.type == "cpu":
        return torch.from_numpy(np.sort(indices.numpy(), axis=-1))
    return indices.sort(dim=-1).values


def _rank_topk(scores: torch.Tensor, k: int, mask: torch.Tensor) -> torch.Tensor:
    """[N, S] -> [N, k] unordered key indices, S where there is none, by unique int64 keys: exact whatever the ties.

    A key is the score's bits in integer order, then the reversed index. Adding 0.0 makes -0.0 and 0.0, which ReLU mixes
    freely, one value.
    """
    keys = scores.shape[-1]
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    bits = scores.contiguous().view(torch.int32)  # (N, S)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_index = torch.arange(keys - 1, -1, -1, device=scores.device)  # (S)
    rank = ((bits.long() << 32) | reversed_index).masked_fill(~mask, LOWEST)  # (N, S)
    top = rank.topk(k, dim=-1, sorted=False).values  # (N, K)
    return torch.where(top == LOWEST, keys, keys - 1 - (top & 0xFFFFFFFF))


def control_scores(name: str, queries: torch.Tensor, keys: int, sinks: int, layer_idx: int) -> torch.Tensor:
    """Scores [1, T, keys] of the control arms that look at positions only.

    Args:
        name: "window", "sink_window" or "random".
        queries: int [T], absolute positions of the queries.
        sinks: keys at the start that "sink_window" keeps.
        layer_idx: makes "random" differ from layer to layer.
    """
    key = torch.arange(keys, device=queries.device)  # (S)
    if name == "random":  # a hash of (layer, query, key): the same in prefill, in decoding and in every run
        mixed = (queries[:, None] * 2_654_435_761 + key * 2_246_822_519 + layer_idx * 3_266_489_917) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) & 0xFFFFFFFF  # (T, S)
        mixed = ((mixed ^ (mixed >> 13)) * 3_266_489_917) & 0xFFFFFFFF
        return (mixed >> 8).float()[None]
    score = key.float()  # (S)
    if name == "sink_window":
        score = torch.where(key < sinks, torch.inf, score)
    elif name != "window":
        raise ValueError(f"selector: {name!r} scores no positions")
    return score.expand(1, len(queries), keys)


def latest_keys(positions: torch.Tensor, topk: int, keys: int, sinks: int = 0) -> torch.Tensor:
    """What `select_topk` makes of the scores of "window", or with `sinks` of "sink_window", where all that is hidden
    from a query is what comes after it: int32 [1, T, min(topk, keys)], without a score for every key.

    Args:
        positions: int [T], absolute positions of the queries.
    """
    k = min(topk, keys)
    positions = positions.int()
    place = torch.arange(k, device=positions.device, dtype=torch.int32)  # (K)
    beyond = (positions[:, None] - (k - 1)).clamp(min=0)  # (T, 1), earlier keys than have a place
    chosen = place + beyond * (place >= sinks)  # (T, K)
    return chosen.masked_fill_(chosen > positions[:, None], -1)[None]
