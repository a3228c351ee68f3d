"""Differences between arms on the same held-out tokens, with standard errors."""

from copy import copy

import numpy as np
import pandas as pd
from scipy import stats

MARGIN = 0.01  # nats an answer token, fixed before any run: within it two arms count as equally good


def ratio_with_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sum over count and its standard error, rows as the independent units, from each row's sum and count.

    The error of a single row is NaN: it tells nothing of others.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, n = sums.sum() / counts.sum(), len(counts)
    residual = sums - mean * counts
    return float(mean), float(np.sqrt(n / (n - 1) * (residual**2).sum()) / counts.sum()) if n > 1 else np.nan


def mean_with_error(values: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Mean of per-token values and its standard error with rows, not tokens, as the independent units."""
    frame = pd.DataFrame({"row": rows, "value": values}).groupby("row")["value"].agg(["sum", "count"])
    return ratio_with_error(frame["sum"].to_numpy(), frame["count"].to_numpy())


def equivalence(gap: float, error: float, rows: int, margin: float = MARGIN) -> float:
    """p of two one-sided t-tests (TOST, Schuirmann 1987) that a mean difference lies within ± margin; NaN for a row."""
    return float(stats.t.sf((margin - abs(gap)) / error, rows - 1)) if rows > 1 and error > 0 else np.nan


def plain(x):
    """NumPy's numbers and arrays as JSON has them, to six digits behind the point; what is not a number as None."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [plain(value) for value in x]
    if isinstance(x, (float, np.floating)):
        return None if np.isnan(x) else round(float(x), 6)
    return x.item() if isinstance(x, np.generic) else x


def load(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name."""
    with np.load(path) as file:
        return dict(file)


class Predictions:
    """All arms' per-token predictions on the same held-out rows.

    Args:
        groups: of the stage `evaluate`.
    """

    def __init__(self, groups: tuple[str, ...]):
        arrays: dict[str, np.ndarray] = {}
        for group in groups:
            arrays |= load(f"data/evaluate/{group}.npz")
        self._hold(arrays)

    def first(self, count: int) -> "Predictions":
        """Those of the first rows alone, for arms that ran on no others."""
        lookups = int((self.arrays["lookup_row"] < count).sum())
        tokens = int(self.arrays["lengths"][:count].sum())
        limits = {"lengths": count, "heatmap": None, "lookup": lookups, "share": lookups, "right": lookups}
        few = copy(self)
        few._hold(
            {name: x[: limits.get(name.split("_")[0], tokens)] if x.ndim else x for name, x in self.arrays.items()}
        )
        return few

    def _hold(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        lengths = self.arrays["lengths"]
        self.rows = np.repeat(np.arange(len(lengths)), lengths)
        self.positions = np.concatenate([np.arange(1, n + 1) for n in lengths])
        self.answers = self.arrays["answers"]

    def nll(self, arm: str) -> np.ndarray:
        return self.arrays[f"nll_{arm}"]

    def gap(self, arm: str, reference: str, answers: bool = True) -> tuple[float, float]:
        """Loss of an arm minus that of the reference on the same tokens, with standard error."""
        n = min(len(self.nll(arm)), len(self.nll(reference)))  # an arm may have run on the first rows only
        which = self.answers[:n] if answers else np.ones(n, dtype=bool)
        return mean_with_error((self.nll(arm)[:n] - self.nll(reference)[:n])[which], self.rows[:n][which])

    def lookups(self, what: str, arm: str, reference: str) -> tuple[float, float]:
        """Look-ups answered exactly ("right"), or the share of their tokens that is right ("share"): the arm minus the
        reference on the same ones, with standard error over rows: a row asks up to eight questions."""
        ours, theirs = (self.arrays[f"{what}_{name}"].astype(float) for name in (arm, reference))
        n = min(len(ours), len(theirs))
        if n == 0:
            return 0.0, 0.0
        return mean_with_error(ours[:n] - theirs[:n], self.arrays["lookup_row"][:n])

    def agreement(self, arm: str, reference: str) -> float:
        """Share of answer tokens whose likeliest token is the same."""
        ours, theirs = self.arrays[f"argmax_{arm}"], self.arrays[f"argmax_{reference}"]
        n = min(len(ours), len(theirs))
        return float((ours[:n] == theirs[:n])[self.answers[:n]].mean())

    def summary(self, arm: str, reference: str) -> dict[str, float]:
        """Answer loss, its gap to the reference with standard error, and the look-ups, of the arms that have them."""
        gap, error = self.gap(arm, reference)
        found = {"loss": float(self.nll(arm)[self.answers].mean()), "gap": gap, "gap_se": error}
        for name, what in (("retrieval", f"right_{arm}"), ("retrieval_tokens", f"share_{arm}")):
            if what in self.arrays:
                found[name] = float(self.arrays[what].mean()) if len(self.arrays[what]) else 0.0
        return found
