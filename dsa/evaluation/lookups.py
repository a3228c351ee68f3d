"""Key-value retrieval: a JSON object of random keys and values, and the question what one key's value is.

The form is that of "Lost in the Middle" (Liu et al. 2023, section 3.1). Nothing but looking the key up helps, the
length is free, and the place of the pair is known: depth 0 is the start of the context, 1 its end.
"""

import json
import random
import uuid
from dataclasses import dataclass

import torch

from dsa.data.rows import encode, render
from dsa.evaluation.predictions import answer_spans
from dsa.modeling import Qwen2DSAForCausalLM

QUESTION = "Extract the value corresponding to the specified key in the JSON object below."


@dataclass(frozen=True)
class Lookup:
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


def lookup(tokenizer, records: list[tuple[str, str]], depth: float) -> Lookup:
    """Ask for the value of the pair at `depth`, 0 the first and 1 the last."""
    key, value = records[round(depth * (len(records) - 1))]
    (example,) = encode(tokenizer, [render(tokenizer, conversation(records, key, value))])
    ((start, end),) = answer_spans(example["labels"])
    return Lookup(example["input_ids"], (start, end - 1), depth)  # without the end of turn


def lookups(tokenizer, length: int, depths: int, rows: int, seed: int) -> list[Lookup]:
    """`rows` rows for each of `depths` places, of at most `length` tokens and nearly as many.

    Raises ValueError where not even `depths` pairs fit.
    """
    rng = random.Random(f"{seed}-{length}")

    def pairs(count: int) -> list[tuple[str, str]]:
        return [tuple(str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)) for _ in range(count)]

    found = []
    for _ in range(rows):
        records = pairs(max(depths, length // 20))  # a pair has more than 20 tokens with any tokenizer
        empty, whole = (len(lookup(tokenizer, records[:n], 0).ids) for n in (1, len(records)))
        count = int((length - empty) / (whole - empty) * (len(records) - 1)) + 1
        for place in range(depths):
            while count >= depths:
                item = lookup(tokenizer, records[:count], place / max(1, depths - 1))
                if len(item.ids) <= length:
                    break
                count -= 1
            else:
                raise ValueError(f"retrieval: {depths} pairs do not fit into {length} tokens")
            found.append(item)
    return found


@torch.no_grad()
def right_tokens(model: Qwen2DSAForCausalLM, item: Lookup) -> torch.Tensor:
    """Which tokens of the value are the model's first choice after the true ones before them: bool [end - start].

    Logits are computed there only: those of a whole row of 32K tokens would be 20 GB with Qwen2.5's vocabulary.
    """
    start, end = item.span
    ids = torch.tensor([item.ids[:end]], device=model.device)
    at = torch.arange(start - 1, end - 1, device=model.device)
    # On a GPU in bfloat16: in float32 PyTorch's dense attention with grouped queries holds all scores, 60 GB at 32K.
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        logits = model(ids, use_cache=False, logits_to_keep=at).logits[0]
    return logits.argmax(-1).cpu() == ids[0, start:].cpu()
