"""What index keys in int8 cost in quality: the same DSA model on the same held-out rows, with and without.

    python -m benchmarks.int8_keys models/dsa data/long/test.jsonl.gz --rows 60

Loss over answer tokens, attention mass on the selected keys, and how many of the selected keys stay the same. Writes
reports/speed/int8_keys.json.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from dsa import index_scores, load_model, select_topk
from dsa.data.rows import IGNORE, examples
from dsa.evaluation.predictions import attention_mass, observe_dense, predict
from dsa.indexer import pack_int8
from dsa.masks import membership
from stages.files import read_rows, write_json
from stages.statistics import mean_interval


class Overlap:
    """Observer: the share of the keys that the indexer selects which it also selects from rounded index keys."""

    def __init__(self, topk: int):
        self.topk = topk
        self.layers: list[float] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        same = total = 0
        for slab in visible.slabs(q.shape[0], q.shape[1]):
            mask = visible.mask(slab, q.device)
            index_q, weights = index[0][:, slab.queries], index[2][:, slab.queries]
            keys = index[1][:, : slab.keys]
            ours, rounded = (
                membership(select_topk(index_scores(index_q, x, weights), self.topk, mask), slab.keys)
                for x in (keys, pack_int8(keys))
            )
            rows = mask.sum(-1).expand(len(q), -1) > self.topk
            same += (ours & rounded)[rows].sum().item()
            total += ours[rows].sum().item()
        self.layers.append(same / max(total, 1))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows_file", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--statistics-rows", type=int, default=8)
    args = parser.parse_args()
    model = load_model(args.model, dtype="float32").eval()
    topk, length = model.config.index_topk, model.config.max_position_embeddings
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = examples(tokenizer, islice(read_rows(args.rows_file), args.rows), length)
    answers = [torch.tensor(row["labels"][1:]) != IGNORE for row in rows]
    ids = [torch.tensor([row["input_ids"]]) for row in rows[: args.statistics_rows]]
    found: dict[str, dict] = {}
    nll: dict[str, list[torch.Tensor]] = {}
    for name, dtype in (("model", None), ("int8", "int8")):
        model.config.index_key_dtype = dtype
        nll[name] = [predict(model, row["input_ids"]).nll for row in rows]
        mass = [attention_mass(model, x, topk) for x in ids]
        found[name] = {
            "loss": round(torch.cat([x[a] for x, a in zip(nll[name], answers, strict=True)]).mean().item(), 6),
            "loss_all_tokens": round(torch.cat(nll[name]).mean().item(), 6),
            **{key: np.mean([m[key] for m in mass], axis=0).round(5).tolist() for key in ("mass", "recall")},
        }
    model.config.index_key_dtype = None
    overlap = []
    for x in ids:
        observer = Overlap(topk)
        observe_dense(model, x, observer)
        overlap.append(observer.layers)
    gaps = [(x - y)[a] for x, y, a in zip(nll["int8"], nll["model"], answers, strict=True)]
    rows_of = np.repeat(np.arange(len(gaps)), [len(x) for x in gaps])
    gap, half = mean_interval(torch.cat(gaps).double().numpy(), rows_of)
    result = {
        "rows": len(rows),
        "statistics_rows": len(ids),
        "answer_tokens": sum(int(a.sum()) for a in answers),
        "topk": topk,
        "float32": found["model"],
        "int8": found["int8"],
        "loss_gap": round(gap, 7),
        "loss_gap_ci": round(half, 7),
        "same_keys": np.mean(overlap, axis=0).round(5).tolist(),
    }
    write_json(Path("reports/speed/int8_keys.json"), result)
    print(result)


if __name__ == "__main__":
    main()
