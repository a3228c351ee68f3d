"""Stage `filter`: the first N rows with more than `min_tokens` tokens, in one pass that stops there, split by key.

Tokens are counted as training sees them: chat template, history turns and all. What is left out is counted by reason.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from dsa.data import IGNORE, BadRow, Conversation, encode, messages_of, prompt_of, render, split_of
from stages import params
from stages.common import measured, read_rows, write_json, write_rows

BATCH = 256  # rows a tokenizer call
BIN = 256  # tokens, of the length histogram


def first_user_turn(row: dict) -> str:
    return row["history"][0][0] if row.get("history") else prompt_of(row)


def main() -> None:
    data = params.load("filter").data
    tokenizer = AutoTokenizer.from_pretrained("models/base")
    skipped, sources, lengths = Counter(), Counter(), Counter()
    kept: dict[str, list[dict]] = {"train": [], "test": []}
    scanned = tokens = 0

    def batches() -> Iterator[list[tuple[dict, Conversation | str]]]:
        """Rows with their conversation, or with the reason why they are none."""
        rows = read_rows(Path("data/raw/sft.jsonl.gz"))
        while batch := list(islice(rows, BATCH)):
            rendered = []
            for row in batch:
                try:
                    rendered.append((row, render(tokenizer, messages_of(row))))
                except BadRow as reason:
                    rendered.append((row, str(reason)))
            yield rendered

    def long_rows() -> Iterator[tuple[dict, int]]:
        nonlocal scanned
        for batch in batches():
            encoded = iter(encode(tokenizer, [c for _, c in batch if isinstance(c, Conversation)]))
            for row, conversation in batch:
                scanned += 1
                if isinstance(conversation, str):
                    skipped[conversation] += 1
                    continue
                example = next(encoded)
                length = len(example["input_ids"])
                lengths[length // BIN * BIN] += 1
                if length <= data.min_tokens:
                    skipped[f"not over {data.min_tokens} tokens"] += 1
                elif all(label == IGNORE for label in example["labels"][: data.max_length]):
                    skipped[f"no answer within {data.max_length} tokens"] += 1
                else:
                    yield row, length

    metrics: dict = {}
    with measured(metrics):
        progress = tqdm(total=data.samples, desc="long rows")
        for row, length in islice(long_rows(), data.samples):
            key = row["data_source"] if data.split_by == "data_source" else first_user_turn(row)
            kept[split_of(key, data.test_fraction)].append(row)
            sources[row["data_source"]] += 1
            tokens += min(length, data.max_length)
            progress.update()
        progress.close()
    for split, rows in kept.items():
        if not rows:
            raise params.ParamsError(
                f"data: no row is left for the {split} split; more data.rows or data.samples needed"
            )
        write_rows(Path(f"data/long/{split}.jsonl.gz"), rows)
    found = sum(map(len, kept.values()))
    metrics |= {
        "scanned": scanned,
        "kept": found,
        "complete": found == data.samples,
        "train": len(kept["train"]),
        "test": len(kept["test"]),
        "tokens": tokens,
        "skipped": dict(skipped.most_common()),
        "length_histogram": {f"{low}-{low + BIN - 1}": lengths[low] for low in sorted(lengths)},
        "data_source": dict(sources.most_common(20)),
    }
    write_json(Path("reports/data/filter.json"), metrics)


if __name__ == "__main__":
    main()
