"""Stage `compare`: DSA minus dense attention on the same held-out rows, as few numbers that `dvc exp show` can list.

It needs two arms only, so that a sweep over experiments (studies/sweep.py) runs no other. `_ci` is half of a 95 %
interval. The sums of each row are there too: experiments have the same held-out rows, and are compared on these.
"""

import json
from pathlib import Path

import numpy as np

from stages import params
from stages.arms import PAIR
from stages.files import write_json
from stages.statistics import Predictions, mean_interval, plain


def main() -> None:
    p = params.load("compare")
    arms = {arm: json.loads(Path(f"reports/evaluate/{arm}.json").read_text(encoding="utf-8")) for arm in PAIR}
    predictions = Predictions(PAIR, p.data.split_by)
    gap, half = predictions.gap("dsa", "dense")
    share, share_half = predictions.lookups("share", "dsa", "dense")
    difference = (predictions.nll("dsa") - predictions.nll("dense")).astype(float)
    answers, arrays, count = predictions.answers, predictions.arrays, len(predictions.arrays["lengths"])
    selects = answers & (predictions.positions > p.topk)  # before, every key is among the k
    beyond = mean_interval(difference[selects], predictions.units[selects]) if selects.any() else (0.0, 0.0)
    answer_rows, lookup_rows = predictions.rows[answers], arrays["lookup_row"].astype(int)
    shares = arrays["share_dsa"].astype(float) - arrays["share_dense"]
    selection = arms["dsa"]["selection"]
    metrics = {
        "gap": gap,
        "gap_ci": half,
        "gap_beyond_k": beyond[0],
        "gap_beyond_k_ci": beyond[1],
        "lookups": len(shares),
        "share": arms["dsa"]["arms"]["dsa"]["retrieval_tokens"],
        "share_dense": arms["dense"]["arms"]["dense"]["retrieval_tokens"],
        "share_gap": share,
        "share_gap_ci": share_half,
        **{name: float(np.mean(layers)) for name, layers in selection.items()},  # mass@k, the best k's mass, recall
        "rows": {  # of each row
            "family": predictions.families.tolist(),
            "tokens": np.bincount(answer_rows, minlength=count).tolist(),
            "gap": np.bincount(answer_rows, difference[answers], count).round(5).tolist(),
            "lookups": np.bincount(lookup_rows, minlength=count).tolist(),
            "share_gap": np.bincount(lookup_rows, shares, count).round(5).tolist(),
        },
    }
    metrics = {name: round(x, 5) if isinstance(x, float) else x for name, x in metrics.items()}
    write_json(Path("reports/compare.json"), plain(metrics))


if __name__ == "__main__":
    main()
