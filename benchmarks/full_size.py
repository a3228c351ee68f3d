"""Training steps of the full profile at full size, with random weights: time and memory, measured and computed.

    python -m benchmarks.full_size CONFIG.json --lengths 2048 4096
    python -m benchmarks.full_size CONFIG.json --lengths 4096 --checkpointing
    python -m benchmarks.full_size CONFIG.json --lengths 2048 4096 --arithmetic    # measures nothing

CONFIG.json is the published config of Qwen2.5-0.5B (models/base/config.json after the full profile's stage `model`).
One row a step, by the stages' own trainers (stages/steps.py); the warm-up never with checkpointing. Each step runs
in a process of its own, for its peak memory. Writes reports/speed/full_size.json, what was measured on a GPU to
reports/gpu/full_size.json, after every step; what stands there is kept, if it is of the same model and machine.
"""

import argparse
import json
import multiprocessing
from functools import partial
from itertools import product
from pathlib import Path

import torch
from transformers import Qwen2Config

from dsa.machine import supports_bf16
from dsa.training import tiles
from stages.common import device_name
from stages.files import write_json
from stages.params import Indexer, Training
from stages.steps import model_of, training

STAGES = ("dense", "warmup", "sparse")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
MEASURED = ("seconds", "peak_gb", "tokens_per_second", "failed")
GB = 2**30


def key(row: dict) -> tuple:
    return row["length"], row["checkpointing"], STAGES.index(row["stage"])


def step_seconds(config: Path, stage: str, length: int, topk: int, checkpointing: bool, pipe) -> None:
    """Runs in its own process; sends what it measured."""
    section = Training(steps=1, batch_size=1, learning_rate=1e-5, gradient_checkpointing=checkpointing)
    make = partial(model_of, Qwen2Config.from_pretrained(config), Indexer(n_heads=4, head_dim=64), topk)
    cost = training(stage, make, section, length, length)
    pipe.send({"seconds": round(cost.rows[length] + cost.once, 3), "peak_gb": round(cost.peak / GB, 2)})


def measure(*options) -> dict:
    """`step_seconds` in a process of its own. Arguments as there, without the pipe."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=step_seconds, args=(*options, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = {"failed": "the process ended before its time, most likely for want of memory"}
    process.join()
    return found


def computed_gb(config: dict, stage: str, length: int, checkpointing: bool) -> dict[str, float]:
    """What a training step holds on a GPU, by arithmetic: float32 master weights, bfloat16 activations, one row.

    Of a layer, backward needs the two norms' inputs and normalised inputs in float32 and their outputs, q, k, v,
    attention's output, and of the MLP gate, up, the activation and the product; of an indexer its input in both
    precisions, queries and keys. With checkpointing it needs the layer's input only. The warm-up keeps nothing of the
    backbone, and is not checkpointed. Autocast keeps a bfloat16 copy of the weights. A tile's logits are in bfloat16,
    in float32 and as their gradient (dsa/training/tiles.py).
    """
    hidden, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    kv = config["num_key_value_heads"] * hidden // heads
    layers, wide = config["num_hidden_layers"], config["intermediate_size"]
    backbone = vocabulary * hidden + layers * (2 * hidden * (hidden + kv) + 3 * hidden * wide)
    indexer = layers * hidden * (4 * 64 + 64 + 4)
    trained = {"dense": backbone, "warmup": indexer, "sparse": backbone + indexer}[stage]
    of_backbone = 0 if stage == "warmup" else 2 * (6 * hidden + 2 * kv + 4 * wide) + 4 * 4 * hidden
    of_indexer = 0 if stage == "dense" else 8 * hidden + 4 * 4 * 64 + 14 * 64
    of_layer = 4 * hidden if checkpointing else of_backbone + of_indexer  # bytes a token
    held = {
        "weights": 4 * (backbone + (indexer if stage != "dense" else 0)),
        "autocast_copies": 2 * backbone,
        "gradients_and_adam": 12 * trained,
        "activations": layers * length * of_layer,
        "logits": 0 if stage == "warmup" else min(length, tiles.TILE) * vocabulary * (2 + 4 + 4),
        "slab": 0 if stage == "dense" else 3 * 4 * 2**24,  # dsa.masks.SLAB_ELEMENTS
    }
    return {name: round(value / GB, 2) for name, value in held.items()} | {"total": round(sum(held.values()) / GB, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="to measure")
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--arithmetic", action="store_true", help="measure nothing")
    parser.add_argument("--longest", type=int, default=1 << 30, help="of the lengths, measure up to this one")
    parser.add_argument("--checkpointing", action="store_true", help="measure with activation checkpointing")
    args = parser.parse_args()
    config = json.loads(args.config.read_text(encoding="utf-8"))
    gpu = not args.arithmetic and torch.cuda.is_available()
    path = Path("reports/gpu" if gpu else "reports/speed", "full_size.json")
    result = {"model": {name: config[name] for name in SIZES}}
    machine = {
        "device": device_name(),
        "torch": torch.__version__,
        "precision": "bfloat16 autocast" if supports_bf16() else "float32",
        "topk": args.topk,
    }
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not args.arithmetic:
        result |= machine
    elif "device" in before:  # the arithmetic is of no machine, and leaves what was measured
        result |= {name: before[name] for name in machine}
    same = all(before.get(name) == value for name, value in result.items())
    rows = {key(row): row for row in before["rows"]} if same else {}

    def put(row: dict) -> None:
        rows[key(row)] = row
        write_json(path, result | {"rows": [rows[each] for each in sorted(rows)]})

    tasks = list(product(args.lengths, STAGES))
    for (length, stage), checkpointing in product(tasks, (False, True)):
        if checkpointing and stage == "warmup":
            continue
        row = {"stage": stage, "length": length, "checkpointing": checkpointing}
        measured = {name: value for name, value in rows.get(key(row), {}).items() if name in MEASURED}
        put(row | measured | {"computed_gpu_gb": computed_gb(config, stage, length, checkpointing)})
    for length, stage in () if args.arithmetic else tasks:
        if length <= args.longest and stage in args.stages:
            checkpointing = args.checkpointing and stage != "warmup"
            row = {"stage": stage, "length": length, "checkpointing": checkpointing}
            computed = rows[key(row)]["computed_gpu_gb"]
            row |= measure(args.config, stage, length, args.topk, checkpointing)
            if "seconds" in row:
                row["tokens_per_second"] = round(length / row["seconds"])
            put(row | {"computed_gpu_gb": computed})
            print(row, flush=True)


if __name__ == "__main__":
    main()
