"""Models and data are the same bytes in another place, another time zone, by another user."""

import os
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from dsa import from_dense
from stages import params
from stages.training import save
from tests.conftest import ROOT
from tests.test_pipeline import copy_of_project

DATA = dict.fromkeys(("model", "download", "filter", "pairs"), "")
STAGES = DATA | {"dense": "", "evaluate": "'dense'", "dpo": "'dense'"}
SMALL = {
    "data": {
        "packages": ["networkx", "trl"],
        "rows": 24,
        "samples": 8,
        "max_length": 640,
        "min_tokens": 512,
        "test_fraction": 0.5,
    },
    "preference": {"rows": 24, "pairs": 8},
    "dense": {"steps": 1},
    "dpo": {"steps": 1, "held_out": 1},
    "evaluate": {"rows": 1, "control_rows": 1},
}
HERE = {"HF_HUB_OFFLINE": "1", "TZ": "UTC", "USER": "ann", "LOGNAME": "ann", "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
THERE = {
    "TZ": "Asia/Tokyo",
    "USER": "ben",
    "LOGNAME": "ben",
    "PYTHONHASHSEED": "1",
    "LC_ALL": "C",
    "TRANSFORMERS_VERBOSITY": "info",
}


def small_project(target, **changes):
    """A copy of the project whose stages take seconds. changes: of sections of the profile."""
    copy_of_project(target)
    profile = params.read(target / "profiles/smoke.yaml")
    for section, values in [*SMALL.items(), *changes.items()]:
        profile[section] |= values
    (target / "profiles/smoke.yaml").write_text(params.dump(profile), encoding="utf-8")
    knobs = params.read(target / "params.yaml")
    (target / "params.yaml").write_text(params.dump(knobs | {"profile": "smoke"}), encoding="utf-8")
    return target


def run_stages(project, stages, environment):
    """In one process: each alone would spend its seconds on imports. stages: modules with the arguments of main."""
    lines = [f"from stages import {name}; {name}.main({argument})" for name, argument in stages.items()]
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=project, env=inherited | environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:].decode()


def outputs(project, environment):
    """What the stages write that DVC hashes and that holds no measurement: {path: bytes}."""
    small_project(project)
    committed = {path for path in (project / "data").rglob("*") if path.is_file()}
    home = project.parent / f"home of {environment['USER']}"
    home.mkdir()
    run_stages(project, STAGES, environment | {"HOME": str(home), "DSA_SCRATCH": str(home / "scratch")})
    curves = [project / "reports/train/dense.csv", project / "reports/dpo/dense.csv"]
    made = {path for folder in ("models", "data") for path in (project / folder).rglob("*") if path.is_file()}
    return {path.relative_to(project).as_posix(): path.read_bytes() for path in {*made, *curves} - committed}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return [
        outputs(tmp_path_factory.mktemp("here") / "project", HERE),
        outputs(tmp_path_factory.mktemp("elsewhere") / "a longer name/of the project", THERE),
    ]


@pytest.mark.slow
def test_no_environment_user_time_or_path_reaches_models_and_data(both):
    here, there = both
    wanted = {
        "models/base/config.json",
        "data/raw/sft.jsonl.gz",
        "data/long/train.jsonl.gz",
        "data/pairs/test.jsonl.gz",
    }
    wanted |= {"models/dense/model.safetensors", "models/dpo-dense/tokenizer_config.json"}
    wanted |= {"data/evaluate/dense.npz", "data/dpo/dense.npz", "reports/train/dense.csv"}
    assert here.keys() == there.keys() >= wanted
    assert [name for name in here if here[name] != there[name]] == []


def test_how_a_tokenizer_was_loaded_is_not_saved_with_it(dense_model, tmp_path):
    """transformers keeps local_files_only in tokenizer_config.json, which HF_HUB_OFFLINE=1 sets."""
    model = from_dense(dense_model, topk=8, n_heads=2, head_dim=8)
    folders = [tmp_path / str(offline) for offline in (True, False)]
    for offline, folder in zip((True, False), folders, strict=True):
        save(model, AutoTokenizer.from_pretrained(ROOT / "data/base", local_files_only=offline), folder)
    here, there = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert here == there and "tokenizer_config.json" in here
