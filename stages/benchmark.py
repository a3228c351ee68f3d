"""Stage `benchmark`: what dense attention and DSA cost here, whole rows and whole models (stages/cost.py).

One layer of Qwen2.5-0.5B's geometry, with its projections and without, and the whole of a small model that spends most
of its work on attention. One process, random tensors or weights; `python -m benchmarks.cost` repeats it in several.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig

from dsa.indexer import SCALE_BYTES
from dsa.machine import supports_bf16
from stages import cost, params
from stages.common import measured
from stages.cost import Shape
from stages.files import write_json
from stages.params import Benchmark, Indexer

GENERATED = 8  # tokens of a call of `generate`


def tables(options: Benchmark, topks: list[int], indexer: Indexer, full: bool) -> dict[str, list[Callable[[], dict]]]:
    """name -> measurements, one a length. `layer`: of Qwen2.5-0.5B; `model`: a small one, whole, of random weights.

    The stage has a layer in float32: its models' own cost is measured by the stage `speed`. With `full` there is the
    rest: bfloat16, a layer's attention with its projections and that of a decoded token, the small model, and all of
    Qwen2.5-0.5B in decoding.
    """
    layer = replace(cost.QWEN, index_heads=indexer.n_heads, index_dim=indexer.head_dim)
    model, repeats, few = cost.SMALL, options.repeats, topks[:1]
    f32, bf16 = torch.float32, torch.bfloat16
    found: dict[str, list[Callable[[], dict]]] = {}

    def table(name: str, measurement: Callable, lengths: list[int], *args, **kwargs) -> None:
        found[name] = [lambda n=n: measurement(args[0], n, *args[1:], repeats, **kwargs) for n in lengths]

    for name, dtype in ({"": f32} | ({"_bf16": bf16} if full and supports_bf16() else {})).items():
        table(f"layer_attention{name}", cost.attention_of_a_row, options.prefill, layer, topks, dtype)
        table(f"layer_prefill{name}", cost.prefill, options.prefill, layer, topks, dtype, layers=1)
        table(f"layer_train{name}", cost.training, options.train, layer, topks, dtype == bf16, layers=1)
        table(f"layer_decode{name}", cost.decoding, options.decode, layer, topks, dtype, layers=1)
        if full:
            table(f"layer_module{name}", cost.attention_module, options.prefill, layer, topks, dtype)
            table(f"layer_token{name}", cost.attention_of_a_token, options.decode, layer, topks, dtype)
            table(f"model_prefill{name}", cost.prefill, options.prefill, model, few, dtype)
            table(f"model_train{name}", cost.training, options.train, model, few, dtype == bf16)
            table(f"model_decode{name}", cost.decoding, options.decode, model, few, dtype)
    if full:
        table("model_generate", cost.decoding, options.decode, model, few, f32, generate=GENERATED)
        table("full_decode_bf16", cost.decoding, [n for n in options.decode if n <= 32768], layer, topks[-1:], bf16)
    return found


def measure(
    options: Benchmark, topks: list[int], indexer: Indexer, only: tuple[str, ...] = (), full: bool = False
) -> dict:
    """The tables, those named in `only` if any are."""
    everything = tables(options, topks, indexer, full)
    chosen = {name: calls for name, calls in everything.items() if not only or name in only}
    bar = tqdm(total=sum(map(len, chosen.values())))
    found = {}
    for name, calls in chosen.items():
        bar.set_description(name)
        found[name] = []
        for call in calls:
            found[name].append(call())
            bar.update()
    return found


def pays_from(rows: list[dict], arm: str) -> int | None:
    """The first measured length from which on DSA is faster than dense attention."""
    ratios = [(row["length"], row["ratio"][arm]) for row in rows if arm in row["ratio"]]
    slower = [length for length, ratio in ratios if ratio <= 1]
    return next((length for length, _ in ratios if not slower or length > max(slower)), None)


def summarize(found: dict, topks: list[int], indexer: Indexer) -> dict:
    """The settings beside the tables, and from which length on DSA pays."""
    layer, model = replace(cost.QWEN, index_heads=indexer.n_heads, index_dim=indexer.head_dim), cost.SMALL
    return {
        "shapes": {"layer": vars(layer), "model": vars(model)},
        "topk": topks,
        "tables": found,
        "pays_from": {
            name: {arm: pays_from(rows, arm) for arm in sorted({arm for row in rows for arm in row["ratio"]})}
            for name, rows in found.items()
        },
        # Bytes a token and layer, in bfloat16, and of an index key in int8 with its scale.
        "cache_bytes": {
            name: {
                "keys_and_values": 4 * shape.kv_heads * shape.head_dim,
                "index_key": 2 * shape.index_dim,
                "index_key_int8": shape.index_dim + SCALE_BYTES,
            }
            for name, shape in {"layer": layer, "model": model}.items()
        },
    }


def own_model(config, indexer: Indexer, topk: int, lengths: list[int]) -> dict:
    """What the run's own shape decides, by arithmetic: operations (two a multiply-add) and the bounds of the ratios."""
    shape = Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        config.vocab_size,
        indexer.n_heads,
        indexer.head_dim,
    )

    def bounds(length: int) -> dict:
        attention = {k: shape.prefill(length, k, linear=False) for k in (None, topk)}
        return {
            "length": length,
            "operations": {
                "dense": 2 * attention[None] // length // shape.layers,
                "dsa": 2 * attention[topk] // length // shape.layers,
            },
            "prefill": round(shape.prefill(length, None) / shape.prefill(length, topk), 2),
            "training": round(shape.training(length, None) / shape.training(length, topk), 2),
            "decoding_bytes": round(shape.read(length, None, 2) / shape.read(length, topk, 2), 2),
        }

    return {
        "shape": vars(shape),
        "topk": topk,
        "score": 2 * shape.index_heads * shape.index_dim,
        "attention": 4 * shape.query_heads * shape.head_dim,
        "bounds": [bounds(length) for length in lengths],
    }


def main() -> None:
    p = params.load("benchmark")
    topks = sorted({p.topk, *p.benchmark.topk})
    metrics: dict = {}
    with measured(metrics):
        metrics |= summarize(measure(p.benchmark, topks, p.indexer), topks, p.indexer)
        config, lengths = AutoConfig.from_pretrained("models/base"), {p.data.max_length, *p.benchmark.prefill}
        metrics["own"] = own_model(config, p.indexer, p.topk, sorted(lengths))
    write_json(Path("reports/benchmark/cost.json"), metrics)


if __name__ == "__main__":
    main()
