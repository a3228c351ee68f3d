"""Differences between arms, worked out by hand on three short rows."""

import numpy as np
import pytest
from scipy import stats

from stages.files import write_rows
from stages.statistics import Predictions, equivalence, holm, kind_of, plain, ratio_interval


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Rows of 2, 1 and 2 predicted tokens; arm `few` ran on the first two rows only."""
    monkeypatch.chdir(tmp_path)
    for name in ("evaluate", "long"):
        (tmp_path / "data" / name).mkdir(parents=True)
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
    kinds = (["lookup", "signature"], ["continue"], ["lookup"], ["recall"])
    write_rows(
        tmp_path / "data/long/test.jsonl.gz",
        [{"type_keyword": kind, "data_source": name} for kind, name in zip(kinds, "abac", strict=True)],
    )


def test_an_arm_is_compared_on_the_rows_it_ran_on(evaluated):
    predictions = Predictions(("arms",), "data_source")
    assert predictions.gap("all", "reference")[0] == pytest.approx((0 + 1 + 3 + 5) / 4)
    assert predictions.gap("few", "reference")[0] == pytest.approx((2 + 4) / 2)


def test_a_single_row_has_no_error():
    assert ratio_interval(np.array([6.0]), np.array([3]))[0] == 2 and np.isnan(
        ratio_interval(np.ones(1), np.ones(1))[1]
    )
    assert plain({"a": (np.float32(0.5), np.nan), "b": np.arange(2)}) == {"a": [0.5, None], "b": [0, 1]}


def test_the_first_rows_alone(evaluated):
    few = Predictions(("arms",), "data_source").first(2)
    assert few.rows.tolist() == [0, 0, 1] and few.positions.tolist() == [1, 2, 1]
    assert few.arrays["heatmap_wanted"].shape == (4, 4) and few.arrays["heatmap_layer"] == 2
    assert few.gap("all", "reference")[0] == pytest.approx(0.5) and few.count == 2
    assert few.arrays["lookup_distance"].tolist() == [5, 6]
    assert few.gap("few", "all")[0] == pytest.approx((2 + 3) / 2)
    whole = Predictions(("arms",), "data_source")
    assert whole.first(99).gap("all", "reference") == whole.gap("all", "reference")


def test_files_of_a_family_are_one_unit(evaluated):
    """Rows 0 and 2 are of family a: 5 answer tokens in two units, which differ by 2 from the mean 9 / 4."""
    by_family, by_row = (Predictions(("arms",), split_by) for split_by in ("data_source", "prompt"))
    assert (by_family.count, by_row.count) == (2, 3)
    # a: 0 + 3 + 5 = 8 in 3 tokens, b: 1 in 1. Residuals 8 - 6.75 and 1 - 2.25, so sqrt(2 / 1 * 2 * 1.25 ** 2) / 4.
    mean, half = by_family.gap("all", "reference")
    assert mean == pytest.approx(2.25) and half == pytest.approx(12.7062 * 2.5 / 4, rel=1e-4)
    assert by_row.gap("all", "reference")[0] == mean and by_row.gap("all", "reference")[1] != half


def test_the_gap_of_some_tokens_and_the_kinds_of_rows(evaluated):
    predictions = Predictions(("arms",), "data_source")
    assert predictions.kinds.tolist() == ["lookup", "continue", "lookup"]
    late = predictions.gap("all", "reference", where=predictions.positions == 2)
    assert late[0] == pytest.approx((0 + 5) / 2)
    assert predictions.gap("few", "reference", answers=False, where=predictions.positions == 1)[0] == (6 + 4) / 2
    others = ({"type_keyword": ["写作", "lookup"]}, {"type_keyword": []}, {"type_keyword": "lookup"}, {})
    assert [kind_of(row) for row in others] == ["other"] * 4


def test_p_of_several_comparisons_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]).tolist() == [1, 1] and holm([0.2]).tolist() == [0.2] and not len(holm([]))


def test_equivalence_needs_a_small_difference_that_is_known_well():
    """Its p is the larger one of two one-sided t-tests."""
    samples = np.random.default_rng(0).normal(0.004, 0.02, 50)
    gap, error = samples.mean(), samples.std(ddof=1) / 50**0.5
    sides = [
        stats.ttest_1samp(samples, side, alternative=way).pvalue for side, way in ((-0.01, "greater"), (0.01, "less"))
    ]
    half = error * stats.t.ppf(0.975, 49)
    assert equivalence(gap, half, 50, 0.01) == pytest.approx(max(sides))
    assert equivalence(-gap, half, 50, 0.01) == pytest.approx(max(sides))
    assert equivalence(0.02, 0.002, 50) > 0.95
    assert np.isnan(equivalence(0.0, 0.0, 1))
