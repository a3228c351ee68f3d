"""Stage `filter`: the first N rows with more than `min_tokens` tokens, in one pass that stops there, split by key.

Tokens are counted as training sees them: chat template, history turns and all. What is left out is counted by reason.
"""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data.rows import messages_of, prompt_key, split_of
from dsa.data.scan import Kept, LongRows, Scan, TooManyBadRows
from stages import params
from stages.common import measured
from stages.files import read_lines, write_json, write_rows


def select(
    raw: Path, scan: Scan, wanted: int, out: Path, split_by: str, prompt: Callable, test_fraction: float
) -> tuple[list[Kept], dict]:
    """Write the first `wanted` rows that the scan keeps to `out`/{train,test}.jsonl.gz, what shares a key on one side.

    The key is the row's field `split_by`, or where that is "prompt" the text of the messages that `prompt` gives.
    Returns them all, and the stage's metrics about them. Raises ParamsError where a side has no row.
    """
    kept = list(tqdm(islice(scan(read_lines(raw)), wanted), total=wanted, desc=str(out)))
    keys = [prompt_key(prompt(k.row)) if split_by == "prompt" else str(k.row.get(split_by)) for k in kept]
    splits = {"train": [], "test": []}
    for item, key in zip(kept, keys, strict=True):
        splits[split_of(key, test_fraction)].append(item.row)
    for split, rows in splits.items():
        if not rows:
            few = f"{len(kept)} rows are kept, with {len(set(keys))} different values of {split_by}"
            why = f"{few}, which are too few for test_fraction = {test_fraction}" if kept else scan.tally.why_none()
            raise params.ParamsError(f"{out}: no row is left for the {split} split: {why}")
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
            data.split_by,
            messages_of,
            data.test_fraction,
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
