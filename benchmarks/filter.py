"""How fast long rows are found, against the plain loop: one tokenizer call a row, all rows.

    python -m benchmarks.filter ROWS.jsonl... --tokenizer models/base

The files' rows are repeated up to --rows. Ratios of one run on one machine; the selections must be identical.
Writes reports/speed/filter.json.
"""

import argparse
import time
from itertools import cycle, islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data import BadRow, messages_of
from dsa.scan import LongRows, parse
from stages.common import device_name, write_json


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
    parser.add_argument("--samples", type=int, default=10_000)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    published = [line for path in sorted(args.files) for line in path.read_bytes().splitlines()]
    lines = list(islice(cycle(published), args.rows))
    megabytes = sum(map(len, lines)) / 1e6

    def timed(call) -> tuple[list[int], float]:
        start = time.perf_counter()
        return call(), time.perf_counter() - start

    def scan() -> LongRows:
        return LongRows(tokenizer, 1 << 30, 0, args.min_tokens)

    first = scan()
    stopping, stopping_seconds = timed(lambda: [row.number for row in islice(first(lines), args.samples)])
    whole, whole_seconds = timed(lambda: [row.number for row in scan()(lines)])
    plain, plain_seconds = timed(lambda: plain_loop(tokenizer, lines, args.min_tokens))
    if whole != plain or stopping != plain[: args.samples]:
        raise SystemExit("the selections differ")

    def speed(seconds: float) -> dict:
        return {
            "seconds": round(seconds, 1),
            "rows_per_second": round(args.rows / seconds),
            "mb_per_second": round(megabytes / seconds, 1),
            "times_plain": round(plain_seconds / seconds, 2),
        }

    result = {
        "device": device_name(),
        "rows": args.rows,
        "megabytes": round(megabytes, 1),
        "long_rows": len(plain),
        "plain_loop": speed(plain_seconds),
        "every_row": speed(whole_seconds),
        "first_samples": {
            "samples": len(stopping),
            "scanned": first.tally.scanned,
            "seconds": round(stopping_seconds, 1),
            "times_plain": round(plain_seconds / stopping_seconds, 2),
        },
    }
    write_json(Path("reports/speed/filter.json"), result)
    print(result)


if __name__ == "__main__":
    main()
