"""Stage `benchmark`: what one layer's attention costs at a position, at Qwen2.5-0.5B's geometry, on this machine.

Decode is one query at position L, prefill a block of queries that ends there; random tensors, one process, medians.
Dense is the faster of PyTorch's SDPA and a grouped matrix product; DSA is scoring, top-k and attention together, in
decoding also with index keys in int8. Decode is measured in bfloat16 too.
Training is forward and backward of a whole layer, MLP included, in sparse mode with the indexer's loss.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM, index_scores, select_topk, sparse_attention
from dsa.indexer import SCALE_BYTES, pack_int8
from dsa.masks import Slab, Visibility
from dsa.modeling import IndexerLoss
from dsa.training import supports_bf16
from stages import params
from stages.common import measured, write_json

HQ, HKV, D, MLP = 14, 2, 64, 4864  # Qwen2.5-0.5B
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
BLOCK = 64  # queries of a prefill measurement


def milliseconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median, spread between the quartiles) of a call, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    return median(times), times[(3 * len(times)) // 4] - times[len(times) // 4]


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Dense attention as two matrix products; K and V are read once for all heads of a group."""
    B, Hq, T, D = q.shape
    logits = (q.view(B, HKV, -1, D) @ k.transpose(2, 3)).view(B, Hq, T, -1) * D**-0.5
    p = (logits if mask is None else logits.masked_fill_(~mask, -torch.inf)).softmax(-1)
    return (p.view(B, HKV, -1, k.shape[2]) @ v).view(B, Hq, T, D)


@torch.no_grad()
def measure(length: int, queries: int, topks: list[int], indexer, repeats: int, dtype: torch.dtype) -> dict:
    """Milliseconds a token at position `length` of each way to attend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = random(1, HQ, queries, D), random(1, HKV, length, D), random(1, HKV, length, D)
    index_q = random(1, queries, indexer.n_heads, indexer.head_dim)
    index_k, weights = random(1, length, indexer.head_dim), random(1, queries, indexer.n_heads).float()
    mask = None  # one query sees all, and without a mask PyTorch has its fastest kernels
    if queries > 1:
        mask = Visibility(queries, length, length - queries).mask(Slab(0, queries, length), q.device)
    index_keys = {"": index_k} | ({"int8_": pack_int8(index_k)} if queries == 1 else {})
    row: dict = {"position": length}

    def note(name: str, call: Callable[[], object]) -> None:
        middle, spread = milliseconds(call, repeats)
        row[name], row[f"{name}_spread"] = round(middle / queries, 5), round(spread / queries, 5)

    note("sdpa", lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
    note("grouped_matmul", lambda: grouped_attention(q, k, v, mask))
    row["dense"] = min(row["sdpa"], row["grouped_matmul"])
    for topk in topks:
        if topk >= length:
            continue

        for kind, keys in index_keys.items():

            def select(topk: int = topk, keys: torch.Tensor = keys) -> torch.Tensor:
                return select_topk(index_scores(index_q, keys, weights), topk, mask)

            note(f"indexer_{kind}{topk}", select)
            note(f"dsa_{kind}{topk}", lambda select=select: sparse_attention(q, k, v, select()))
            row[f"speedup_{kind}{topk}"] = round(row["dense"] / row[f"dsa_{kind}{topk}"], 3)
    return row


def train_layer(length: int, mode: str, topk: int, indexer, repeats: int) -> tuple[float, float]:
    """(median, spread) of the milliseconds of one layer's forward and backward, as the stages train it."""
    config = Qwen2DSAConfig(
        vocab_size=16,
        hidden_size=HQ * D,
        intermediate_size=MLP,
        num_hidden_layers=1,
        num_attention_heads=HQ,
        num_key_value_heads=HKV,
        index_topk=topk,
        index_n_heads=indexer.n_heads if mode == "sparse" else 0,
        index_head_dim=indexer.head_dim,
        attention_mode=mode,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2DSAForCausalLM(config).model.to(device).train()
    x = torch.randn(1, length, HQ * D, device=device)

    def step() -> None:
        observer = IndexerLoss() if mode == "sparse" else None
        with torch.autocast(device, torch.bfloat16, enabled=supports_bf16()):
            loss = model(inputs_embeds=x, use_cache=False, observer=observer).last_hidden_state.float().square().mean()
        (loss + sum(observer.kl) if observer else loss).backward()

    return milliseconds(step, repeats)


def crossover(rows: list[dict], topk: int) -> int | None:
    """The first measured position from which on DSA is faster than dense."""
    ratios = [(row["position"], row[f"speedup_{topk}"]) for row in rows if f"speedup_{topk}" in row]
    slower = [position for position, ratio in ratios if ratio <= 1]
    return next((position for position, _ in ratios if not slower or position > max(slower)), None)


def flops(length: int, topk: int, indexer) -> dict[str, int]:
    """Multiply-adds twice, of one query at position `length` in one layer: attention over all keys, over k, scores."""
    scores = 2 * indexer.n_heads * indexer.head_dim * length
    return {"dense": 4 * HQ * D * length, "dsa": 4 * HQ * D * min(topk, length) + scores, "indexer": scores}


def main() -> None:
    p = params.load("benchmark")
    topks = sorted({p.topk, *p.benchmark.topk})
    metrics: dict = {
        "geometry": {"query_heads": HQ, "kv_heads": HKV, "head_dim": D} | p.indexer.model_dump(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "topk": topks,
    }
    with measured(metrics):
        kinds = {
            "decode": (1, p.benchmark.decode, DTYPE),
            "decode_bf16": (1, p.benchmark.decode, torch.bfloat16),
            "prefill": (BLOCK, p.benchmark.prefill, DTYPE),
        }
        for kind, (queries, lengths, dtype) in kinds.items():
            metrics[kind] = [
                measure(length, queries, topks, p.indexer, p.benchmark.repeats, dtype)
                for length in tqdm(lengths, desc=kind)
            ]
            for row in metrics[kind]:
                row["flops"] = {str(k): flops(row["position"], k, p.indexer) for k in topks}
        metrics["crossover"] = {kind: {str(k): crossover(metrics[kind], k) for k in topks} for kind in kinds}
        metrics["training"] = []
        for length in tqdm(p.benchmark.train, desc="training"):
            row = {"length": length, "topk": p.topk}
            for mode in ("dense", "sparse"):
                row[mode], row[f"{mode}_spread"] = (
                    round(x, 1) for x in train_layer(length, mode, p.topk, p.indexer, p.benchmark.repeats)
                )
            metrics["training"].append(row | {"ratio": round(row["sparse"] / row["dense"], 2)})
    # Bytes a token and layer, in bfloat16, and of an index key in int8 with its scale.
    metrics["cache_bytes"] = {
        "keys_and_values": 2 * 2 * HKV * D,
        "index_key": 2 * p.indexer.head_dim,
        "index_key_int8": p.indexer.head_dim + SCALE_BYTES,
    }
    write_json(Path("reports/benchmark/cost.json"), metrics)


if __name__ == "__main__":
    main()
