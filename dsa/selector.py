"""The top-k selector, and the scores of the control arms that stand in for the indexer's.

V3.2 report, eq. 2: attention runs over the keys whose index score is among the k largest.
"""

import torch

LOWEST = torch.iinfo(torch.int64).min


def select_topk(scores: torch.Tensor, topk: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The keys with the largest scores of each query: exact, and bitwise the same on every call and device.

    Args:
        scores: float [B, T, S].
        topk: k; more than S keys are never returned.
        mask: bool, broadcastable to [B, T, S]; False forbids a key. A forbidden key loses even to a score of -inf.

    Returns:
        int32 [B, T, min(topk, S)]: key indices, ascending, then -1 where fewer than topk keys are allowed. Equal scores
        go to the lower index; NaN counts as -inf.
    """
    if topk < 1:
        raise ValueError(f"topk: {topk} is less than 1")
    keys = scores.shape[-1]
    k = min(topk, keys)
    index = torch.arange(keys, device=scores.device)
    if k == keys:  # every allowed key is taken: nothing to rank
        chosen = index if mask is None else torch.where(mask, index, keys)
        chosen = chosen.expand(scores.shape)
    else:
        # One int64 key that no two entries share: the score's bits in integer order, then the reversed index. Any
        # top-k algorithm gives the same set for it. Adding 0.0 makes -0.0 and 0.0, which ReLU mixes freely, one value.
        scores = scores.detach().float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
        bits = scores.contiguous().view(torch.int32)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        rank = (bits.long() << 32) | (keys - 1 - index)
        if mask is not None:
            rank = rank.masked_fill(~mask, LOWEST)
        top = rank.topk(k, dim=-1, sorted=False).values
        chosen = torch.where(top == LOWEST, keys, keys - 1 - (top & 0xFFFFFFFF))
    chosen = chosen.int().sort(dim=-1).values
    return chosen.masked_fill(chosen == keys, -1)


def control_scores(name: str, queries: torch.Tensor, keys: int, sinks: int, layer_idx: int) -> torch.Tensor:
    """Scores [1, T, keys] of the control arms that look at positions only.

    Args:
        name: "window", "sink_window" or "random".
        queries: int [T], absolute positions of the queries.
        sinks: keys at the start that "sink_window" keeps.
        layer_idx: makes "random" differ from layer to layer.
    """
    key = torch.arange(keys, device=queries.device)
    if name == "random":  # a hash of (layer, query, key): the same in prefill, in decoding and in every run
        mixed = (queries[:, None] * 2_654_435_761 + key * 2_246_822_519 + layer_idx * 3_266_489_917) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 15)) * 2_246_822_519) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 3_266_489_917) & 0xFFFFFFFF
        return (mixed >> 8).float()[None]
    score = key.float()
    if name == "sink_window":
        score = torch.where(key < sinks, torch.inf, score)
    elif name != "window":
        raise ValueError(f"selector: {name!r} scores no positions")
    return score.expand(1, len(queries), keys)
