"""From rows to token ids: chat format, answer masks, splits, batches.

A row has deepctrl-sft-data's fields: `instruction` and `input` are the last user turn, `output` its answer, `history`
the earlier [user, assistant] pairs, oldest first. A preference row has COIG-P's. Either may have a `system` turn.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import torch

IGNORE = -100  # label of a token that is no target
END_OF_TURN = "<|im_end|>"  # of ChatML
NOT_RENDERED = ("tools", "tool_calls", "images", "videos", "audios")  # fields of known schemas, of rows or messages


def end_ids(tokenizer) -> list[int]:
    """The ids that end a generation: the end of a turn, and the tokenizer's own eos where that is another one."""
    return list(dict.fromkeys([tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.eos_token_id]))


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, short enough to be counted by."""


class LeftOut(ValueError):
    """A sound row that is not wanted; the message is the reason."""


def split_of(key: str, test_fraction: float) -> str:
    """ "train" or "test", by a hash of `key`, so that everything with one key is on one side, whatever the seed."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") / 2**64 < test_fraction else "train"


def prompt_key(messages: list[dict]) -> str:
    """The same for prompts that differ in white space or Unicode form only: the text of all user turns.

    No system turn is in it, which many rows share, nor an answer.
    """
    text = "\n".join(message["content"] for message in messages if message["role"] == "user")
    return " ".join(unicodedata.normalize("NFKC", text).split())


def prompt_of(row: dict) -> str:
    """The last user turn: the instruction, then the input where there is one."""
    return "\n".join(part for part in (row.get("instruction") or "", row.get("input") or "") if part.strip())


def first_of(fields: dict, *names: str) -> object:
    """The first of these fields that has a value: a table has the fields of all of its rows in every row, as null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def refuse_not_rendered(part: dict) -> None:
    """Raises BadRow for a field that changes what a row or message means and that nothing here can render."""
    for field in NOT_RENDERED:
        if part.get(field):
            raise BadRow(f"{field} cannot be rendered")


def system_of(row: dict) -> list[dict]:
    """The row's own system turn, a list of one message; an empty list where the chat template's default is meant."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise BadRow("system is not a string")
    return [{"role": "system", "content": system}] if system.strip() else []


def messages_of(row: dict) -> list[dict]:
    """The conversation of a row as chat messages. Raises BadRow for a row of another shape or without an answer."""
    if not isinstance(row, dict):
        raise BadRow("not an object")
    for field in ("instruction", "input", "output"):
        if not isinstance(row.get(field), str | None):
            raise BadRow(f"{field} is not a string")
    if row.get("output") is None or first_of(row, "instruction", "input") is None:
        raise BadRow("unknown schema")
    refuse_not_rendered(row)
    history = row.get("history") or []
    pair = "history is not a list of [user, assistant] pairs"
    if not isinstance(history, list):
        raise BadRow(pair)
    turns = []
    for turn in history:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
            raise BadRow(pair)
        turns.append(tuple(turn))
    turns.append((prompt_of(row), row["output"]))
    if not turns[-1][0]:
        raise BadRow("no prompt")
    if not turns[-1][1].strip():
        raise BadRow("no answer")
    return system_of(row) + [
        m
        for user, answer in turns
        for m in ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    ]


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def turns_of(value: object, field: str) -> list[dict]:
    """One message or a list of them, {"from", "value"} or {"role", "content"}, as chat messages."""
    turns = []
    for turn in value if isinstance(value, list) else [value]:
        if not isinstance(turn, dict):
            raise BadRow(f"{field} is not a list of messages")
        refuse_not_rendered(turn)
        role, content = first_of(turn, "role", "from"), first_of(turn, "content", "value")
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise BadRow(f"{field} has a message of unknown schema")
        turns.append({"role": ROLES[role], "content": content})
    return turns


def pair_of(row: dict) -> dict:
    """A preference row as {"prompt", "chosen", "rejected"}, each a list of chat messages, the last two of one message,
    and its "domain" and "data_source".

    COIG-P is published as `conversations` (the prompt) with one message each in `chosen` and `rejected`, and is trained
    on as whole message lists in the two that share all but the last message. Both forms are read.
    Raises BadRow for any other.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object")
    if row.get("chosen") is None or row.get("rejected") is None:
        raise BadRow("unknown schema")
    chosen, rejected = (turns_of(row[answer], answer) for answer in ("chosen", "rejected"))
    if row.get("conversations") is not None:
        prompt = turns_of(row["conversations"], "conversations")
        if len(chosen) != 1 or len(rejected) != 1:
            raise BadRow("an answer is not one message")
    else:
        prompt = chosen[:-1]
        if rejected[:-1] != prompt:
            raise BadRow("the two prompts differ")
    refuse_not_rendered(row)
    system = system_of(row)
    if system and prompt and prompt[0]["role"] == "system":
        raise BadRow("two system turns")
    prompt = system + prompt
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise BadRow("no prompt")
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise BadRow("an answer is not the assistant's")
    about = {field: str(row.get(field)) for field in ("domain", "data_source")}
    return {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:], **about}


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: its text and the [start, end) characters of each answer, end-of-turn token included."""

    text: str
    answers: list[tuple[int, int]]


def render(tokenizer, messages: list[dict]) -> Conversation:
    """Apply the tokenizer's own chat template and find the answers in the result. Raises BadRow."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        upto = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False).rstrip("\n")
        if not (text.startswith(head) and text.startswith(upto)):
            raise BadRow("the chat template rewrites earlier turns: answers cannot be told from prompts")
        answers.append((len(head), len(upto)))
    return Conversation(text, answers)


def encode(tokenizer, conversations: Iterable[Conversation], max_length: int | None = None) -> list[dict]:
    """Token ids and labels: the id where a token belongs to an answer (its end-of-turn token too), else IGNORE.

    Longer conversations are cut on the right, so that the prompt stays; a row may be left without a label.
    Returns one {"input_ids", "labels"} of equal-length lists a conversation.
    """
    conversations = list(conversations)
    if not conversations:
        return []
    encoded = tokenizer(
        [c.text for c in conversations],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    examples = []
    for conversation, ids, offsets in zip(conversations, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        labels, spans = [IGNORE] * len(ids), iter(conversation.answers)
        start, end = next(spans)
        for i, (left, _) in enumerate(offsets):
            while left >= end:
                start, end = next(spans, (len(conversation.text), len(conversation.text) + 1))
            if left >= start:
                labels[i] = ids[i]
        examples.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return examples


def examples(tokenizer, rows: Iterable[dict], max_length: int | None = None) -> list[dict]:
    """Instruction rows, none of them bad, as `encode` has conversations."""
    return encode(tokenizer, [render(tokenizer, messages_of(row)) for row in rows], max_length)


def pair_texts(tokenizer, pair: dict) -> tuple[str, str, str]:
    """A pair's prompt with the start of an answer's turn, and the whole conversations that end with either answer.

    Raises BadRow where the chat template rewrites the prompt.
    """
    prompt = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    chosen, rejected = (
        tokenizer.apply_chat_template(pair["prompt"] + pair[answer], tokenize=False)
        for answer in ("chosen", "rejected")
    )
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        raise BadRow("the chat template rewrites the prompt: answers cannot be told from prompts")
    return prompt, chosen, rejected


def tokenize_pair(tokenizer, pair: dict) -> dict[str, list[int]]:
    """A pair's {"prompt_ids", "chosen_ids", "rejected_ids"}, as TRL makes them of the pairs that it trains on.

    Raises LeftOut where the end of the prompt and the start of an answer are one token, as before "\\nyes": TRL would
    end the prompt before that token, where no generation begins.
    """
    prompt, chosen, rejected = tokenizer(list(pair_texts(tokenizer, pair)), add_special_tokens=False)["input_ids"]
    if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
        raise LeftOut("a token across prompt and answer")
    return {"prompt_ids": prompt, "chosen_ids": chosen[len(prompt) :], "rejected_ids": rejected[len(prompt) :]}


class Collator:
    """Right-pads examples to the longest of the batch; the attention mask, not the pad id, tells what is padding."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(e["input_ids"]) for e in examples)

        def stack(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([list(v) + [fill] * (length - len(v)) for v in values])

        return {
            "input_ids": stack([e["input_ids"] for e in examples], self.pad_token_id),
            "attention_mask": stack([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": stack([e["labels"] for e in examples], IGNORE),
        }
