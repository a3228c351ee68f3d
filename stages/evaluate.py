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

from dsa import Qwen2DSAForCausalLM
from dsa.data.rows import END_OF_TURN, IGNORE
from dsa.evaluation.lookups import lookups, right_tokens
from dsa.evaluation.predictions import (
    Heatmap,
    Predictions,
    answer_spans,
    attention_mass,
    correct,
    evidence_distance,
    greedy,
    observe_dense,
    predict,
)
from stages import params
from stages.common import measured, read_rows, write_json
from stages.training import examples

# group: (model, {arm: what is changed in its config})
GROUPS = {
    "dense": ("models/dense", {"dense": {}}),
    "warmup": (
        "models/warmup",
        {
            "base": {},
            "oracle": {"attention_mode": "sparse", "selector": "oracle"},
            "sink_window": {"attention_mode": "sparse", "selector": "sink_window"},
            "window": {"attention_mode": "sparse", "selector": "window"},
            "random": {"attention_mode": "sparse", "selector": "random"},
            "warmup": {"attention_mode": "sparse", "selector": "indexer"},
        },
    ),
    "dsa": ("models/dsa", {"dsa_oracle": {"selector": "oracle"}, "dsa": {"selector": "indexer"}}),
    "window": ("models/window", {"window_trained": {}}),
    "dpo_dense": ("models/dpo-dense", {"dpo_dense": {}}),
    "dpo_dsa": ("models/dpo-dsa", {"dpo_dsa": {}}),
}
SHOWN = 128  # tokens of a sample answer
RETRIEVAL_SEED = 0  # every arm and every seed of the experiment has the same questions


def is_lookup(row: dict) -> bool:
    """Whether a row asks for definitions in the text above: only the corpus of the cpu profile has such rows."""
    kinds = row.get("type_keyword")
    return isinstance(kinds, list) and kinds[:1] == ["lookup"]


def summarize(tokenizer, rows: list[dict], texts: list[dict], predictions: list[Predictions]) -> tuple[dict, list]:
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


def generate(model: Qwen2DSAForCausalLM, tokenizer, rows: list[dict], texts: list[dict], count: int) -> list[dict]:
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


def main(group: str) -> None:
    p = params.load(f"evaluate@{group}")
    path, arms = GROUPS[group]
    model = Qwen2DSAForCausalLM.from_pretrained(path, dtype="float32").eval()
    if torch.cuda.is_available():
        model.cuda()
    if group not in ("dense", "dpo_dense"):
        model.config.index_topk = p.topk
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = list(read_rows(Path("data/long/test.jsonl.gz")))[: p.evaluate.rows]
    rows = examples(tokenizer, Path("data/long/test.jsonl.gz"), p.data.max_length)[: p.evaluate.rows]
    metrics: dict = {"arms": {}}
    arrays: dict[str, np.ndarray] = {
        "lengths": np.array([len(r["input_ids"]) - 1 for r in rows]),
        "answers": np.concatenate([np.array(r["labels"][1:]) != IGNORE for r in rows]),
    }

    def run(arm: str, count: int) -> tuple[dict, list[dict]]:
        start = time.monotonic()
        predictions = [predict(model, row["input_ids"]) for row in tqdm(rows[:count], desc=arm)]
        summary, lookups = summarize(tokenizer, rows[:count], texts[:count], predictions)
        summary["tokens_per_second"] = round(summary["tokens"] / (time.monotonic() - start))
        arrays[f"nll_{arm}"] = torch.cat([x.nll for x in predictions]).numpy()
        arrays[f"argmax_{arm}"] = torch.cat([x.argmax for x in predictions]).numpy().astype(np.int32)
        return summary, lookups

    with measured(metrics), torch.no_grad():
        for arm, changes in arms.items():
            for name, value in changes.items():
                setattr(model.config, name, value)
            trained = arm in ("dense", "dsa", "window_trained")
            metrics["arms"][arm], lookups = run(arm, p.evaluate.rows if trained else p.evaluate.control_rows)
            arrays[f"right_{arm}"] = np.array([x["right"] for x in lookups])
            arrays[f"share_{arm}"] = np.array([x["tokens"] for x in lookups])
            if trained:
                arrays["lookup_distance"] = np.array([x["distance"] for x in lookups])
                arrays["lookup_row"] = np.array([x["row"] for x in lookups])
                arrays["lookup_kind"] = np.array([x["kind"] for x in lookups])
        if group in ("dense", "dsa"):
            metrics["generations"] = generate(model, tokenizer, rows, texts, p.evaluate.generations)
        if group in ("dense", "dsa", "window"):
            metrics["retrieval"] = retrieval(model, tokenizer, p.evaluate.retrieval)
        if group in ("warmup", "dsa"):
            metrics["selection"] = selection(model, rows[: p.evaluate.statistics_rows], p.topk)
        if group == "dsa":
            metrics["topk_sweep"] = {}
            for topk in sorted({*p.evaluate.topk_sweep, p.topk}):
                model.config.index_topk = topk
                summary = metrics["arms"]["dsa"] if topk == p.topk else run(f"k{topk}", p.evaluate.control_rows)[0]
                metrics["topk_sweep"][str(topk)] = {
                    key: summary[key] for key in ("loss", "loss_all_tokens", "retrieval", "retrieval_tokens")
                }
            model.config.index_topk = p.topk
            arrays |= heatmap(model, rows[0])
    out = Path(f"data/evaluate/{group}.npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **arrays)
    write_json(Path(f"reports/evaluate/{group}.json"), metrics)


def retrieval(model: Qwen2DSAForCausalLM, tokenizer, grid) -> list[dict]:
    """Key-value retrieval by length and depth: exact values, and the share of their tokens that is right."""
    found = []
    for length in grid.lengths:
        cells: dict[float, list[torch.Tensor]] = {}
        items = lookups(tokenizer, length, grid.depths, grid.rows, RETRIEVAL_SEED)
        for item in tqdm(items, desc=f"retrieval at {length}"):
            cells.setdefault(item.depth, []).append(right_tokens(model, item))
        for depth, right in cells.items():
            exact = sum(bool(r.all()) for r in right) / len(right)
            tokens = torch.cat(right).float().mean().item()
            cell = {"length": length, "depth": depth, "rows": len(right), "exact": exact, "tokens": round(tokens, 4)}
            found.append(cell)
    return found


def selection(model: Qwen2DSAForCausalLM, rows: list[dict], topk: int) -> dict[str, list[float]]:
    """Mass@k, oracle's mass@k and recall@k of each layer, means over the rows of more than k tokens; 1 if none is."""
    rows = [row for row in rows if len(row["input_ids"]) > topk] or rows[:1]
    each = [attention_mass(model, torch.tensor([r["input_ids"]], device=model.device), topk) for r in rows]
    return {name: [round(float(x), 4) for x in np.mean([e[name] for e in each], axis=0)] for name in each[0]}


def heatmap(model: Qwen2DSAForCausalLM, row: dict, queries: int = 256) -> dict[str, np.ndarray]:
    """The last queries of a row, middle layer: what attention wanted and what the indexer offers, [queries, keys]."""
    layer = model.config.num_hidden_layers // 2
    observer = Heatmap(layer, queries)
    observe_dense(model, torch.tensor([row["input_ids"]], device=model.device), observer)
    maps = {"heatmap_wanted": observer.wanted, "heatmap_offered": observer.offered}
    return {name: x.cpu().numpy().astype(np.float16) for name, x in maps.items()} | {"heatmap_layer": np.array(layer)}


if __name__ == "__main__":
    main(sys.argv[1])
