"""That the campaign of faults finds a stage that does not survive one: on two stages that take no time."""

import random

import pytest

from stages import params
from tests import faults

PIPELINE = {
    "stages": {
        "pretrain": {"cmd": "true", "params": []},
        "model": {"cmd": "python model.py", "params": [], "outs": ["models/base"]},
        "dense": {"cmd": "python dense.py", "deps": ["models/base"], "params": [], "outs": ["models/dense"]},
    }
}
MODEL = """
from pathlib import Path
Path("models/base").mkdir(parents=True)
Path("models/base/model.safetensors").write_bytes(bytes(1000))
"""
SOUND = """
from pathlib import Path
import os
content = Path("models/base/model.safetensors").read_bytes()
Path("models/dense").mkdir(parents=True)
Path("models/dense/model.safetensors").write_bytes(content[::-1])
"""
UNSOUND = SOUND.replace("content[::-1]", "str(os.times().elapsed).encode()")  # another result in each run


def project(tmp_path, monkeypatch, dense: str) -> faults.Project:
    def toy(target, **_):
        (target / "profiles").mkdir(parents=True)
        (target / "reports").mkdir()
        (target / ".dvc").mkdir()
        files = {"model.py": MODEL, "dense.py": dense, "dvc.yaml": params.dump(PIPELINE), "dvc.lock": ""}
        files |= {".dvc/config": "[core]\n    no_scm = true\n", "params.yaml": "profile: smoke\n"}
        for name, text in files.items():
            (target / name).write_text(text, encoding="utf-8")

    monkeypatch.setattr(faults, "small_project", toy)
    made = faults.Project(tmp_path, random.Random(0))
    made.make(made.stages)
    return made


@pytest.mark.slow
def test_a_stage_that_survives_and_one_that_does_not(tmp_path, monkeypatch):
    for name, code, then in (("sound", SOUND, "same"), ("unsound", UNSOUND, "another result")):
        (tmp_path / name).mkdir()
        found = faults.trial(project(tmp_path / name, monkeypatch, code), "clock", "dense")
        assert (found["first"], found["then"]) == ("nothing happened", then)


@pytest.mark.slow
def test_a_model_that_was_cut_short_is_made_anew(tmp_path, monkeypatch):
    """The fault does something, and DVC sees it: the stage reads what it reads with nothing wrong."""
    made = project(tmp_path, monkeypatch, SOUND)
    cut = made.root / "models/base/model.safetensors"
    sizes = []
    monkeypatch.setattr(faults.os, "truncate", lambda path, size: sizes.append(size) or cut.write_bytes(bytes(size)))
    assert faults.trial(made, "cut", "dense")["then"] == "same"
    assert sizes[0] < 1000 == cut.stat().st_size


def test_the_table_counts_what_was_tried():
    trials = {"kill": [{"stage": "dense", "first": "killed", "then": "same"}] * 3}
    rows = [line for line in faults.table(trials).splitlines() if line.startswith("| kill -9 of all")]
    assert rows == [f"| {faults.FAULTS['kill'][0]} | 3 | 1 | 0 | 3 | 0 | 0 | 3 | 0 |"]
