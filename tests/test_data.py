import pytest
from transformers import AutoTokenizer

from dsa.data.rows import IGNORE, BadRow, Collator, encode, messages_of, render, split_of
from tests.conftest import ROOT, SHARED

ROW = {
    "id": 1,
    "instruction": "Say it.",
    "input": "",
    "output": "  It is\nsaid.",
    "history": [["a?", "b."], ["c", "d"]],
}


def tokenizers():
    found = [ROOT / "data/base", SHARED / "data/qwen2.5-0.5b"]
    return [pytest.param(p, id=p.name, marks=() if p.exists() else pytest.mark.skip("not here")) for p in found]


@pytest.fixture(params=tokenizers())
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.param)


def test_labels_are_the_answers_and_their_end_of_turn(tokenizer):
    conversation = render(tokenizer, messages_of(ROW))
    (example,) = encode(tokenizer, [conversation])
    labelled = [i for i, label in enumerate(example["labels"]) if label != IGNORE]
    assert all(example["labels"][i] == example["input_ids"][i] for i in labelled)
    text = tokenizer.decode([example["input_ids"][i] for i in labelled])
    assert text.replace(" ", "") == "b.<|im_end|>d<|im_end|>Itis\nsaid.<|im_end|>"
    assert tokenizer.decode(example["input_ids"]) == conversation.text
    assert conversation.text.count("You are a helpful assistant.") == 1


def test_the_count_is_that_of_the_whole_conversation(tokenizer):
    conversation = render(tokenizer, messages_of(ROW))
    (example,) = encode(tokenizer, [conversation])
    assert example["input_ids"] == tokenizer(conversation.text, add_special_tokens=False)["input_ids"]


def test_truncation_keeps_the_prompt(tokenizer):
    conversation = render(tokenizer, messages_of(ROW))
    (whole,), (cut,) = encode(tokenizer, [conversation]), encode(tokenizer, [conversation], max_length=30)
    assert cut["input_ids"] == whole["input_ids"][:30] and len(cut["labels"]) == 30


@pytest.mark.parametrize(
    "change,reason",
    [
        ({"output": " "}, "no answer"),
        ({"instruction": "", "input": " "}, "no prompt"),
        ({"history": [["only one"]]}, "history"),
        ({"history": "text"}, "history"),
        ({"output": 3}, "output is not a string"),
    ],
)
def test_a_bad_row_is_named(change, reason):
    with pytest.raises(BadRow, match=reason):
        messages_of(ROW | change)


def test_an_unknown_schema_is_named():
    with pytest.raises(BadRow, match="unknown schema"):
        messages_of({"text": "x"})
    with pytest.raises(BadRow, match="not an object"):
        messages_of([1])


def test_instruction_comes_before_input():
    assert messages_of(ROW | {"input": "This.", "history": None})[0]["content"] == "Say it.\nThis."


def test_padding_is_told_by_the_mask_and_not_by_the_id():
    rows = [{"input_ids": [5, 0, 7], "labels": [IGNORE, 0, 7]}, {"input_ids": [0], "labels": [0]}]
    batch = Collator(0)(rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 0, 7], [0, IGNORE, IGNORE]]


def test_splits_are_stable_and_of_the_size_asked_for():
    sides = [split_of(f"key {i}", 0.2) for i in range(5000)]
    assert 0.18 < sides.count("test") / 5000 < 0.22
    assert sides == [split_of(f"key {i}", 0.2) for i in range(5000)]
    assert all(split_of(f"key {i}", 0.3) == "test" for i, side in enumerate(sides) if side == "test")
