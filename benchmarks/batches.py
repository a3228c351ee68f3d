"""Decoding a batch of rows of different lengths: what a token of it costs, dense attention and DSA.

    python -m benchmarks.batches          # reports/speed/batches.json, ten minutes

The small model of stages/cost.py with random weights, left-padded rows of half to the whole length in its cache, one
token a row and step. DSA reads the k keys that each row selects and every index key, float32 or int8 (`dsa_int8`).
Dense attention is at its best: the fastest of SDPA as transformers calls it, of SDPA with a group's heads as rows, and
of matrix products, all with the padding's mask.
"""

import argparse
from pathlib import Path

import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stages.common import device_name, git_commit
from stages.cost import DEVICE, SMALL, Shape, arms, compared, filled_cache, in_turn, model_of, switch, topk_of
from stages.files import write_json

OUT = Path("reports/speed/batches.json")
BATCHES, LENGTHS = [1, 4, 16], [4096, 16384, 32768]
WAYS = ("grouped", "grouped_sdpa")  # of stages/cost.py, beside transformers' own
for way in WAYS:
    AttentionMaskInterface.register(way, sdpa_mask)  # without one a model is given no mask


def row_lengths(batch: int, length: int) -> torch.Tensor:
    """int64 [B]: evenly from half to the whole; one row has all of it."""
    return torch.linspace(length / 2, length, batch).long() if batch > 1 else torch.tensor([length])


@torch.no_grad()
def measure(shape: Shape, batch: int, length: int, topks: list[int], repeats: int) -> dict:
    """Milliseconds of a step, of all rows together."""
    model, lengths = model_of(shape, max(topks), torch.float32).eval(), row_lengths(batch, length)
    mask = (torch.arange(length + 1) >= length - lengths[:, None]).long().to(DEVICE)  # (B, S): 0 is padding
    found, caches = arms(topks, length, int8=True, grouped=True), {}
    for arm in found:  # one for all ways of dense attention, and one for each type of index keys
        if kind(arm) not in caches:
            switch(model, **found[arm])
            caches[kind(arm)] = filled_cache(model, length, batch)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    positions = lengths[:, None].to(DEVICE)

    def call(arm: str) -> None:
        switch(model, **found[arm])
        cache = caches[kind(arm)]
        if extra := cache.get_seq_length() - length:
            cache.crop(-extra)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    times = in_turn({arm: lambda arm=arm: call(arm) for arm in found}, repeats)
    rows = lengths.tolist()
    bounds = {arm: bound(shape, rows, topk_of(arm), kind(arm) == "dsa_int8") for arm in found if kind(arm) != "dense"}
    return {"batch": batch, "length": length} | compared(times, bounds)


def kind(arm: str) -> str:
    """dense, dsa or dsa_int8."""
    return "dense" if arm.startswith("dense") else arm.rsplit("_", 1)[0]


def bound(shape: Shape, lengths: list[int], topk: int, int8: bool) -> float:
    """Of the ratio, by the bytes that are read: weights once for all rows, each row's own keys and values."""
    width = torch.float32.itemsize

    def read(k: int | None) -> int:
        weights = (shape.linear(k is not None) + shape.hidden * shape.vocab) * width
        return weights + sum(shape.read(n, k, width, int8, weights=False) for n in lengths)

    return round(read(None) / read(topk), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--topk", type=int, nargs="+", default=[256])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows = [measure(SMALL, b, n, args.topk, args.repeats) for n in args.lengths for b in args.batches]
    settings = {"device": device_name(), "torch": torch.__version__, "commit": git_commit(), "shape": vars(SMALL)}
    write_json(OUT, settings | {"rows": rows})
    for row in rows:
        speed = {arm: round(1e3 * row["batch"] / time["ms"]) for arm, time in row["arms"].items()}
        print(f"{row['batch']:3} rows of up to {row['length']:6,}: tokens/s {speed}, dense / DSA {row['ratio']}")


if __name__ == "__main__":
    main()
