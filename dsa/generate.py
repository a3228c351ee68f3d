"""Answers to a file of prompts: `python -m dsa.generate PATH PROMPTS.jsonl > ANSWERS.jsonl`.

A line has its prompt as `prompt` or `messages` (a text, or chat messages of which the last is the user's), or is an
instruction row as in dsa/data/rows.py, its `output` left out or ignored. Its answer is the same line with `generated`,
`generated_tokens` and `finished`: whether the model ended its turn. Lines that cannot be used are counted and named on
stderr.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import BadRow, first_of, messages_of, turns_of
from dsa.data.scan import parse


def load(path: str, topk: int | None = None) -> tuple[DSAForCausalLM, PreTrainedTokenizerBase]:
    """A model, at its own k or another, and its tokenizer, from a folder or a hub. Raises SystemExit, one line."""
    disable_progress_bar()
    try:
        model = load_model(path, **({"index_topk": topk} if topk else {}))
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0] if Path(path).is_dir() else "no such folder, and no such model on a hub"
        raise SystemExit(f"{path}: {why}") from None
    if not isinstance(model, DSAForCausalLM):
        raise SystemExit(f"{path}: {type(model).__name__} has no indexer: dsa.from_dense gives it one, to be trained")
    if not tokenizer.chat_template:
        raise SystemExit(f"{path}: its tokenizer has no chat template")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def ends(model: DSAForCausalLM, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: those of the model's generation config, and the tokenizer's own."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(i for i in (*named, tokenizer.eos_token_id) if i is not None))


def prompt_of(row: dict) -> list[dict]:
    """The chat messages that a row wants an answer to. Raises BadRow."""
    prompt = first_of(row, "messages", "prompt") if isinstance(row, dict) else None
    if prompt is None:
        return messages_of(row | {"output": "any"} if isinstance(row, dict) else row)[:-1]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else turns_of(prompt, "prompt")
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadRow("no prompt")
    return messages


def prompts(lines: Iterable[bytes], tokenizer, bad: list[str]) -> Iterator[tuple[dict, str]]:
    """Rows with their rendered prompts. Of each line that cannot be used, `bad` gets the number and the reason."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse(line)
            yield row, tokenizer.apply_chat_template(prompt_of(row), tokenize=False, add_generation_prompt=True)
        except (BadRow, TemplateError) as reason:
            bad.append(f"line {number}: {reason}")


def answers(model: DSAForCausalLM, tokenizer, texts: list[str], max_new_tokens: int) -> Iterator[dict]:
    """Those to a batch of rendered prompts, in their order."""
    kinds = {"add_special_tokens": False, "return_token_type_ids": False}
    inputs = tokenizer(texts, padding=True, return_tensors="pt", **kinds).to(model.device)
    stop = ends(model, tokenizer)
    pad = tokenizer.pad_token_id
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=pad)
    for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(ids) if token in stop), None)
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        count = len(ids) if end is None else end + 1
        yield {"generated": text, "generated_tokens": count, "finished": end is not None}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dsa.generate", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="of the model, or its name on a hub")
    parser.add_argument("prompts", type=Path, help="JSON lines")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    parser.add_argument("--topk", type=int, help="keys that a query attends to, by default as trained")
    asked = parser.parse_args(arguments)
    if not asked.prompts.is_file():
        raise SystemExit(f"{asked.prompts}: no such file")
    model, tokenizer = load(asked.path, asked.topk)
    bad, done = [], 0
    with asked.prompts.open("rb") as lines:
        rows = prompts(lines, tokenizer, bad)
        while batch := list(islice(rows, asked.batch_size)):
            texts = [text for _, text in batch]
            for (row, _), answer in zip(batch, answers(model, tokenizer, texts, asked.max_new_tokens), strict=True):
                print(json.dumps(row | answer, ensure_ascii=False), flush=True)
            done += len(batch)
    print(*bad, f"{done} prompts answered, {len(bad)} lines cannot be used", sep="\n", file=sys.stderr)
    if bad and not done:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
