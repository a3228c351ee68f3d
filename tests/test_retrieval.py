"""Key-value retrieval: rows of the published form, of the asked-for length, with the pair where it should be."""

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.evaluation.predictions import correct, predict
from dsa.evaluation.retrieval import question, questions, score
from tests.conftest import ROOT, SHARED

NEEDLE = SHARED / "data/needle/kv-retrieval-75_keys.rows0-332.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


@pytest.mark.parametrize("length", [400, 1024])
def test_rows_have_the_length_and_the_depth(tokenizer, length):
    items = questions(tokenizer, length, depths=3, rows=2, seed=0)
    assert len(items) == 6
    for i, item in enumerate(items):
        assert 0.8 * length < len(item.ids) <= length
        assert item.depth == i % 3 / 2
        text = tokenizer.decode(item.ids)
        value = tokenizer.decode(item.ids[slice(*item.span)])
        data = json.loads(text[text.index("{") : text.index("}") + 1])
        key = json.loads(text[text.index("Key: ") + 5 :].split("\n")[0])
        assert data[key] == value
        assert list(data).index(key) == round(item.depth * (len(data) - 1))
    assert [i.ids for i in items] == [i.ids for i in questions(tokenizer, length, 3, 2, 0)]
    assert [i.ids for i in items] != [i.ids for i in questions(tokenizer, length, 3, 2, 1)]


def test_too_short_a_context_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="5 pairs do not fit into 64 tokens"):
        questions(tokenizer, 64, depths=5, rows=1, seed=0)


def test_scores_of_the_value_alone_are_those_of_the_whole_row(dense_model, tokenizer):
    dense_model.resize_token_embeddings(len(tokenizer))
    model = from_dense(dense_model, topk=9, n_heads=2, head_dim=8).eval()
    (item, *_) = questions(tokenizer, 300, depths=2, rows=1, seed=0)
    with torch.no_grad():  # make it copy, so that some tokens are right
        item.ids[item.span[0] : item.span[1]] = predict(model, item.ids).argmax[item.span[0] - 1 : item.span[1] - 1]
    whole = correct(predict(model, item.ids), item.ids, item.span)
    ((right, _),) = score(model, [item])
    assert right.tolist() == whole.tolist() and whole.any()


@pytest.mark.skipif(not NEEDLE.exists(), reason="the shared data are not here")
def test_published_rows_fit_the_same_form():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/qwen2.5-0.5b")
    with gzip.open(NEEDLE, "rt", encoding="utf-8") as file:
        row = json.loads(next(file))
    at = [key for key, _ in row["ordered_kv_records"]].index(row["key"])
    item = question(tokenizer, [tuple(pair) for pair in row["ordered_kv_records"]], at / 74)
    assert tokenizer.decode(item.ids[slice(*item.span)]) == row["value"]
    assert 5049 <= len(item.ids) <= 5200  # 5049 to 5119 by the data's own README, without the question
