"""Which keys a query may see, as O(L) facts; a boolean mask exists for one slab of queries at a time.

Letters, here and below: B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SLAB_ELEMENTS = 2**24  # of the largest tensor of a slab, [B, H, queries, keys]: 64 MiB in float32


@dataclass(frozen=True)
class Slab:
    """Queries [start, stop) and the first `keys` keys, beyond which none of them sees anything."""

    start: int
    stop: int
    keys: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Visibility:
    """Query t (at position offset + t) sees key s if s <= offset + t, s is no padding and both are of one document.

    Args:
        length: T.
        keys: S, including cache slots that are not filled yet (causality hides them).
        offset: number of keys that came before the first query.
        key_mask: [B or 1, S] bool, False at padding; None if there is none.
        documents: [B or 1, S] document of each token, for packed rows without cache; None if there is one.
        explicit: [B or 1, 1, T, S] bool, True where a query sees a key; replaces all of the above.
        dense_mask: what transformers' own attention functions take for the same; unused in sparse mode.
    """

    length: int
    keys: int
    offset: int = 0
    key_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    explicit: torch.Tensor | None = None
    dense_mask: torch.Tensor | None = None

    @property
    def causal_only(self) -> bool:
        """Whether nothing but causality hides a key."""
        return self.explicit is None and self.key_mask is None and self.documents is None

    def repeat(self, times: int) -> "Visibility":
        """Of a batch in which each row comes so many times, one after the other. Masks of one row are for all rows."""
        masks = {name: getattr(self, name) for name in ("key_mask", "documents", "explicit")}
        rows = {name: m.repeat_interleave(times, dim=0) for name, m in masks.items() if m is not None and len(m) > 1}
        return replace(self, **rows)

    def slabs(self, batch: int, heads: int) -> Iterator[Slab]:
        """Slabs that cover all queries, few enough rows each that [batch, heads, rows, keys] stays small."""
        rows = max(16, min(256, SLAB_ELEMENTS // max(1, batch * heads * self.keys)))
        for start in range(0, self.length, rows):
            stop = min(start + rows, self.length)
            keys = self.keys if self.explicit is not None else min(self.keys, self.offset + stop)
            yield Slab(start, stop, keys)

    def sees_all(self, slab: Slab) -> bool:
        """Whether the mask is known to be all True without being made: one query, as in decoding, and no padding."""
        return slab.stop - slab.start == 1 and slab.keys <= self.offset + slab.stop and self.causal_only

    def mask(self, slab: Slab, device: torch.device) -> torch.Tensor:
        """[B or 1, queries, keys] bool, True where visible."""
        if self.explicit is not None:
            return self.explicit[:, 0, slab.queries, : slab.keys]
        position = torch.arange(slab.start, slab.stop, device=device) + self.offset
        mask = (torch.arange(slab.keys, device=device) <= position[:, None])[None]
        if self.key_mask is not None:
            mask = mask & self.key_mask[:, None, : slab.keys]
        if self.documents is not None:
            mask = mask & (self.documents[:, slab.queries, None] == self.documents[:, None, : slab.keys])
        return mask

    def is_query(self, batch: int, device: torch.device) -> torch.Tensor:
        """[B, T] bool: query positions that are real tokens; the others count in no loss."""
        if self.explicit is not None:
            own = torch.arange(self.length, device=device) + self.offset
            return self.explicit[:, 0, torch.arange(self.length, device=device), own].expand(batch, -1)
        if self.key_mask is not None:
            return self.key_mask[:, self.offset : self.offset + self.length].expand(batch, -1)
        return torch.ones(batch, self.length, dtype=torch.bool, device=device)


def membership(indices: torch.Tensor, keys: int) -> torch.Tensor:
    """[..., K] key indices, -1 for none -> [..., keys] bool, True at the selected keys."""
    mask = indices.new_zeros(*indices.shape[:-1], keys + 1, dtype=torch.bool)
    mask.scatter_(-1, indices.long() % (keys + 1), True)  # -1 goes to the extra column
    return mask[..., :keys]
