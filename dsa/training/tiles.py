"""The language-model loss in tiles of tokens: the logits of a whole row are never there.

A row of 4096 tokens has 2.5 GB of float32 logits with Qwen2.5's vocabulary of 151,936, the largest tensor of a step,
twice with its gradient. PyTorch's `linear_cross_entropy` goes through the tokens in tiles and computes their logits
again in backward. On a CPU that takes three times as long (reports/log.md), and memory is not what is scarce there.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

LOGITS_BYTES = 2**30  # of a batch, in float32: below there is no need
DEVICES = ("cuda",)
TILE = 512  # tokens: large enough that reading the head's weights is not what takes the time


def worth_it(model: PreTrainedModel, tokens: int) -> bool:
    """Whether the logits of so many tokens are large, and nothing but a factor stands between the head and the loss."""
    large = 4 * tokens * model.config.vocab_size > LOGITS_BYTES and model.device.type in DEVICES
    return large and not getattr(model.config, "final_logit_softcapping", None)


@contextmanager
def tiled(model: PreTrainedModel) -> Iterator[None]:
    """A forward with labels computes its loss in tiles; its `logits` are the head's inputs, [B, T, hidden].

    It happens within the forward, where a sharded head is whole.
    """
    head, loss_function = model.lm_head, model.loss_function

    def in_tiles(
        logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None, ignore_index: int = -100, **kwargs
    ) -> torch.Tensor:
        """As transformers' loss of a causal language model, the sum over tokens divided by their number."""
        targets = F.pad(labels, (0, 1), value=ignore_index)[:, 1:].flatten()
        kept = targets != ignore_index
        hidden, weight, targets = logits.flatten(0, 1)[kept], head.weight, targets[kept]
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        options = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=TILE)
        # A sum would come in the dtype of the inputs: in bfloat16 it has three digits
        losses = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
        return losses.float().sum() / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    head.forward, model.loss_function = lambda hidden: hidden, in_tiles
    try:
        yield
    finally:
        del head.forward
        model.loss_function = loss_function


def tiled_if_large(model: PreTrainedModel, tokens: int) -> AbstractContextManager:
    """`tiled` where the logits of so many tokens make it worth it, else nothing."""
    return tiled(model) if worth_it(model, tokens) else nullcontext()
