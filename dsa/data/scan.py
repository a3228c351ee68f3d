"""The first usable rows of a data set, in one pass over its lines that stops as soon as there are enough.

`download` stops fetching by a scan and `filter` and `pairs` select by the same one, so the slice that was fetched is
certainly enough. Tokens are counted as training sees them, on the whole rendered conversation. Most rows of an
instruction data set are short, and a byte-level tokenizer never makes more tokens than there are bytes: rows with too
few bytes are not tokenised at all, the others word by word (`dsa.data.counting`), in batches on all cores.
"""

import json
import logging
import multiprocessing
import os
import signal
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

from dsa.data.counting import TokenCounter
from dsa.data.rows import IGNORE, BadRow, LeftOut, encode, messages_of, pair_of, render, tokenize_pair
from dsa.machine import cores

log = logging.getLogger(__name__)

BATCH = 256  # rows, read by one process at a time
ALONE = 4096  # rows that are read before other processes are worth their start
PROCESSES = 8  # at most: they read ahead of what is wanted
BIN = 256  # tokens, of the length histogram


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
        self.count = TokenCounter(tokenizer)
        self.tally = Tally()

    def __call__(self, lines: Iterable[bytes]) -> Iterator[Kept]:
        for number, (tokens, outcome) in enumerate(self.outcomes(lines)):
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

    def outcomes(self, lines: Iterable[bytes]) -> Iterator[tuple[int | None, dict | BadRow | LeftOut]]:
        """What `read` says of each line, in their order: the first ones at once, the others on all cores."""
        lines = iter(lines)
        yield from map(self.read, islice(lines, ALONE))
        processes = min(cores(), PROCESSES)
        batches = in_batches(lines)
        first = next(batches, [])
        batches = chain([first], batches)
        if processes == 1 or len(first) < BATCH:
            yield from map(self.read, chain.from_iterable(batches))
            return
        try:
            pool = ProcessPoolExecutor(processes, initializer=start_process, initargs=(self,))
        except (OSError, NotImplementedError) as error:  # a container whose /dev/shm is missing, full or not writable
            log.warning("rows are read by one process, for others cannot be started: %s", error)
            yield from map(self.read, chain.from_iterable(batches))
            return
        ahead, failure = deque(), None
        try:
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:  # the source's: what it gave before may be enough
                    failure = error
                    break
                if batch is None:
                    break
                ahead.append(pool.submit(read_batch, batch))
                if len(ahead) == 2 * processes:
                    yield from ahead.popleft().result()
            for future in ahead:
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if failure is not None:
            raise failure

    def read(self, line: bytes) -> tuple[int | None, dict | BadRow | LeftOut]:
        """A line's tokens, None where they were not counted, and its row or why it is not kept."""
        tokens = None
        try:
            row, texts = self.prepare(parse(line))
            if texts:
                tokens = max(map(self.count, texts))
            return tokens, self.judge(row, tokens or 0)
        except (BadRow, LeftOut) as reason:
            return tokens, reason

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


def in_batches(lines: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Lists of BATCH lines. Where the source fails, what it gave before comes first."""
    batch = []
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


def start_process(scan: Scan) -> None:
    global process_scan
    process_scan = scan
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pass
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process


def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A parent that is killed stops no process of its pool."""
    parent.join()
    os._exit(1)


def read_batch(lines: list[bytes]) -> list[tuple[int | None, dict | BadRow | LeftOut]]:
    return list(map(process_scan.read, lines))


class LongRows(Scan):
    """Rows in deepctrl-sft-data's schema with more than `min_tokens` tokens and an answer within `max_length`."""

    def __init__(self, tokenizer, max_length: int, max_bad_rows: int, min_tokens: int):
        super().__init__(tokenizer, max_length, max_bad_rows)
        self.min_tokens = min_tokens
        self.frames: dict[int, list[str] | None] = {}  # by number of messages

    def prepare(self, row: dict) -> tuple[dict, list[str]]:
        messages = messages_of(row)
        contents = [message["content"] for message in messages]
        frame = self.frame(messages)
        if frame is None:
            return row, [self.tokenizer.apply_chat_template(messages, tokenize=False)]
        if not self.may_be_long(frame, contents):
            return row, []
        return row, ["".join(chain.from_iterable(zip(frame, [*contents, ""], strict=True)))]

    def judge(self, row: dict, tokens: int) -> dict:
        if tokens <= self.min_tokens:
            raise LeftOut(f"not over {self.min_tokens} tokens")
        messages = messages_of(row)
        if self.frame(messages) is None:
            render(self.tokenizer, messages)  # raises BadRow where training could not
        if tokens > self.max_length and not self.has_answer(messages):
            raise LeftOut(f"no answer within {self.max_length} tokens")
        return row

    def frame(self, messages: list[dict]) -> list[str] | None:
        """What the chat template writes before, between and after the contents: it is slow, and this does not change.

        None where it does not copy a content as it is but trims it, or drops what was thought. Raises BadRow.
        """
        if len(messages) not in self.frames:
            probes = [f" \n<think>\n{i}\n</think>\n " for i in range(len(messages))]
            marked = [message | {"content": probe} for message, probe in zip(messages, probes, strict=True)]
            rest, frame = self.tokenizer.apply_chat_template(marked, tokenize=False), []
            for probe in probes:
                before, found, rest = rest.partition(probe)
                frame = [*frame, before] if found and frame is not None else None
            if frame is not None:
                render(self.tokenizer, marked)
            self.frames[len(messages)] = frame and [*frame, rest]
        return self.frames[len(messages)]

    def may_be_long(self, frame: list[str], contents: list[str]) -> bool:
        """False where the row has certainly no more than `min_tokens` tokens."""
        room = self.min_tokens - sum(len(text.encode()) for text in frame)
        if 4 * sum(map(len, contents)) <= room:  # a character has at most four bytes: no need to encode
            return False
        if not all(unicodedata.is_normalized("NFC", text) for text in contents):
            return True  # the tokenizer composes characters first, which can lengthen a text: no bound
        return sum(len(text.encode()) for text in contents) > room

    def has_answer(self, messages: list[dict]) -> bool:
        """Whether training, which cuts on the right, is left with a token of an answer."""
        first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        if self.count.fast and messages[first]["content"][:1].strip():
            head = self.tokenizer.apply_chat_template(messages[:first], tokenize=False, add_generation_prompt=True)
            if head.endswith("\n"):  # no token has the end of this line and the answer's first character
                return self.count(head) < self.max_length
        (example,) = encode(self.tokenizer, [render(self.tokenizer, messages)], self.max_length)
        return any(label != IGNORE for label in example["labels"])


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
