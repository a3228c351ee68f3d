"""The indexer's KL in tiles: `dsa.losses.indexer_kl` without its slabs of size queries x keys.

Each head's softmax sums to one, so a tile of the target is p = mean_h exp(logit_h - LSE_h), whatever the other tiles
hold, and KL(p || softmax(I)) = sum p log p - sum p I + LSE_I. Hence two sweeps over the keys: the first for the LSEs
and the sums, the second for the gradient dI = softmax(I) - p, which goes on to index queries, keys and weights at once.
"""

import torch

from dsa.kernels import require
from dsa.kernels.triton.dense_kl import Spans, dense_gradients, dense_rows
from dsa.kernels.triton.sparse_kl import sparse_gradients, sparse_rows
from dsa.kernels.triton.views import same_dtype
from dsa.masks import Visibility

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # index queries, keys and weights


def kl_in_tiles(
    index: Index,
    q: torch.Tensor,
    k: torch.Tensor,
    scaling: float,
    visible: Visibility,
    indices: torch.Tensor | None,
    valid: torch.Tensor,
    wanted: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """For `dsa.losses.MeanLoss`: the sum of the losses of the `valid` [B, T] queries and, if `wanted`, its gradients.

    Memory beyond the gradients: O(T H), and in sparse training [B, T, K] while it runs.

    Raises:
        ValueError: the kernels cannot run on this device, type or head size, or `visible` is a whole [T, S] mask.
    """
    if visible.explicit is not None:
        raise ValueError("the indexer-loss kernels take key masks and documents, no explicit [B, 1, T, S] mask")
    q, k = same_dtype(q, k)
    require(q, q.shape[3])
    index = *same_dtype(*index[:2]), index[2]
    require(index[0], q.shape[3])
    with torch.cuda.device_of(q):  # Triton launches on the current device
        if indices is None:
            spans = query_spans(visible, valid)
            rows, lses = dense_rows(index, q, k, scaling, spans)
            grads = dense_gradients(index, q, k, scaling, spans, *lses) if wanted else ()
        else:
            indices = indices.masked_fill(~valid[..., None], -1)
            rows, d_scores = sparse_rows(index, q, k, scaling, indices)
            grads = sparse_gradients(index, indices, d_scores) if wanted else ()
    return rows.sum(), grads


def query_spans(visible: Visibility, valid: torch.Tensor) -> Spans:
    """The mask in O(B (T + S)) numbers; `valid` [B, T] are the queries that count."""
    B, T = valid.shape
    S = visible.keys
    starts = torch.zeros(B, S, dtype=torch.int32, device=valid.device)
    if visible.documents is not None:
        documents = visible.documents.expand(B, S).contiguous()
        ordered, order = documents.sort(dim=1, stable=True)  # of equal documents the first position comes first
        starts = order.gather(1, torch.searchsorted(ordered, documents)).int()
    query_start = starts[:, :T] if visible.documents is not None else starts.new_zeros(B, T)
    key_start = starts if visible.key_mask is None else starts.masked_fill(~visible.key_mask, -1)
    return Spans(query_start.masked_fill(~valid, S), key_start.contiguous(), T, S, visible.offset)
