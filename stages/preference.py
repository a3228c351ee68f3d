"""What the report says about preference optimisation: both arms on the same held-out pairs."""

import numpy as np

from stages.statistics import Predictions, mean_with_error

ARMS = ("dense", "dsa")


def load(arm: str) -> dict[str, np.ndarray]:
    with np.load(f"data/dpo/{arm}.npz") as file:
        return {name: file[name] for name in file.files}


def summarize(metrics: dict[str, dict], beta: float, predictions: Predictions) -> dict:
    """Both arms' numbers and their paired difference, each with a standard error over the independent units of `dpo`.

    Args:
        metrics: of the two `dpo` stages, by arm.
        predictions: of the language-model rows, with the arms before and after.
    """
    scores = {arm: load(arm) for arm in ARMS}
    unit = scores["dense"]["unit"]
    arms = {}
    for arm, s in scores.items():
        arms[arm] = {
            "accuracy": mean_with_error((s["margin"] > 0).astype(float), unit),
            "margin": mean_with_error(beta * s["margin"], unit),
            "before": mean_with_error((s["before"] > 0).astype(float), unit),
            "after": mean_with_error((s["before"] + s["margin"] > 0).astype(float), unit),
            "chosen": mean_with_error(s["chosen"], unit),
            "kl": mean_with_error(np.repeat(s["kl"] / s["tokens"], s["tokens"]), np.repeat(unit, s["tokens"])),
            "lm_loss": predictions.gap(f"dpo_{arm}", arm),
            "generations": metrics[arm]["generations"],
        }
    ours, theirs = scores["dsa"], scores["dense"]
    difference = {
        "accuracy": mean_with_error((ours["margin"] > 0).astype(float) - (theirs["margin"] > 0), unit),
        "margin": mean_with_error(beta * (ours["margin"] - theirs["margin"]), unit),
        "after": mean_with_error(
            (ours["before"] + ours["margin"] > 0).astype(float) - (theirs["before"] + theirs["margin"] > 0), unit
        ),
    }
    return {
        "arms": arms,
        "difference": difference,
        "differs": {name: abs(mean) > 2 * error for name, (mean, error) in difference.items()},
        "held_out_pairs": len(unit),
        "units": len(np.unique(unit)),
        "pairs": metrics["dense"]["pairs"],
    }
