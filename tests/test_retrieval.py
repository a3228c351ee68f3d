"""Retrieval: what counts as an answer, and rows of the published form with the pair where it should be."""

import gzip
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.data.recall import Recall
from dsa.evaluation.exact import exact
from dsa.evaluation.predictions import correct, predict
from dsa.evaluation.retrieval import question, score
from tests.conftest import ROOT, SHARED

NEEDLE = SHARED / "data/needle/kv-retrieval-75_keys.rows0-332.jsonl.gz"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


def pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [tuple(f"{rng.getrandbits(64):x}" for _ in range(2)) for _ in range(count)]


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_asked_for_pair_is_where_it_should_be(tokenizer, depth):
    item = question(tokenizer, pairs(9), depth)
    text = tokenizer.decode(item.ids)
    value = tokenizer.decode(item.ids[slice(*item.span)])
    data = json.loads(text[text.index("{") : text.index("}") + 1])
    key = json.loads(text[text.index("Key: ") + 5 :].split("\n")[0])
    assert data[key] == value
    assert list(data).index(key) == round(8 * depth)


def test_scores_of_the_value_alone_are_those_of_the_whole_row(dense_model, tokenizer):
    dense_model.resize_token_embeddings(len(tokenizer))
    model = from_dense(dense_model, topk=9, n_heads=2, head_dim=8).eval()
    item = question(tokenizer, pairs(4), 0.5)
    with torch.no_grad():  # make it copy, so that some tokens are right
        item.ids[item.span[0] : item.span[1]] = predict(model, item.ids).argmax[item.span[0] - 1 : item.span[1] - 1]
    whole = correct(predict(model, item.ids), item.ids, item.span)
    ((right, _),) = score(model, [item])
    assert right.tolist() == whole.tolist() and whole.any()


def test_exact_counts_whole_values_and_can_leave_the_context_out(dense_model, tokenizer):
    """A value of two tokens of which one is right is no answer; without its context a row is asked the same."""
    dense_model.resize_token_embeddings(len(tokenizer))
    model = from_dense(dense_model, topk=9, n_heads=2, head_dim=8).eval()
    recall = Recall(tokenizer, torch.randint(3, 4000, (3000,), generator=torch.Generator().manual_seed(0)))
    for row in (recall.pairs_row(0, 256), recall.needles_row(0, 300)):
        for start in (0, row.context):
            first = row.spans[0][0]
            ids = row.ids[start:]
            row.ids[first] = predict(model, ids).argmax[first - 1 - start].item()  # half a value
            expected = [bool(correct(predict(model, row.ids[start:]), row.ids[start:], (a - start, b - start)).all())
                        for a, b in row.spans]  # fmt: skip
            assert exact(model, row, start) == expected
            assert not expected[0]
            row.ids[first + 1] = predict(model, row.ids[start:]).argmax[first - start].item()
            assert exact(model, row, start)[0]


@pytest.mark.skipif(not NEEDLE.exists(), reason="the shared data are not here")
def test_published_rows_fit_the_same_form():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/qwen2.5-0.5b")
    with gzip.open(NEEDLE, "rt", encoding="utf-8") as file:
        row = json.loads(next(file))
    at = [key for key, _ in row["ordered_kv_records"]].index(row["key"])
    item = question(tokenizer, [tuple(pair) for pair in row["ordered_kv_records"]], at / 74)
    assert tokenizer.decode(item.ids[slice(*item.span)]) == row["value"]
    assert 5049 <= len(item.ids) <= 5200  # 5049 to 5119 by the data's own README, without the question
