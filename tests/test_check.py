"""That what would end a late stage is said before the first long one."""

import json
import shutil

import pytest

from stages import check, params
from tests.conftest import ROOT


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The project's params with its base model."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    shutil.copytree(ROOT / "data/base", tmp_path / "models/base")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOURS = {name: {"batch_size": 4} for name in ("dense", "warmup", "sparse")}


def change(path, **sections):
    content = params.read(path)
    for section, values in sections.items():
        content[section] = content[section] | values if isinstance(values, dict) else values
    path.write_text(params.dump(content), encoding="utf-8")


@pytest.mark.parametrize("profile", ["cpu", "smoke", "sweep", "qwen2.5-0.5b", "qwen2.5-0.5b-rehearsal"])
def test_the_profiles_pass(root, profile):
    change(root / "params.yaml", profile=profile)
    check.base_model()
    check.experiment()


@pytest.mark.parametrize(
    "knobs,scale,machine,line",
    [
        ({}, FOURS | {"dpo": {"batch_size": 6}}, {"WORLD_SIZE": "4"}, "dpo: batch_size: 6 rows cannot be split over 4"),
        ({}, FOURS | {"sparse": {"batch_size": 6}}, {"DSA_MICRO_BATCH": "4"}, "sparse: batch_size: 6 rows cannot be"),
        ({"indexer": {"n_heads": 3}, "ablation": "per_kv_head"}, {}, {}, "indexer, ablation: index_per_kv_head: .*=3"),
    ],
)  # fmt: skip
def test_what_a_late_stage_would_refuse_ends_the_first_one(root, monkeypatch, knobs, scale, machine, line):
    """Each ended the run after hours of training, the last one and the first in a traceback."""
    change(root / "params.yaml", **knobs)
    change(root / "profiles/cpu.yaml", **scale)
    for name, value in machine.items():
        monkeypatch.setenv(name, value)
    for stage in ("dense", "warmup", "window"):
        monkeypatch.setattr(f"stages.{stage}.from_dense", lambda *args, **kwargs: pytest.fail("the stage has begun"))
        with pytest.raises(params.ParamsError, match=f"^{line}") as error:
            __import__(f"stages.{stage}", fromlist=["main"]).main()
        assert "\n" not in str(error.value)


def test_tasks_longer_than_their_prompts_may_be_are_refused(root):
    """RULER's prompts were cut, without a word."""
    change(root / "profiles/cpu.yaml", harness={"max_length": 4096, "ruler_lengths": [4096, 8192]})
    with pytest.raises(params.ParamsError, match=r"cpu\.yaml: harness\.ruler_lengths: .*max_length = 4096"):
        params.load()


@pytest.mark.parametrize(
    "file,edit,line",
    [
        ("config.json", {"model_type": "gpt2"}, "no DSA for a 'gpt2' model: none of arcee, "),
        ("config.json", {"model_type": "bloom"}, "no DSA for a 'bloom' model: ALiBi"),
        ("config.json", {"use_sliding_window": True}, "use_sliding_window"),
        ("chat_template.jinja", None, "its tokenizer has no chat template"),
        ("tokenizer.json", ("<|im_end|>", "<|fin|>"), "its tokenizer does not know <|im_end|>"),
    ],
)
def test_a_base_model_that_cannot_be_used_ends_the_stage_that_brings_it(root, file, edit, line):
    """It ended the stage after the download, or the training, in a traceback."""
    path = root / "models/base" / file
    if edit is None:
        path.unlink()
    elif isinstance(edit, tuple):
        for each in (path, path.with_name("tokenizer_config.json")):
            each.write_text(each.read_text(encoding="utf-8").replace(*edit), encoding="utf-8")
    else:
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | edit), encoding="utf-8")
    with pytest.raises(params.ParamsError, match=rf"^model\.source: {line}") as error:
        check.base_model()
    assert "\n" not in str(error.value)
