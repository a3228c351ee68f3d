"""Stage `pairs`: the first N usable preference pairs as TRL reads them, those of a prompt on one side of the split."""

from collections import Counter
from operator import itemgetter
from pathlib import Path

from transformers import AutoTokenizer

from dsa.data.rows import prompt_key
from dsa.data.scan import Pairs, TooManyBadRows
from stages import params
from stages.common import measured
from stages.files import write_json
from stages.filter import select


def main() -> None:
    p = params.load("pairs")
    preference = p.preference
    scan = Pairs(
        AutoTokenizer.from_pretrained("models/base"),
        preference.max_length,
        preference.max_bad_rows,
        preference.domains,
    )
    by_source = preference.split_by == "data_source"  # a family is on the side where the instruction rows have it
    metrics: dict = {}
    with measured(metrics), params.one_line(TooManyBadRows):
        kept, summary = select(
            Path("data/raw/preference.jsonl.gz"),
            scan,
            preference.pairs,
            Path("data/pairs"),
            preference.split_by,
            itemgetter("prompt"),
            p.data.test_fraction if by_source else preference.test_fraction,
        )
    metrics |= summary | {
        "prompts": len({prompt_key(item.row["prompt"]) for item in kept}),
        "domain": dict(Counter(item.row["domain"] for item in kept).most_common()),
    }
    write_json(Path("reports/data/pairs.json"), metrics)


if __name__ == "__main__":
    main()
