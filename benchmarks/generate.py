"""Tokens a second in decoding with a model of Qwen2.5-0.5B's size and random weights, dense attention against DSA.

    python -m benchmarks.generate --contexts 2048 8192 32768 --dtypes float32 bfloat16

The cache is filled with random keys, values and index keys instead of by a prefill, which takes hours on two cores;
then tokens are decoded one after another through the model's own forward, the same for every arm. Dense attention is
measured as transformers' SDPA and as a grouped matrix product. One process an arm. Adds its rows to
reports/speed/generate.json, on a GPU to reports/gpu/generate.json.
"""

import argparse
import json
import multiprocessing
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

ARMS = ("dense_sdpa", "dense_grouped", "dsa", "dsa_int8")
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


def build(arm: str, dtype: torch.dtype, topk: int, device: torch.device):
    with torch.device(device):
        dense = Qwen2ForCausalLM(MODEL).to(dtype)
        model = from_dense(
            dense,
            topk=topk,
            n_heads=4,
            head_dim=64,
            attention_mode="sparse" if arm.startswith("dsa") else "dense",
            index_key_dtype="int8" if arm == "dsa_int8" else None,
        )
    if arm == "dense_grouped":
        AttentionInterface.register("grouped", grouped)
        model.config._attn_implementation = "grouped"
    return model.eval()


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
def decode(arm: str, contexts: list[int], name: str, topk: int, tokens: int, pipe) -> None:
    """Runs in its own process; sends a row a context."""
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, name)
    model = build(arm, dtype, topk, device)
    for context in contexts:
        cache = filled_cache(model, context, dtype, device)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        times = []
        for _ in range(tokens + 2):
            start = time.perf_counter()
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            token.item()  # waits for the device
            times.append((time.perf_counter() - start) * 1e3)
        times = sorted(times[2:])
        middle = median(times)
        spread = times[(3 * len(times)) // 4] - times[len(times) // 4]
        row = {"dtype": name, "context": context, "arm": arm, "topk": topk if arm.startswith("dsa") else None}
        pipe.send(
            row | {"ms": round(middle, 2), "spread": round(spread, 2), "tokens_per_second": round(1e3 / middle, 2)}
        )
    pipe.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=12)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    path = Path("reports/gpu" if gpu else "reports/speed", "generate.json")
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["dtype"], row["context"], row["arm"]): row for row in found}
    spawn = multiprocessing.get_context("spawn")
    for name in args.dtypes:
        for arm in args.arms:
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=decode, args=(arm, args.contexts, name, args.topk, args.tokens, theirs))
            process.start()
            theirs.close()
            for context in args.contexts:
                rows[name, context, arm] = ours.recv()
                print(rows[name, context, arm], flush=True)
            process.join()
    result = {
        "device": torch.cuda.get_device_name() if gpu else device_name(),
        "torch": torch.__version__,
        "cache": "random keys, values and index keys, not a prefill",
        "rows": [rows[key] for key in sorted(rows)],
    }
    write_json(path, result)


if __name__ == "__main__":
    main()
