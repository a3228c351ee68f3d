"""Tokens a second in decoding with a model of Qwen2.5-0.5B's size and random weights, dense attention against DSA.

    python -m benchmarks.generate --contexts 2048 8192 32768 --dtypes float32 bfloat16

The cache is filled with random keys, values and index keys instead of by a long prefill; then tokens are decoded one
after another through the model's own forward. Dense attention is measured as transformers' SDPA and as a grouped matrix
product. All arms share the weights and take turns at every token, so that what else the machine does falls on all of
them. Adds its rows to reports/speed/generate.json, on a GPU to reports/gpu/generate.json.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import AttentionInterface

from dsa import from_dense
from dsa.cache import growing
from dsa.indexer import pack_int8
from stages.benchmark import grouped_attention
from stages.common import device_name, write_json

ARMS = {
    "dense_sdpa": {"attention_mode": "dense", "_attn_implementation": "sdpa"},
    "dense_grouped": {"attention_mode": "dense", "_attn_implementation": "grouped"},
    "dsa": {"attention_mode": "sparse", "index_key_dtype": None},
    "dsa_int8": {"attention_mode": "sparse", "index_key_dtype": "int8"},
}
MODEL = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)


def grouped(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """`grouped_attention` as an attention function of transformers."""
    return grouped_attention(q, k, v, None).transpose(1, 2), None


def switch(model, arm: str) -> None:
    for name, value in ARMS[arm].items():
        setattr(model.config, name, value)


def filled_cache(model, context: int, dtype: torch.dtype, device: torch.device) -> DynamicCache:
    config = model.config
    cache = growing(DynamicCache(config=config))
    shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in cache.layers:
        layer.update(*(torch.randn(shape, device=device).to(dtype) for _ in range(2)))
        if config.attention_mode == "sparse":
            keys = torch.randn(1, context, config.index_head_dim, device=device).to(dtype)
            layer.update_indexer(pack_int8(keys) if config.index_key_dtype == "int8" else keys)
    return cache


@torch.no_grad()
def decode(model, context: int, tokens: int) -> dict[str, list[float]]:
    """Milliseconds of each token of each arm, after two that do not count."""
    device, dtype = model.device, model.dtype
    caches, times = {}, {arm: [] for arm in ARMS}
    for arm in ARMS:
        switch(model, arm)
        caches[arm] = filled_cache(model, context, dtype, device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for _ in range(tokens + 2):
        for arm in ARMS:
            switch(model, arm)
            start = time.perf_counter()
            model(token, past_key_values=caches[arm], use_cache=True).logits[:, -1].argmax(-1).item()
            times[arm].append((time.perf_counter() - start) * 1e3)
    return {arm: sorted(each[2:]) for arm, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    path = Path("reports/gpu" if gpu else "reports/speed", "generate.json")
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {(row["dtype"], row["context"]): row for row in before}
    AttentionInterface.register("grouped", grouped)
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        dense = Qwen2ForCausalLM(MODEL)
    for name in args.dtypes:
        dense = dense.to(getattr(torch, name))
        model = from_dense(dense, topk=args.topk, n_heads=4, head_dim=64).eval()
        for context in args.contexts:
            row: dict = {"dtype": name, "context": context, "topk": args.topk}
            for arm, times in decode(model, context, args.tokens).items():
                spread = times[(3 * len(times)) // 4] - times[len(times) // 4]
                row[arm] = {
                    "ms": round(median(times), 2),
                    "spread": round(spread, 2),
                    "tokens_per_second": round(1e3 / median(times), 2),
                }
            best = min(row[arm]["ms"] for arm in ARMS if arm.startswith("dense"))
            row |= {f"speedup_{arm}": round(best / row[arm]["ms"], 2) for arm in ARMS if arm.startswith("dsa")}
            rows[name, context] = row
            print(row, flush=True)
            result = {
                "device": device_name(),
                "torch": torch.__version__,
                "cache": "random keys, values and index keys, not a prefill",
                "rows": [rows[key] for key in sorted(rows)],
            }
            write_json(path, result)


if __name__ == "__main__":
    main()
