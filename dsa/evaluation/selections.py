"""Which keys each layer selected for each query, what its attention wanted, and what of that was missed."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsa.masks import membership
from dsa.modeling import DSAForCausalLM
from dsa.reference import attention_target


@dataclass
class LayerSelection:
    """Of T queries and as many keys; R is 1, or with `index_per_kv_head` a row for each key-value head.

    indices: int32 [R, T, K], the selected keys, -1 for none.
    wanted: int32 [R, T, N], the keys that attention to all of them gives most to (heads averaged), -1 for none.
    mass: float32 [R, T, N], how much it gives to each of those, 0 where there is none.
    missed: float32 [R, T], how much it gives to keys that were not selected.
    """

    indices: torch.Tensor
    wanted: torch.Tensor
    mass: torch.Tensor
    missed: torch.Tensor


class Selections:
    """Observer of a model in sparse mode: a `LayerSelection` of each layer, with N = `entries`."""

    def __init__(self, entries: int):
        self.entries = entries
        self.layers: list[LayerSelection] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        if indices is None:
            raise ValueError("attention_mode: dense attention selects nothing to look at")
        B, Hq = q.shape[:2]
        parts = []
        for slab in visible.slabs(B, Hq):
            mask = visible.mask(slab, q.device)
            p = attention_target(q[:, :, slab.queries], k[:, :, : slab.keys], mask, layer.scaling)  # (R, C, S)
            mass, wanted = p.masked_fill(~mask, -1.0).topk(min(self.entries, slab.keys))  # (R, C, N) each
            wanted, mass = wanted.int().masked_fill(mass < 0, -1), mass.clamp(min=0)
            missed = (p * ~membership(indices[:, slab.queries], slab.keys)).sum(-1)  # (R, C)
            room = (0, self.entries - wanted.shape[-1])
            parts.append((F.pad(wanted, room, value=-1), F.pad(mass, room), missed))
        wanted, mass, missed = (torch.cat(part, dim=1).cpu() for part in zip(*parts, strict=True))
        self.layers.append(LayerSelection(indices.cpu(), wanted, mass, missed))


@torch.no_grad()
def selections(model: DSAForCausalLM, ids: list[int], entries: int) -> tuple[list[LayerSelection], torch.Tensor]:
    """What each layer selected on one row, and the logits [L, vocabulary]."""
    observer = Selections(entries)
    logits = model(torch.tensor([ids], device=model.device), observer=observer, use_cache=False).logits[0]
    return observer.layers, logits.float().cpu()
