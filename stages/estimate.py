"""From what a row costs here (stages/steps.py) and the params: what each stage will take, in seconds and GB.

Of the stages whose time is the network's or a few seconds, nothing.
"""

from collections import Counter
from dataclasses import replace

from transformers import PreTrainedConfig

from stages import arms, cost
from stages.benchmark import own_model
from stages.cost import Shape
from stages.evaluate import SHOWN
from stages.params import Indexer, Params, Training
from stages.steps import Cost

ROWS_A_TEST = (
    3  # of retrieval, for each row in the params: one of pairs and, with half as many questions, two of needles
)
PROBES = 12  # of the indexer in a training: each tenth step, the first and the last
FORWARD = 1 / 3  # of a training step's time


def choice(changes: dict) -> str:
    """Of `stages.steps.CHOICES`, the one that an arm's changes of the config come closest to in cost."""
    name = changes.get("selector", "dense")
    return name if name in ("dense", "indexer", "oracle") else "window"


def evaluated(group: str, p: Params, topk: int, mean: int) -> Counter[tuple[str, int]]:
    """{(choice of keys, tokens): rows} of the stage evaluate@<group>."""
    e, found, measures = p.evaluate, Counter(), arms.GROUPS[group].measures
    lengths = e.retrieval.lengths
    for name, arm in arms.of(group).items():
        found[choice(arm.changes), mean] += e.rows if arm.trained_by else e.control_rows
        for length in lengths if "retrieval" in measures and name in arms.RETRIEVING else ():
            found[choice(arm.changes), length] += ROWS_A_TEST * e.retrieval.rows
    for changes in arms.budgets([*{topk, *e.topk_sweep}]).values() if "budgets" in measures else ():
        found[choice(changes), mean] += e.control_rows
        for length in sorted(n for n in lengths if n <= p.data.max_length)[-1:]:
            found[choice(changes), length] += e.retrieval.rows  # of pairs alone
    if "selection" in measures:
        found["oracle", mean] += e.statistics_rows
    return found


def training(section: Training, row: Cost, mean: int, world: int) -> float:
    return section.steps * (section.batch_size / world * row.seconds(mean) + row.once)


def benchmark(p: Params, topk: int, layer: Shape, per_second: dict[str, float]) -> float:
    """The stage's tables by their multiply-adds, at the rate of this model's own forward pass."""
    b, total = p.benchmark, 0.0
    for n in (*b.prefill, *b.train):
        for k in (None, *(k for k in {topk, *b.topk} if k < n)):
            rate = per_second["dense" if k is None else "indexer"]
            total += b.prefill.count(n) * (2 * layer.prefill(n, k, linear=False) + layer.prefill(n, k)) / rate
            total += b.train.count(n) * layer.training(n, k) / rate
    return (b.repeats + 1) * total


def speed(p: Params, topk: int, rows: dict[str, Cost], step: dict[str, Cost]) -> float:
    """Prefill and training under dense attention, with DSA and a window, and tokens behind a cache of each."""
    s, kinds = p.speed, {"dense": 1, "indexer": 1, "window": 1}
    every = kinds | dict.fromkeys(("indexer", "window"), len({topk, *p.evaluate.topk_sweep}))
    total = 0.0
    for n in s.prefill:
        counts = every if n == p.data.max_length else kinds
        total += (s.repeats + 1) * sum(count * rows[name].seconds(n) for name, count in counts.items())
    for n in s.decoding:
        total += sum(rows[name].seconds(n) for name in kinds)
        total += (s.repeats + 1) * 5 * s.generated * rows["token"].seconds(1)
    for n in s.training:
        total += (s.repeats + 1) * sum(step[name].seconds(n) for name in ("dense", "sparse", "window"))
    return total


def stages(
    p: Params, indexer: Indexer, topk: int, config: PreTrainedConfig, step: dict[str, Cost], rows: dict[str, Cost],
    means: tuple[int, int], world: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{stage: {"seconds", "peak_memory_gb"}}. step: by `stages.steps.KINDS`; rows: by CHOICES, `token` and `scoring`;
    means: tokens of a row and of a preference row; world: processes."""
    mean, pair = means
    shape = Shape(**own_model(config, indexer, topk, [])["shape"])
    longest = p.data.max_length
    per_second = {"dense": shape.prefill(longest, None), "indexer": shape.prefill(longest, topk)}
    per_second = {name: work / rows[name].seconds(longest) for name, work in per_second.items()}
    layer = replace(cost.QWEN, layers=1, index_heads=indexer.n_heads, index_dim=indexer.head_dim)
    layer = replace(layer, vocab=16)
    found: dict[str, float] = {}
    for name in ("dense", "warmup", "sparse", "window"):
        section = p.sparse if name == "window" else getattr(p, name)
        found[name] = training(section, step[name], mean, world)
        found[name] += PROBES * rows["oracle"].seconds(mean) if name in ("warmup", "sparse") else 0
    for name in ("dpo@dense", "dpo@dsa"):
        reference = FORWARD * p.dpo.steps * p.dpo.batch_size / world * step[name].seconds(pair)
        found[name] = training(p.dpo, step[name], pair, world) + reference
        found[name] += p.dpo.held_out * rows["scoring"].seconds(pair)
        found[name] += 2 * 64 * p.dpo.generations * rows["token"].seconds(1)
    for group in arms.GROUPS:
        counts = evaluated(group, p, topk, mean)
        found[f"evaluate@{group}"] = sum(count * rows[name].seconds(n) for (name, n), count in counts.items())
        if "generations" in arms.GROUPS[group].measures:
            found[f"evaluate@{group}"] += p.evaluate.generations * SHOWN * rows["token"].seconds(1)
    found["benchmark"] = benchmark(p, topk, layer, per_second)
    found["speed"] = speed(p, topk, rows, step)
    peaks = {name: c.peak for name, c in step.items()}
    peaks |= {f"evaluate@{group}": rows["oracle"].peak for group in arms.GROUPS}
    return {
        name: {"seconds": round(s, 1), "peak_memory_gb": round(peaks[name] / 2**30, 2) if peaks.get(name) else None}
        for name, s in found.items()
    }
