"""Questions for a value that stands in the context, one a row, and how well a model gives it.

Key-value retrieval in the form of "Lost in the Middle" (Liu et al. 2023, section 3.1): a JSON object of keys and
values, and the question what one key's value is. Depth 0 is the start of the context, 1 its end.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from dsa.data.rows import encode, render
from dsa.evaluation.predictions import answer_spans
from dsa.modeling import DSAForCausalLM

QUESTION = "Extract the value corresponding to the specified key in the JSON object below."


@dataclass(frozen=True)
class Question:
    """A row's token ids, [start, end) of the value in them, and where the pair stands: 0 first, 1 last."""

    ids: list[int]
    span: tuple[int, int]
    depth: float


def conversation(records: list[tuple[str, str]], key: str, value: str) -> list[dict]:
    """Chat messages; the pairs are written one a line, as published."""
    data = json.dumps(dict(records)).replace('", "', '",\n "')
    return [
        {"role": "user", "content": f'{QUESTION}\n\nJSON data:\n{data}\n\nKey: "{key}"\nCorresponding value:'},
        {"role": "assistant", "content": value},
    ]


def question(tokenizer, records: list[tuple[str, str]], depth: float) -> Question:
    """Ask for the value of the pair at `depth`, 0 the first and 1 the last."""
    key, value = records[round(depth * (len(records) - 1))]
    (example,) = encode(tokenizer, [render(tokenizer, conversation(records, key, value))])
    ((start, end),) = answer_spans(example["labels"])
    return Question(example["input_ids"], (start, end - 1), depth)  # without the end of turn


def common(a: list[int], b: list[int]) -> int:
    """How many elements two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def score(model: DSAForCausalLM, items: Iterable[Question]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each value's tokens, given the true ones before: whether it is the first choice (bool [n]), and its loss
    (float32 [n], nats).

    Logits are computed there only: those of a row of 32K tokens would be 20 GB with Qwen2.5's vocabulary. A row that
    shares most of its beginning with the one before it goes on from that one's cache; where less is shared it is run
    anew, for queries that go on from a cache need a mask of all keys, which at 32K tokens is half a GB even for half of
    the row.
    """
    found, cache, seen = [], None, []
    for item in items:
        start, end = item.span
        ids = item.ids[: end - 1]  # the last token of the value is predicted and predicts nothing
        shared = min(common(seen, ids), start - 1)
        if cache is None or 2 * shared < len(ids):
            cache, shared = DynamicCache(config=model.config), 0
        elif shared < len(seen):
            cache.crop(shared - len(seen))
        at = torch.arange(start - 1, end - 1, device=model.device)
        # On a GPU in bfloat16: in float32 PyTorch's dense attention with grouped queries holds all scores, 60 GB at 32K
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            x = torch.tensor([ids[shared:]], device=model.device)
            logits = model(x, past_key_values=cache, use_cache=True, logits_to_keep=at - shared).logits[0].float()
        seen = ids
        value = torch.tensor(item.ids[start:end], device=model.device)
        nll = torch.nn.functional.cross_entropy(logits, value, reduction="none")
        found.append(((logits.argmax(-1) == value).cpu(), nll.cpu()))
    return found
