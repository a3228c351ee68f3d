"""How many tokens a text has, several times faster than by tokenising it.

A byte-level tokenizer first cuts a text into words by a pattern and no token crosses a cut, so a text has as many
tokens as its words together. Most words have been seen before: their counts are remembered. Of what a tokenizer call
costs, more goes into normalising, cutting and building the result than into the merges, so a new word that is
certainly one of the pattern's goes to the merges straight away.

Which characters are letters depends on the Unicode version that a tokenizer was built with. The cuts here are only at
places where no version differs: a piece is one or several of the tokenizer's words, never a part of one.
"""

import json
import re

from transformers.convert_slow_tokenizer import bytes_to_unicode

# The pattern of Qwen2 and Qwen2.5. A tokenizer with another one is asked for every text.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REMEMBERED = 1 << 18  # pieces
LONGEST = 32  # characters of a remembered piece: words are remembered, not texts

# Sets of characters. Python's \s has four control characters that Unicode's white space has not.
LETTERS = "A-Za-z\u4e00-\u9fa5"
PUNCTUATION = (
    r"!-&(-/:-@\[-`{-~\xab\xb7\xbb\u2010-\u2027\u2030-\u205e\u3001-\u3004\u3008-\u3020\uff01-\uff0f\uff1a-\uff20"
)
NO_LETTERS = rf"\t-\r '0-9\u3000{PUNCTUATION}"
SPACE, NO_SPACE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
BLANK = r"[^\S\x1c-\x1f\r\n]"

# The pattern never has a letter and then something else in one word, nor a space (but for the end of a line) after
# something else, nor anything after the end of a line.
PIECE = re.compile(
    rf"{BLANK}*+[^{LETTERS}\s]*+[{LETTERS}]++(?=[{NO_LETTERS}]|\Z)"
    rf"|{BLANK}*+{NO_SPACE}++(?:{SPACE}*[\r\n])?"
    rf"|{SPACE}*[\r\n]|{SPACE}+"
)
WORD = re.compile(rf"[ {PUNCTUATION}]?[{LETTERS}]+")  # one word of the pattern, and in normal form


class TokenCounter:
    """`counter(text)`: the tokens that `tokenizer` makes of a text, without adding any. Exact.

    `fast` is False where the tokenizer is of a kind that has to be asked for the whole text.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        added = sorted((token.content for token in self.backend.get_added_tokens_decoder().values()), key=len)
        self.added = re.compile("|".join(map(re.escape, reversed(added))) or r"(?!)")  # the longest first
        self.pieces = Pieces(self.backend)
        self.fast = cuts_like_qwen2(self.backend)

    def __call__(self, text: str) -> int:
        if not self.fast:
            return len(self.backend.encode(text, add_special_tokens=False))
        parts = self.added.split(text)
        return len(parts) - 1 + sum(sum(map(self.pieces.__getitem__, PIECE.findall(part))) for part in parts)

    def __reduce__(self):
        return TokenCounter, (self.tokenizer,)


class Pieces(dict):
    """Tokens by piece."""

    def __init__(self, backend):
        super().__init__()
        self.backend, self.model = backend, backend.model
        self.byte_names = bytes_to_unicode()

    def __missing__(self, piece: str) -> int:
        if WORD.fullmatch(piece):
            tokens = len(self.model.tokenize(piece.encode().decode("latin-1").translate(self.byte_names)))
        else:
            tokens = len(self.backend.encode(piece, add_special_tokens=False))
        if len(piece) <= LONGEST:
            if len(self) == REMEMBERED:
                self.clear()  # the common words are back at once
            self[piece] = tokens
        return tokens


def cuts_like_qwen2(backend) -> bool:
    def settings(component) -> dict:
        return json.loads(component.__getstate__())

    if backend.normalizer is None or backend.pre_tokenizer is None or settings(backend.normalizer) != {"type": "NFC"}:
        return False
    cut, *to_bytes = settings(backend.pre_tokenizer).get("pretokenizers", [{}])
    for step in to_bytes:
        step.pop("trim_offsets", None)
    return (
        cut == {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}
        and to_bytes == [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
        and not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized or re.search(r"\s", token.content)
            for token in backend.get_added_tokens_decoder().values()
        )
    )
