"""The table of arms, and what else names them."""

import pytest
import yaml

from dsa import Qwen2DSAConfig
from dsa.evaluation.predictions import changed
from stages import arms, params
from stages.evaluate import Evaluation
from tests.conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def test_the_pipeline_has_the_same_groups():
    """A group that is added in one place alone is evaluated and never reported, or the other way round."""
    evaluated = STAGES["evaluate"]["foreach"]
    assert {name: group["model"] for name, group in evaluated.items()} == {
        name: group.model for name, group in arms.GROUPS.items()
    }
    assert {arm.group for arm in arms.ARMS.values()} == set(arms.GROUPS)
    for stage in ("dpo", "harness"):
        assert tuple(STAGES[stage]["foreach"]) == arms.PAIR
    assert all(f"dpo_{arm}" in arms.ARMS for arm in arms.PAIR)
    assert {arms.ARMS[arm].trained_by for arm in arms.TRAINED} <= set(STAGES)


def test_a_group_reads_k_where_dvc_runs_it_again_for_another():
    for name, group in arms.GROUPS.items():
        assert ("topk" in params.declared(f"evaluate@{name}", "cpu", ROOT)) == group.sparse


def test_every_arm_is_a_config_and_every_measure_is_one():
    """A misspelt field would be set on the config, and the arm would silently be another."""
    known = Qwen2DSAConfig().to_dict()
    for arm in arms.ARMS.values():
        assert arm.changes.keys() <= known.keys()
        Qwen2DSAConfig(**arm.changes)
    for group in arms.GROUPS.values():
        assert all(callable(getattr(Evaluation, what)) for what in group.measures)


def test_a_change_of_the_config_ends_with_its_arm():
    """One arm's selector would else be the next one's too, whatever the order."""
    config = Qwen2DSAConfig(index_topk=7)
    before = config.to_dict()
    with pytest.raises(ZeroDivisionError), changed(config, index_topk=3, **arms.sparse("oracle")):
        assert (config.index_topk, config.selector) == (3, "oracle")
        _ = 1 / 0
    assert config.to_dict() == before
