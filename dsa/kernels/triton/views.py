"""What kernels get for a tensor of any strides."""

from typing import NamedTuple

import torch


class View(NamedTuple):
    """A kernel reads `data` as a pointer."""

    data: torch.Tensor
    strides: tuple[int, ...]


def view(x: torch.Tensor) -> View:
    return View(x, x.stride())


def same_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Promote to one type: under autocast a layer norm leaves float32 beside a projection's bfloat16."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype) for x in tensors]
