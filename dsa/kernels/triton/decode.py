"""Decoding: one query a row leaves most of a GPU idle, so several programs share its keys and a second kernel merges.

Every program returns the output over its own keys and the log of its softmax's denominator (LSE); the merged output is
the mean of the parts weighted by exp(LSE).
"""

import torch
import triton
import triton.language as tl

TARGET_PROGRAMS = 256  # about two for each multiprocessor of a Hopper GPU


def split_count(programs: int, blocks: int) -> int:
    """Into how many parts to split the `blocks` key blocks of a query when `programs` programs take no split."""
    return max(1, min(blocks, TARGET_PROGRAMS // max(1, programs)))


def merge(parts: torch.Tensor, lses: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """parts float32 [N, B, T, H, D], lses float32 [N, B, T, H] -> [B, T, H, D] in dtype, and the LSE of the whole."""
    N, B, T, H, D = parts.shape
    out, lse = torch.empty_like(parts[0], dtype=dtype), torch.empty_like(lses[0])
    _merge[(B * T * H,)](parts, lses, out, lse, N, B * T * H, D, triton.next_power_of_2(N))
    return out, lse


@triton.jit
def _merge(parts, lses, out, lse, N, ROWS, D: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_N).to(tl.int64)
    cols = tl.arange(0, D)
    part_lse = tl.load(lses + part * ROWS + row, mask=part < N, other=float("-inf"))
    top = tl.max(part_lse, 0)
    weight = tl.exp(part_lse - tl.where(top == float("-inf"), 0.0, top))
    at = (part * ROWS + row)[:, None] * D + cols[None, :]
    values = tl.load(parts + at, mask=(part < N)[:, None], other=0.0)
    total = tl.sum(weight, 0)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(out + row * D + cols, tl.sum(weight[:, None] * values, 0) / total)
    tl.store(lse + row, tl.where(some, top + tl.log(total), float("-inf")))
