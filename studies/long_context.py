"""Long contexts, from a finished run: needles by depth and length, and the loss beyond the trained length.

    python -m studies.long_context                     # minutes: reports/long_context.{json,md}, long_context/*.png
    python -m studies.long_context --lengths 4096 8192 16384 32768 --text BOOK.txt.gz --kv ROWS.jsonl.gz
    python -m studies.long_context --from reports/long_context.json     # the page again, without the models

The first is for the cpu profile: its texts are the held-out files of the corpus. Other profiles name texts, plain or
gzipped, which are cut into documents, and rows of key-value retrieval as published with "Lost in the Middle".
"""

import argparse
import gzip
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dsa import DSAForCausalLM, load_model
from dsa.data.corpus import separate, source_files
from dsa.evaluation.needles import DOCSTRING, SENTENCE, Form, Haystack, published, token_losses
from dsa.evaluation.retrieval import Question, score
from stages import params
from stages.arms import ARMS, model_of
from stages.common import device_name, git_commit
from stages.files import read_rows
from stages.lock import model_hashes
from stages.statistics import plain
from studies.common import interval, write
from studies.long_context_report import write_report

OUT = Path("reports/long_context.json")
SHOWN = ("dense", "dsa", "dsa_oracle", "window_trained")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURES = ("tokens", "nats", "exact")  # of an answer: share of tokens right, loss of a token, all of them right
SEED = 0  # every arm, and every run of the experiment, has the same questions
BIN = 256  # positions
SLACK = 512  # tokens that a document has beyond the longest row
PACKAGES = ("torch", "transformers")


class LongContextError(SystemExit):
    """str() is the one line to show."""


@dataclass(frozen=True)
class Document:
    """A text of enough tokens, and the family of texts that it is from."""

    source: str
    family: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Item:
    """One of a task; `row` is the independent unit: the rows of a document share their text and facts."""

    question: Question
    length: int
    row: int


def held_out_files(p: params.Params) -> Iterator[tuple[str, str, str]]:
    """(source, family, text) of the files whose families no training saw, the base model's included."""
    for file in separate(source_files(p.data.packages), p.data.test_fraction)[1]:
        yield file.path, file.family, file.text


def text_files(paths: list[Path]) -> Iterator[tuple[str, str, str]]:
    for path in paths:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            yield path.name, path.name, file.read()


def documents(
    tokenizer, texts: Iterator[tuple[str, str, str]], tokens: int, count: int, *, cut: bool
) -> list[Document]:
    """The first `count` documents of so many tokens, one of each family after the other and then the next of each.

    Args:
        cut: a text gives as many documents as fit into it without overlap, else its beginning alone.

    Raises LongContextError where there are fewer than two.
    """
    families: dict[str, list[Document]] = {}
    for source, family, text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        members = families.setdefault(family, [])
        starts = range(0, len(ids) - tokens + 1, tokens)
        for start in starts if cut else starts[:1]:
            piece = text[offsets[start][0] : offsets[start + tokens - 1][1]]
            name = f"{source}+{start}" if cut else source
            members.append(Document(name, family, piece, ids[start : start + tokens]))
    turns = itertools.zip_longest(*families.values())
    found = [document for turn in turns for document in turn if document is not None][:count]
    if len(found) < 2:
        raise LongContextError(f"{len(found)} documents of {tokens} tokens: more or longer texts are needed (--text)")
    return found


def needle_items(tokenizer, form: Form, texts: list[Document], lengths: list[int], *, many: bool) -> list[Item]:
    """The questions of all documents, lengths and depths; a document has the same facts in each of its rows."""
    stacks = [Haystack(tokenizer, form, document.text) for document in texts]
    return [
        Item(item, length, row)
        for length in lengths
        for row, stack in enumerate(stacks)
        for item in stack.rows(length, DEPTHS, f"{SEED}-{row}", many=many)
    ]


def published_items(tokenizer, paths: list[Path], count: int) -> list[Item]:
    """The first `count` rows of each file, of the file's longest row's length, at the nearest of `DEPTHS`."""
    items: list[Item] = []
    for path in paths:
        rows = list(published(tokenizer, itertools.islice(read_rows(path), count)))
        length = max(len(item.ids) for item in rows)
        for item in rows:
            depth = min(DEPTHS, key=lambda d: abs(d - item.depth))
            items.append(Item(Question(item.ids, item.span, depth), length, len(items)))
    return items


def load(arm: str) -> DSAForCausalLM:
    model = load_model(model_of(arm), dtype="float32", **ARMS[arm].changes).eval()
    return model.cuda() if torch.cuda.is_available() else model


def answers(model: DSAForCausalLM, items: list[Item], name: str) -> np.ndarray:
    """`MEASURES` of each item, [items, 3]."""
    found = []
    for _, group in itertools.groupby(tqdm(items, desc=name), key=lambda item: (item.length, item.row)):
        for right, nll in score(model, [item.question for item in group]):
            found.append((right.float().mean().item(), nll.mean().item(), float(right.all())))
    return np.array(found)


def contrast(values: dict[str, np.ndarray], units: np.ndarray) -> dict:
    """Means of each arm's [items, 3], and its paired difference from dense attention."""
    gaps = {arm: v - values["dense"] for arm, v in values.items() if arm != "dense"}
    return {
        "items": len(units),
        "means": {arm: dict(zip(MEASURES, v.mean(0), strict=True)) for arm, v in values.items()},
        "gaps": {
            arm: {name: interval(gap[:, i], units) for i, name in enumerate(MEASURES)} for arm, gap in gaps.items()
        },
    }


def summary(items: list[Item], values: dict[str, np.ndarray], trained: int) -> dict:
    """A task's table: cells by length and depth, and contrasts by length, by depth, and on either side of `trained`."""
    length = np.array([item.length for item in items])
    depth = np.array([item.question.depth for item in items])
    units = np.array([item.row for item in items])
    lengths = sorted(set(length.tolist()))

    def part(which: np.ndarray) -> dict | None:
        if len(np.unique(units[which])) < 2:
            return None
        return contrast({arm: v[which] for arm, v in values.items()}, units[which])

    def cell(v: np.ndarray, which: np.ndarray) -> float:
        return v[which].mean() if which.any() else np.nan

    return {
        "lengths": lengths,
        "depths": DEPTHS,
        "rows": len(np.unique(units)),
        "cells": {
            arm: {
                name: [[cell(v[:, i], (length == n) & (depth == d)) for n in lengths] for d in DEPTHS]
                for i, name in enumerate(MEASURES)
            }
            for arm, v in values.items()
        },
        "by_length": [part(length == n) for n in lengths],
        "by_depth": [part((depth == d) & (length <= trained)) for d in DEPTHS],
        "trained": part(length <= trained),
        "beyond": part(length > trained),
    }


def extrapolation(losses: dict[str, np.ndarray], families: np.ndarray, trained: int, topk: int) -> dict:
    """Losses [documents, positions] of each arm by position: in bins, and on either side of the trained length.

    The query at position t, counted from 0, predicts token t + 1.
    """
    count, positions = losses["dense"].shape
    units, at = np.arange(count), np.arange(positions)
    gaps = {arm: x - losses["dense"] for arm, x in losses.items() if arm != "dense"}

    def part(which: np.ndarray) -> dict:
        rows = np.repeat(units, which.sum())
        found = {"means": {arm: x[:, which].mean() for arm, x in losses.items()}, "gaps": {}}
        for arm, gap in gaps.items():
            found["gaps"][arm] = interval(gap[:, which].ravel(), rows)
            if len(np.unique(families)) > 1:
                found["gaps"][arm]["by_family"] = interval(gap[:, which].ravel(), families[rows])
        return found

    parts = {"up_to_k": at < topk, "trained": (at >= topk) & (at < trained), "beyond": at >= trained}
    late = (at >= trained // 2) & (at < trained)
    return {
        "documents": count,
        "positions": positions,
        "bins": [{"from": b, **part((at >= b) & (at < b + BIN))} for b in range(0, positions, BIN)],
        "parts": {name: part(which) for name, which in parts.items() if which.any()},
        # Beyond the trained length minus before it, document by document: of each gap, and of each arm's own loss.
        **(
            {
                "growth": {
                    arm: interval(gap[:, parts["beyond"]].mean(1) - gap[:, parts["trained"]].mean(1), units)
                    for arm, gap in gaps.items()
                },
                "own": {
                    arm: interval(x[:, parts["beyond"]].mean(1) - x[:, late].mean(1), units)
                    for arm, x in losses.items()
                },
            }
            if positions > trained
            else {}
        ),
    }


def analyse(args: argparse.Namespace) -> dict:
    """All of the numbers of the page."""
    start = time.monotonic()
    p = params.load()
    trained = p.data.max_length
    lengths = sorted(args.lengths or [trained // 4, trained // 2, trained, 3 * trained // 2, 2 * trained])
    if args.text is None and not p.data.packages:
        raise LongContextError(f"the profile {p.profile} has no files of its own to hold out: name texts (--text)")
    form = DOCSTRING if args.text is None else SENTENCE
    tokenizer = AutoTokenizer.from_pretrained(model_of("dense"))
    texts = text_files(args.text) if args.text else held_out_files(p)
    found = documents(tokenizer, texts, lengths[-1] + SLACK, max(args.rows, args.documents), cut=bool(args.text))
    tasks = {
        "needle": needle_items(tokenizer, form, found[: args.rows], lengths, many=False),
        "multikey": needle_items(tokenizer, form, found[: args.rows], lengths, many=True),
    }
    if args.kv:
        tasks["kv"] = published_items(tokenizer, args.kv, args.kv_rows)
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in tasks}
    losses: dict[str, np.ndarray] = {}
    topk = {}
    for arm in SHOWN:
        model = load(arm)
        if model.config.attention_mode == "sparse":
            topk[arm] = model.config.index_topk
        for name, items in tasks.items():
            scores[name][arm] = answers(model, items, f"{arm}: {name}")
        rows = tqdm(found[: args.documents], desc=f"{arm}: losses")
        losses[arm] = torch.stack([token_losses(model, d.ids[: lengths[-1] + 1]) for d in rows]).double().numpy()
    if len(set(topk.values())) != 1:
        raise LongContextError(f"the arms select different numbers of keys: {topk}")
    k = topk["dsa"]
    families = np.unique([d.family for d in found[: args.documents]], return_inverse=True)[1]
    example = tasks["needle"][0].question
    setup = {
        "arms": list(SHOWN),
        "topk": k,
        "trained": trained,
        "limit": model.config.max_position_embeddings,
        "lengths": lengths,
        "rows": len(found[: args.rows]),
        "row_families": len({d.family for d in found[: args.rows]}),
        "families": len(set(families.tolist())),
        "form": {"fact": form.fact, "prompt": form.prompt, "answer": form.answer},
        "value": tokenizer.decode(example.ids[slice(*example.span)]),
        "value_tokens": len(example.ids[slice(*example.span)]),
        "sources": [d.source for d in found],
        "kv": [path.name for path in args.kv or []],
    }
    run = {
        "command": " ".join(["python -m studies.long_context", *sys.argv[1:]]),
        "seconds": time.monotonic() - start,
        "device": device_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": git_commit(),
        "models": model_hashes(sorted({model_of(arm) for arm in SHOWN})),
    }
    pages = {name: summary(items, scores[name], trained) for name, items in tasks.items()}
    return plain({"setup": setup, **pages, "extrapolation": extrapolation(losses, families, trained, k), "run": run})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens of a row; default: 1/4, 1/2, 1, 1.5 and 2 of the trained"
    )
    parser.add_argument("--rows", type=int, default=8, help="documents in which needles are planted")
    parser.add_argument("--documents", type=int, default=16, help="documents for the loss by position")
    parser.add_argument("--text", type=Path, nargs="+", help="text files instead of the corpus' held-out files")
    parser.add_argument("--kv", type=Path, nargs="+", help="rows of key-value retrieval, .jsonl.gz")
    parser.add_argument("--kv-rows", type=int, default=100, help="of each such file")
    parser.add_argument("--from", dest="source", type=Path, help="this file instead of the models")
    args = parser.parse_args()
    if args.source:
        found = json.loads(args.source.read_text(encoding="utf-8"))
    else:
        found = analyse(args)
        write(found, OUT)
    write_report(found, OUT.parent)


if __name__ == "__main__":
    main()
