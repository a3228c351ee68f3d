"""The benchmark of long contexts on small random models, and its statistics by hand."""

import gzip
import json
import shutil
from pathlib import Path

import markdown_it
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.evaluation.needles import token_losses
from dsa.evaluation.retrieval import Question
from stages.files import write_rows
from studies import long_context
from studies.long_context import DEPTHS, Item, documents, extrapolation, published_items, summary
from studies.long_context_report import side, verdict, write_report
from tests.conftest import ROOT, SHARED, corpus_model

NEEDLE = SHARED / "data/needle/kv-retrieval-75_keys.rows0-332.jsonl.gz"
PROSE = "".join(f"Chapter {i} has words, of which number {i * i} is one. Is it true?\n" for i in range(900))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


@pytest.fixture
def finished_run(tmp_path, monkeypatch, tokenizer):
    """A folder with params, small random models of each arm, a text and rows of key-value retrieval."""
    base = corpus_model(max_position_embeddings=8192)
    for name, selector in (("dense", None), ("dsa", "indexer"), ("window", "window")):
        model = from_dense(base, topk=16, n_heads=2, head_dim=8)
        model.config.attention_mode = "sparse" if selector else "dense"
        model.config.selector = selector or "indexer"
        for x in (model, tokenizer):
            x.save_pretrained(tmp_path / "models" / name)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    with gzip.open(tmp_path / "book.txt.gz", "wt", encoding="utf-8") as file:
        file.write(PROSE)
    pairs = [[f"key-{i}", f"value {i * 7919}"] for i in range(12)]
    rows = [{"ordered_kv_records": pairs, "key": k, "value": v} for k, v in pairs]
    write_rows(tmp_path / "kv.jsonl.gz", rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_page_of_a_finished_run(finished_run, monkeypatch):
    arguments = ["--lengths", "400", "600", "4400", "--rows", "2", "--documents", "3", "--text", "book.txt.gz"]
    monkeypatch.setattr("sys.argv", ["long_context", *arguments, "--kv", "kv.jsonl.gz", "--kv-rows", "10"])
    long_context.main()
    found = json.loads(Path("reports/long_context.json").read_text(encoding="utf-8"))
    setup = found["setup"]
    assert (setup["topk"], setup["trained"], setup["lengths"]) == (16, 4096, [400, 600, 4400])
    assert len(set(setup["sources"])) == 3 and "locker" in setup["form"]["fact"]
    for name in ("needle", "multikey"):
        task = found[name]
        assert task["lengths"] == [400, 600, 4400] and task["rows"] == 2
        assert task["trained"]["items"] == 2 * 2 * len(DEPTHS) and task["beyond"]["items"] == 2 * len(DEPTHS)
        cells = np.array(task["cells"]["dsa"]["nats"])
        assert cells.shape == (5, 3)  # every cell has as many questions, so their mean is that of the table
        assert task["by_length"][1]["means"]["dsa"]["nats"] == pytest.approx(cells[:, 1].mean(), abs=1e-5)
    assert found["kv"]["rows"] == 10 and found["kv"]["beyond"] is None
    assert [b["from"] for b in found["extrapolation"]["bins"]] == list(range(0, 4400, 256))
    first = found["extrapolation"]["bins"][0]
    assert first["means"]["dense"] != first["means"]["dsa"] != first["means"]["window_trained"]
    assert "python -m studies.long_context --lengths 400" in found["run"]["command"]
    text = Path("reports/long_context.md").read_text(encoding="utf-8")
    assert "{{" not in text and "nan" not in text and "None" not in text
    figures = {p.name for p in Path("reports/long_context").iterdir()}
    assert figures == {"needle.png", "multikey.png", "kv.png", "extrapolation.png"}
    assert all(f"(long_context/{name})" in text for name in figures)
    tables = [t for t in markdown_it.MarkdownIt("commonmark").enable("table").parse(text) if t.type == "table_open"]
    assert len(tables) == 2 * 3 + 2
    write_report(found, Path("again"))
    assert Path("again/long_context.md").read_text(encoding="utf-8") == text


def test_all_models_and_arms_are_those_that_are_named(finished_run, tokenizer):
    ids = tokenizer(PROSE)["input_ids"][:300]
    losses = {arm: token_losses(long_context.load(arm), ids) for arm in long_context.SHOWN}
    for arm in ("dsa", "window_trained"):
        assert torch.allclose(losses[arm][:15], losses["dense"][:15], atol=1e-3)  # up to k the same keys and weights
        assert not torch.allclose(losses[arm][20:], losses["dense"][20:], atol=1e-3)
    assert not torch.allclose(losses["dsa"], losses["window_trained"], atol=1e-3)


def test_documents_are_of_one_text_each_and_of_many_families(tokenizer):
    long, short = PROSE, PROSE[:2000]
    texts = [("a/1", "a", long), ("a/2", "a", "x " + long), ("b/1", "b", short[:1000]), ("c/1", "c", "y " + long)]
    found = documents(tokenizer, iter(texts), 500, 3, cut=False)
    assert [d.source for d in found] == ["a/1", "c/1", "a/2"]
    assert found[0].ids == tokenizer(long)["input_ids"][:500] and long.startswith(found[0].text)
    pieces = documents(tokenizer, iter([("p", "p", long)]), 500, 3, cut=True)
    assert [i for d in pieces for i in d.ids] == tokenizer(long)["input_ids"][:1500]
    assert "".join(d.text for d in pieces) == long[: sum(len(d.text) for d in pieces)]
    with pytest.raises(SystemExit, match="1 documents of 500 tokens"):
        documents(tokenizer, iter(texts[:1]), 500, 3, cut=False)


def test_a_profile_without_files_needs_texts(finished_run, monkeypatch):
    file = finished_run / "params.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("profile: cpu", "profile: qwen2.5-0.5b"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["long_context"])
    with pytest.raises(SystemExit, match="--text"):
        long_context.main()


def test_arms_of_other_k_are_refused(finished_run, monkeypatch):
    file = finished_run / "models/window/config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"index_topk": 16', '"index_topk": 32'), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["long_context", "--lengths", "400", "--rows", "2", "--text", "book.txt.gz"])
    with pytest.raises(SystemExit, match="different numbers of keys"):
        long_context.main()


def test_summary_by_hand():
    """Two documents, lengths 10 and 30, depths 0 and 1: the units are documents, not questions."""
    items = [Item(Question([], (0, 1), d), n, row) for n in (10, 30) for row in (0, 1) for d in (0.0, 1.0)]
    dense = np.zeros((8, 3))
    dsa = np.zeros((8, 3))
    dsa[:, 1] = [1, 3, 5, 7, 0, 0, 2, 2]  # nats
    found = summary(items, {"dense": dense, "dsa": dsa}, trained=20)
    assert found["lengths"] == [10, 30] and found["rows"] == 2
    assert [found["cells"]["dsa"]["nats"][i] for i in (0, 4)] == [[3, 1], [5, 1]]
    assert np.isnan(found["cells"]["dsa"]["nats"][2]).all()  # no question at half of the depth
    e = found["by_length"][0]["gaps"]["dsa"]["nats"]
    # Documents' means 2 and 6: mean 4, standard error 2, t of one degree of freedom.
    assert (e["mean"], e["error"], e["units"]) == (4, 2, 2) and e["high"] == pytest.approx(4 + 2 * 12.706, abs=1e-3)
    assert found["trained"] == found["by_length"][0] and found["beyond"] == found["by_length"][1]
    assert found["by_depth"][0]["means"]["dsa"]["nats"] == 3 and found["by_depth"][2] is None


def test_extrapolation_by_hand():
    dense = np.zeros((3, 512))
    dsa = np.zeros((3, 512))
    dsa[:, 256:] = np.array([[1.0], [2.0], [3.0]])
    dsa[:, :100] = 9.0
    found = extrapolation({"dense": dense, "dsa": dsa}, np.array([0, 0, 1]), trained=256, topk=100)
    assert {name: part["means"]["dsa"] for name, part in found["parts"].items()} == {
        "up_to_k": 9,
        "trained": 0,
        "beyond": 2,
    }
    beyond = found["parts"]["beyond"]["gaps"]["dsa"]
    assert (beyond["mean"], beyond["units"], beyond["by_family"]["units"]) == (2, 3, 2)
    assert beyond["error"] == pytest.approx(1 / 3**0.5)
    growth = found["growth"]["dsa"]
    assert (growth["mean"], growth["units"]) == (2, 3) and growth["error"] == pytest.approx(1 / 3**0.5)
    assert found["own"]["dense"]["mean"] == 0 and found["own"]["dsa"]["mean"] == 2
    assert [b["means"]["dsa"] for b in found["bins"]] == [900 / 256, 2]
    assert "growth" not in extrapolation({"dense": dense, "dsa": dsa}, np.array([0, 0, 1]), trained=512, topk=100)


def test_verdicts():
    def e(low, high):
        return {"mean": (low + high) / 2, "low": low, "high": high}

    zero, less, more = e(-1, 1), e(-2, -1), e(1, 2)
    assert [side(x) for x in (zero, less, more)] == [0, -1, 1]
    assert verdict({"tokens": zero, "nats": zero}) == "not told apart"
    assert verdict({"tokens": less, "nats": more}) == "fewer tokens right and a higher loss"
    assert verdict({"tokens": zero, "nats": less}) == "a lower loss; the share of tokens right is not told apart"
    assert verdict({"tokens": more, "nats": zero}) == "more tokens right; the loss is not told apart"


@pytest.mark.skipif(not NEEDLE.exists(), reason="the shared data are not here")
def test_published_rows_are_put_at_the_nearest_depth():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/qwen2.5-0.5b")
    items = published_items(tokenizer, [NEEDLE], 20)
    assert [item.row for item in items] == list(range(20)) and len({item.length for item in items}) == 1
    assert {item.question.depth for item in items} <= set(DEPTHS)
    assert max(len(item.question.ids) for item in items) == items[0].length <= 5300
