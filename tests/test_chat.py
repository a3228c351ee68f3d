"""Talking to a model, and answers to a file of prompts."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.image import imread
from transformers import AutoTokenizer

from dsa import chat, export_model, from_dense, generate
from dsa.evaluation.predictions import changed
from stages.files import write_rows
from studies import chat_picture
from tests.conftest import ROOT, small_model

NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random DSA model whose k is less than any prompt is long, as `dsa.export` writes one."""
    path = tmp_path_factory.mktemp("chat") / "model"
    model = from_dense(small_model(vocab_size=4096), topk=8, n_heads=2, head_dim=8)
    export_model(model, path, AutoTokenizer.from_pretrained(ROOT / "data/base"))
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return generate.load(str(folder))


def expected(loaded, messages, **changes):
    """The answer to a talk without any cache, and how many tokens its prompt and it have."""
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with changed(model.config, **changes):
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, use_cache=False, eos_token_id=generate.ends(model, tokenizer)
        )
    new = out[0, len(ids) :].tolist()
    return tokenizer.decode(new, skip_special_tokens=True), len(ids), len(new)


def talk(monkeypatch, capsys, folder, said, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    chat.main([str(folder), "--max-new-tokens", str(NEW), *options])
    return capsys.readouterr()


def user(text):
    return {"role": "user", "content": text}


def test_a_talk_equals_generation_without_a_cache(monkeypatch, capsys, folder, loaded):
    """Each turn continues the cache of the last; decoded and encoded again, an answer may be other tokens."""
    got = talk(monkeypatch, capsys, folder, "def f(x):\n\nWhat is f?\nAnd g?\n")
    messages, texts, speeds = [], [], []
    for said in ("def f(x):", "What is f?", "And g?"):
        messages.append(user(said))
        text, prompt, tokens = expected(loaded, messages)
        messages.append({"role": "assistant", "content": text})
        texts.append(text)
        speeds.append(f"each read 8 of {prompt + (tokens - 1) / 2:,.0f} keys")
    assert got.out == "".join(text + "\n" for text in texts)
    lines = got.err.splitlines()
    assert len(lines) == 3 and all(speed in line for speed, line in zip(speeds, lines, strict=True))
    assert f"DSA: {NEW} tokens" in lines[0] and "tokens/s" in lines[0]


def test_dense_attention_answers_beside(monkeypatch, capsys, folder, loaded):
    got = talk(monkeypatch, capsys, folder, "def f(x):\nAnd g?\n", "--beside")
    out, messages = "", []
    for said in ("def f(x):", "And g?"):
        messages.append(user(said))
        ours, _, _ = expected(loaded, messages)
        dense, _, _ = expected(loaded, messages, attention_mode="dense")
        out += f"DSA:\n{ours}\ndense attention:\n{dense}\n"
        messages.append({"role": "assistant", "content": ours})
    assert got.out == out
    dense = [line for line in got.err.splitlines() if line.startswith("[dense attention")]
    assert len(dense) == 2 and all(line.split()[-4] == line.split()[-2] for line in dense)


def test_a_context_comes_before_the_first_question(monkeypatch, capsys, folder, loaded, tmp_path):
    (tmp_path / "file.py").write_text("def f(x): pass", encoding="utf-8")
    got = talk(monkeypatch, capsys, folder, "What is f?\n", "--context", str(tmp_path / "file.py"))
    assert got.out == expected(loaded, [user("def f(x): pass\n\nWhat is f?")])[0] + "\n"


def test_an_answer_stops_at_the_models_end_tokens(monkeypatch, capsys, folder, loaded, tmp_path):
    model, tokenizer = loaded
    ids = tokenizer.apply_chat_template([user("def f(x):")], add_generation_prompt=True, return_dict=False)
    new = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
    end = next(i for i in range(1, NEW) if new[i] not in new[:i])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [new[end], tokenizer.eos_token_id])
    for module in (chat, generate):
        monkeypatch.setattr(module, "load", lambda *_: loaded)
    assert f"DSA: {end + 1} tokens" in talk(monkeypatch, capsys, folder, "def f(x):\n").err
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "def f(x):"}), encoding="utf-8")
    generate.main([str(folder), str(path), "--max-new-tokens", str(NEW)])
    answer = json.loads(capsys.readouterr().out)
    assert answer["generated"] == tokenizer.decode(new[:end], skip_special_tokens=True)
    assert (answer["generated_tokens"], answer["finished"]) == (end + 1, True)


ROWS = [
    {"prompt": "def f(x):", "id": 7},
    {"messages": [user("What is f?"), {"role": "assistant", "content": "A function."}, user("And g?")]},
    {"instruction": "Describe f", "input": "def f(x): return x + 1", "history": [["Hello", "你好"]], "output": "?"},
]
BAD = {
    b"{": "malformed JSON",
    b"[1]": "not an object",
    b'{"prompt": ""}': "no prompt",
    b'{"text": "x"}': "unknown schema",
    b'{"messages": [{"role": "assistant", "content": "x"}]}': "no prompt",
    b'{"prompt": "\xff"}': "not UTF-8",
}


def test_prompts_are_answered_in_batches_as_alone_and_bad_lines_are_named(capsys, folder, loaded, tmp_path):
    lines = [json.dumps(ROWS[0]).encode(), *BAD, b"", *(json.dumps(row).encode() for row in ROWS[1:])]
    (tmp_path / "prompts.jsonl").write_bytes(b"\n".join(lines))
    generate.main([str(folder), str(tmp_path / "prompts.jsonl"), "--max-new-tokens", str(NEW), "--batch-size", "2"])
    got = capsys.readouterr()
    talks = [[user("def f(x):")], ROWS[1]["messages"], generate.prompt_of(ROWS[2])]
    assert talks[2] == [
        user("Hello"),
        {"role": "assistant", "content": "你好"},
        user("Describe f\ndef f(x): return x + 1"),
    ]
    answers = [json.loads(line) for line in got.out.splitlines()]
    for row, messages, answer in zip(ROWS, talks, answers, strict=True):
        text, _, tokens = expected(loaded, messages)
        assert answer == row | {"generated": text, "generated_tokens": tokens, "finished": tokens < NEW}
    reasons = [f"line {number}: {reason}" for number, reason in enumerate(BAD.values(), start=2)]
    assert got.err.splitlines() == [*reasons, f"3 prompts answered, {len(BAD)} lines cannot be used"]


def test_another_k_reads_other_keys(monkeypatch, capsys, folder):
    assert "each read 3 of " in talk(monkeypatch, capsys, folder, "def f(x):\n", "--topk", "3").err


def test_what_cannot_be_used_is_one_line(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"^\S*nowhere: no such folder, and no such model on a hub$"):
        generate.load(str(tmp_path / "nowhere"))
    small_model(vocab_size=4096).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(ROOT / "data/base").save_pretrained(tmp_path / "dense")
    with pytest.raises(SystemExit, match=r"^\S*dense: Qwen2ForCausalLM has no indexer: [^\n]*$"):
        generate.load(str(tmp_path / "dense"))
    with pytest.raises(SystemExit, match=r"^x\.jsonl: no such file$"):
        generate.main([str(folder), "x.jsonl"])
    with pytest.raises(SystemExit, match=r"^x\.txt: no such file$"):
        chat.main([str(folder), "--context", "x.txt"])
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(SystemExit) as error:  # not one answer: a script should see that
        generate.main([str(folder), str(tmp_path / "bad.jsonl")])
    assert error.value.code == 1


ASKS = """
while True:
    try:
        line = input("\\n> ")
    except EOFError:
        break
    print(f"DSA:\\n{line.upper()}\\n[{len(line)} tokens]")
"""


def test_a_picture_shows_what_is_typed_when_it_is_asked_for(tmp_path):
    said = chat_picture.talk([sys.executable, "-c", ASKS], ["one", "two"])
    assert said.split("\n") == ["> one", "DSA:", "ONE", "[3 tokens]", "", "> two", "DSA:", "TWO", "[3 tokens]"]
    chat_picture.draw(said, tmp_path / "a/chat.png")
    picture = imread(tmp_path / "a/chat.png")[..., :3]  # (height, width, 3) of 0 to 1
    assert len(picture) == chat_picture.LEAD * 9 + 2 * chat_picture.MARGIN
    colors = {to_hex(color) for color in np.unique(picture.reshape(-1, 3), axis=0)}
    assert {chat_picture.COLORS[key] for key in ">D["} <= colors


def test_the_picture_is_of_the_first_look_up_that_is_short_enough(tmp_path):
    def row(kind, text):
        turn = [f"{text}\n\nWhere is f?", "line 1"]
        return {"instruction": "And g?", "output": "line 2", "history": [turn], "type_keyword": [kind]}

    write_rows(tmp_path / "rows.gz", [row("code", "a"), row("lookup", "b" * 99), row("lookup", "c\n\nd")])
    found = chat_picture.look_up(tmp_path / "rows.gz", 50)
    assert found == ("c\n\nd", ["Where is f?", "And g?"], ["line 1", "line 2"])
    with pytest.raises(SystemExit, match="no look-up row of at most 5 char"):
        chat_picture.look_up(tmp_path / "rows.gz", 5)
