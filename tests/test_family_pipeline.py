"""The stages, one after the other, on a random small base of other families than Qwen2: the profile names it."""

import importlib
import json
import os

import pytest
from transformers import AutoTokenizer

from dsa.config import FAMILIES
from stages import params
from tests.conftest import ROOT, copy_of_code, small_model
from tests.test_families import OWN

SOME = ["model", "download", "filter", "pairs", "dense", "warmup", "sparse", "window", "dpo dense", "dpo dsa"]
SOME += ["evaluate dense", "evaluate dsa", "evaluate window"]
ALL = [
    "preflight",
    *SOME,
    "evaluate warmup",
    "evaluate dpo_dense",
    "evaluate dpo_dsa",
    "compare",
    "harness dense",
    "harness dsa",
]
ALL += ["benchmark", "speed", "see", "report"]


def small(profile: dict) -> dict:
    """Of the smoke profile, what takes a few seconds."""
    profile["model"] = {"source": "data/local/model"}
    profile["data"] |= {"packages": ["trl", "dvc"], "rows": 24, "min_tokens": 256, "samples": 12, "max_length": 320}
    profile["preference"] |= {"rows": 12, "pairs": 8}
    for stage in ("dense", "warmup", "sparse"):
        profile[stage]["steps"] = 2
    profile["dpo"] |= {"held_out": 2, "steps": 1}
    profile["evaluate"] |= {"rows": 2, "retrieval": {"lengths": [1024], "rows": 1}}
    return profile


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, in whose folder the test runs, with the smoke profile made smaller."""
    copy_of_code(tmp_path)
    (tmp_path / "data/base").mkdir(parents=True)
    path = tmp_path / "profiles/smoke.yaml"
    path.write_text(params.dump(small(params.read(path))), encoding="utf-8")
    path = tmp_path / "params.yaml"
    path.write_text(params.dump(params.read(path) | {"profile": "smoke", "topk": 32}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("stages.training.use_all_cores", lambda: None)
    monkeypatch.setattr("stages.preflight.limit_memory", lambda: None)  # it would hold for all tests of this process
    return tmp_path


FAMILIES_RUN = {"llama": ALL, "qwen3": SOME}
if os.environ.get("DSA_EVERY_FAMILY"):  # python -m tests.families: half a minute each
    FAMILIES_RUN = dict.fromkeys(FAMILIES, SOME) | FAMILIES_RUN


@pytest.mark.slow
@pytest.mark.parametrize("model_type,stages", FAMILIES_RUN.items())
def test_the_pipeline_trains_and_evaluates_another_family(project, model_type, stages):
    base = project / "data/local/model"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(project / "data/base")  # from which the preflight takes one
    more = {"vocab_size": 4096, "max_position_embeddings": 2048, "initializer_range": 0.05}
    small_model(model_type, **OWN.get(model_type, {}) | more).save_pretrained(base)
    for stage in stages:
        name, *arguments = stage.split()
        importlib.import_module(f"stages.{name}").main(*arguments)
    for arm in ("dense", "warmup", "dsa", "window", "dpo-dense", "dpo-dsa"):
        config = json.loads((project / f"models/{arm}/config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == f"{model_type}_dsa", arm
    curve = (project / "reports/train/sparse.csv").read_text(encoding="utf-8").splitlines()
    assert len(curve) == 3 and "kl_layer_2" in curve[0] and "lm_loss" in curve[0]
    measured = json.loads((project / "reports/evaluate/dsa.json").read_text(encoding="utf-8"))
    assert measured["arms"]["dsa"]["loss"] > 0
    if stages is ALL:
        report = (project / "reports/report.md").read_text(encoding="utf-8")
        assert "Profile `smoke`" in report and "{{" not in report
        assert (project / "reports/see/page.html").stat().st_size > 10_000


def test_all_are_those_of_the_pipeline():
    found = params.read(ROOT / "dvc.yaml")["stages"]
    names = [f"{name} {item}".strip() for name, stage in found.items() for item in stage.get("foreach", [""])]
    assert sorted(ALL) == sorted(set(names) - {"pretrain"})
