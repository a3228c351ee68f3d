"""Where DSA loses, on small random models: routes against each other, and statistics by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.data.recall import Recall
from dsa.data.rows import examples
from dsa.evaluation.predictions import predict
from stages import params
from stages.files import read_rows, write_rows
from studies import failures
from studies.common import interval
from studies.failures import by_context, growth, lengths, losses, sparse_in, text_losses, value_losses
from studies.failures_report import verdict, write_report
from tests.conftest import ROOT, corpus_model

TOPK = 6


@pytest.fixture
def model(dense_model):
    return from_dense(dense_model, topk=TOPK, n_heads=2, head_dim=8)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


class Recorder:
    """Observer: the keys that each layer selected."""

    def __init__(self):
        self.seen = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        self.seen.append(indices)


def test_all_layers_sparse_is_plain_sparse_and_none_is_dense(model, ids):
    sparse = logits(model, ids)
    with sparse_in(model, range(3)):
        assert torch.equal(logits(model, ids), sparse)
    with sparse_in(model, ()):
        none = logits(model, ids)
    assert torch.equal(logits(model, ids), sparse)
    model.config.attention_mode = "dense"
    assert torch.equal(logits(model, ids), none) and not torch.equal(none, sparse)


def test_one_layer_alone_is_sparse(model, ids):
    outputs = []
    for i in range(3):
        recorder = Recorder()
        with sparse_in(model, [i]), torch.no_grad():
            outputs.append(model.model(ids, observer=recorder, use_cache=False).last_hidden_state)
        assert [indices is not None for indices in recorder.seen] == [j == i for j in range(3)]
    assert not any(torch.equal(a, b) for a, b in zip(outputs, [*outputs[1:], outputs[0]], strict=True))


@pytest.mark.parametrize("topk", [40, 41])
def test_a_layer_that_selects_every_key_costs_nothing(model, ids, topk):
    model.config.index_topk = topk
    with sparse_in(model, ()):
        dense = logits(model, ids)
    for layers in ([0], [2], [0, 1]):
        with sparse_in(model, layers):
            assert torch.allclose(logits(model, ids), dense, atol=1e-4)


def test_configs_are_put_back_after_an_error(model):
    configs = [layer.self_attn.config for layer in model.model.layers]
    with pytest.raises(ZeroDivisionError), sparse_in(model, [1]):
        1 / 0  # noqa: B018
    assert model.config.attention_mode == "sparse"
    assert all(layer.self_attn.config is c for layer, c in zip(model.model.layers, configs, strict=True))


def test_losses_are_those_of_the_model_row_by_row(model, ids):
    rows = [{"input_ids": ids[0].tolist()}, {"input_ids": ids[1, :30].tolist()}]
    got = losses(model, rows, range(3))
    wanted = model(ids[1:, :30], labels=ids[1:, :30]).loss.item()
    assert got.shape == (39 + 29,) and got[39:].mean() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("longest", "expected"), [(4096, [1024, 2048, 4096]), (3000, [1024, 2048, 3000]), (512, [512]), (1024, [1024])]
)
def test_lengths_end_at_the_longest_that_was_trained(longest, expected):
    assert lengths(longest) == expected


def test_the_same_last_tokens_are_scored_whatever_the_context(model, ids, monkeypatch):
    monkeypatch.setattr(failures, "TAIL", 4)
    row = ids[0].tolist()
    whole = predict(model, row).nll
    assert text_losses(model, row, 40) == pytest.approx(whole[-4:].mean().item())
    assert text_losses(model, row, 20) == pytest.approx(predict(model, row[20:]).nll[-4:].mean().item())
    assert text_losses(model, row, 20) != pytest.approx(whole[-4:].mean().item())


def test_values_are_scored_at_the_positions_that_predict_them():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    model = from_dense(corpus_model(), topk=16, n_heads=2, head_dim=8).eval()
    recall = Recall(tokenizer, torch.arange(1, 2000) % 300)
    makers = list(recall.tests.values())
    row = makers[1](0, 400)  # seed 1: the second test's first row
    log_p = logits(model, torch.tensor([row.ids]))[0].log_softmax(-1)
    wanted = np.mean([[-log_p[i - 1, row.ids[i]].item() for i in range(*span)] for span in row.spans])
    assert value_losses(model, makers, 1, 400) == pytest.approx(wanted, abs=1e-4)


def test_growth_by_hand():
    gaps = np.array([[0.0, 0.1, 0.2], [0.1, 0.1, 0.1]])  # a slope of 0.1 each doubling, and of none
    found = growth(gaps, [1024, 2048, 4096], np.arange(2))
    assert [e["mean"] for e in found["at"]] == pytest.approx([0.05, 0.1, 0.15])
    assert found["per_doubling"]["mean"] == pytest.approx(0.05)
    assert found["per_doubling"]["high"] == pytest.approx(0.05 + 12.706 * 0.05, abs=1e-3)


def test_a_model_beside_itself_has_no_gap_but_by_its_keys(monkeypatch):
    """With k as large as the context "fixed" equals "dense"; "share" has fewer keys where the context is shorter."""
    monkeypatch.setattr(failures, "TAIL", 16)
    monkeypatch.setattr(failures, "VALUE_ROWS", 1)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    dsa = from_dense(corpus_model(), topk=800, n_heads=2, head_dim=8).eval()
    dense = from_dense(corpus_model(), topk=800, n_heads=2, head_dim=8, attention_mode="dense").eval()
    dense.load_state_dict(dsa.state_dict())
    texts = [{"input_ids": [(7 * i + j) % 500 for j in range(800)]} for i in range(3)]
    recall = Recall(tokenizer, torch.arange(1, 4000) % 300)
    found = by_context({"dsa": dsa, "dense": dense}, texts, np.arange(3), recall, 800, [400, 800])
    for test in ("text", "values"):
        for way in ("every", "fixed"):
            assert all(abs(e["mean"]) < 1e-4 for e in found[test][way]["at"])
        half, whole = found[test]["share"]["at"]
        assert abs(whole["mean"]) < 1e-4 and abs(half["mean"]) < 1e-4  # 400 of 400 keys
    found = by_context({"dsa": dsa, "dense": dense}, texts, np.arange(3), recall, 80, [400, 800])
    half, whole = zip(found["text"]["share"]["at"], found["text"]["fixed"]["at"], strict=True)
    assert half[0]["mean"] != half[1]["mean"] and whole[0] == whole[1]


def test_interval_by_hand():
    # Rows of 1 and 3 tokens: mean 8 / 4 = 2, residuals 4 - 2 = 2 and 4 - 6 = -2, so sqrt(2 / 1 * 8) / 4 = 1.
    e = interval(np.array([4.0, 1.0, 1.0, 2.0]), np.array([0, 1, 1, 1]))
    assert (e["mean"], e["units"], e["tokens"]) == (2, 2, 4)
    assert (e["low"], e["high"]) == (pytest.approx(2 - 12.706, abs=1e-3), pytest.approx(2 + 12.706, abs=1e-3))
    with pytest.raises(SystemExit, match="two rows"):
        interval(np.array([1.0, 2.0]), np.array([3, 3]))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (10, 2.228), (15, 2.131), (47, 2.012), (1000, 1.962)])
def test_the_fewer_rows_the_wider_an_interval(freedom, quantile):
    """1.96 standard errors of three rows hold the mean in four of five cases, not in nineteen of twenty."""
    rows = np.arange(freedom + 1)
    e = interval(rows.astype(float), rows)
    error = rows.std(ddof=1) / len(rows) ** 0.5
    assert (e["high"] - e["mean"]) / error == pytest.approx(quantile, abs=1e-3)


def test_verdicts():
    def said(low, high):
        return verdict({"low": low, "high": high})

    assert said(0.001, 0.02) == "a loss" and said(-0.03, -0.001) == "a gain"
    assert said(0.001, 0.005).startswith("a loss, of less than") and said(-0.005, -0.001).startswith("a gain, of less")
    assert "less than 0.01 nats either way" in said(-0.001, 0.005)
    assert "not excluded" in said(-0.001, 0.02) and "not excluded" in said(-0.02, 0.001)


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """A folder with small random models, params, rows and predictions: DSA's own, and with noise those of dense."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    model = from_dense(corpus_model(), topk=16, n_heads=2, head_dim=8).eval()
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    content = params.read(ROOT / "params.yaml") | {"topk": 16}
    Path("params.yaml").write_text(params.dump(content), encoding="utf-8")
    profile = params.read(Path("profiles/cpu.yaml"))
    profile["data"] |= {"min_tokens": 64, "max_length": 512}
    Path("profiles/cpu.yaml").write_text(params.dump(profile), encoding="utf-8")
    for arm in ("dsa", "dense"):
        model.config.attention_mode = {"dsa": "sparse", "dense": "dense"}[arm]
        for x in (model, tokenizer):
            x.save_pretrained(tmp_path / "models" / arm)
    model.config.attention_mode = "sparse"
    question = "What | is\n" + "def `f`(x):\n" * 56
    texts = [{"instruction": question, "output": f"a `b` {i} | c\n" * 12, "data_source": f"s{i % 3}"} for i in range(6)]
    for text in texts:
        text["type_keyword"] = ["continue"]
    Path("data/long").mkdir(parents=True)
    Path("data/evaluate").mkdir()
    write_rows(Path("data/long/test.jsonl.gz"), texts)
    rows = examples(tokenizer, read_rows(Path("data/long/test.jsonl.gz")), 512)
    nll = losses(model, rows, range(2))
    lengths = np.array([len(row["input_ids"]) - 1 for row in rows])
    answers = np.concatenate([np.array(row["labels"][1:]) >= 0 for row in rows])
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(nll))
    for arm, values in (("dsa", nll), ("dense", nll + noise)):
        arrays = {f"nll_{arm}": values.astype(np.float32), f"argmax_{arm}": np.zeros(len(nll), int)}
        np.savez(f"data/evaluate/{arm}.npz", lengths=lengths, answers=answers, lookup_row=[], **arrays)
    monkeypatch.setattr(failures, "TAIL", 32)
    monkeypatch.setattr("sys.argv", ["failures"])
    return tmp_path


@pytest.mark.slow
def test_the_page_of_a_finished_run(finished_run, monkeypatch):
    failures.main()
    found = json.loads(Path("reports/failures.json").read_text(encoding="utf-8"))
    assert found["layers"]["rows"] == 3 and found["setup"]["lengths"] == [512]
    means = [row["gap"] for row in found["worst"]["shown"]]
    assert means == sorted(found["worst"]["gaps"], reverse=True)[: failures.SHOWN]
    text = Path("reports/failures.md").read_text(encoding="utf-8")
    assert "{{" not in text and "nan" not in text and text.count("| a file to continue |") == failures.SHOWN
    monkeypatch.setattr("sys.argv", ["failures", "--from", "reports/failures.json"])
    failures.main()
    assert Path("reports/failures.md").read_text(encoding="utf-8") == text
    write_report(found, Path("again"))
    assert (Path("again/failures.png")).is_file()


@pytest.mark.slow
def test_another_model_or_other_rows_are_refused(finished_run, monkeypatch):
    monkeypatch.setattr(failures, "by_context", lambda *args: {})
    with np.load("data/evaluate/dsa.npz") as arrays:
        content = dict(arrays)
    np.savez("data/evaluate/dsa.npz", **content | {"nll_dsa": content["nll_dsa"] + 0.1})
    with pytest.raises(SystemExit, match="the model is not the one"):
        failures.main()
    write_rows(Path("data/long/test.jsonl.gz"), [{"instruction": "x", "output": "y " * 40}] * 6)
    with pytest.raises(SystemExit, match="does not hold the rows"):
        failures.main()
    assert not Path("reports/failures.json").exists()
