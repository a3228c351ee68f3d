"""How fast long rows are found, against the plain loop: one tokenizer call a row, all rows.

    python -m benchmarks.filter ROWS.jsonl... --tokenizer models/base

The files' rows are repeated up to --rows; nothing is remembered of a row. The tokenizer has all cores for a batch. The
plain loop always reads all rows, also where `first_samples` is compared with it.
Ratios of one run on one machine; the selections must be identical. Writes reports/speed/filter.json.
"""

import argparse
import time
from itertools import cycle, islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data.rows import BadRow, messages_of
from dsa.data.scan import LongRows, parse
from stages.common import device_name
from stages.files import write_json


def plain_loop(tokenizer, lines: list[bytes], min_tokens: int) -> list[int]:
    found = []
    for number, line in enumerate(tqdm(lines, desc="plain loop")):
        try:
            ids = tokenizer.apply_chat_template(messages_of(parse(line)), return_dict=False)
        except BadRow:
            continue
        if len(ids) > min_tokens:
            found.append(number)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", default="models/base")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--min-tokens", type=int, default=1024)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    published = [line for path in sorted(args.files) for line in path.read_bytes().splitlines()]
    lines = list(islice(cycle(published), args.rows))

    def timed(call) -> tuple[list[int], float]:
        start = time.perf_counter()
        return call(), time.perf_counter() - start

    def scan() -> LongRows:
        return LongRows(tokenizer, args.max_length, 0, args.min_tokens)

    first = scan()
    stopping, stopping_seconds = timed(lambda: [row.number for row in islice(first(lines), args.samples)])
    whole, whole_seconds = timed(lambda: [row.number for row in scan()(lines)])
    plain, plain_seconds = timed(lambda: plain_loop(tokenizer, lines, args.min_tokens))
    # No published row is without an answer within --max-length: all long rows are kept.
    if whole != plain or stopping != plain[: args.samples]:
        raise SystemExit("the selections differ")

    def speed(lines: list[bytes], seconds: float, plain_seconds: float) -> dict:
        return {
            "rows": len(lines),
            "seconds": round(seconds, 2),
            "rows_per_second": round(len(lines) / seconds),
            "mb_per_second": round(sum(map(len, lines)) / 1e6 / seconds, 1),
            "times_plain": round(plain_seconds / seconds, 2),
        }

    scanned = lines[: first.tally.scanned]
    result = {
        "device": device_name(),
        "rows": args.rows,
        "megabytes": round(sum(map(len, lines)) / 1e6, 1),
        "long_rows": len(plain),
        "plain_loop": speed(lines, plain_seconds, plain_seconds),
        "every_row": speed(lines, whole_seconds, plain_seconds),
        "first_samples": {"samples": len(stopping), **speed(scanned, stopping_seconds, plain_seconds)},
    }
    write_json(Path("reports/speed/filter.json"), result)
    print(result)


if __name__ == "__main__":
    main()
