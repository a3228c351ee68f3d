"""The run in a dozen numbers, reports/summary.json: the columns of `dvc exp show`, in this order."""

from statistics import mean

COLUMNS = 12  # at most: more do not fit a terminal


def summarize(rows: dict[str, dict], selection: dict, preference: dict, stages: list[dict]) -> dict[str, float]:
    """
    Args:
        rows: of each arm, its losses and look-ups and their differences to dense attention.
        selection: of the DSA model, by layer (`evaluate`).
        preference: `stages.preference.summarize`.
        stages: what each stage cost, `{"seconds": ..., "peak_memory_gb": ...}`.

    Losses in nats a token, over the answers; look-ups by the share of their tokens that is right, pairs by the share
    found exactly in the longest rows, mass by the share of dense attention that the selected keys hold; `_ci` is half
    of the 95 % interval.
    """
    dense, dsa = rows["dense"], rows["dsa"]
    memory = [stage.get("peak_device_memory_gb", stage["peak_memory_gb"]) for stage in stages]
    columns = {
        "loss_dense": dense["loss"],
        "loss_dsa": dsa["loss"],
        "gap": dsa["gap"][0],
        "gap_ci": dsa["gap"][1],
        "gap_window": rows["window_trained"]["gap"][0],
        "lookups": dsa["retrieval_tokens"],
        "pairs_dense": dense["exact"].get("pairs"),
        "pairs": dsa["exact"].get("pairs"),
        "mass": mean(selection["mass"]),
        "dpo": preference["arms"]["dsa"]["accuracy"][0],
    }
    rounded = {name: value if value is None else round(value, 4) for name, value in columns.items()}
    return rounded | {"seconds": round(sum(stage["seconds"] for stage in stages)), "gb": round(max(memory), 1)}
