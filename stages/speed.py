"""Stage `speed`: what the trained model costs, end to end, on held-out text: one set of weights, three ways to attend.

Prefill, decoding through transformers' `generate`, and a training step, each under dense attention, with DSA and with a
recency window. Dense attention has no indexer and is taken at its best: causal SDPA over the whole row, in decoding the
fastest of its ways (stages/cost.py). All arms of a measurement take turns. Lengths beyond the trained one say what a
token costs there and nothing of its quality.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache

from dsa import DSAForCausalLM, load_model
from dsa.data.rows import examples
from dsa.evaluation.predictions import changed
from dsa.machine import supports_bf16
from dsa.training import tiles
from stages import arms, cost, params
from stages.common import forget_peak, measured, peak_memory
from stages.files import read_rows, write_json

MODEL = Path("models/dsa")
Settings = dict[str, dict]  # of an arm: what changes in the model's config


def settings(topks: list[int], length: int) -> Settings:
    """The budgets that leave keys out, and dense attention."""
    return arms.budgets([k for k in topks if k < length])


def held_out(rows: list[dict], length: int) -> torch.Tensor:
    """int64 [1, length]: the rows one behind the other, from the first again where they do not suffice."""
    ids = [i for row in rows for i in row["input_ids"]]
    return torch.tensor([(ids * (1 + length // len(ids)))[:length]])


def table(times: dict[str, dict[str, float]], length: int, tokens: int) -> dict:
    """Milliseconds of each arm, `dense` the fastest of its ways, tokens a second, and how many times as fast as dense
    attention it is."""
    found = cost.compared(times, {})
    own = {"dense": times[found["dense_by"]]} | {arm: times[arm] for arm in found["ratio"]}
    for time in own.values():
        time["tokens_per_second"] = round(1e3 * tokens / time["ms"], 1)
    return {"length": length, "arms": own, "dense_by": found["dense_by"], "ratio": found["ratio"]}


@torch.no_grad()
def prefill(model: DSAForCausalLM, ids: torch.Tensor, found: Settings, repeats: int) -> dict:
    """The row into a cache, and the last token's logits."""

    def call(arm: str) -> None:
        with changed(model.config, **found[arm]):
            model(ids, use_cache=True, logits_to_keep=1)

    length = ids.shape[1]
    return table(cost.in_turn({arm: lambda arm=arm: call(arm) for arm in found}, repeats), length, length)


@torch.no_grad()
def decoding(model: DSAForCausalLM, ids: torch.Tensor, found: Settings, repeats: int, tokens: int) -> dict:
    """So many tokens by `generate`, behind the row in the cache."""
    caches, length = {}, ids.shape[1] - 1
    for arm, changes in found.items():
        caches[arm] = DynamicCache(config=model.config)
        with changed(model.config, **changes):
            model(ids[:, :-1], past_key_values=caches[arm], use_cache=True, logits_to_keep=1)
    held, mask = {arm: size(cache) for arm, cache in caches.items()}, torch.ones_like(ids)
    ways = cost.arms([], length, grouped=True)  # of dense attention, which share a cache
    found, caches = ways | found, dict.fromkeys(ways, caches["dense"]) | caches

    def call(arm: str) -> None:
        cache = caches[arm]
        if extra := cache.get_seq_length() - length:
            cache.crop(-extra)
        with changed(model.config, **found[arm]):
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, do_sample=False, eos_token_id=-1
            )

    times = cost.in_turn({arm: lambda arm=arm: call(arm) for arm in found}, repeats)
    return table(times, length, tokens) | {"cache_bytes": held}


def size(cache: DynamicCache) -> int:
    """Bytes of all tensors that a cache holds."""
    tensors = [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def training(model: DSAForCausalLM, ids: torch.Tensor, found: Settings, repeats: int, bf16: bool) -> dict:
    """Forward and backward of a row, as the stages train: DSA with the indexer's loss, the others without."""
    peaks: dict[str, float] = {}

    def call(arm: str) -> None:
        dsa = arm.startswith("dsa")
        forget_peak()
        autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
        with changed(model.config, **found[arm]), autocast, tiles.tiled_if_large(model, ids.numel()):
            out = model(ids, labels=ids, use_cache=False, output_indexer_kl=dsa)
        (out.loss + out.indexer_kl.sum() if dsa else out.loss).backward()
        model.zero_grad(set_to_none=True)
        if (peak := peak_memory()) is not None:
            peaks[arm] = round(peak / 2**30, 2)

    length = ids.shape[1]
    times = cost.in_turn({arm: lambda arm=arm: call(arm) for arm in found}, repeats)
    return table(times, length, length) | {"peak_gb": peaks}


def measure(model: DSAForCausalLM, text: Callable[[int], torch.Tensor], p: params.Params, bf16: bool) -> dict:
    """Tables by name, one row a length; at the trained length for every k of the sweep, else for the experiment's."""
    options, trained = p.speed, p.data.max_length
    every = [*{p.topk, *p.evaluate.topk_sweep}]
    lengths = {"prefill": options.prefill, "decoding": options.decoding, "training": options.training}
    bar = tqdm(total=sum(map(len, lengths.values())))
    found: dict[str, list[dict]] = {name: [] for name in lengths}
    for name in lengths:
        for length in lengths[name]:
            bar.set_description(f"{name} at {length}")
            few = settings(every if name == "prefill" and length == trained else [p.topk], length)
            if name == "prefill":
                row = prefill(model.eval(), text(length), few, options.repeats)
            elif name == "decoding":
                row = decoding(model.eval(), text(length + 1), few, options.repeats, options.generated)
            else:
                row = training(model.train(), text(length), few, options.repeats, bf16)
            found[name].append(row)
            bar.update()
    return found


def main() -> None:
    p = params.load("speed")
    metrics: dict = {"topk": p.topk, "trained_length": p.data.max_length}
    with measured(metrics):
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        model = load_model(MODEL, dtype="float32", index_topk=p.topk)
        if torch.cuda.is_available():
            model.cuda()
        rows = examples(tokenizer, read_rows(Path("data/long/test.jsonl.gz")), p.data.max_length)
        metrics["tables"] = measure(model, lambda length: held_out(rows, length).to(model.device), p, supports_bf16())
        metrics["precision"] = {"training": "bfloat16 autocast" if supports_bf16() else "float32", "others": "float32"}
    write_json(Path("reports/benchmark/speed.json"), metrics)


if __name__ == "__main__":
    main()
