"""The full profile from end to end: the true tokenizer and config, real rows, hubs on this machine, the steps of its
rehearsal."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from stages import params
from stages.files import read_rows
from tests.conftest import SHARED
from tests.hub import Hub
from tests.test_pipeline import copy_of_project, run

DATA = SHARED / "data"
PUBLISHED = "qwen2.5-0.5b"
PROFILE = f"{PUBLISHED}-rehearsal"
BAD = {
    3: (b'{"instruction": "a", "input": "", "output": "b', "malformed JSON"),
    10: (b'{"instruction": "\xff", "output": "b"}', "not UTF-8"),
    17: (b'{"instruction": "a", "input": "", "output": ""}', "no answer"),
    18: (b'{"text": "a"}', "unknown schema"),
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.exists(), reason="the shared data are not here")]


def published_model(folder: Path) -> dict[str, bytes]:
    """A checkpoint in the published layout, with the true tokenizer and vocabulary and small random weights."""
    published = json.loads((DATA / PUBLISHED / "config.json").read_text(encoding="utf-8"))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = Qwen2Config(**published | small | {"num_key_value_heads": 2, "max_window_layers": 2})
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt"):
        shutil.copy(DATA / PUBLISHED / name, folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sft_rows() -> bytes:
    """Real rows with deepctrl's fields, and bad lines at known places."""
    lines = (DATA / "sft/moss_conversations.jsonl").read_bytes().splitlines()[:200]
    lines += (DATA / "sft/alpaca_zh_demo.jsonl").read_bytes().splitlines()
    more = {"input_len": 1, "output_len": 1, "num_utter": 1, "type": 31, "type_keyword": ["作者"]}
    lines = [json.dumps(json.loads(line) | more, ensure_ascii=False).encode() for line in lines]
    for number, (line, _) in BAD.items():
        lines.insert(number, line)
    return b"\n".join(lines) + b"\n"


def preference_shards() -> dict[str, bytes]:
    """COIG-P's published form: several pairs of one prompt, a domain, two shards."""
    lines = (DATA / "preference/dpo_zh_demo.sharegpt_form_50.jsonl").read_text(encoding="utf-8").splitlines()
    columns = ("conversations", "chosen", "rejected")
    rows = [{name: json.loads(line)[name] for name in columns} | {"domain": "Chat"} for line in lines for _ in range(2)]
    rows[5] |= {"chosen": rows[5]["rejected"]}
    shards = {}
    for number in range(2):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows[number::2]), sink)
        shards[f"data/train-{number:05}-of-00002.parquet"] = sink.getvalue().to_pybytes()
    return shards


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The project after `dvc repro`, from hubs whose connections break."""
    clone = copy_of_project(tmp_path_factory.mktemp("full") / "project")
    home = tmp_path_factory.mktemp("home")
    with Hub() as hub:
        model = published_model(tmp_path_factory.mktemp("model"))
        weights = hub.add("model", "Qwen/Qwen2.5-0.5B", model).sha256["model.safetensors"]
        hub.add("dataset", "deepctrl/deepctrl-sft-data", {"sft_data_zh.jsonl": sft_rows()})
        hub.add("dataset", "m-a-p/COIG-P", preference_shards())
        path = clone / f"profiles/{PROFILE}.yaml"
        profile = params.read(path)
        profile["model"]["source"] = ["hf://Qwen/Qwen2.5-0.5B@main", *profile["model"]["source"][1:]]
        profile["model"]["sha256"]["model.safetensors"] = weights
        profile["data"]["max_bad_rows"] = len(BAD)
        path.write_text(params.dump(profile), encoding="utf-8")
        knobs = params.read(clone / "params.yaml")
        (clone / "params.yaml").write_text(params.dump(knobs | {"profile": PROFILE}), encoding="utf-8")
        shutil.rmtree(clone / "reports")
        (clone / "dvc.lock").unlink()
        environment = {
            "HF_ENDPOINT": hub.url,
            "MODELSCOPE_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "DSA_SCRATCH": str(home / "scratch"),
            "HOME": str(home),
        }
        run(["dvc", "repro", "model"], clone, **environment)
        hub.breaks = [30_000, 200_000, None]  # in the middle of the instruction rows, twice
        run(["dvc", "repro"], clone, **environment)
        yield clone, hub


def metrics(clone: Path, name: str) -> dict:
    return json.loads((clone / "reports" / name).read_text(encoding="utf-8"))


def test_sources_and_revisions_are_recorded(full):
    clone, hub = full
    model, download = metrics(clone, "data/model.json"), metrics(clone, "data/download.json")
    assert model["source"].startswith("hf://Qwen") and model["revision"]
    assert download["sft"]["source"].startswith("modelscope://datasets/deepctrl") and download["sft"]["revision"]
    assert download["preference"]["source"].startswith("hf://datasets/m-a-p")
    assert len(hub.starts("sft_data_zh.jsonl")) > 3  # by the preflight, and again where the connection broke


def test_bad_lines_are_listed_with_their_numbers(full):
    clone, _ = full
    for name in ("data/download.json", "data/filter.json"):
        found = metrics(clone, name)
        bad = found.get("sft", found)["bad_rows"]
        listed = {n: reason for reason, rows in bad.items() for n in rows["row_numbers"]}
        assert listed == {number: reason for number, (_, reason) in BAD.items()}
    filtered = metrics(clone, "data/filter.json")
    assert filtered["complete"] and filtered["train"] + filtered["test"] == 24
    published = [
        json.loads(line) for line in (DATA / "sft/moss_conversations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    language = {row["id"]: row["language"] for row in published}
    kept = [row["id"] for side in ("train", "test") for row in read_rows(clone / f"data/long/{side}.jsonl.gz")]
    assert filtered["language"] == Counter(language[i] for i in kept) and len(kept) == 24


def test_pairs_of_a_prompt_are_on_one_side(full):
    clone, _ = full
    sides = [{str(r["prompt"]) for r in read_rows(clone / f"data/pairs/{s}.jsonl.gz")} for s in ("train", "test")]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert metrics(clone, "data/pairs.json")["left_out"]["equal answers"] == 1


def test_models_end_their_turns_with_both_ids(full):
    clone, _ = full
    for name in ("dsa", "dpo-dsa"):
        generation = json.loads((clone / f"models/{name}/generation_config.json").read_text(encoding="utf-8"))
        assert generation["eos_token_id"] == [151645, 151643] and generation["pad_token_id"] == 151643
    config = json.loads((clone / "models/dsa/config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2_dsa" and config["vocab_size"] == 151936


def test_training_and_evaluation_ran_on_real_rows(full):
    clone, _ = full
    sparse, dpo = metrics(clone, "train/sparse.json"), metrics(clone, "dpo/dsa.json")
    assert 10 < sparse["first"]["lm_loss"] < 13  # random weights, 151,936 tokens: ln V = 11.9
    assert dpo["first"]["loss"] == pytest.approx(0.6931, abs=0.01)
    assert metrics(clone, "evaluate/dsa.json")["arms"]["dsa"]["answer_tokens"] > 0


def test_the_report_says_where_everything_came_from(full):
    clone, _ = full
    report = (clone / "reports/report.md").read_text(encoding="utf-8")
    assert "hf://Qwen/Qwen2.5-0.5B@main @ " + metrics(clone, "data/model.json")["revision"] in report
    assert "modelscope://datasets/deepctrl/deepctrl-sft-data" in report and "hf://datasets/m-a-p/COIG-P" in report
    assert "1 malformed JSON" in report and "biased by its order" in report
    assert report.splitlines()[2].startswith("**A rehearsal. The numbers on this page mean nothing")
    assert "families" not in report and "look-up" not in report  # those are the corpus of the cpu profile


def test_without_a_network_one_line_says_what_to_set(tmp_path):
    """No hub answers: which hosts could not be reached, and which setting helps."""
    clone = copy_of_project(tmp_path / "project")
    knobs = params.read(clone / "params.yaml")
    (clone / "params.yaml").write_text(params.dump(knobs | {"profile": PROFILE}), encoding="utf-8")
    nobody = "http://127.0.0.1:9"
    environment = {"HF_ENDPOINT": nobody, "MODELSCOPE_ENDPOINT": nobody, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path), "DSA_SCRATCH": str(tmp_path)}
    done = run([sys.executable, "-m", "stages.model"], clone, check=False, **environment)
    assert done.returncode
    (line,) = [line for line in done.stderr.splitlines() if "127.0.0.1:9" in line and "WARNING" not in line][-1:]
    assert "HF_ENDPOINT" in line and "MODELSCOPE_ENDPOINT" in line and "Traceback" not in done.stderr
    assert not (clone / "models/base").exists()
