"""Needles in a haystack: facts planted at known depths of a long text, each asked for at its end.

The tasks are RULER's single needle and multi-key needle (Hsieh et al. 2024, section 3.1): one fact in the text, or
several of the same form with other keys. Depth 0 is the start of the text, 1 its end. Only the tokens of the fact's
value are scored: the rest of an answer repeats the question.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dsa.data.rows import Conversation, encode, render
from dsa.evaluation.predictions import answer_spans
from dsa.evaluation.retrieval import Question, question
from dsa.modeling import DSAForCausalLM

# Frequent in any text, so that a small vocabulary has a token for each.
WORDS = [
    *("table", "index", "value", "path", "mode", "file", "name", "size", "state", "label", "group", "order", "level"),
    *("color", "item", "node", "line", "event", "task", "model", "layer", "token", "block", "field", "result", "query"),
    *("source", "target", "length", "offset"),
]
SENTENCE_END = re.compile(r"\n+|(?<=[.!?]) +|(?<=[。！？])(?![”’」』])")


@dataclass(frozen=True)
class Form:
    """How a fact stands in the text, is asked for and is answered; all but `places` have {key} or {value} or both."""

    fact: str  # with what sets it off from the text around it
    prompt: str  # {text}, and the question with {key}
    answer: str  # ends with {value}
    key: Callable[[random.Random], str]
    value: Callable[[random.Random], str]
    places: re.Pattern  # a fact may stand behind each match


# A look-up as the cpu profile's model was trained on it (dsa/data/corpus.py). Of the kinds of facts there, this is the
# one that dense attention copies best; reports/log.md has the others.
DOCSTRING = Form(
    fact='    def {key}(self):\n        """Return{value}."""\n',
    prompt="{text}\n\nWhat is the first line of the docstring of `{key}`?",
    answer="Return{value}",
    key=lambda rng: "_".join(rng.sample(WORDS, 2)),
    value=lambda rng: " " + " ".join(rng.sample(WORDS, 2)),
    places=re.compile(r"\n"),
)
# RULER's task in our words, for models that read prose.
SENTENCE = Form(
    fact="The code of the {key} locker is {value}. ",
    prompt="The text below says in passing what the code of a locker is.\n\n{text}\n\n"
    "What is the code of the {key} locker?",
    answer="The code of the {key} locker is {value}",
    key=lambda rng: "-".join(rng.sample(WORDS, 2)),
    value=lambda rng: str(rng.randrange(1_000_000, 10_000_000)),
    places=SENTENCE_END,
)


def facts(form: Form, text: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """`count` keys with values, no two alike, none of which stands in the text."""
    found: dict[str, str] = {}
    while len(found) < count:
        key, value = form.key(rng), form.value(rng)
        taken = [*found, *found.values()]
        if key not in taken and value not in taken and key.lower() not in text.lower() and value not in text:
            found[key] = value
    return list(found.items())


def row(tokenizer, form: Form, text: str, key: str, value: str, depth: float) -> Question:
    """A text that has its facts already, and the question for one of them."""
    prompt, answer = form.prompt.format(text=text, key=key), form.answer.format(key=key, value=value)
    rendered = render(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    (start, _) = rendered.answers[0]
    end = start + len(answer)
    (example,) = encode(tokenizer, [Conversation(rendered.text, [(end - len(value), end)])])
    (span,) = answer_spans(example["labels"])
    return Question(example["input_ids"], span, depth)


class Haystack:
    """A text, the places where a fact may stand in it, and the tokens before each."""

    def __init__(self, tokenizer, form: Form, text: str):
        self.tokenizer, self.form, self.text = tokenizer, form, text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [left for left, _ in encoded["offset_mapping"]]
        self.places = [0, *(m.end() for m in form.places.finditer(text))]
        self.tokens = []  # before each place
        at = 0
        for place in self.places:
            while at < len(starts) and starts[at] < place:
                at += 1
            self.tokens.append(at)

    def upto(self, tokens: int) -> int:
        """How many places there are within the first so many tokens."""
        return sum(t <= tokens for t in self.tokens)

    def planted(self, count: int, needles: list[tuple[str, str, float]]) -> str:
        """The text up to the place number `count` - 1, with each (key, value, depth) at the place nearest to it."""
        total, parts, before = self.tokens[count - 1], [], 0
        for key, value, depth in sorted(needles, key=lambda needle: needle[2]):
            place = self.places[min(range(count), key=lambda i: abs(self.tokens[i] - depth * total))]
            parts += [self.text[before:place], self.form.fact.format(key=key, value=value)]
            before = place
        return "".join([*parts, self.text[before : self.places[count - 1]]]).rstrip("\n")

    def rows(self, length: int, depths: Sequence[float], seed: object, *, many: bool) -> list[Question]:
        """A question for each depth, of at most `length` tokens and as many as whole lines (or sentences) give.

        Args:
            many: a fact at every depth at once (multi-key), else one at a time. A seed has the same facts at every
                length.

        The deepest comes first: rows that follow each other then share long beginnings, of which
        `dsa.evaluation.retrieval.score` makes use.
        Raises ValueError where the text is too short, the facts do not fit into the length, or a value's first token
        also holds what stands before it.
        """
        known = facts(self.form, self.text, len(depths) if many else 1, random.Random(str(seed)))
        needles = [(*fact, depth) for fact, depth in zip(known if many else known * len(depths), depths, strict=True)]
        needles.sort(key=lambda needle: -needle[2])
        if self.tokens[-1] < length:
            raise ValueError(f"needles: the text has {self.tokens[-1]} tokens, fewer than {length}")
        count = self.upto(length)
        while count > len(depths):
            texts = [self.planted(count, needles if many else [needle]) for needle in needles]
            items = [row(self.tokenizer, self.form, text, *needle) for text, needle in zip(texts, needles, strict=True)]
            excess = max(len(item.ids) for item in items) - length
            if excess <= 0:
                break
            count = min(count - 1, self.upto(self.tokens[count - 1] - excess))
        else:
            raise ValueError(f"needles: {len(depths)} places for {len(known)} facts do not fit into {length} tokens")
        for item, (_, value, _) in zip(items, needles, strict=True):
            if self.tokenizer.decode(item.ids[slice(*item.span)]) != value:
                raise ValueError(f"needles: {value!r} does not begin with a token of its own")
        return items


def published(tokenizer, rows: Iterable[dict]) -> Iterator[Question]:
    """Key-value retrieval from the rows of "Lost in the Middle": `ordered_kv_records`, `key`, `value`."""
    for record in rows:
        pairs = [tuple(pair) for pair in record["ordered_kv_records"]]
        at = [key for key, _ in pairs].index(record["key"])
        yield question(tokenizer, pairs, at / max(1, len(pairs) - 1))


@torch.no_grad()
def token_losses(model: DSAForCausalLM, ids: list[int], slab: int = 1024) -> torch.Tensor:
    """-log p of each token of a text but its first, float32 [L - 1]; logits of `slab` positions at a time, for those of
    32K tokens would be 20 GB with Qwen2.5's vocabulary."""
    x = torch.tensor([ids], device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.model(x[:, :-1], use_cache=False).last_hidden_state[0]
        parts = []
        for states, targets in zip(hidden.split(slab), x[0, 1:].split(slab), strict=True):
            logits = model.lm_head(states).float()
            parts.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(parts).cpu()
