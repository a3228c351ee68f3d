"""Needles in a haystack: facts stand where they should, rows have their length, and scores from a cache are true."""

import gzip
import itertools
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

from dsa import from_dense
from dsa.evaluation.needles import DOCSTRING, SENTENCE, Haystack, facts, published, token_losses
from dsa.evaluation.predictions import correct, predict
from dsa.evaluation.retrieval import score
from stages.files import read_rows
from tests.conftest import ROOT, SHARED, error_ratio

NEEDLE = SHARED / "data/needle/kv-retrieval-75_keys.rows0-332.jsonl.gz"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LINES = "".join(f"    name_{i} = load(path, {i} + offset)  # of a line\n" for i in range(400))
PROSE = "It was the best of times. Was it the worst of times? It was the age of wisdom!\n\n" * 200
CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争！" * 100


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


@pytest.fixture
def small(dense_model, tokenizer):
    dense_model.resize_token_embeddings(len(tokenizer))
    return dense_model


def planted(form, text):
    """Every fact of a row's text: [(key, value, characters before it)]."""
    pattern = (
        re.escape(form.fact.strip()).replace(r"\{key\}", r"([A-Za-z_\-]+)").replace(r"\{value\}", r"(\d+| \w+ \w+)")
    )
    return [(m[1], m[2], m.start()) for m in re.finditer(pattern, text)]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("form", "text"), [(DOCSTRING, LINES), (SENTENCE, PROSE), (SENTENCE, CHINESE)])
@pytest.mark.parametrize("length", [900, 1500])
def test_rows_have_the_length_the_depth_and_the_facts(tokenizer, form, text, length, many):
    items = Haystack(tokenizer, form, text).rows(length, DEPTHS, "s", many=many)
    assert [item.depth for item in items] == sorted(DEPTHS, reverse=True)
    assert length - 60 < max(len(item.ids) for item in items) <= length
    asked = set()
    for item in items:
        value = tokenizer.decode(item.ids[slice(*item.span)])
        prompt = tokenizer.decode(item.ids).split("<|im_start|>assistant")[0]
        found = planted(form, prompt)
        assert len(found) == (5 if many else 1)
        key, at = next((k, place) for k, v, place in found if v == value)
        start = prompt.index(text[:8]) if item.depth else prompt.index(form.fact.split("{")[0] or key)
        end = prompt.rindex("\n", 0, prompt.rindex("What is the"))
        assert (at - start) / (end - start) == pytest.approx(
            item.depth, abs=60 / (end - start) + (0.12 if many else 0.03)
        )
        assert prompt.rindex(key) > end  # the question names it ...
        assert prompt.lower().count(key.lower()) == 2 and key.lower() not in text.lower()  # ... and but one fact does
        asked.add((key, value))
    assert len(asked) == (5 if many else 1)


def test_several_facts_stand_in_the_order_of_their_depths(tokenizer):
    items = Haystack(tokenizer, DOCSTRING, LINES).rows(900, DEPTHS, 0, many=True)
    prompts = [tokenizer.decode(item.ids).split("What is")[0] for item in items]
    assert len(set(prompts)) == 1  # one context, five questions
    values = [value for _, value, _ in planted(DOCSTRING, prompts[0])]
    assert values == [tokenizer.decode(item.ids[slice(*item.span)]) for item in reversed(items)]


def test_a_seed_has_its_facts_at_every_length(tokenizer):
    stack = Haystack(tokenizer, DOCSTRING, LINES)

    def values(length, seed):
        return [item.ids[slice(*item.span)] for item in stack.rows(length, DEPTHS, seed, many=True)]

    assert values(500, 1) == values(900, 1) == values(500, "1") != values(500, 2)
    assert [i.ids for i in stack.rows(500, DEPTHS, 1, many=False)] == [
        i.ids for i in stack.rows(500, DEPTHS, 1, many=False)
    ]


def test_a_key_or_value_of_the_text_is_not_drawn():
    drawn = itertools.chain(["A_B", "C_D", "C_D", "E_F"], itertools.repeat("G_H"))
    numbers = iter(["1", "22", "33", "44", "55", "66", "77"])
    form = DOCSTRING.__class__(**{**vars(DOCSTRING), "key": lambda _: next(drawn), "value": lambda _: next(numbers)})
    assert facts(form, "x = a_b + 33", 3, random.Random(0)) == [("C_D", "22"), ("E_F", "44"), ("G_H", "55")]


def test_what_does_not_fit_is_an_error(tokenizer):
    stack = Haystack(tokenizer, DOCSTRING, LINES)
    with pytest.raises(ValueError, match="do not fit into 90 tokens"):
        stack.rows(90, DEPTHS, 0, many=True)
    with pytest.raises(ValueError, match="fewer than 100000"):
        stack.rows(100_000, DEPTHS, 0, many=False)
    glued = DOCSTRING.__class__(
        **{**vars(DOCSTRING), "fact": "def {key}({value})\n", "answer": "{key}({value}", "value": lambda _: "token"}
    )
    with pytest.raises(ValueError, match="a token of its own"):
        Haystack(tokenizer, glued, LINES).rows(300, DEPTHS, 0, many=False)


@pytest.mark.parametrize("selector", ["dense", "indexer", "window", "oracle"])
@pytest.mark.parametrize("many", [False, True])
def test_scores_are_those_of_whole_rows(small, tokenizer, selector, many):
    model = from_dense(small, topk=23, n_heads=2, head_dim=8).eval()
    if selector == "dense":
        model.config.attention_mode = "dense"
    else:
        model.config.selector = selector
    items = Haystack(tokenizer, DOCSTRING, LINES).rows(330, DEPTHS, 0, many=many)
    first, *_ = items
    with torch.no_grad():  # make one of them right, so that not all are wrong
        start, end = first.span
        for i in range(start, end):
            first.ids[i] = predict(model, first.ids).argmax[i - 1].item()
    found = score(model, [*items, first])
    for item, (right, nll) in zip([*items, first], found, strict=True):
        start, end = item.span
        assert right.tolist() == correct(predict(model, item.ids), item.ids, item.span).tolist()
        assert error_ratio(nll, predict(model, item.ids).nll[start - 1 : end - 1]) < 1e-4
    assert found[0][0].all() and found[-1][0].all()


def test_losses_in_slabs_are_those_of_the_whole(small, ids):
    model = from_dense(small, topk=7, n_heads=2, head_dim=8).eval()
    row = ids[0].tolist()
    for slab in (1, 13, 39, 64):
        assert error_ratio(token_losses(model, row, slab), predict(model, row).nll) < 1e-5


@pytest.mark.skipif(not NEEDLE.exists(), reason="the shared data are not here")
def test_published_rows():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/qwen2.5-0.5b")
    rows = list(itertools.islice(read_rows(NEEDLE), 3))
    for row, item in zip(rows, published(tokenizer, rows), strict=True):
        assert tokenizer.decode(item.ids[slice(*item.span)]) == row["value"]
        assert row["ordered_kv_records"][round(74 * item.depth)] == [row["key"], row["value"]]
        assert 5049 <= len(item.ids) <= 5200


@pytest.mark.skipif(not NEEDLE.exists(), reason="the shared data are not here")
@pytest.mark.parametrize("name", ["alice_en", "hongloumeng_zh"])
def test_the_full_profile_s_tokenizer_and_texts(name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/qwen2.5-0.5b")
    with gzip.open(SHARED / f"data/text/{name}.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()[:40_000]
    for many in (False, True):
        items = Haystack(tokenizer, SENTENCE, text).rows(4096, DEPTHS, 0, many=many)
        assert 3900 < len(items[0].ids) <= 4096
        assert all(len(item.ids[slice(*item.span)]) == 7 for item in items)  # Qwen2 has a token a digit
