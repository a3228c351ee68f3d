"""Differences between arms, worked out by hand on three short rows."""

import numpy as np
import pytest
from scipy import stats

from stages.statistics import Predictions, equivalence, plain, ratio_with_error


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Rows of 2, 1 and 2 predicted tokens; arm `few` ran on the first two rows only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/evaluate").mkdir(parents=True)
    arrays = {
        "lengths": [2, 1, 2],
        "answers": [False, True, True, True, True],
        "nll_all": [9.0, 1.0, 2.0, 4.0, 6.0],
        "right_all": [True, False, True],
        "share_all": [1.0, 0.5, 1.0],
        "nll_reference": [1.0, 1.0, 1.0, 1.0, 1.0],
        "nll_few": [7.0, 3.0, 5.0],
        "lookup_row": [0, 1, 2],
        "lookup_distance": [5, 6, 7],
        "heatmap_wanted": np.zeros((4, 4)),
        "heatmap_layer": 2,
    }
    np.savez("data/evaluate/arms.npz", **arrays)


def test_an_arm_is_compared_on_the_rows_it_ran_on(evaluated):
    predictions = Predictions(("arms",))
    assert predictions.gap("all", "reference")[0] == pytest.approx((0 + 1 + 3 + 5) / 4)
    assert predictions.gap("few", "reference")[0] == pytest.approx((2 + 4) / 2)


def test_a_single_row_has_no_error():
    assert ratio_with_error(np.array([6.0]), np.array([3]))[0] == 2 and np.isnan(
        ratio_with_error(np.ones(1), np.ones(1))[1]
    )
    assert plain({"a": (np.float32(0.5), np.nan), "b": np.arange(2)}) == {"a": [0.5, None], "b": [0, 1]}


def test_the_first_rows_alone(evaluated):
    few = Predictions(("arms",)).first(2)
    assert few.rows.tolist() == [0, 0, 1] and few.positions.tolist() == [1, 2, 1]
    assert few.arrays["heatmap_wanted"].shape == (4, 4) and few.arrays["heatmap_layer"] == 2
    summary = few.summary("all", "reference")
    assert summary["loss"] == pytest.approx(1.5) and summary["gap"] == pytest.approx(0.5)
    assert (summary["retrieval"], summary["retrieval_tokens"]) == (0.5, 0.75)
    assert few.arrays["lookup_distance"].tolist() == [5, 6]
    assert few.summary("few", "all")["gap"] == pytest.approx((2 + 3) / 2)
    assert "retrieval" not in few.summary("few", "all")
    assert Predictions(("arms",)).first(99).summary("all", "reference") == Predictions(("arms",)).summary(
        "all", "reference"
    )


def test_equivalence_needs_a_small_difference_that_is_known_well():
    """Its p is the larger one of two one-sided t-tests."""
    samples = np.random.default_rng(0).normal(0.004, 0.02, 50)
    gap, error = samples.mean(), samples.std(ddof=1) / 50**0.5
    sides = [
        stats.ttest_1samp(samples, side, alternative=way).pvalue for side, way in ((-0.01, "greater"), (0.01, "less"))
    ]
    assert equivalence(gap, error, 50, 0.01) == pytest.approx(max(sides))
    assert equivalence(-gap, error, 50, 0.01) == pytest.approx(max(sides))
    assert equivalence(0.02, 0.001, 50) > 0.95
    assert np.isnan(equivalence(0.0, 0.0, 1))
