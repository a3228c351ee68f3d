"""How many values a model gives exactly, on the rows of dsa/data/recall.py: many questions in one forward pass."""

import torch
from transformers import PreTrainedModel

from dsa.data.recall import Row


@torch.no_grad()
def exact(model: PreTrainedModel, row: Row, start: int = 0) -> list[bool]:
    """Of each value that a row asks for, whether all of its tokens are the first choice, given the true ones before.

    Args:
        start: tokens to leave out at the beginning; `row.context` leaves the questions alone, which gives the floor of
            who does not see the context.
    """
    ids = torch.tensor([row.ids[start:]], device=model.device)
    at = torch.tensor([i - start for span in row.spans for i in range(*span)], device=model.device)
    # On a GPU in bfloat16: in float32 PyTorch's dense attention with grouped queries holds all scores, 60 GB at 32K
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, at - 1]
        right = (model.lm_head(hidden).argmax(-1) == ids[0, at]).cpu()  # of all values' tokens, one behind the other
    return [bool(part.all()) for part in right.split([end - start for start, end in row.spans])]
