"""The analysis of failures on a small random model: routes against each other, observers against loops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense, index_scores
from dsa.data.rows import examples
from dsa.evaluation.predictions import attention_mass, observe_dense
from dsa.reference import attention_logits
from stages.arms import groups_of
from stages.files import read_rows, write_rows
from stages.statistics import Predictions
from studies import failures
from studies.common import interval
from studies.failures import decomposition, distribution, quarters
from studies.failures_report import verdict, write_report
from studies.probes import MissedKeys, QueryStatistics, losses, sparse_in
from tests.conftest import ROOT, corpus_model

TOPK = 6


@pytest.fixture
def model(dense_model):
    return from_dense(dense_model, topk=TOPK, n_heads=2, head_dim=8)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


class Recorder:
    """Observer: what each layer worked with."""

    def __init__(self):
        self.seen = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        self.seen.append((index, q, k, layer.scaling, indices))


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
        assert [indices is not None for *_, indices in recorder.seen] == [j == i for j in range(3)]
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


def brute_force(seen, t):
    """Attention of a query, [heads, keys], and the keys that the indexer selects for it, by sorting."""
    (index_q, index_k, weights), q, k, scaling, _ = seen
    p = attention_logits(q[:, :, t : t + 1], k[:, :, : t + 1], scaling)[0, :, 0].softmax(-1)
    scores = index_scores(index_q, index_k, weights)[0, t, : t + 1].tolist()
    return p, sorted(range(t + 1), key=lambda s: (-scores[s], s))[:TOPK]


def test_missed_keys_by_brute_force(model, ids):
    queries = [0, TOPK - 1, TOPK, 17, 39]
    observer, recorder = MissedKeys(queries, TOPK, 4), Recorder()
    for each in (observer, recorder):
        observe_dense(model, ids[:1], each)
    assert len(observer.layers) == 3
    for found, seen in zip(observer.layers, recorder.seen, strict=True):
        for t in queries:
            p, selected = brute_force(seen, t)
            mass, keys = found[t]
            missed = [s for s in range(t + 1) if s not in selected]
            assert mass == pytest.approx(sum(p.mean(0)[s].item() for s in missed), abs=1e-6)
            assert {s for s, _ in keys} <= set(missed) and len(keys) == min(4, len(missed))
            largest = sorted((p.mean(0)[s].item() for s in missed), reverse=True)[:4]
            assert [x for _, x in keys] == pytest.approx(largest, abs=1e-6)
    assert observer.layers[0][TOPK - 1] == (0.0, []) and observer.layers[0][TOPK][1]


def test_query_statistics_by_brute_force_and_by_those_of_the_stage(model, ids):
    observer, recorder = QueryStatistics(TOPK, sinks=2), Recorder()
    for each in (observer, recorder):
        observe_dense(model, ids[:1], each)
    mass = attention_mass(model, ids[:1], TOPK)["mass"]
    for layer, seen, expected in zip(observer.layers, recorder.seen, mass, strict=True):
        assert layer["sink_mass"].shape == (6, 40) and layer["selected"][TOPK:].mean() == pytest.approx(expected)
        for t in (0, 5, 20, 39):
            p, selected = brute_force(seen, t)
            best = p.mean(0).argsort(descending=True)[:TOPK].tolist()
            assert layer["sink_mass"][:, t] == pytest.approx(p[:, :2].sum(-1).numpy(), abs=1e-6)
            assert layer["selected"][t] == pytest.approx(p.mean(0)[selected].sum().item(), abs=1e-5)
            assert layer["all"][t] == ({0, 1} <= set(selected)) and layer["any"][t] == bool({0, 1} & set(selected))
            assert layer["oracle_all"][t] == ({0, 1} <= set(best))
    assert observer.missed() == pytest.approx(1 - np.mean([x["selected"] for x in observer.layers], axis=0))


def save_predictions(folder: Path, lengths, answers, nll: dict[str, np.ndarray], **more) -> None:
    (folder / "data/evaluate").mkdir(parents=True)
    groups = {"dense": ("dense",), "warmup": ("base", "oracle", "warmup"), "dsa": ("dsa_oracle", "dsa")}
    for group, arms in groups.items():
        arrays = {f"nll_{arm}": nll[arm] for arm in arms} | more
        np.savez(folder / f"data/evaluate/{group}.npz", lengths=lengths, answers=answers, **arrays)


def test_the_parts_add_up_on_the_rows_that_all_arms_have(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = np.array([5, 9, 7, 4])
    answers = rng.random(25) < 0.6
    answers[[0, 5, 14]] = True
    nll = {arm: rng.random(25 if arm in ("dense", "dsa") else 21).astype(np.float32) for arm in failures.ARMS}
    save_predictions(tmp_path, lengths, answers, nll)
    monkeypatch.chdir(tmp_path)
    found = decomposition(Predictions(groups_of(*failures.ARMS)), np.array([0, 1, 0, 2]))
    for group in ("base", "trained", "change"):
        assert found[f"{group}_budget"]["mean"] + found[f"{group}_indexer"]["mean"] == pytest.approx(
            found[group]["mean"]
        )
    assert found["change"]["mean"] == pytest.approx(found["trained"]["mean"] - found["base"]["mean"])
    gap = (nll["dsa"] - nll["dense"])[:21][answers[:21]]
    assert found["trained"]["mean"] == pytest.approx(gap.mean(), abs=1e-6)
    assert found["trained"]["units"] == 3 and found["trained"]["by_family"]["units"] == 2


def test_interval_by_hand():
    # Rows of 1 and 3 tokens: mean 8 / 4 = 2, residuals 4 - 2 = 2 and 4 - 6 = -2, so sqrt(2 / 1 * 8) / 4 = 1.
    e = interval(np.array([4.0, 1.0, 1.0, 2.0]), np.array([0, 1, 1, 1]))
    assert (e["mean"], e["error"], e["units"], e["tokens"]) == (2, 1, 2, 4)
    assert (e["low"], e["high"]) == (pytest.approx(2 - 12.706, abs=1e-3), pytest.approx(2 + 12.706, abs=1e-3))
    with pytest.raises(SystemExit, match="two rows"):
        interval(np.array([1.0, 2.0]), np.array([3, 3]))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (10, 2.228), (15, 2.131), (47, 2.012), (1000, 1.962)])
def test_the_fewer_rows_the_wider_an_interval(freedom, quantile):
    """1.96 standard errors of three rows hold the mean in four of five cases, not in nineteen of twenty."""
    rows = np.arange(freedom + 1)
    e = interval(rows.astype(float), rows)
    assert (e["high"] - e["mean"]) / e["error"] == pytest.approx(quantile, abs=1e-3)


def test_distribution_and_quarters_by_hand():
    gaps = np.zeros(200)
    gaps[:4] = 3.0, -2.0, 0.5, -0.5
    d = distribution(gaps)
    assert (d["same"], d["lost"], d["won"]) == (0.98, 3.5, -2.5)
    assert (d["largest"], d["largest_lost"], d["largest_won"]) == (2, 3.0, -2.0)
    found = quarters(np.arange(8.0), np.array([0.7, 0.0, 0.6, 0.1, 0.5, 0.2, 0.4, 0.3]), np.arange(8))
    assert [x["gap"]["mean"] for x in found] == [2.0, 6.0, 5.0, 1.0]
    assert [x["missed"] for x in found] == pytest.approx([0.05, 0.25, 0.45, 0.65])


def test_verdicts():
    def said(low, high):
        return verdict({"low": low, "high": high})

    assert said(0.001, 0.02) == "a loss" and said(-0.03, -0.001) == "a gain"
    assert said(0.001, 0.005).startswith("a loss, of less than") and said(-0.005, -0.001).startswith("a gain, of less")
    assert "less than 0.01 nats either way" in said(-0.001, 0.005)
    assert "not excluded" in said(-0.001, 0.02) and "not excluded" in said(-0.02, 0.001)


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """A folder with a small random model, rows and predictions: the model's own as DSA, with noise as other arms."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    model = from_dense(corpus_model(), topk=16, n_heads=2, head_dim=8).eval()
    for x in (model, tokenizer):
        x.save_pretrained(tmp_path / "models/dsa")
    monkeypatch.chdir(tmp_path)
    texts = [
        {
            "instruction": "What | is\n" + "def `f`(x):\n" * (12 + i),
            "output": "a `b` | c\n" * 6,
            "data_source": f"s{i % 2}",
        }
        for i in range(6)
    ]
    file = Path("data/long/test.jsonl.gz")
    write_rows(file, texts)
    rows = examples(tokenizer, read_rows(file), 512)
    nll = losses(model, rows, range(2))
    lengths = [len(row["input_ids"]) - 1 for row in rows]
    answers = np.concatenate([np.array(row["labels"][1:]) >= 0 for row in rows])
    rng = np.random.default_rng(0)
    all_arms = {arm: (nll + 0.1 * rng.standard_normal(len(nll))).astype(np.float32) for arm in failures.ARMS}
    first = np.zeros(len(nll), int)
    more = {"argmax_dense": first, "argmax_dsa": first}
    save_predictions(tmp_path, np.array(lengths), answers, all_arms | {"dsa": nll}, **more)
    return tmp_path


@pytest.mark.slow
def test_the_page_of_a_finished_run(finished_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["failures", "--rows", "3"])
    failures.main()
    found = json.loads(Path("reports/failures.json").read_text(encoding="utf-8"))
    assert len(found["worst"]["shown"]) == failures.ROWS and found["layers"]["rows"] == 3
    means = [row["gap"] for row in found["worst"]["shown"]]
    assert means == sorted(found["worst"]["gaps"], reverse=True)[: failures.ROWS]
    for row in found["worst"]["shown"]:
        gaps = [token["gap"] for token in row["tokens"]]
        assert len(gaps) == failures.TOKENS and gaps == sorted(gaps, reverse=True)
    text = Path("reports/failures.md").read_text(encoding="utf-8")
    assert "{{" not in text and "nan" not in text and text.count("\n### Row") == failures.ROWS
    assert {p.name for p in Path("reports/failures").iterdir()} == {"decomposition.png", "layers.png", "rows.png"}
    write_report(found, Path("again"))
    assert Path("again/failures.md").read_text(encoding="utf-8") == text


def test_another_model_or_other_rows_are_refused(finished_run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["failures", "--rows", "3"])
    for name in ("dense", "warmup", "dsa"):
        file = f"data/evaluate/{name}.npz"
        with np.load(file) as arrays:
            content = dict(arrays)
        np.savez(file, **{k: v + 0.1 if k.startswith("nll") else v for k, v in content.items()})
    with pytest.raises(SystemExit, match="the model is not the one"):
        failures.main()
    write_rows(Path("data/long/test.jsonl.gz"), [{"instruction": "x", "output": "y " * 40}] * 6)
    with pytest.raises(SystemExit, match="does not hold the rows"):
        failures.main()
    assert not Path("reports/failures.json").exists()
