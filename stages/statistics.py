"""Differences between arms on the same held-out tokens, with 95 % intervals."""

from copy import copy
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from stages.files import read_rows

MARGIN = 0.01  # nats an answer token, fixed before any run: within it two arms count as equally good
LEVEL = 0.95  # of every interval on every page
KINDS = ("lookup", "recall", "continue")  # of rows of dsa/data/corpus.py
HELD_OUT = Path("data/long/test.jsonl.gz")


def quantile(freedom: float) -> float:
    """Half of an interval, in standard errors, by Student's t."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def ratio_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Sum over count and half of its 95 % interval, from the sum and count of each independent unit.

    Half of a single unit's is NaN: it tells nothing of others.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, n = sums.sum() / counts.sum(), len(counts)
    residual = sums - mean * counts
    error = np.sqrt(n / (n - 1) * (residual**2).sum()) / counts.sum() if n > 1 else np.nan
    return float(mean), float(error * quantile(n - 1)) if n > 1 else np.nan


def mean_interval(values: np.ndarray, units: np.ndarray) -> tuple[float, float]:
    """Mean of per-token values and half of its 95 % interval; the units, and not the tokens, are independent."""
    frame = pd.DataFrame({"unit": units, "value": values}).groupby("unit")["value"].agg(["sum", "count"])
    return ratio_interval(frame["sum"].to_numpy(), frame["count"].to_numpy())


def equivalence(gap: float, half: float, units: int, margin: float = MARGIN) -> float:
    """p of two one-sided t-tests (TOST, Schuirmann 1987) that a mean lies within ± margin, from half of its 95 %
    interval; NaN for a unit."""
    if units < 2 or not half > 0:
        return np.nan
    return float(stats.t.sf((margin - abs(gap)) / half * quantile(units - 1), units - 1))


def holm(p: np.ndarray) -> np.ndarray:
    """p of several comparisons, corrected (Holm 1979): below 0.05, a difference is shown with at most 5 % of chance
    that any that is called one is none."""
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate((len(p) - np.arange(len(p))) * np.asarray(p)[order]).clip(max=1)
    return adjusted


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


def kind_of(row: dict) -> str:
    """What a row of the cpu profile's corpus asks for, one of `KINDS`; "other" of other data."""
    kinds = row.get("type_keyword")
    return kinds[0] if isinstance(kinds, list) and kinds and kinds[0] in KINDS else "other"


class Predictions:
    """All arms' per-token predictions on the same held-out rows.

    Args:
        groups: of the stage `evaluate`.
        split_by: the field that rows of one side of the split share. Where it is "data_source", the families are the
            independent units of all intervals, for files of a family are alike; else the rows are.
    """

    def __init__(self, groups: tuple[str, ...], split_by: str):
        arrays: dict[str, np.ndarray] = {}
        for group in groups:
            arrays |= load(f"data/evaluate/{group}.npz")
        texts = list(islice(read_rows(HELD_OUT), len(arrays["lengths"])))
        self.families = np.array([str(text.get("data_source")) for text in texts])
        by_family = split_by == "data_source"
        self.unit_of = np.unique(self.families, return_inverse=True)[1] if by_family else np.arange(len(texts))
        self.kinds = np.array([kind_of(text) for text in texts])
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
        self.units = self.unit_of[self.rows]
        self.positions = np.concatenate([np.arange(1, n + 1) for n in lengths])
        self.answers = self.arrays["answers"]

    @property
    def count(self) -> int:
        """Of the independent units."""
        return len(np.unique(self.units))

    def nll(self, arm: str) -> np.ndarray:
        return self.arrays[f"nll_{arm}"]

    def gap(
        self, arm: str, reference: str, answers: bool = True, where: np.ndarray | None = None
    ) -> tuple[float, float]:
        """Loss of an arm minus that of the reference on the same tokens, and half of its 95 % interval.

        where: bool, of all tokens, those that count.
        """
        n = min(len(self.nll(arm)), len(self.nll(reference)))  # an arm may have run on the first rows only
        which = self.answers[:n] if answers else np.ones(n, dtype=bool)
        which = which if where is None else which & where[:n]
        return mean_interval((self.nll(arm)[:n] - self.nll(reference)[:n])[which], self.units[:n][which])

    def lookups(self, what: str, arm: str, reference: str) -> tuple[float, float]:
        """Look-ups answered exactly ("right"), or the share of their tokens that is right ("share"): the arm minus the
        reference on the same ones, and half of its 95 % interval."""
        ours, theirs = (self.arrays[f"{what}_{name}"].astype(float) for name in (arm, reference))
        n = min(len(ours), len(theirs))
        if n == 0:
            return 0.0, 0.0
        return mean_interval(ours[:n] - theirs[:n], self.unit_of[self.arrays["lookup_row"][:n]])

    def agreement(self, arm: str, reference: str) -> float:
        """Share of answer tokens whose likeliest token is the same."""
        ours, theirs = self.arrays[f"argmax_{arm}"], self.arrays[f"argmax_{reference}"]
        n = min(len(ours), len(theirs))
        return float((ours[:n] == theirs[:n])[self.answers[:n]].mean())
