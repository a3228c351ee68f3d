"""Questions that need many keys at once: the rows by counting, the statistics by hand, the page of a small run."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.data.rows import IGNORE
from stages import params
from stages.files import write_rows
from studies import many_keys
from studies.many_keys import ASKED, Rows, right, sampled, share
from studies.many_keys_report import breaks
from tests.conftest import ROOT, corpus_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


def test_each_question_has_the_votes_and_the_lead_that_it_says(tokenizer):
    """Counted again from the row itself; who leads changes, and no question shows an answer."""
    make, leaders = Rows(tokenizer, list(range(300, 4000))), []
    true, false = make.votes
    for seed in range(16):
        row = make(seed, 256, 64)
        ids, labels = row["input_ids"], row["labels"]
        assert len(ids) == len(labels) == len(make(0, 256, 64)["input_ids"])
        asked = [i for i, label in enumerate(labels) if label != IGNORE]
        assert len(asked) == len(ASKED)
        for i, m in zip(asked, ASKED, strict=True):
            cast = [ids[:i].count(true), ids[:i].count(false)]
            assert sum(cast) == m and max(cast) == max(m // 2 + 1, round(0.59375 * m))
            assert labels[i] == (true if cast[0] > cast[1] else false)
            assert ids[i - len(make.question) : i] == make.question
        leaders.append([labels[i] for i in asked])
        assert not {true, false} & set(ids[:64])
    assert all(len(set(column)) == 2 for column in zip(*leaders, strict=True))  # no place has always the same answer
    assert any(a != b for row in leaders for a, b in pairwise(row))
    assert make(0, 256, 64) == make(0, 256, 64) != make(1, 256, 64)


def test_the_answer_is_read_where_the_question_ends(tokenizer, monkeypatch):
    """A model that always says " True" is right where that vote leads, and nowhere else."""
    make = Rows(tokenizer, list(range(300, 4000)))
    rows = [make(seed, 32, 40) for seed in range(4)]
    model = from_dense(corpus_model(), topk=8, n_heads=2, head_dim=8).eval()
    true = make.votes[0]

    class Always(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], true), 4096).float()

    monkeypatch.setattr(model, "lm_head", Always())
    expected = [[label == true for label in row["labels"] if label != IGNORE] for row in rows]
    assert right(model, rows).tolist() == expected and {True, False} == {x for row in expected for x in row}


def test_a_sample_of_the_votes_by_hand():
    assert sampled(256, 256) == sampled(8, 64) == 1
    assert sampled(8, 1) == pytest.approx(5 / 8)
    # Two of five and three: both for the leader 10 / 28, one each 15 / 28, which tells in half of the cases.
    assert sampled(8, 2) == pytest.approx((10 + 7.5) / 28)
    assert sampled(256, 32) < sampled(256, 128) < 1


def test_wilsons_interval_knows_that_all_right_is_not_always_right():
    e = share(np.ones(48, bool))
    assert e["mean"] == 1 and e["low"] == pytest.approx(1 / (1 + 1.96**2 / 48), abs=1e-4) and e["high"] == 1


def test_where_a_choice_breaks():
    def cells(*means):
        return {str(m): {"mean": x, "low": x - 0.05, "high": x + 0.05} for m, x in zip((1, 8, 32), means, strict=True)}

    found = {"setup": {"asked": [1, 8, 32], "topk": [4, 16]}}
    found["right"] = {"dense": cells(0.9, 0.9, 0.9), "dsa_4": cells(0.9, 0.7, 0.5), "dsa_16": cells(0.7, 0.9, 0.88)}
    assert breaks(found, "dsa") == {4: 8, 16: None}


@pytest.mark.slow
def test_the_page_of_a_small_run(tmp_path, monkeypatch, tokenizer):
    model = from_dense(corpus_model(), topk=16, n_heads=2, head_dim=8)
    for x in (model, tokenizer):
        x.save_pretrained(tmp_path / "models/dsa")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    Path("data/long").mkdir(parents=True)
    text = "".join(f"line {i} of {i * i}\n" for i in range(400))
    for split in ("train", "test"):
        write_rows(Path(f"data/long/{split}.jsonl.gz"), [{"instruction": "x", "output": text}])
    for name, value in {"ASKED": (1, 8, 32), "TOPK": (4, 16), "ROWS": 4, "TEXT": 32}.items():
        monkeypatch.setattr(many_keys, name, value)
    monkeypatch.setattr(many_keys, "TRAINING", params.Training(steps=2, batch_size=2, learning_rate=1e-3))
    monkeypatch.setattr("sys.argv", ["many_keys"])
    many_keys.main()
    found = json.loads(Path("reports/many_keys.json").read_text(encoding="utf-8"))
    assert set(found["right"]) == {"dense", *(f"{c}_{k}" for c in ("dsa", "oracle", "window") for k in (4, 16))}
    assert found["setup"]["kl"] > 0 and found["setup"]["lm_loss"] > 0
    page = Path("reports/many_keys.md").read_text(encoding="utf-8")
    assert "{{" not in page and "nan" not in page and Path("reports/many_keys.png").is_file()
    monkeypatch.setattr("sys.argv", ["many_keys", "--from", "reports/many_keys.json"])
    many_keys.main()
    assert Path("reports/many_keys.md").read_text(encoding="utf-8") == page
