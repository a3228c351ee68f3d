"""The first usable rows of a data set, in one pass over its lines that stops as soon as there are enough.

`download` stops fetching by a scan and `filter` and `pairs` select by the same one, so the slice that was fetched is
certainly enough. Tokens are counted as training sees them, on the whole rendered conversation. Most rows of an
instruction data set are short, and a byte-level tokenizer never makes more tokens than there are bytes: rows with too
few bytes are not tokenised at all, the others in batches on all cores.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from dsa.data import IGNORE, BadRow, encode, messages_of, pair_of, render

BATCH = 1024  # rows a tokenizer call
BIN = 256  # tokens, of the length histogram


class TooManyBadRows(RuntimeError):
    """More rows than allowed could not be used; str() is the one line to show."""


class LeftOut(ValueError):
    """A sound row that is not wanted; the message is the reason."""


@dataclass(frozen=True)
class Kept:
    """A usable row: the number of its line, from 0, what was made of it, and its tokens."""

    number: int
    row: dict
    tokens: int


@dataclass
class Tally:
    """What a scan has seen so far. Nothing is lost: a line was kept, or it was left out, or it is a bad row."""

    scanned: int = 0
    kept: int = 0
    tokenised: int = 0
    bad: dict[str, list[int]] = field(default_factory=dict)  # line numbers by reason
    left_out: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)  # of the rows that were tokenised, by the lower edge of the bin

    @property
    def bad_rows(self) -> int:
        return sum(map(len, self.bad.values()))

    def summary(self) -> dict:
        return {
            "scanned": self.scanned,
            "kept": self.kept,
            "tokenised": self.tokenised,
            "left_out": dict(self.left_out.most_common()),
            "bad_rows": {reason: {"rows": len(n), "row_numbers": n} for reason, n in sorted(self.bad.items())},
            "length_histogram": {f"{low}-{low + BIN - 1}": self.lengths[low] for low in sorted(self.lengths)},
        }


def parse(line: bytes) -> dict:
    """A line's row. Raises BadRow with the reason."""
    try:
        row = json.loads(line.decode())
        if b"\\u" in line:  # an escape may be half a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("malformed JSON") from None
    return row


class Scan:
    """A pass over lines; a subclass says how a row is read (`prepare`) and whether it is wanted (`judge`).

    Args:
        tokenizer: with a byte-level vocabulary and a chat template.
        max_length: of a training row, in tokens.
        max_bad_rows: more rows than these that cannot be read end the pass with TooManyBadRows.

    `tally` says what the pass has seen; when the caller stops, it counts no further than the last row handed out.
    """

    def __init__(self, tokenizer, max_length: int, max_bad_rows: int):
        self.tokenizer, self.max_length, self.max_bad_rows = tokenizer, max_length, max_bad_rows
        self.tally = Tally()

    def __call__(self, lines: Iterable[bytes]) -> Iterator[Kept]:
        numbered = enumerate(lines)
        while batch := list(islice(numbered, BATCH)):
            prepared = []
            for number, line in batch:
                try:
                    prepared.append((number, self.prepare(parse(line))))
                except (BadRow, LeftOut) as reason:
                    prepared.append((number, reason))
            texts = [text for _, item in prepared if isinstance(item, tuple) for text in item[1]]
            counts = iter(self.count(texts))
            for number, item in prepared:
                self.tally.scanned += 1
                try:
                    if isinstance(item, Exception):
                        raise item
                    row, rendered = item
                    tokens = max((next(counts) for _ in rendered), default=0)
                    if rendered:
                        self.tally.tokenised += 1
                        self.tally.lengths[tokens // BIN * BIN] += 1
                    kept = self.judge(row, tokens)
                except LeftOut as reason:
                    self.tally.left_out[str(reason)] += 1
                except BadRow as reason:
                    self.tally.bad.setdefault(str(reason), []).append(number)
                    self.check_bad_rows()
                else:
                    self.tally.kept += 1
                    yield Kept(number, kept, tokens)

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        """A row and the texts whose tokens are to be counted, none where that is not needed. Raises BadRow, LeftOut."""
        raise NotImplementedError

    def judge(self, row: dict, tokens: int) -> dict:
        """What is kept of a row whose longest text has so many tokens. Raises BadRow, LeftOut."""
        raise NotImplementedError

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, as many as `dsa.data.encode` makes of it."""
        if not texts:
            return []
        backend = self.tokenizer.backend_tokenizer
        return [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def check_bad_rows(self) -> None:
        if self.tally.bad_rows > self.max_bad_rows:
            worst = sorted(self.tally.bad.items(), key=lambda item: -len(item[1]))
            reasons = "; ".join(f"{len(numbers)} {reason} (first: row {numbers[0]})" for reason, numbers in worst)
            raise TooManyBadRows(
                f"{self.tally.bad_rows} of the first {self.tally.scanned} rows cannot be read, more than "
                f"max_bad_rows = {self.max_bad_rows}: {reasons}"
            )


class LongRows(Scan):
    """Rows in deepctrl-sft-data's schema with more than `min_tokens` tokens and an answer within `max_length`."""

    def __init__(self, tokenizer, max_length: int, max_bad_rows: int, min_tokens: int):
        super().__init__(tokenizer, max_length, max_bad_rows)
        self.min_tokens = min_tokens
        self.frames: dict[int, int] = {}  # bytes that the chat template adds, by number of messages

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        messages = messages_of(row)
        if not self.may_be_long(messages):
            return row, []
        return row, [self.tokenizer.apply_chat_template(messages, tokenize=False)]

    def judge(self, row: dict, tokens: int) -> dict:
        if tokens <= self.min_tokens:
            raise LeftOut(f"not over {self.min_tokens} tokens")
        if tokens > self.max_length:  # training cuts on the right: is there an answer in what is left?
            (example,) = encode(self.tokenizer, [render(self.tokenizer, messages_of(row))], self.max_length)
            if all(label == IGNORE for label in example["labels"]):
                raise LeftOut(f"no answer within {self.max_length} tokens")
        return row

    def may_be_long(self, messages: list[dict]) -> bool:
        """False where the row has certainly no more than `min_tokens` tokens."""
        count, contents = len(messages), [m["content"] for m in messages]
        if count not in self.frames:
            empty = [message | {"content": ""} for message in messages]
            self.frames[count] = len(self.tokenizer.apply_chat_template(empty, tokenize=False).encode())
        room = self.min_tokens - self.frames[count]
        if 4 * sum(map(len, contents)) <= room:  # a character has at most four bytes: no need to encode
            return False
        if not all(unicodedata.is_normalized("NFC", text) for text in contents):
            return True  # the tokenizer composes characters first, which can lengthen a text: no bound
        return sum(len(text.encode()) for text in contents) > room


class Pairs(Scan):
    """Preference pairs whose longer conversation fits into `max_length`, of the given `domains` (all of them: None)."""

    def __init__(self, tokenizer, max_length: int, max_bad_rows: int, domains: list[str] | None = None):
        super().__init__(tokenizer, max_length, max_bad_rows)
        self.domains = domains

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        pair = pair_of(row)
        if self.domains is not None and row.get("domain") not in self.domains:
            raise LeftOut("another domain")
        chosen, rejected = (pair[answer][0]["content"] for answer in ("chosen", "rejected"))
        if not chosen.strip() or not rejected.strip():
            raise LeftOut("empty answer")
        if chosen.strip() == rejected.strip():
            raise LeftOut("equal answers")
        texts = [
            self.tokenizer.apply_chat_template(pair["prompt"] + pair[answer], tokenize=False)
            for answer in ("chosen", "rejected")
        ]
        return pair, texts

    def judge(self, row: dict, tokens: int) -> dict:
        if tokens > self.max_length:
            raise LeftOut(f"over {self.max_length} tokens")
        return row
