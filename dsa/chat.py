"""Talk to a model: `python -m dsa.chat PATH`. A line is a turn; Ctrl-D, Ctrl-C or the end of a pipe ends the talk.

Under each answer stands how fast it came and how many keys a token's attention read of those that were there (the
indexer scores them all). With `--beside`, dense attention of the same weights answers too; DSA's answer goes on.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from transformers import DynamicCache, TextStreamer

from dsa.evaluation.predictions import changed
from dsa.generate import ends, load

NAMES = {"indexer": "DSA"}  # of selectors; the others are called what they are


class Meter(TextStreamer):
    """Prints an answer as it comes, and keeps the time of each of its tokens."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times = [time.monotonic()]

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.monotonic())
        super().put(value)


class Speaker:
    """One way to attend, and what it has in its cache of the talk so far.

    Args:
        changes: of the model's config.
    """

    def __init__(self, model, tokenizer, max_new_tokens: int, **changes):
        self.model, self.tokenizer, self.max_new_tokens, self.changes = model, tokenizer, max_new_tokens, changes
        self.seen: list[int] = []
        self.cache = DynamicCache(config=model.config)

    @property
    def name(self) -> str:
        config = self.model.config
        mode = self.changes.get("attention_mode", config.attention_mode)
        return "dense attention" if mode == "dense" else NAMES.get(config.selector, config.selector)

    def answer(self, messages: list[dict]) -> str:
        """Print the answer to the talk so far, then its speed on stderr, and return it."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.forget(ids)
        meter, given = Meter(self.tokenizer), torch.tensor([ids], device=self.model.device)
        with changed(self.model.config, **self.changes):
            out = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                past_key_values=self.cache,
                streamer=meter,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=ends(self.model, self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        self.seen = out[0].tolist()
        print(self.speed(meter.times, len(ids)), file=sys.stderr, flush=True)
        return self.tokenizer.decode(self.seen[len(ids) :], skip_special_tokens=True)

    def forget(self, ids: list[int]) -> None:
        """Leave in the cache what these ids begin with, but for the last, whose logits are wanted."""
        pairs = zip(self.seen, ids[:-1], strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.seen), len(ids) - 1))
        if extra := max(0, self.cache.get_seq_length() - same):
            self.cache.crop(-extra)

    def speed(self, times: list[float], prompt: int) -> str:
        """Of an answer to a prompt of so many tokens; `times` are its start and those of its tokens, in seconds."""
        tokens, k = len(times) - 1, self.model.config.index_topk
        there = [prompt + i for i in range(tokens)]
        read = there if self.name == "dense attention" else [min(k, keys) for keys in there]
        parts = [f"{self.name}: {tokens} tokens, the first after {times[1] - times[0]:.2f} s"]
        if tokens > 1:
            parts.append(f"then {(tokens - 1) / (times[-1] - times[1]):.1f} tokens/s")
        parts.append(f"each read {sum(read) / tokens:,.0f} of {sum(there) / tokens:,.0f} keys")
        return f"[{', '.join(parts)}]"


def turns(context: str) -> Iterator[str]:
    """What the user says, a line each; the context comes before the first."""
    with suppress(EOFError):
        while True:
            line = input("\n> " if sys.stdin.isatty() else "")
            if line.strip():
                yield context + line
                context = ""


def talk(speakers: list[Speaker], context: str) -> None:
    """All answer each turn; the first one's answers are what the talk goes on from."""
    messages: list[dict] = []
    for turn in turns(context):
        messages.append({"role": "user", "content": turn})
        said = []
        for speaker in speakers:
            if len(speakers) > 1:
                print(f"{speaker.name}:")
            said.append(speaker.answer(messages))
        messages.append({"role": "assistant", "content": said[0]})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dsa.chat", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="of the model, or its name on a hub")
    parser.add_argument("--beside", action="store_true", help="dense attention of the same weights answers too")
    parser.add_argument("--context", type=Path, metavar="FILE", help="a text that comes before the first question")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--topk", type=int, help="keys that a query attends to, by default as trained")
    asked = parser.parse_args(arguments)
    if asked.context and not asked.context.is_file():
        raise SystemExit(f"{asked.context}: no such file")
    context = asked.context.read_text(encoding="utf-8") + "\n\n" if asked.context else ""
    model, tokenizer = load(asked.path, asked.topk)
    speakers = [Speaker(model, tokenizer, asked.max_new_tokens)]
    if asked.beside:
        speakers.append(Speaker(model, tokenizer, asked.max_new_tokens, attention_mode="dense"))
    with suppress(KeyboardInterrupt):
        talk(speakers, context)


if __name__ == "__main__":
    main()
