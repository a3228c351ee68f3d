"""What a model predicts on held-out rows, and what its indexer selects against what attention wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dsa.config import DSAConfig
from dsa.data.rows import IGNORE
from dsa.indexer import index_scores
from dsa.masks import Slab, membership
from dsa.modeling import AttentionObserver, DSAForCausalLM
from dsa.reference import attention_target
from dsa.selector import select_topk


@dataclass
class RowPredictions:
    """Teacher-forced predictions of one row; entry i is about token i + 1.

    nll: float32 [L - 1], -log p of the true token. argmax: int64 [L - 1], the likeliest token.
    """

    nll: torch.Tensor
    argmax: torch.Tensor


@torch.no_grad()
def predict(model: DSAForCausalLM, ids: list[int]) -> RowPredictions:
    """One row, without padding, in the model's own precision."""
    x = torch.tensor([ids], device=model.device)
    logits = model(x, use_cache=False).logits[0, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="none")
    return RowPredictions(nll.cpu(), logits.argmax(-1).cpu())


@torch.no_grad()
def greedy(model: DSAForCausalLM, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What the model answers to a prompt, up to the end that its generation config names."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()


def answer_spans(labels: list[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of labels that are no IGNORE."""
    spans, start = [], None
    for i, label in enumerate([*labels, IGNORE]):
        if label != IGNORE and start is None:
            start = i
        elif label == IGNORE and start is not None:
            spans.append((start, i))
            start = None
    return spans


def evidence_distance(pieces: list[str], span: tuple[int, int]) -> int | None:
    """Tokens between an answer and the nearest earlier place where the same text stands; None where it does not.

    Args:
        pieces: the text of each token of the row. Texts are compared, not ids: the same line is cut into other tokens
            where it is indented or ends in a line break.
        span: [start, end) of the answer, the last token its end of turn.
    """
    start, end = span
    wanted = "".join(pieces[start : end - 1]).strip()
    before = "".join(pieces[:start])
    at = before.rfind(wanted) if wanted else -1
    if at < 0:
        return None
    left = before[:at]
    position = length = 0
    while length + len(pieces[position]) <= len(left):
        length += len(pieces[position])
        position += 1
    return start - position


def correct(predictions: RowPredictions, ids: list[int], span: tuple[int, int]) -> torch.Tensor:
    """Which tokens of an answer, its end of turn included, are the model's first choice: bool [end - start].

    If all are, greedy decoding from the true prompt gives the whole answer: it follows the true answer as long as every
    argmax is right, so teacher forcing decides the exact match exactly.
    """
    start, end = span
    return predictions.argmax[start - 1 : end - 1] == torch.tensor(ids[start:end])


class SelectionStatistics:
    """Observer: per layer, how much of dense attention the top-k keys hold, and how many of the best k they are.

    mass: attention mass on the k keys with the largest index scores; oracle_mass: on the k best keys;
    recall: the share of the k best keys among the selected. Means over the queries that see more than k keys; 1 where
    there are none, for they select all that they see.
    """

    def __init__(self, topk: int):
        self.topk = topk
        self.layers: list[dict[str, float]] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        B, Hq = q.shape[:2]
        sums = dict.fromkeys(("mass", "oracle_mass", "recall"), 0.0)
        count = 0
        for slab in visible.slabs(B, Hq):
            mask = visible.mask(slab, q.device)
            p = attention_target(q[:, :, slab.queries], k[:, :, : slab.keys], mask, layer.scaling)
            rows = mask.sum(-1).expand(B, -1) > self.topk
            if not rows.any():
                continue
            scores = index_scores(index[0][:, slab.queries], index[1][:, : slab.keys], index[2][:, slab.queries])
            ours = membership(select_topk(scores, self.topk, mask), slab.keys)
            best = membership(select_topk(p, self.topk, mask), slab.keys)
            sums["mass"] += (p * ours).sum(-1)[rows].sum().item()
            sums["oracle_mass"] += (p * best).sum(-1)[rows].sum().item()
            sums["recall"] += ((ours & best).sum(-1) / self.topk)[rows].sum().item()
            count += rows.sum().item()
        self.layers.append({name: total / count if count else 1.0 for name, total in sums.items()})


@contextmanager
def changed(config: DSAConfig, **fields) -> Iterator[None]:
    """Other values of a config's fields, for as long as it is held."""
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@torch.no_grad()
def observe_dense(model: DSAForCausalLM, ids: torch.Tensor, observer: AttentionObserver) -> None:
    """Show an observer the model on ids [B, L] under dense attention, whatever its mode."""
    training = model.training
    model.eval()
    try:
        with changed(model.config, attention_mode="dense"):
            model.model(ids, observer=observer, use_cache=False)
    finally:
        model.train(training)


def attention_mass(model: DSAForCausalLM, ids: torch.Tensor, topk: int) -> dict[str, list[float]]:
    """`SelectionStatistics` of ids [B, L]: each of its names with a number a layer."""
    statistics = SelectionStatistics(topk)
    observe_dense(model, ids, statistics)
    return {name: [layer[name] for layer in statistics.layers] for name in statistics.layers[0]}


class Heatmap:
    """Observer: what a layer's attention wanted (p) and its indexer offers (softmax of the scores), last queries."""

    def __init__(self, layer_idx: int, queries: int):
        self.layer_idx, self.queries = layer_idx, queries
        self.wanted = self.offered = None

    def observe(self, layer, index, q, k, visible, indices) -> None:
        if layer.layer_idx != self.layer_idx:
            return
        slab = Slab(max(0, visible.length - self.queries), visible.length, visible.keys)
        mask = visible.mask(slab, q.device)
        self.wanted = attention_target(q[:, :, slab.queries], k, mask, layer.scaling)[0]
        scores = index_scores(index[0][:, slab.queries], index[1], index[2][:, slab.queries])
        self.offered = scores.masked_fill(~mask, -torch.inf).softmax(-1)[0]
