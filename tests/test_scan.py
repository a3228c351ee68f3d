"""Which rows are kept, which are left out and why, and that the pass stops."""

import json
import random
from itertools import islice

import pytest
from transformers import AutoTokenizer

from dsa.data import scan as scan_module
from dsa.data.rows import BadRow, encode, messages_of, pair_of, render, tokenize_pair
from dsa.data.scan import LongRows, Pairs, TooManyBadRows, parse
from tests.conftest import ROOT, SHARED

QWEN = SHARED / "data/qwen2.5-0.5b"
needs_shared = pytest.mark.skipif(not QWEN.exists(), reason="the shared data are not here")
# By file: rows, and rows over 1024 tokens with Qwen2.5's tokenizer and default system turn (shared/data/README.md).
LONG = {
    "alpaca_zh_demo": (669, 0),
    "alpaca_en_demo": (638, 0),
    "sharegpt_zh_100": (63, 21),
    "moss_conversations": (419, 323),
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data/base")


def lines(rows):
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def row(words, **more):
    return {"instruction": "Say it.", "input": "", "output": "word " * words, "history": [], **more}


def plain_loop(tokenizer, raw, min_tokens):
    """Slow and obviously right: every row, one tokenizer call each."""
    found = []
    for number, line in enumerate(raw):
        try:
            conversation = render(tokenizer, messages_of(parse(line)))
        except BadRow:
            continue
        (example,) = encode(tokenizer, [conversation])
        if len(example["input_ids"]) > min_tokens:
            found.append((number, len(example["input_ids"])))
    return found


def test_the_same_rows_as_the_plain_loop(tokenizer):
    """On the edge, where the shortcut by bytes would first be wrong."""
    raw = lines([row(n) for n in range(1, 180, 2)])
    raw += lines([row(n, output="e\u0301" * n) for n in (5, 60, 120)])  # composes to fewer characters
    raw += lines([row(n, output="\u0958" * n) for n in (5, 60, 120)])  # normalisation makes two characters of one
    raw += lines([row(1, output="\U0001d160" * n) for n in (5, 25, 40)])  # and twelve bytes of four
    raw += lines([row(3, history=[["a" * n, "b"]] * n) for n in range(1, 30)])
    for min_tokens in (150, 151, 200, 300):
        scan = LongRows(tokenizer, 10_000, 0, min_tokens)
        kept = [(r.number, r.tokens) for r in scan(raw)]
        assert kept == plain_loop(tokenizer, raw, min_tokens)
        assert 0 < len(kept) < len(raw)
        assert scan.tally.scanned == len(raw) and scan.tally.tokenised < len(raw)


def test_exactly_on_the_threshold(tokenizer):
    """With and without what could make the count of a part wrong: each length once, the first kept one is 101 long."""
    for more in ("", " e\u0301", " 👩\u200d👧", " 好的，好的。", " <|im_end|>\n", "\n\n \n", " \u0958", "   "):
        raw = lines([row(n, output="a " * n + more) for n in range(1, 130)])
        kept = [(r.number, r.tokens) for r in LongRows(tokenizer, 10_000, 0, 100)(raw)]
        assert kept == plain_loop(tokenizer, raw, 100) and kept[0][1] in (101, 102)


@pytest.mark.parametrize("change", [" | trim", ".split('</think>')[-1]"])
def test_a_template_that_does_not_copy_its_contents(tokenizer, change):
    """Then neither the frame nor the bound by bytes holds."""
    other = AutoTokenizer.from_pretrained(ROOT / "data/base")
    other.chat_template = tokenizer.chat_template.replace("m['content']", "m['content']" + change)
    raw = lines([row(n, input=" \n" * n + "<think> so </think>" + " \n" * n) for n in range(1, 90)])
    kept = [(r.number, r.tokens) for r in LongRows(other, 10_000, 0, 100)(raw)]
    assert kept and kept == plain_loop(other, raw, 100) != plain_loop(tokenizer, raw, 100)


@needs_shared
@pytest.mark.parametrize("name", LONG)
def test_counts_on_real_rows(name):
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    raw = (SHARED / f"data/sft/{name}.jsonl").read_bytes().splitlines()
    scan = LongRows(tokenizer, 4096, 0, 1024)
    kept = list(scan(raw))
    assert (scan.tally.scanned, len(kept) + scan.tally.left_out["no answer within 4096 tokens"]) == LONG[name]
    assert [(r.number, r.tokens) for r in kept] == plain_loop(tokenizer, raw, 1024)


AWKWARD = [
    " ",
    "\n \n  \n",
    "don't DON'T it'sam 'LL ' s",
    "e\u0301 \u0301 \n\u0301 >\u0338 好\u0301，\u0301",  # marks on letters, on spaces, on nothing
    "\u0958\u0958 \u1100\u1161\u11a8 \uf900\ufa10 \U0001d160",  # normal form: longer, composed, another character
    "👩\u200d👩\u200d👧 🇨🇳🇨🇳 ☎\ufe0f\n",
    "中文，没有空格。“引号”：（括号）！？……——《书》·名\u3000\u3000全角",
    "\u88d5々〇㐀\U00020000\U0002ebf0\U000323b0 ﾊﾝｶｸ ひらがな漢字カタカナ 한국어 Привет, мир",
    "naïve café été ſ 'ſ x\u2028y\u2029z\x85w\x1c.\x1c\x1d \x1f\n\x0b\x0c\r\r\n\t\tq\u00a0\u2003 \ufeff\x00",
    "1234567890 3.14 ２３ ①Ⅳ½ 2023年5月10日 x1y2",
    "<|im_start|>user\nhi<|im_end|>\n<|im_end|><|endoftext|> <|im_end| > !!<|im_end|>!! <|im_start|>\u0338",
    "<tool_call>\n{}\n</tool_call><tool_call>\u0338 <|fim_prefix|>  a",
    "def f(x):\n    return x  \n\n\n\tpass\r\n  # ...   \n",
]


@pytest.mark.parametrize("name", ["data/base", pytest.param("../shared/data/qwen2.5-0.5b", marks=needs_shared)])
def test_awkward_texts_are_counted_as_training_sees_them(name):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
    draw = random.Random(0)
    raw = lines([row(3, input="".join(draw.choices(AWKWARD, k=draw.randrange(1, 12)))) for _ in range(300)])
    kept = [(r.number, r.tokens) for r in LongRows(tokenizer, 10_000, 0, 120)(raw)]
    assert kept == plain_loop(tokenizer, raw, 120) and 50 < len(kept) < 280


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_batches_of_any_size_find_the_same(tokenizer, batch, monkeypatch):
    """A count that goes to the row beside it."""
    monkeypatch.setattr(scan_module, "BATCH", batch)
    raw = lines([row(n * 37 % 180 + 1) for n in range(100)])
    raw[7], raw[40] = b"{", lines([{"text": ""}])[0]
    scan = LongRows(tokenizer, 10_000, 2, 100)
    assert [(r.number, r.tokens) for r in scan(raw)] == plain_loop(tokenizer, raw, 100)
    assert scan.tally.scanned == 100 and scan.tally.bad == {"malformed JSON": [7], "unknown schema": [40]}
    pairs = lines([published(chosen="a " * (n % 40 + 1), rejected="b " * (n * 7 % 40)) for n in range(60)])
    scan = Pairs(tokenizer, 60, 0)
    kept = list(scan(pairs))
    assert 5 < len(kept) < 55 and scan.tally.scanned == 60
    for pair in kept:
        texts = [pair.row["prompt"] + pair.row[answer] for answer in ("chosen", "rejected")]
        assert pair.tokens == max(len(tokenizer.apply_chat_template(t, return_dict=False)) for t in texts) <= 60


def test_what_a_source_gave_before_it_failed_is_not_lost(tokenizer):
    """It may be enough."""

    def source():
        yield from raw
        raise ConnectionError("gone")

    raw = lines([row(number % 300 + 1) for number in range(2 * scan_module.BATCH + 3)])
    found = []
    with pytest.raises(ConnectionError):
        for kept in LongRows(tokenizer, 10_000, 0, 100)(source()):
            found.append((kept.number, kept.tokens))
    assert found == plain_loop(tokenizer, raw, 100)


def test_the_pass_stops_at_the_last_wanted_row(tokenizer):
    read = []

    def source():
        for number in range(100_000):
            read.append(number)
            yield lines([row(400 if number % 3 == 0 else 5)])[0]

    scan = LongRows(tokenizer, 10_000, 0, 100)
    kept = list(islice(scan(source()), 4))
    assert [r.number for r in kept] == [0, 3, 6, 9]
    assert scan.tally.scanned == 10 and scan.tally.kept == 4 and len(read) <= 1024


BAD = [
    (b"{", "malformed JSON"),
    (b"", "malformed JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b'{"instruction": "a", "output": "\\ud800"}', "not UTF-8"),
    (b'{"instruction": "a", "output": NaN}', "output is not a string"),
    (b'{"instruction": "a", "output": 0}', "output is not a string"),
    (b"[1]", "not an object"),
    (b'{"text": "a"}', "unknown schema"),
    (b'{"instruction": "a", "output": " "}', "no answer"),
    (b'{"instruction": "a", "output": "b", "history": [["c"]]}', "history is not a list of [user, assistant] pairs"),
]


def test_bad_rows_are_counted_with_their_numbers_and_lose_nothing(tokenizer):
    good = lines([row(200)])[0]
    raw = [good]
    for line, _ in BAD:
        raw += [line, good]
    scan = LongRows(tokenizer, 10_000, len(BAD), 100)
    assert [r.number for r in scan(raw)] == list(range(0, len(raw), 2))
    summary = scan.tally.summary()
    listed = {n: reason for reason, bad in summary["bad_rows"].items() for n in bad["row_numbers"]}
    assert listed == {2 * i + 1: reason for i, (_, reason) in enumerate(BAD)}
    assert summary["kept"] == len(BAD) + 1 and summary["scanned"] == 2 * len(BAD) + 1


def test_too_many_bad_rows_stop_the_pass_and_say_why(tokenizer):
    raw = lines([row(200)]) + [b"{"] * 5
    with pytest.raises(TooManyBadRows, match=r"3 of the first 4 rows .* max_bad_rows = 2: 3 malformed JSON .*row 1"):
        list(LongRows(tokenizer, 1000, 2, 100)(raw))


def test_truncation_leaves_no_row_without_an_answer(tokenizer):
    late = row(3, input="far " * 300)
    early = row(600, input="near")
    scan = LongRows(tokenizer, 128, 0, 100)
    kept = list(scan(lines([late, early])))
    assert [r.number for r in kept] == [1]
    assert scan.tally.left_out == {"no answer within 128 tokens": 1}
    (example,) = encode(tokenizer, [render(tokenizer, messages_of(kept[0].row))], 128)
    assert any(label != -100 for label in example["labels"])
    assert "near" in tokenizer.decode(example["input_ids"])  # the prompt is whole


def test_whether_an_answer_is_left_as_the_labels_say(tokenizer):
    """At every length of the cut, and where the answer's first characters are in the prompt's last token."""
    for answer in ("word", "\n\nword", " word", "\u0301", "<|im_end|>", "好"):
        for history in ([], [["a b", "c"]], [["a", ""]]):
            raw = row(1, instruction="one two", output=answer, history=history)
            (example,) = encode(tokenizer, [render(tokenizer, messages_of(raw))])
            first = next(i for i, label in enumerate(example["labels"]) if label != -100)
            for cut in range(first - 3, first + 4):
                scan = LongRows(tokenizer, cut, 0, 1)
                assert len(list(scan(lines([raw])))) == (cut > first)


def published(prompt="p", chosen="good", rejected="bad", **more):
    return {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
        **more,
    }


def as_lists(prompt="p", chosen="good", rejected="bad", **more):
    user = {"role": "user", "content": prompt}
    return {
        "chosen": [user, {"role": "assistant", "content": chosen}],
        "rejected": [user, {"role": "assistant", "content": rejected}],
        **more,
    }


def test_both_published_forms_of_a_pair_are_the_same():
    assert pair_of(published(domain="Chat")) == pair_of(as_lists(domain="Chat"))
    assert pair_of(published())["chosen"] == [{"role": "assistant", "content": "good"}]


@pytest.mark.parametrize(
    "bad,reason",
    [
        ([], "not an object"),
        ({"prompt": "p"}, "unknown schema"),
        (published() | {"chosen": None}, "unknown schema"),
        (published() | {"chosen": "good"}, "chosen is not a list of messages"),
        (published() | {"tools": "[{}]"}, "tools cannot be rendered"),
        (published() | {"chosen": {"role": "assistant", "content": "", "tool_calls": [1]}}, "tool_calls cannot be .*"),
        (published() | {"system": ["x"]}, "system is not a string"),
        (as_lists() | {"system": "x", "chosen": [{"role": "user"}]}, "chosen has a message of unknown schema"),
        (published() | {"chosen": {"from": ["gpt"], "value": "x"}}, "chosen has a message of unknown schema"),
        (published() | {"chosen": {"from": "gpt"}}, "chosen has a message of unknown schema"),
        (published() | {"chosen": {"from": "human", "value": "x"}}, "an answer is not the assistant's"),
        (published() | {"rejected": as_lists()["rejected"]}, "an answer is not one message"),
        (as_lists() | {"rejected": as_lists("q")["rejected"]}, "the two prompts differ"),
        (published(prompt=" "), "no prompt"),
        (published() | {"conversations": []}, "no prompt"),
    ],
)
def test_pairs_of_another_shape_are_refused_with_a_reason(bad, reason):
    with pytest.raises(BadRow, match=f"^{reason}$"):
        pair_of(bad)


def test_fields_that_a_table_filled_with_null_are_not_there():
    """A parquet file has the fields of both forms in every row, and of both forms of a message."""
    message = {"from": None, "value": None, "role": None, "content": None}
    filled = {
        "chosen": [message | turn for turn in as_lists()["chosen"]],
        "rejected": [message | turn for turn in as_lists()["rejected"]],
        "conversations": None,
        "system": None,
        "tools": None,
    }
    assert pair_of(filled) == pair_of(as_lists())
    assert pair_of(published() | {"chosen": message | published()["chosen"]}) == pair_of(published())
    plain = row(3)
    filled = plain | {"input": None, "history": None, "system": None, "tools": None, "chosen": None, "text": None}
    assert messages_of(filled) == messages_of(plain)
    with pytest.raises(BadRow, match="unknown schema"):
        messages_of({"instruction": None, "input": None, "output": None, "text": "a"})
    with pytest.raises(BadRow, match="unknown schema"):
        pair_of({"chosen": None, "rejected": None, "text": "a"})


def test_the_system_prompt_of_a_row_is_used(tokenizer):
    """It was dropped for the template's default (LLaMA-Factory #7592)."""
    default = tokenizer.apply_chat_template(messages_of(row(200)), tokenize=False)
    own = tokenizer.apply_chat_template(messages_of(row(200, system="Be brief.")), tokenize=False)
    assert own == default.replace("You are a helpful assistant.", "Be brief.") != default
    for empty in (None, "", " "):
        assert messages_of(row(200, system=empty)) == messages_of(row(200))
    assert pair_of(published(system="Be brief."))["prompt"][0] == {"role": "system", "content": "Be brief."}
    turns = [{"from": "system", "value": "Be brief."}, *published()["conversations"]]
    assert pair_of(published(system="Be brief.")) == pair_of(published() | {"conversations": turns})
    with pytest.raises(BadRow, match="two system turns"):
        pair_of(published(system="Be long.") | {"conversations": turns})
    with pytest.raises(BadRow, match="tools cannot be rendered"):
        messages_of(row(200, tools=[{"name": "f"}]))


@pytest.mark.parametrize("system", ["Be brief.", "word " * 300])
def test_rows_with_a_system_prompt_are_counted_and_cut_as_training_cuts_them(tokenizer, system):
    """The cut was looked for behind the system turn instead of the question."""
    raw = lines([row(n, system=system, input="far " * n) for n in range(1, 400, 7)])
    raw += lines([row(n, input="far " * n) for n in range(1, 400, 7)])
    scan = LongRows(tokenizer, 256, 0, 100)
    kept = [(r.number, r.tokens) for r in scan(raw)]
    expected = []
    for number, tokens in plain_loop(tokenizer, raw, 100):
        (example,) = encode(tokenizer, [render(tokenizer, messages_of(parse(raw[number])))], 256)
        if any(label != -100 for label in example["labels"]):
            expected.append((number, tokens))
    assert kept == expected and 0 < len(kept) < len(raw)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tokenizer):
    """Excel and PowerShell write one; the row was malformed JSON."""
    (line,) = lines([row(3)])
    assert parse(b"\xef\xbb\xbf" + line) == parse(line)
    scan = LongRows(tokenizer, 1000, 0, 1)
    assert len(list(scan([b"\xef\xbb\xbf" + line, line]))) == 2


def test_pairs_that_are_not_wanted_are_counted(tokenizer):
    rows = [
        published(domain="Chat"),
        published(chosen="same ", rejected="same", domain="Chat"),
        published(rejected="", domain="Chat"),
        published(rejected="long " * 200, domain="Chat"),
        published(domain="Math"),
        as_lists(domain="Chat"),
    ]
    scan = Pairs(tokenizer, 100, 0, ["Chat"])
    assert [kept.number for kept in scan(lines(rows))] == [0, 5]
    assert scan.tally.left_out == {"equal answers": 1, "empty answer": 1, "over 100 tokens": 1, "another domain": 1}


@needs_shared
def test_real_pairs():
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    folder = SHARED / "data/preference"

    def scanned(name):
        scan = Pairs(tokenizer, 2048, 10_000)
        return list(scan((folder / name).read_bytes().splitlines())), scan.tally

    forms, _ = scanned("dpo_zh_demo.sharegpt_form_50.jsonl")
    both, tally = scanned("dpo_zh_demo.jsonl")
    assert len(both) == tally.scanned == 197 and not tally.bad
    answers = {str(kept.row["chosen"] + kept.row["rejected"]) for kept in both}
    assert len(forms) == 50 and all(str(kept.row["chosen"] + kept.row["rejected"]) in answers for kept in forms)
    english, tally = scanned("dpo_en_demo.jsonl")
    assert tally.left_out == {"over 2048 tokens": 6} and len(english) == 197
    _, unpaired = scanned("kto_en_demo.jsonl")
    assert list(unpaired.bad) == ["unknown schema"] and unpaired.bad_rows == 202


@pytest.mark.parametrize("name", ["data/base", pytest.param("../shared/data/qwen2.5-0.5b", marks=needs_shared)])
@pytest.mark.parametrize("answer", ["chosen", "rejected"])
def test_no_kept_pair_has_a_token_across_prompt_and_answer(name, answer):
    """A held-out pair with one ended DPO after its training; TRL moved the border of the others (trl #5213)."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / name)
    texts = ["\n\nyes", "\nyes", "\r\nyes", " \nyes", "yes", " yes", "  yes", "\tyes", "\u0301", "<|im_end|>"]
    rows = [published() | {answer: {"from": "gpt", "value": text}} for text in texts]
    scan = Pairs(tokenizer, 100, 0)
    kept = list(scan(lines(rows)))
    left = len(rows) - len(kept)
    assert scan.tally.left_out == {"a token across prompt and answer": left} and left > 1 and len(kept) > 1
    assert {"yes", " yes"} <= {pair.row[answer][0]["content"] for pair in kept}
    for pair in kept:
        prompt = tokenizer.apply_chat_template(pair.row["prompt"], add_generation_prompt=True, return_dict=False)
        example = tokenize_pair(tokenizer, pair.row)
        assert example["prompt_ids"] == prompt  # what a generation begins with
        whole = tokenizer.apply_chat_template(pair.row["prompt"] + pair.row[answer], return_dict=False)
        assert prompt + example[f"{answer}_ids"] == whole


REWRITES = {
    "the last answer": "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}",  # as Qwen3's
    "the first question": "{% if loop.first and messages | length > 2 %}!{% endif %}",
    "what is trimmed": "{% if loop.last %}!{% endif %}",
}


@pytest.mark.parametrize("mark", REWRITES.values(), ids=REWRITES)
def test_a_template_that_rewrites_earlier_turns_is_found_before_training(tokenizer, mark):
    """It ended `dense` in a traceback, and `dpo` after its training."""
    other = AutoTokenizer.from_pretrained(ROOT / "data/base")
    content = "{{ m['content'] }}"
    copied = "{{ m['content'] | trim }}" if mark is REWRITES["what is trimmed"] else content
    other.chat_template = tokenizer.chat_template.replace(content, mark + copied)
    scan = LongRows(other, 10_000, 9, 100)
    single = [1] if "assistant" in mark or "first" in mark else []
    assert [kept.number for kept in scan(lines([row(200, history=[["a", "b"]]), row(200)]))] == single
    assert list(scan.tally.bad) == ["the chat template rewrites earlier turns: answers cannot be told from prompts"]
    other.chat_template = tokenizer.chat_template.replace(
        content, "{% if messages | length > 1 %}!{% endif %}" + copied
    )
    pairs = Pairs(other, 100, 9)
    assert not list(pairs(lines([published()])))
    assert list(pairs.tally.bad) == ["the chat template rewrites the prompt: answers cannot be told from prompts"]
