"""That remembered words count as the tokenizer counts whole texts, wherever the cuts could be wrong."""

import json
import pickle
import random
import re
import unicodedata

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from dsa.data import counting
from dsa.data.counting import LETTERS, LONGEST, NO_LETTERS, NO_SPACE, PUNCTUATION, TokenCounter
from tests.conftest import ROOT, SHARED

QWEN = SHARED / "data/qwen2.5-0.5b"
needs_shared = pytest.mark.skipif(not QWEN.exists(), reason="the shared data are not here")


@pytest.fixture(scope="module", params=["data/base", pytest.param("../shared/data/qwen2.5-0.5b", marks=needs_shared)])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(ROOT / request.param)


def whole(tokenizer, text: str) -> int:
    """Slow and obviously right."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


AWKWARD = [
    "",
    " ",
    " " * 3000,
    "\n \n  \n",
    "a" * 5000,
    "don't DON'T it'sam 'LL ' s",
    "e\u0301 \u0301 \n\u0301 >\u0338 好\u0301，\u0301",  # marks on letters, on spaces, on nothing
    "\u0958\u0958 \u1100\u1161\u11a8 \uf900\ufa10",  # normal form: longer, composed, another character
    "👩\u200d👩\u200d👧 🇨🇳🇨🇳 ☎\ufe0f\n",
    "中文，没有空格。“引号”：（括号）！？……——《书》·名\u3000\u3000全角",
    "\u88d5々〇㐀\U00020000\U0002ebf0\U000323b0 ﾊﾝｶｸ ひらがな漢字カタカナ 한국어 Привет, мир",
    "naïve café été ſ 'ſ x\u2028y\u2029z\x85w\x1c.\x1c\x1d \x1f\n\x0b\x0c\r\r\n\t\tq\u00a0\u2003 \ufeff\x00",
    "1234567890 3.14 ２３ ①Ⅳ½ 2023年5月10日 x1y2",
    "<|im_start|>user\nhi<|im_end|>\n<|im_end|><|endoftext|> <|im_end| > !!<|im_end|>!! <|im_start|>\u0338",
    "<tool_call>\n{}\n</tool_call><tool_call>\u0338 <|fim_prefix|>  a",
    "def f(x):\n    return x  \n\n\n\tpass\r\n  # ...   \n",
    "." * 100 + "\n" * 100 + "。\n \n。”\n\n  他说",
]


@pytest.mark.parametrize("text", AWKWARD, ids=lambda text: ascii(text[:12]))
def test_awkward_texts(tokenizer, text):
    count = TokenCounter(tokenizer)
    assert count.fast
    assert count(text) == whole(tokenizer, text)
    assert count(text) == whole(tokenizer, text)  # from what was remembered


def test_texts_of_random_characters(tokenizer):
    """Every way for two of the awkward characters to meet; and no pass may depend on what is remembered already."""
    draw = random.Random(0)
    characters = sorted(set("".join(AWKWARD) + "abcXYZ好的吗"))
    characters += [" ", "\n", "\r", "\t", "a", "好", "，", ".", "'", "1"] * 12 + ["<|im_end|>", "'s", "  ", "\n\n"] * 6
    count = TokenCounter(tokenizer)
    for _ in range(3000):
        text = "".join(draw.choices(characters, k=draw.randrange(1, 30)))
        assert count(text) == whole(tokenizer, text), ascii(text)


def test_what_the_cuts_take_for_sure():
    """The sets of characters, out of all there are, against the Unicode version of the tokenizers."""
    unicode = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)

    def own(pattern: str) -> set[str]:
        split = pre_tokenizers.Split(Regex(pattern), "removed")
        return set(unicode) - set("".join(piece for piece, _ in split.pre_tokenize_str(unicode)))

    def ours(pattern: str) -> set[str]:
        return set(re.findall(pattern, unicode))

    letters = own(r"\p{L}")
    assert ours(f"[{LETTERS}]") < letters and not ours(f"[{NO_LETTERS}]") & letters
    assert ours(f"[{PUNCTUATION}]").isdisjoint(letters | own(r"\p{N}") | own(r"\s") | {"'"})
    assert ours(NO_SPACE) == set(unicode) - own(r"\s")
    for character in ours(f"[ {LETTERS}{PUNCTUATION}]"):
        assert unicodedata.is_normalized("NFC", f"好{character}") and not unicodedata.combining(character)


@needs_shared
@pytest.mark.parametrize("name", ["alpaca_zh_demo", "alpaca_en_demo", "sharegpt_zh_100", "moss_conversations"])
def test_real_texts(tokenizer, name):
    rows = map(json.loads, (SHARED / f"data/sft/{name}.jsonl").read_bytes().splitlines())
    texts = [row["instruction"] + row["output"] for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert list(map(TokenCounter(tokenizer), texts)) == list(map(len, encoded))


def test_few_and_short_pieces_are_remembered(tokenizer, monkeypatch):
    monkeypatch.setattr(counting, "REMEMBERED", 50)
    count = TokenCounter(tokenizer)
    for n in range(300):
        text = f"{'word' * (n % 20)} x{chr(0x4E00 + n)}"
        assert count(text) == whole(tokenizer, text)
        assert len(count.pieces) <= 50 and all(len(piece) <= LONGEST for piece in count.pieces)


@pytest.mark.parametrize("change", ["pattern", "normalizer", "added token"])
def test_a_tokenizer_of_another_kind_is_asked_for_the_whole_text(change):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/base")
    backend = tokenizer.backend_tokenizer
    if change == "pattern":  # words of two letters
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\p{L}{1,2}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    elif change == "normalizer":
        backend.normalizer = normalizers.Replace(" ", "")
    else:
        tokenizer.add_tokens("two words")
    count = TokenCounter(tokenizer)
    text = "Here are two words that return return"
    assert not count.fast and count(text) == whole(tokenizer, text)
    assert count(text) != TokenCounter(AutoTokenizer.from_pretrained(ROOT / "data/base"))(text)


def test_a_counter_can_be_sent_to_another_process(tokenizer):
    count = pickle.loads(pickle.dumps(TokenCounter(tokenizer)))
    assert count(AWKWARD[-2]) == whole(tokenizer, AWKWARD[-2])
