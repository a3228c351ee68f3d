"""A model whose layers attend in different ways, and observers of single queries (studies/failures.py)."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dsa import DSAForCausalLM, index_scores, select_topk
from dsa.evaluation.predictions import predict
from dsa.masks import Slab, membership
from dsa.reference import MASKED, attention_logits, attention_target


@contextmanager
def sparse_in(model: DSAForCausalLM, layers: Iterable[int]) -> Iterator[None]:
    """Sparse attention in these layers and dense attention in all others, each layer with a config of its own."""
    layers = set(layers)
    attentions = [layer.self_attn for layer in model.model.layers]
    shared, mode = [attention.config for attention in attentions], model.config.attention_mode
    try:
        model.config.attention_mode = "dense"  # has the dense layers' mask made; sparse ones do not read it
        for i, attention in enumerate(attentions):
            attention.config = copy.deepcopy(model.config)
            attention.config.attention_mode = "sparse" if i in layers else "dense"
        yield
    finally:
        model.config.attention_mode = mode
        for attention, config in zip(attentions, shared, strict=True):
            attention.config = config


def losses(model: DSAForCausalLM, rows: list[dict], layers: Iterable[int]) -> np.ndarray:
    """-log p of each token of the rows but their first, one after the other, with sparse attention in these layers."""
    with sparse_in(model, layers):
        return torch.cat([predict(model, row["input_ids"]).nll for row in rows]).double().numpy()


class QueryStatistics:
    """Observer of a single row: each layer's attention on the selected keys and on the first keys, query by query.

    selected: [T], attention mass (mean of the heads) on the indexer's k keys. sink_mass: [Hq, T], mass on the first
    `sinks` keys. all, any, oracle_all: bool [T], whether the indexer's k keys, or the k best, hold those first keys.
    """

    def __init__(self, topk: int, sinks: int):
        self.topk, self.sinks = topk, sinks
        self.layers: list[dict[str, np.ndarray]] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        found: dict[str, list[torch.Tensor]] = {}
        for slab in visible.slabs(*q.shape[:2]):
            mask = visible.mask(slab, q.device)
            logits = attention_logits(q[:, :, slab.queries], k[:, :, : slab.keys], layer.scaling)
            p = logits.masked_fill_(~mask[:, None], MASKED).softmax(-1)[0]  # (Hq, T, S)
            mean = p.mean(0, keepdim=True)
            scores = index_scores(index[0][:, slab.queries], index[1][:, : slab.keys], index[2][:, slab.queries])
            ours, best = (membership(select_topk(x, self.topk, mask), slab.keys)[0] for x in (scores, mean))
            values = {
                "selected": (mean[0] * ours).sum(-1),
                "sink_mass": p[:, :, : self.sinks].sum(-1),
                "all": ours[:, : self.sinks].all(-1),
                "any": ours[:, : self.sinks].any(-1),
                "oracle_all": best[:, : self.sinks].all(-1),
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        self.layers.append({name: torch.cat(parts, dim=-1).cpu().numpy() for name, parts in found.items()})

    def missed(self) -> np.ndarray:
        """[T], the share of attention that is not on the selected keys, mean of the layers."""
        return 1 - np.mean([layer["selected"] for layer in self.layers], axis=0)


class MissedKeys:
    """Observer of a single row: of some queries, the keys with the most attention that the indexer does not select.

    layers: a dict a layer, {query: (mass of all missed keys, [(key, its mass), ...])}, the largest `count` of them.
    """

    def __init__(self, queries: Iterable[int], topk: int, count: int):
        self.queries, self.topk, self.count = list(queries), topk, count
        self.layers: list[dict[int, tuple[float, list[tuple[int, float]]]]] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        found = {}
        for t in self.queries:
            slab = Slab(t, t + 1, visible.keys)
            mask = visible.mask(slab, q.device)
            p = attention_target(q[:, :, slab.queries], k, mask, layer.scaling)[0, 0]
            scores = index_scores(index[0][:, slab.queries], index[1], index[2][:, slab.queries])
            missed = p.masked_fill(membership(select_topk(scores, self.topk, mask), slab.keys)[0, 0], 0.0)
            mass, keys = missed.topk(min(self.count, len(missed)))
            largest = [(key, x) for key, x in zip(keys.tolist(), mass.tolist(), strict=True) if x > 0]
            found[t] = missed.sum().item(), largest
        self.layers.append(found)
