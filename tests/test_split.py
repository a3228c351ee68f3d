"""What stands on one side of the split, and what is said where a side is empty."""

import json

import pytest
from transformers import AutoTokenizer

from dsa.data.rows import messages_of, pair_of, prompt_key
from dsa.data.scan import LongRows, Pairs
from stages.files import line_writer, read_rows
from stages.filter import select
from stages.params import ParamsError
from tests.conftest import ROOT, SHARED


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


def row(instruction, **more):
    return {"instruction": instruction, "input": "", "output": "good", **more}


def pair(prompt, *before):
    turns = [*before, {"from": "human", "value": prompt}]
    return {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }


def sides(tmp_path, rows, scan, prompt, split_by="prompt", test_fraction=0.5, wanted=1000):
    """The rows of both sides, and the split's metrics."""
    with line_writer(tmp_path / "raw.jsonl.gz") as write:
        for line in rows:
            write(json.dumps(line).encode())
    out = tmp_path / "out"
    _, summary = select(tmp_path / "raw.jsonl.gz", scan, wanted, out, split_by, prompt, test_fraction)
    return [list(read_rows(out / f"{side}.jsonl.gz")) for side in ("train", "test")], summary


def pairs_of(tokenizer):
    return Pairs(tokenizer, 1000, 1000), lambda kept: kept["prompt"]


def rows_of(tokenizer):
    return LongRows(tokenizer, 1000, 1000, 1), messages_of


def test_rows_that_share_a_system_turn_are_on_both_sides(tokenizer, tmp_path):
    """The key was the first turn: all fell to one side (LLaMA-Factory #2464)."""
    system = {"from": "system", "value": "You are an assistant."}
    for rows, (scan, prompt) in (
        ([pair(f"question {i}", system) for i in range(40)], pairs_of(tokenizer)),
        ([row(f"question {i}", system=system["value"]) for i in range(40)], rows_of(tokenizer)),
        ([row(f"question {i}", history=[["", "Hello, ask me."]]) for i in range(40)], rows_of(tokenizer)),
        ([row(f"question {i}", history=[["Hi", "Ask me."]]) for i in range(40)], rows_of(tokenizer)),
    ):
        (train, test), _ = sides(tmp_path, rows, scan, prompt)
        assert len(train) + len(test) == 40 and min(len(train), len(test)) > 8


COPIES = [
    "{0}\nWhat of caf\u00e9 Ａ?",
    "{0}\r\nWhat of caf\u00e9 Ａ?",
    " {0}\nWhat of cafe\u0301 A? \n",
    "{0}  What\u3000of caf\u00e9 A?",
]


def test_copies_that_differ_in_white_space_or_unicode_form_are_on_one_side(tokenizer, tmp_path):
    """One was trained on and the other held out (LLaMA-Factory #5743)."""
    texts = [[copy.format(f"Number {i}.") for copy in COPIES] for i in range(30)]
    for rows, (scan, prompt) in (
        ([pair(text) for copies in texts for text in copies], pairs_of(tokenizer)),
        ([row(text) for copies in texts for text in copies], rows_of(tokenizer)),
        ([row("", input=text) for copies in texts for text in copies], rows_of(tokenizer)),
    ):
        (train, test), _ = sides(tmp_path, rows, scan, prompt)
        assert len(train) + len(test) == 120 and train and test
        assert len({prompt_key(prompt(r)) for r in train}) * len(COPIES) == len(train)


def test_what_an_assistant_said_is_no_part_of_the_prompt():
    one, other = (messages_of(row("c", history=[["a", answer]], system=answer)) for answer in ("x", "y"))
    assert prompt_key(one) == prompt_key(other) != prompt_key(messages_of(row("c", history=[["b", "x"]])))
    assert prompt_key(pair_of(pair("c"))["prompt"]) == "c"


def test_an_empty_split_names_its_cause(tokenizer, tmp_path):
    """ "More rows are needed" was said of any number of rows with one key, and where no row was long enough."""
    rows = [row(f"question {i}", data_source="one") for i in range(50)]
    scan, prompt = rows_of(tokenizer)
    with pytest.raises(ParamsError, match=r"50 rows are kept, with 1 different values of data_source, .*= 0\.5"):
        sides(tmp_path, rows, scan, prompt, split_by="data_source")
    scan = LongRows(tokenizer, 1000, 1, 500)
    with pytest.raises(ParamsError, match=r"none of the 51 rows can be used: 50 not over 500 tokens; 1 no answer$"):
        sides(tmp_path, [*rows, row("q", output="")], scan, prompt)
    with pytest.raises(ParamsError, match=r"none of the 0 rows can be used: the source is empty"):
        sides(tmp_path, [], *rows_of(tokenizer))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_real_pairs_of_which_some_share_a_system_turn(tokenizer, tmp_path):
    raw = (SHARED / "data/preference/dpo_zh_demo.sharegpt_form_50.jsonl").read_bytes().splitlines()
    rows = [r for r in map(json.loads, raw) if r["conversations"][0]["from"] == "system"]
    assert len(rows) == 10
    scan, prompt = Pairs(tokenizer, 100_000, 0), lambda kept: kept["prompt"]
    (train, test), summary = sides(tmp_path, rows, scan, prompt)
    assert train and test and summary["kept"] == len({prompt_key(prompt(r)) for r in train + test}) == 10
