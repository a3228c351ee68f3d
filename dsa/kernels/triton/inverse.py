"""The inverse of top-k indices: for every key the queries that selected it.

Gradients of keys are sums over queries. Atomics would add them in a different order on every run; here each sum has an
owner, which walks its list in order. Attention sinks are selected by every query, so lists are cut into chunks of equal
length: a program sums one chunk, and a second one the chunks of a key, in order again.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK = 256  # selections that one program sums
SUM_BLOCK = 16  # chunks that `_sum_chunks` adds at once


class InversePointers(NamedTuple):
    """Compressed sparse rows, by key. C, the number of chunk slots, is S + T * K / CHUNK: enough whatever was selected.

    entries: int [B, T * K], positions t * K + j of `indices`, by key and then by query.
    entry_start: int64 [B, S + 1]; key s was selected at entries[entry_start[s] : entry_start[s + 1]].
    chunk_start: int64 [B, S + 1]; the same for its chunks.
    chunk_key: int64 [B, C], the key of each chunk; S where the slot is not used.
    """

    entries: torch.Tensor
    entry_start: torch.Tensor
    chunk_start: torch.Tensor
    chunk_key: torch.Tensor


@dataclass(frozen=True)
class InverseIndex:
    pointers: InversePointers
    chunk: int  # selections in a full chunk
    slots: int  # C


def invert(indices: torch.Tensor, keys: int) -> InverseIndex:
    """`indices` int [B, T, K], -1 for none, over `keys` keys. O(T K log(T K)) time, O(T K + S) memory, no host sync."""
    B, T, K = indices.shape
    by_key, entries = indices.reshape(B, T * K).sort(dim=1, stable=True)
    edges = torch.arange(keys + 1, device=indices.device, dtype=indices.dtype).repeat(B, 1)
    entry_start = torch.searchsorted(by_key, edges)  # the entries before the first hold -1
    chunks = (entry_start.diff(dim=1) + CHUNK - 1) // CHUNK
    chunk_start = torch.nn.functional.pad(chunks.cumsum(1), (1, 0))
    slots = torch.arange(keys + T * K // CHUNK, device=indices.device).repeat(B, 1)
    chunk_key = torch.searchsorted(chunk_start, slots, right=True) - 1
    if T * K < 2**31:
        entries = entries.int()
    return InverseIndex(InversePointers(entries, entry_start, chunk_start, chunk_key), CHUNK, slots.shape[1])


@triton.jit
def chunk_bounds(inverse: InversePointers, b, slot, S, CHUNK: tl.constexpr):
    """(key, first entry, end): what chunk `slot` of batch row b sums; nothing where the slot is not used. The kernel's
    first grid axis runs over the slots."""
    key = tl.load(inverse.chunk_key + b * tl.num_programs(0) + slot)
    row = b * (S + 1) + tl.minimum(key, S - 1)
    first = tl.load(inverse.entry_start + row) + (slot - tl.load(inverse.chunk_start + row)) * CHUNK
    end = tl.minimum(first + CHUNK, tl.load(inverse.entry_start + row + 1))
    return key, first, tl.where(key < S, end, first)


def sum_chunks(partial: torch.Tensor, inverse: InverseIndex, dtype: torch.dtype) -> torch.Tensor:
    """Add up the chunks of each key in order: partial float32 [B, H, C, D] -> [B, H, S, D]."""
    B, H, C, D = partial.shape
    S = inverse.pointers.chunk_start.shape[1] - 1
    out = torch.empty(B, H, S, D, dtype=dtype, device=partial.device)
    block_d = triton.next_power_of_2(D)
    _sum_chunks[S, B * H](partial, inverse.pointers.chunk_start, out, S, C, H, D, block_d, SUM_BLOCK, num_warps=1)
    return out


@triton.jit
def _sum_chunks(partial, chunk_start, out, S, C, H, D, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    s = tl.program_id(0).to(tl.int64)
    bh = tl.program_id(1).to(tl.int64)
    row = (bh // H) * (S + 1) + s
    first, end = tl.load(chunk_start + row), tl.load(chunk_start + row + 1)
    cols = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_C):
        slot = start + tl.arange(0, BLOCK_C)
        mask = (slot < end)[:, None] & (cols < D)[None, :]
        total += tl.sum(tl.load(partial + (bh * C + slot)[:, None] * D + cols[None, :], mask=mask, other=0.0), 0)
    tl.store(out + (bh * S + s) * D + cols, total, mask=cols < D)
