"""Prefill attention at Qwen2.5-0.5B's geometry on the keys that a trained model selects, and on random ones.

    python -m benchmarks.prefill models/dsa data/long/test.jsonl.gz --lengths 32768 65536

The model reads the held-out rows, joined, in its own sparse mode with k = 2048. What its indexers made of the text is
kept in the scratch folder, for reading 64K tokens takes minutes. For a block of queries at each length and each layer's
selection: scoring and ranking with the layer's own index queries and keys; sparse attention as the library chooses and
in each way by itself, over random tensors of the full-size geometry; dense attention. The ways take turns. How much the
selections overlap is in multiples of k, also for whole rows of the length that the model was trained on, at its own k:
positions beyond that length are new to it. Writes reports/speed/prefill.json.
"""

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, DynamicCache

from dsa import Qwen2DSAForCausalLM, attention, index_scores, select_topk, sparse_attention
from dsa.masks import Slab, Visibility
from stages.benchmark import BLOCK, HKV, HQ, D, grouped_attention
from stages.common import device_name, scratch, versions, write_json
from stages.training import examples

CHUNK = 1024  # tokens a forward pass
NEIGHBOURS = 16  # queries of a union
WAYS = {  # what they set in dsa.attention
    "chosen": {"OWN_UNION": attention.OWN_UNION},
    "union": {"OWN_UNION": float("inf")},
    "union_16": {"OWN_UNION": float("inf"), "GATHER_ROWS": NEIGHBOURS},
    "own": {"OWN_UNION": 0, "OWN_LENGTH": 0},
}


class Indices:
    """Observer: each layer's latest index queries, keys, weights and selection."""

    def __init__(self):
        self.layers: dict[int, tuple[torch.Tensor, ...]] = {}

    def observe(self, layer, index, q, k, visible, indices) -> None:
        self.layers[layer.layer_idx] = *index, indices


def read(model: Qwen2DSAForCausalLM, ids: list[int], lengths: list[int]) -> dict[int, list[tuple[torch.Tensor, ...]]]:
    """length -> for each layer the index queries, keys, weights and selection of the last `BLOCK` queries before it."""
    found, observer, cache = {}, Indices(), DynamicCache(config=model.config)
    for start in range(0, max(lengths), CHUNK):
        chunk = torch.tensor([ids[start : start + CHUNK]])
        model.model(chunk, past_key_values=cache, use_cache=True, observer=observer)
        if start + CHUNK in lengths:
            found[start + CHUNK] = [
                (q[:, -BLOCK:].clone(), k.clone(), weights[:, -BLOCK:].clone(), indices[:, -BLOCK:].clone())
                for _, (q, k, weights, indices) in sorted(observer.layers.items())
            ]
    return found


def overlap(indices: torch.Tensor) -> dict[str, float]:
    """Of int [T, K]: the share of a query's keys that the query before has too, and the union of 16, in multiples."""
    K = indices.shape[1]
    both = [len(torch.cat([a, b]).unique()) for a, b in pairwise(indices)]
    unions = [len(x.unique()) for x in indices.split(NEIGHBOURS) if len(x) == NEIGHBOURS]
    return {"neighbour": round(2 - mean(both) / K, 4), "union_of_16": round(mean(unions) / K, 3)}


def in_turn(calls: dict[str, Callable[[], object]], queries: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a query of each call: median and spread between the quartiles."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first does not count
                times[name].append((time.perf_counter() - start) * 1e3 / queries)
    for each in times.values():
        each.sort()
    return {
        name: {"ms": round(median(each), 4), "spread": round(each[(3 * repeats) // 4] - each[repeats // 4], 4)}
        for name, each in times.items()
    }


def measure(length: int, topk: int, layers: list[tuple[torch.Tensor, ...]], repeats: int) -> dict:
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, n, D, generator=g) for heads, n in ((HQ, BLOCK), (HKV, length), (HKV, length)))
    mask = Visibility(BLOCK, length, length - BLOCK).mask(Slab(0, BLOCK, length), q.device)
    selections = {f"layer_{i}": layer[3] for i, layer in enumerate(layers)}
    selections["random"] = select_topk(torch.randn(1, BLOCK, length, generator=g), topk, mask)

    def attend(indices: torch.Tensor, way: str) -> torch.Tensor:
        with patch.multiple(attention, **WAYS[way]):
            return sparse_attention(q, k, v, indices, backend="gather")

    calls: dict[str, Callable[[], object]] = {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        "grouped_matmul": lambda: grouped_attention(q, k, v, mask),
    }
    for name, indices in selections.items():
        for way in WAYS:
            calls[f"{name} {way}"] = lambda indices=indices, way=way: attend(indices, way)
    for i, (index_q, index_k, weights, _) in enumerate(layers):
        calls[f"layer_{i} indexer"] = lambda index=(index_q, index_k, weights): select_topk(
            index_scores(*index), topk, mask
        )
    times = in_turn(calls, BLOCK, repeats)
    row: dict = {"position": length, **{name: times[name] for name in ("sdpa", "grouped_matmul")}}
    dense = min(row["sdpa"]["ms"], row["grouped_matmul"]["ms"])
    for name, indices in selections.items():
        row[name] = overlap(indices[0]) | {
            kind.split()[1]: value for kind, value in times.items() if kind.startswith(f"{name} ")
        }
        indexer = row[name].get("indexer", row["layer_0"].get("indexer"))["ms"]  # random scores cost the same to make
        row[name]["speedup"] = round(dense / (row[name]["chosen"]["ms"] + indexer), 2)
        row[name]["speedup_union"] = round(dense / (row[name]["union"]["ms"] + indexer), 2)
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8, help="rows of the trained length, for their overlap")
    args = parser.parse_args()
    model = Qwen2DSAForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    trained = {"length": model.config.max_position_embeddings, "topk": model.config.index_topk}
    rows = [row["input_ids"] for row in examples(AutoTokenizer.from_pretrained(args.model), args.rows_file, 10**9)]
    shares: list[list[dict[str, float]]] = []
    for ids in [ids for ids in rows if len(ids) >= trained["length"]][: args.rows]:
        observer = Indices()
        model.model(torch.tensor([ids[: trained["length"]]]), use_cache=False, observer=observer)
        half = trained["length"] // 2
        shares.append([overlap(observer.layers[i][3][0, half:]) for i in sorted(observer.layers)])
    trained["layers"] = [
        {key: round(mean(x[key] for x in layer), 4) for key in layer[0]} for layer in zip(*shares, strict=True)
    ]
    made_from = {"topk": args.topk, "lengths": args.lengths, "versions": versions()}
    index = scratch("prefill", made_from, [args.model, args.rows_file, Path("dsa"), Path("benchmarks/prefill.py")])
    if not index.exists():
        model.config.index_topk = args.topk
        index.parent.mkdir(parents=True, exist_ok=True)
        torch.save(read(model, [i for ids in rows for i in ids], args.lengths), index)
    layers = torch.load(index)
    result = {
        "model": str(args.model),
        "device": device_name(),
        "topk": args.topk,
        "queries": BLOCK,
        "trained": trained | {"rows": len(shares)},
        "rows": [measure(length, args.topk, layers[length], args.repeats) for length in args.lengths],
    }
    write_json(Path("reports/speed/prefill.json"), result)
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
