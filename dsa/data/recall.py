"""Rows that can only be solved by reaching back: pairs, tables, copies and needles, new ones for every seed.

The base model of this repository is pre-trained on them beside text (stages/pretrain.py), and the same forms, with keys
and values of other seeds, are what retrieval is measured with. Everything is token ids, so that a value is the same
tokens in the fact and in the answer. What a row teaches is its weights: 0 where a token cannot be known.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

PAIRS = ('"', '": "', '",\n')  # the form that `pairs_row` asks for: JSON, the question repeats the fact
NEEDLE = ("    # note:", " is", ".\n")  # that of `needles_row`
FORMS = [  # what stands before a key, between key and value, and behind
    *(PAIRS, ("", " = ", "\n"), ("", ": ", "\n"), ("", " -> ", "\n"), ("- ", " is ", ".\n"), ("    '", "': '", "',\n")),
    *(("", "", ""), ("", " ", "\n"), ("| ", " | ", " |\n"), ("def ", "(): return ", "\n"), ("set ", " to ", "; ")),
    *(("(", ", ", "), "), ("", ",", "\n"), ("", ":", " "), ("<", ">", "</a>\n"), ("x[", "] = ", "\n")),
]
FACTS = [
    *(
        NEEDLE,
        ("_", " = ", "  # constant\n"),
        ("    def", "(self):\n        return", "\n"),
        ("The code of", "is", ".\n"),
    ),
    *(('    set_option("', '", "', '")\n'), ("# TODO(", "): ", "\n"), ("        self.", " = ", "\n")),
    *(
        ("class", "(", ")\n"),
        ('register("', '", "', '")\n'),
        ("We met", "in", ".\n"),
        ("Remember that", "means", ".\n"),
    ),
]
QUESTIONS = [
    *(('What is the value of "', '"? "', '".\n'), ("# ", " = ", "\n"), ("print(", ")  # ", "\n")),
    ("<|im_start|>user\nWhat is ", "?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"),
    *(("assert get(", ") == ", "\n"), (">>> ", "\n", "\n"), ("Q: ", "\nA: ", "\n")),
]
BREAKS = ["\n\n", "<|im_end|>\n", "\n---\n", "", "\n# questions\n", "<|endoftext|>"]  # between facts and questions


@dataclass
class Row:
    """Token ids, and of each its weight as a target. `spans` [start, end) are the values asked for, with `depths`;
    the questions begin at `context`, before which `facts` of their form are told."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    depths: list[float] = field(default_factory=list)
    context: int = 0
    facts: int = 0

    def add(self, ids: Sequence[int], weight: float = 0.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut(self, length: int) -> "Row":
        return Row(self.ids[:length], self.weights[:length], self.spans, self.depths)


class Recall:
    """Makes rows for one tokenizer.

    Args:
        text: int [N] token ids, from which needles get their haystacks and copies their passages.
    """

    def __init__(self, tokenizer, text: torch.Tensor):
        self.tokenizer, self.text = tokenizer, text
        strings = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        special = set(tokenizer.all_special_ids)
        self.whole = [i for i, s in enumerate(strings) if "\ufffd" not in s and i not in special]
        self.spaced = [i for i in self.whole if re.fullmatch(r" [A-Za-z]{2,}", strings[i])]
        self.words = [i for i in self.whole if re.fullmatch(r" ?[A-Za-z]{2,}", strings[i])]
        self.digits = [i for i in self.whole if re.fullmatch(r"[0-9]", strings[i])]
        self.line_ends = torch.tensor([s.endswith("\n") for s in strings])
        self.forms, self.facts, self.questions = (self.encoded(x) for x in (FORMS, FACTS, QUESTIONS))
        self.breaks = [self.encode(s) for s in BREAKS]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def encoded(self, forms: list[tuple[str, str, str]]) -> list[list[list[int]]]:
        return [[self.encode(part) for part in form] for form in forms]

    def snippet(self, rng: random.Random, length: int) -> list[int]:
        at = rng.randrange(len(self.text) - length)
        return self.text[at : at + length].tolist()

    def pairs(
        self, rng: random.Random, count: int, key_size=None, value_size=None, pool=None
    ) -> list[tuple[list[int], list[int]]]:
        """Distinct keys, with values; sizes (least, most) in tokens."""
        pools = [self.whole, self.words, self.spaced, self.digits]
        keys_from, values_from = (pool or rng.choices(pools, [45, 20, 20, 15])[0] for _ in range(2))
        key_size = key_size or rng.choice([(1, 1), (2, 2), (1, 2), (2, 3), (1, 3)])
        value_size = value_size or rng.choice([(1, 1), (1, 1), (2, 2), (1, 2), (1, 3), (3, 3)])
        if keys_from is self.digits:
            key_size = (3, 3) if count < 400 else (4, 4)
        elif key_size[0] == 1 and count > len(keys_from) // 3:
            key_size = (2, max(2, key_size[1]))
        found: dict[tuple[int, ...], list[int]] = {}
        while len(found) < count:
            key = tuple(rng.choices(keys_from, k=rng.randint(*key_size)))
            found.setdefault(key, rng.choices(values_from, k=rng.randint(*value_size)))
        return [(list(key), value) for key, value in found.items()]

    # ---- rows to learn from: each takes (rng, length, most keys)

    def stream(self, rng: random.Random, length: int, most: int) -> Row:
        """Entries with new keys or known ones; the value of a known key can be known."""
        before, between, behind = rng.choice(self.forms) if rng.random() < 0.7 else ([], [], [])
        share_new = rng.choice([0.2, 0.35, 0.5])
        pairs, used, row = self.pairs(rng, max(4, min(most, length // 4))), 0, Row()
        while len(row.ids) < length:
            new = used < 2 or (used < len(pairs) and rng.random() < share_new)
            key, value = pairs[used if new else rng.randrange(used)]
            used += new
            row.add(before + key + between)
            row.add(value, 0.0 if new else 1.0)
            row.add(behind)
        return row.cut(length)

    def table(self, rng: random.Random, length: int, most: int) -> Row:
        """All pairs, then questions in any order, in the form of the facts or in another."""
        form = rng.choice(self.forms)
        asked = form if rng.random() < 0.6 else rng.choice(self.questions)
        size = sum(map(len, form)) + 3
        pairs, row = self.pairs(rng, max(4, min(most, int(length * rng.uniform(0.3, 0.7) / size)))), Row()
        told = []
        for key, value in pairs:
            if len(row.ids) > 0.75 * length:
                break
            row.add(form[0] + key + form[1] + value + form[2])
            told.append((key, value))
        row.add(rng.choice(self.breaks))
        while len(row.ids) < length:
            for key, value in rng.sample(told, len(told)):
                row.add(asked[0] + key + asked[1])
                row.add(value, 1.0)
                row.add(asked[2])
        return row.cut(length)

    def copy(self, rng: random.Random, length: int, most: int) -> Row:
        """A passage, perhaps something else, and the passage again, whole or in pieces."""
        n = rng.randint(length // 8, length // 2 - 8)
        make = self.snippet if rng.random() < 0.5 else lambda rng, n: rng.choices(self.whole, k=n)
        passage, row = make(rng, n), Row()
        row.add(passage)
        if rng.random() < 0.33:
            row.add(make(rng, rng.randint(1, length - 2 * n + 1)))
        while len(row.ids) < length:
            start, end = 0, n
            if rng.random() < 0.5:
                start = rng.randrange(max(1, n - 16))
                end = min(n, start + rng.randint(16, 96))
            row.add(passage[start : start + 2])  # which piece it is
            row.add(passage[start + 2 : end], 1.0)
            if rng.random() < 0.3:
                row.add(rng.choice(self.breaks))
        return row.cut(length)

    def needles(self, rng: random.Random, length: int, most: int) -> Row:
        """Facts in a text, then questions for all of them; answers have half of the row's weight."""
        count = rng.choice([1, 2, 4] if length < 512 else [1, 2, 4, 8] if length < 2048 else [4, 8, 16])
        fact = rng.choice(self.facts)
        asked = fact if rng.random() < 0.6 else rng.choice(self.questions)
        row = self.planted(rng, length, self.pairs(rng, count), fact, asked, [rng.random() for _ in range(count)])
        answers = sum(end - start for start, end in row.spans)
        text = len(row.ids) - answers
        for start, end in row.spans:
            row.weights[start:end] = [text / answers] * (end - start)
        return row

    def planted(self, rng, length: int, pairs, fact, asked, depths: Sequence[float], repeat: bool = True) -> Row:
        """Each pair as a fact at the line end nearest to its depth, then the questions in any order."""
        order = rng.sample(range(len(pairs)), len(pairs)) * (2 if repeat and len(pairs) < 4 else 1)
        tail = Row()
        tail.add(rng.choice(self.breaks) if repeat else self.breaks[0])
        for i in order:
            tail.add(asked[0] + pairs[i][0] + asked[1])
            tail.spans.append((len(tail.ids), len(tail.ids) + len(pairs[i][1])))
            tail.depths.append(depths[i])
            tail.add(pairs[i][1] + asked[2])
        size = sum(len(part) for part in fact) * len(pairs) + sum(len(k) + len(v) for k, v in pairs)
        text = self.snippet(rng, length - len(tail.ids) - size)
        ends = (self.line_ends[torch.tensor(text)].nonzero()[:, 0] + 1).tolist() or [len(text)]
        row, before = Row(), 0
        places = sorted((min(ends, key=lambda e, d=d: abs(e - d * len(text))), i) for i, d in enumerate(depths))
        for place, i in places:
            row.add(text[before:place], 1.0)
            row.add(fact[0] + pairs[i][0] + fact[1] + pairs[i][1] + fact[2])
            before = place
        row.add(text[before:], 1.0)
        shift = len(row.ids)
        row.add(tail.ids)
        row.spans = [(start + shift, end + shift) for start, end in tail.spans]
        row.depths, row.context, row.facts = tail.depths, shift, len(pairs)
        return row

    def plain(self, rng: random.Random, length: int, most: int) -> Row:
        row = Row()
        row.add(self.snippet(rng, length), 1.0)
        return row

    @property
    def kinds(self) -> dict[str, Callable[[random.Random, int, int], Row]]:
        return {
            "stream": self.stream,
            "table": self.table,
            "copy": self.copy,
            "needles": self.needles,
            "text": self.plain,
        }

    # ---- rows to measure with: `questions` of them at evenly spaced depths, values and keys of two tokens

    @property
    def tests(self) -> dict[str, Callable[[object, int], Row]]:
        return {"pairs": self.pairs_row, "needles": self.needles_row}

    def pairs_row(self, seed: object, length: int, questions: int = 20) -> Row:
        """Pairs that fill the row but for its questions. Raises ValueError where these leave no room."""
        rng, form = random.Random(f"pairs-{seed}-{length}"), self.forms[0]
        size = sum(map(len, form)) + 4
        count = (length - questions * size - 2) // size
        if count < 1:
            raise ValueError(f"retrieval: {questions} questions do not fit into {length} tokens")
        pairs, row = self.pairs(rng, count, (2, 2), (2, 2), self.whole), Row()
        for key, value in pairs:
            row.add(form[0] + key + form[1] + value + form[2])
        row.context, row.facts = len(row.ids), count
        row.add(self.breaks[0])
        depths = [(i + 0.5) / questions for i in range(questions)]
        for depth in rng.sample(depths, questions):
            key, value = pairs[round(depth * (count - 1))]
            row.add(form[0] + key + form[1])
            row.spans.append((len(row.ids), len(row.ids) + 2))
            row.depths.append(depth)
            row.add(value + form[2])
        return row

    def needles_row(self, seed: object, length: int, facts: int = 10) -> Row:
        """Ten facts in a text, evenly spaced, all asked for."""
        rng, form = random.Random(f"needles-{seed}-{length}"), self.facts[0]
        pairs = self.pairs(rng, facts, (2, 2), (2, 2), self.whole)
        depths = [(i + 0.5) / facts for i in range(facts)]
        return self.planted(rng, length, pairs, form, form, depths, repeat=False)


def positions(rng: random.Random, length: int, far: int) -> torch.Tensor:
    """0 .. length - 1 with up to 16 jumps, so that the row spans up to `far` positions: a short row teaches far
    distances at the price of near ones. The span is drawn with more weight on long ones."""
    position = torch.arange(length)
    if far <= length:
        return position
    span = length * (far / length) ** (rng.random() ** 0.5)
    jumps = rng.choice([1, 2, 4, 8, 16])
    cuts = sorted(rng.sample(range(1, length), jumps))
    shares = sorted([0.0, *(rng.random() for _ in range(jumps - 1)), 1.0])
    for cut, (low, high) in zip(cuts, pairwise(shares), strict=True):
        position[cut:] += int((high - low) * (span - length))
    return position
