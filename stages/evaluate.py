"""Stage `evaluate@<group>`: what the arms of a group predict on the held-out rows.

All arms of a group share their weights and differ in what each query attends to. Per-token predictions go to
data/evaluate/<group>.npz, numbers to reports/evaluate/<group>.json; differences between arms are the report's work.
"""

import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dsa import DSAForCausalLM, load_model
from dsa.data.recall import Recall, Row
from dsa.data.rows import END_OF_TURN, IGNORE, examples
from dsa.evaluation.exact import exact
from dsa.evaluation.predictions import (
    Heatmap,
    RowPredictions,
    answer_spans,
    attention_mass,
    changed,
    correct,
    evidence_distance,
    greedy,
    observe_dense,
    predict,
)
from stages import arms, params
from stages.common import measured
from stages.files import read_rows, write_json

SHOWN = 128  # tokens of a sample answer
QUESTIONS = 20  # of a row of pairs
MakeRow = Callable[[object, int], Row]  # of a seed and a length


def is_lookup(row: dict) -> bool:
    """Whether a row asks for definitions in the text above: only the corpus of the cpu profile has such rows."""
    kinds = row.get("type_keyword")
    return isinstance(kinds, list) and kinds[:1] == ["lookup"]


def summarize(tokenizer, rows: list[dict], texts: list[dict], predictions: list[RowPredictions]) -> tuple[dict, list]:
    """Held-out losses (nats a token), and each look-up with its distance and how much of it is right."""
    nll = torch.cat([p.nll for p in predictions])
    answers = torch.cat([torch.tensor(r["labels"][1:]) != IGNORE for r in rows])
    lookups, end = [], tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for number, (row, text, prediction) in enumerate(zip(rows, texts, predictions, strict=True)):
        if not is_lookup(text):
            continue
        ids = row["input_ids"]
        pieces = tokenizer.batch_decode([[i] for i in ids])
        for kind, span in zip(text["type_keyword"][1:], answer_spans(row["labels"]), strict=False):
            distance = evidence_distance(pieces, span)
            whole = ids[span[1] - 1] == end  # the length limit may have cut the last answer
            if whole and distance is not None:
                right = correct(prediction, ids, span)
                share = right.float().mean().item()
                right = bool(right.all())
                length = span[1] - span[0]
                lookups.append(
                    {
                        "row": number,
                        "kind": kind,
                        "distance": distance,
                        "length": length,
                        "right": right,
                        "tokens": share,
                    }
                )
    return {
        "loss": round(nll[answers].mean().item(), 5),
        "loss_all_tokens": round(nll.mean().item(), 5),
        "answer_tokens": int(answers.sum()),
        "tokens": len(nll),
        "rows": len(rows),
        "lookups": len(lookups),
        "retrieval": round(sum(x["right"] for x in lookups) / max(1, len(lookups)), 5),
        "lookup_tokens": round(sum(x["length"] for x in lookups) / max(1, len(lookups)), 2),  # of an answer
        "retrieval_tokens": round(sum(x["tokens"] for x in lookups) / max(1, len(lookups)), 5),
    }, lookups


def generate(model: DSAForCausalLM, tokenizer, rows: list[dict], texts: list[dict], count: int) -> list[dict]:
    """Greedy answers to the first question of the first look-up rows, or of any where there are none, and the truth."""
    samples = []
    wanted = [row for row, text in zip(rows, texts, strict=True) if is_lookup(text)] or rows
    for row in wanted[:count]:
        start, end = answer_spans(row["labels"])[0]
        end = min(end, start + SHOWN)
        samples.append(
            {
                "prompt_tokens": start,
                "prompt_end": tokenizer.decode(row["input_ids"][max(0, start - 60) : start]),
                "truth": tokenizer.decode(row["input_ids"][start:end]),
                "answer": tokenizer.decode(greedy(model, row["input_ids"][:start], end - start + 16)),
            }
        )
    return samples


def retrieval(model: DSAForCausalLM, tests: dict[str, MakeRow], lengths: list[int], rows: int, name: str) -> list[dict]:
    """Exact values by test and length, and by fifths of the depth; 20 questions for each of `rows`."""
    found = []
    for test, make in tests.items():
        for length in lengths:
            right, depths = [], []
            for row in tqdm(recall_rows(make, length, rows), desc=f"{name}: {test} at {length}"):
                right += exact(model, row)
                depths += row.depths
            fifth = np.minimum((5 * np.array(depths)).astype(int), 4)
            by_fifth = [float(np.mean(np.array(right)[fifth == f])) for f in range(5)]
            cell = {"test": test, "length": length, "questions": len(right), "exact": float(np.mean(right))}
            found.append({**cell, "by_depth": [round(x, 4) for x in by_fifth]})
    return found


def recall_rows(make: MakeRow, length: int, rows: int) -> list[Row]:
    """So many rows of 20 questions each, or twice as many of ten; every arm has the same."""
    first = make(0, length)
    return [first, *(make(seed, length) for seed in range(1, rows * QUESTIONS // len(first.spans)))]


def floors(model: DSAForCausalLM, recall: Recall, lengths: list[int], rows: int) -> list[dict]:
    """What is right without reaching back: of who sees the questions and not the context, and of who guesses among the
    context's values."""
    found = []
    for test, make in recall.tests.items():
        for length in lengths:
            asked = recall_rows(make, length, rows)
            blind = [right for row in asked for right in exact(model, row, row.context)]
            guess = 1 / asked[0].facts
            found.append({"test": test, "length": length, "blind": float(np.mean(blind)), "guess": round(guess, 4)})
    return found


def selection(model: DSAForCausalLM, rows: list[dict], topk: int) -> dict[str, list[float]]:
    """Mass@k, oracle's mass@k and recall@k of each layer, means over the rows of more than k tokens; 1 if none is."""
    rows = [row for row in rows if len(row["input_ids"]) > topk] or rows[:1]
    each = [attention_mass(model, torch.tensor([r["input_ids"]], device=model.device), topk) for r in rows]
    return {name: [round(float(x), 4) for x in np.mean([e[name] for e in each], axis=0)] for name in each[0]}


def heatmap(model: DSAForCausalLM, row: dict, queries: int = 256) -> dict[str, np.ndarray]:
    """The last queries of a row, middle layer: what attention wanted and what the indexer offers, [queries, keys]."""
    layer = model.config.num_hidden_layers // 2
    observer = Heatmap(layer, queries)
    observe_dense(model, torch.tensor([row["input_ids"]], device=model.device), observer)
    maps = {"heatmap_wanted": observer.wanted, "heatmap_offered": observer.offered}
    return {name: x.cpu().numpy().astype(np.float16) for name, x in maps.items()} | {"heatmap_layer": np.array(layer)}


class Evaluation:
    """A group's model, the held-out rows, and what was measured so far: numbers, and arrays by token or look-up."""

    def __init__(self, group: arms.Group, p: params.Params):
        path, self.p, self.options = Path("data/long/test.jsonl.gz"), p, p.evaluate
        topk = {"index_topk": p.topk} if group.sparse else {}
        self.model = load_model(group.model, dtype="float32", **topk).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.tokenizer = AutoTokenizer.from_pretrained(group.model)
        self.texts = list(read_rows(path))[: self.options.rows]
        self.rows = examples(self.tokenizer, self.texts, p.data.max_length)
        self.metrics: dict = {"arms": {}}
        self.arrays: dict[str, np.ndarray] = {
            "lengths": np.array([len(r["input_ids"]) - 1 for r in self.rows]),
            "answers": np.concatenate([np.array(r["labels"][1:]) != IGNORE for r in self.rows]),
        }

    def predictions(self, name: str, changes: dict, count: int) -> tuple[dict, list[dict]]:
        """Those of the first rows, with changes of the config: kept by name, and as `summarize` has them."""
        start, rows = time.monotonic(), self.rows[:count]
        with changed(self.model.config, **changes):
            found = [predict(self.model, row["input_ids"]) for row in tqdm(rows, desc=name)]
        summary, lookups = summarize(self.tokenizer, rows, self.texts[:count], found)
        summary["tokens_per_second"] = round(summary["tokens"] / (time.monotonic() - start))
        self.arrays[f"nll_{name}"] = torch.cat([x.nll for x in found]).numpy()
        self.arrays[f"argmax_{name}"] = torch.cat([x.argmax for x in found]).numpy().astype(np.int32)
        return summary, lookups

    def arm(self, name: str, arm: arms.Arm) -> None:
        count = self.options.rows if arm.trained_by else self.options.control_rows
        self.metrics["arms"][name], lookups = self.predictions(name, arm.changes, count)
        self.arrays[f"right_{name}"] = np.array([x["right"] for x in lookups])
        self.arrays[f"share_{name}"] = np.array([x["tokens"] for x in lookups])
        if arm.trained_by:
            self.arrays |= {f"lookup_{key}": np.array([x[key] for x in lookups]) for key in ("distance", "row", "kind")}

    def generations(self) -> None:
        answers = generate(self.model, self.tokenizer, self.rows, self.texts, self.options.generations)
        self.metrics["generations"] = answers

    @cached_property
    def recall(self) -> Recall:
        """Rows with questions; the needles' haystacks are the held-out rows."""
        ids = [i for row in self.rows for i in row["input_ids"]]
        repeats = 1 + 2 * max(self.options.retrieval.lengths, default=0) // len(ids)
        return Recall(self.tokenizer, torch.tensor(ids * repeats))

    def retrieval(self) -> None:
        grid, self.metrics["retrieval"] = self.options.retrieval, {}
        for name in arms.RETRIEVING:
            if name in self.metrics["arms"]:
                with changed(self.model.config, **arms.ARMS[name].changes):
                    found = retrieval(self.model, self.recall.tests, grid.lengths, grid.rows, name)
                self.metrics["retrieval"][name] = found

    def floors(self) -> None:
        grid = self.options.retrieval
        self.metrics["floors"] = floors(self.model, self.recall, grid.lengths, grid.rows)

    def selection(self) -> None:
        self.metrics["selection"] = selection(self.model, self.rows[: self.options.statistics_rows], self.p.topk)

    def budgets(self) -> None:
        """The trained weights at other k than they were trained with, with the indexer's choice and with the latest
        keys, and under dense attention: losses on the first rows, pairs found at the longest trained length."""
        options = self.options
        trained = [length for length in options.retrieval.lengths if length <= self.p.data.max_length]
        pairs = {"pairs": self.recall.tests["pairs"]}
        self.metrics["budgets"] = []
        for name, changes in arms.budgets([*{self.p.topk, *options.topk_sweep}]).items():
            summary, _ = self.predictions(f"budget_{name}", changes, options.control_rows)
            numbers = {key: summary[key] for key in ("loss", "loss_all_tokens", "retrieval", "retrieval_tokens")}
            with changed(self.model.config, **changes):
                cells = retrieval(self.model, pairs, sorted(trained)[-1:], options.retrieval.rows, name)
            numbers |= {cell["test"]: cell["exact"] for cell in cells}
            arm, _, k = name.partition("_")
            self.metrics["budgets"].append({"name": name, "arm": arm, "topk": int(k) if k else None, **numbers})

    def heatmap(self) -> None:
        self.arrays |= heatmap(self.model, self.rows[0])


def main(name: str) -> None:
    group = arms.GROUPS[name]
    evaluation = Evaluation(group, params.load(f"evaluate@{name}"))
    with measured(evaluation.metrics), torch.no_grad():
        for arm, about in arms.of(name).items():
            evaluation.arm(arm, about)
        for what in group.measures:
            getattr(evaluation, what)()
    out = Path(f"data/evaluate/{name}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **evaluation.arrays)
    write_json(Path(f"reports/evaluate/{name}.json"), evaluation.metrics)


if __name__ == "__main__":
    main(sys.argv[1])
