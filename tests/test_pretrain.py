"""The stage that makes the embedded base model, from end to end: nothing else runs it, for it is frozen."""

import json

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import params, pretrain
from tests.conftest import copy_of_code


@pytest.mark.slow
def test_the_stage_writes_a_model_its_tokenizer_its_curve_and_what_it_finds(tmp_path, monkeypatch):
    copy_of_code(tmp_path)
    profile = params.read(tmp_path / "profiles/cpu.yaml")
    profile["data"]["packages"] = ["accelerate", "dvc", "trl"]
    first, *_, last = profile["pretrain"]["phases"]
    phases = [first | {"rows": 2, "steps": 25}, last | {"length": 512, "steps": 1}]
    profile["pretrain"] |= {"vocab_size": 600, "num_hidden_layers": 2, "intermediate_size": 64, "phases": phases}
    (tmp_path / "profiles/cpu.yaml").write_text(params.dump(profile), encoding="utf-8")
    (tmp_path / "data/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSA_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(pretrain, "LENGTHS", [512])
    monkeypatch.setattr(pretrain, "ROWS", 1)

    pretrain.main()
    about = json.loads((tmp_path / "data/base/pretrain.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained("data/base")
    assert about["parameters"] == model.num_parameters() and about["train_tokens"] == 25 * 2 * 256 + 512
    assert {"pairs_512", "needles_512", "held_out_bits_per_char", "train_files"} < about.keys()
    assert about["held_out_families"] and len(AutoTokenizer.from_pretrained("data/base")) == 600
    assert pd.read_csv("data/base/pretrain.csv").columns[:2].tolist() == ["step", "tokens"]
    assert not [path for path in (tmp_path / "scratch").iterdir() if path.is_dir()]  # its checkpoints are gone
