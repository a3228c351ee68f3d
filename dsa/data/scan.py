"""The first usable rows of a data set, in one pass over its lines that stops as soon as there are enough.

`download` stops fetching by a scan and `filter` and `pairs` select by the same one, so the slice that was fetched is
certainly enough. Tokens are counted as training sees them, on the whole rendered conversation. Most rows of an
instruction data set are short, and a byte-level tokenizer never makes more tokens than there are bytes: rows with too
few bytes are not tokenised at all, the others in batches, which a fast tokenizer spreads over the cores.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from dsa.data.rows import IGNORE, BadRow, LeftOut, encode, messages_of, pair_of, render, tokenize_pair

BATCH = 256  # rows, as many as are read ahead of what is wanted
BIN = 256  # tokens, of the length histogram
ONLY_IDS = {"add_special_tokens": False, "return_attention_mask": False}


class TooManyBadRows(RuntimeError):
    """More rows than allowed could not be used; str() is the one line to show."""


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

    def why_none(self) -> str:
        """Of a scan that has kept nothing, in one line."""
        reasons = self.left_out + Counter({reason: len(numbers) for reason, numbers in self.bad.items()})
        of_each = "; ".join(f"{rows} {reason}" for reason, rows in reasons.most_common())
        return f"none of the {self.scanned} rows can be used: {of_each or 'the source is empty'}"

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
    """A line's row; before the first of a file there may be a byte order mark. Raises BadRow with the reason."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
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
        outcomes = chain.from_iterable(map(self.outcomes, in_batches(lines)))
        for number, (tokens, outcome) in enumerate(outcomes):
            self.tally.scanned += 1
            if tokens is not None:
                self.tally.tokenised += 1
                self.tally.lengths[tokens // BIN * BIN] += 1
            if isinstance(outcome, LeftOut):
                self.tally.left_out[str(outcome)] += 1
            elif isinstance(outcome, BadRow):
                self.tally.bad.setdefault(str(outcome), []).append(number)
                self.check_bad_rows()
            else:
                self.tally.kept += 1
                yield Kept(number, outcome, tokens or 0)

    def outcomes(self, lines: list[bytes]) -> Iterator[tuple[int | None, dict | BadRow | LeftOut]]:
        """Of each line its tokens, None where they were not counted, and its row or why it is not kept."""
        prepared = [attempt(lambda line: self.prepare(parse(line)), line) for line in lines]
        texts = [text for row in prepared if isinstance(row, tuple) for text in row[1]]
        counted = map(len, self.tokenizer(texts, **ONLY_IDS)["input_ids"] if texts else [])
        for row in prepared:
            if not isinstance(row, tuple):
                yield None, row
                continue
            tokens = max(islice(counted, len(row[1])), default=None)
            yield tokens, attempt(self.judge, row[0], tokens or 0)

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        """A row and the texts whose tokens are to be counted, none where that is not needed. Raises BadRow, LeftOut."""
        raise NotImplementedError

    def judge(self, row: dict, tokens: int) -> dict:
        """What is kept of a row whose longest text has so many tokens. Raises BadRow, LeftOut."""
        raise NotImplementedError

    def check_bad_rows(self) -> None:
        if self.tally.bad_rows > self.max_bad_rows:
            worst = sorted(self.tally.bad.items(), key=lambda item: -len(item[1]))
            reasons = "; ".join(f"{len(numbers)} {reason} (first: row {numbers[0]})" for reason, numbers in worst)
            raise TooManyBadRows(
                f"{self.tally.bad_rows} of the first {self.tally.scanned} rows cannot be read, more than "
                f"max_bad_rows = {self.max_bad_rows}: {reasons}"
            )


def attempt(call, *args):
    """The result of `call`, or the reason why there is none."""
    try:
        return call(*args)
    except (BadRow, LeftOut) as reason:
        return reason


def in_batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of BATCH lines. Where the source fails, what it gave before comes first."""
    batch: list[bytes] = []
    try:
        for line in lines:
            batch.append(line)
            if len(batch) == BATCH:
                yield batch
                batch = []
    except Exception:
        yield batch
        raise
    if batch:
        yield batch


class LongRows(Scan):
    """Rows in deepctrl-sft-data's schema with more than `min_tokens` tokens and an answer within `max_length`."""

    def __init__(self, tokenizer, max_length: int, max_bad_rows: int, min_tokens: int):
        super().__init__(tokenizer, max_length, max_bad_rows)
        self.min_tokens = min_tokens

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        text = self.tokenizer.apply_chat_template(messages_of(row), tokenize=False)
        # The tokenizer composes characters first, which can lengthen a text: then its bytes are no bound
        may_be_long = len(text.encode()) > self.min_tokens or not unicodedata.is_normalized("NFC", text)
        return row, [text] if may_be_long else []

    def judge(self, row: dict, tokens: int) -> dict:
        if tokens <= self.min_tokens:
            raise LeftOut(f"not over {self.min_tokens} tokens")
        conversation = render(self.tokenizer, messages_of(row))
        if tokens > self.max_length:
            (example,) = encode(self.tokenizer, [conversation], self.max_length)
            if all(label == IGNORE for label in example["labels"]):
                raise LeftOut(f"no answer within {self.max_length} tokens")
        return row


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
        tokenize_pair(self.tokenizer, row)
        return row
