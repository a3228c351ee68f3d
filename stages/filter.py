"""Stage `filter`: the first N rows with more than `min_tokens` tokens, in one pass that stops there, split by key.

Tokens are counted as training sees them: chat template, history turns and all. What is left out is counted by reason.
"""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data import prompt_of, split_of
from dsa.scan import Kept, LongRows, Scan, TooManyBadRows
from stages import params
from stages.common import measured, read_lines, write_json, write_rows


def first_user_turn(row: dict) -> str:
    return row["history"][0][0] if row.get("history") else prompt_of(row)


def select(
    raw: Path, scan: Scan, wanted: int, out: Path, key: Callable[[dict], str], test_fraction: float, section: str
) -> tuple[list[Kept], dict]:
    """Write the first `wanted` rows that the scan keeps to `out`/{train,test}.jsonl.gz, what shares a key on one side.

    Returns them all, and the stage's metrics about them.
    """
    kept = list(tqdm(islice(scan(read_lines(raw)), wanted), total=wanted, desc=str(out)))
    splits = {"train": [], "test": []}
    for item in kept:
        splits[split_of(key(item.row), test_fraction)].append(item.row)
    for split, rows in splits.items():
        if not rows:
            raise params.ParamsError(f"{section}: no row is left for the {split} split: more rows are needed")
        write_rows(out / f"{split}.jsonl.gz", rows)
    sizes = {split: len(rows) for split, rows in splits.items()}
    return kept, sizes | {"complete": len(kept) == wanted} | scan.tally.summary()


def main() -> None:
    data = params.load("filter").data
    scan = LongRows(AutoTokenizer.from_pretrained("models/base"), data.max_length, data.max_bad_rows, data.min_tokens)
    metrics: dict = {}
    with measured(metrics), params.one_line(TooManyBadRows):
        kept, summary = select(
            Path("data/raw/sft.jsonl.gz"),
            scan,
            data.samples,
            Path("data/long"),
            (lambda row: str(row.get("data_source"))) if data.split_by == "data_source" else first_user_turn,
            data.test_fraction,
            "data",
        )
    metrics |= summary | {
        "tokens": sum(min(item.tokens, data.max_length) for item in kept),
        "longer_than_max_length": sum(item.tokens > data.max_length for item in kept),
        "data_source": dict(Counter(str(item.row.get("data_source")) for item in kept).most_common(20)),
        "language": dict(Counter(str(item.row.get("language")) for item in kept).most_common()),
        "last_row": kept[-1].number,
    }
    write_json(Path("reports/data/filter.json"), metrics)


if __name__ == "__main__":
    main()
