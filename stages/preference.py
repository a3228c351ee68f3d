"""What the report says about preference optimisation: both arms on the same held-out pairs."""

import numpy as np

from stages.arms import PAIR
from stages.statistics import Predictions, load, mean_interval


def measures(scores: dict[str, np.ndarray], beta: float) -> dict[str, np.ndarray]:
    """Of each pair: whether reward and likelihood (before, after) prefer the right answer, and the reward's margin."""
    before, margin = scores["before"], scores["margin"]
    return {
        "accuracy": (margin > 0).astype(float),
        "margin": beta * margin,
        "before": (before > 0).astype(float),
        "after": (before + margin > 0).astype(float),
    }


def summarize(metrics: dict[str, dict], beta: float, predictions: Predictions) -> dict:
    """Both arms' numbers and their paired difference, each with half of its 95 % interval over the units
    of `dpo`.

    Args:
        metrics: of the two `dpo` stages, by arm.
        predictions: of the language-model rows, with the arms before and after.
    """
    scores = {arm: load(f"data/dpo/{arm}.npz") for arm in PAIR}
    measured = {arm: measures(s, beta) for arm, s in scores.items()}
    unit = scores["dense"]["unit"]
    arms = {}
    for arm, s in scores.items():
        arms[arm] = {
            **{name: mean_interval(values, unit) for name, values in measured[arm].items()},
            "chosen": mean_interval(s["chosen"], unit),
            "kl": mean_interval(np.repeat(s["kl"] / s["tokens"], s["tokens"]), np.repeat(unit, s["tokens"])),
            "lm_loss": predictions.gap(f"dpo_{arm}", arm),
        }
    ours, theirs = measured["dsa"], measured["dense"]
    difference = {n: mean_interval(ours[n] - theirs[n], unit) for n in ("accuracy", "margin", "after")}
    return {
        "arms": arms,
        "difference": difference,
        "differs": {name: abs(mean) > half for name, (mean, half) in difference.items()},
        "held_out_pairs": len(unit),
        "units": len(np.unique(unit)),
        "pairs": metrics["dense"]["pairs"],
    }
