"""Stage `evaluate@<group>`: what the arms of a group predict on the held-out rows.

All arms of a group share their weights and differ in what each query attends to. Per-token predictions go to
data/evaluate/<group>.npz, numbers to reports/evaluate/<group>.json; differences between arms are the report's work.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import END_OF_TURN, IGNORE, examples
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
from dsa.evaluation.retrieval import questions, score
from stages import arms, params
from stages.common import measured
from stages.files import read_rows, write_json

SHOWN = 128  # tokens of a sample answer
RETRIEVAL_SEED = 0  # every arm and every seed of the experiment has the same questions


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


def retrieval(model: DSAForCausalLM, tokenizer, grid) -> list[dict]:
    """Key-value retrieval by length and depth: exact values, and the share of their tokens that is right."""
    found = []
    for length in grid.lengths:
        cells: dict[float, list[torch.Tensor]] = {}
        items = questions(tokenizer, length, grid.depths, grid.rows, RETRIEVAL_SEED)
        for item, (right, _) in zip(items, score(model, tqdm(items, desc=f"retrieval at {length}")), strict=True):
            cells.setdefault(item.depth, []).append(right)
        for depth, right in cells.items():
            exact = sum(bool(r.all()) for r in right) / len(right)
            tokens = torch.cat(right).float().mean().item()
            cell = {"length": length, "depth": depth, "rows": len(right), "exact": exact, "tokens": round(tokens, 4)}
            found.append(cell)
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

    def retrieval(self) -> None:
        self.metrics["retrieval"] = retrieval(self.model, self.tokenizer, self.options.retrieval)

    def selection(self) -> None:
        self.metrics["selection"] = selection(self.model, self.rows[: self.options.statistics_rows], self.p.topk)

    def topk_sweep(self) -> None:
        """The trained model at other k than it was trained with, and at that one."""
        found = {self.p.topk: next(self.metrics["arms"][arm] for arm in self.metrics["arms"] if arm in arms.TRAINED)}
        for k in sorted({*self.options.topk_sweep} - {self.p.topk}):
            found[k], _ = self.predictions(f"k{k}", {"index_topk": k}, self.options.control_rows)
        shown = ("loss", "loss_all_tokens", "retrieval", "retrieval_tokens")
        self.metrics["topk_sweep"] = {str(k): {name: found[k][name] for name in shown} for k in sorted(found)}

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
