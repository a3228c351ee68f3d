"""What dense attention and DSA cost, in several processes: between them ratios move more than within one.

    python -m benchmarks.cost                                             # reports/speed/cost.json, half an hour
    python -m benchmarks.cost --tables model_prefill --lengths 16384 --processes 3

Each process measures all tables of the stage `benchmark` (stages/cost.py), longer rows than the default run has. A
ratio is the median over the processes, with the least and the largest. Tables and lengths that are not asked for keep
the numbers they have in the file; each has the commit that it was measured at.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from stages.benchmark import measure, summarize
from stages.common import device_name, git_commit
from stages.cost import QWEN
from stages.files import write_json
from stages.params import Benchmark, Indexer

INDEXER = Indexer(n_heads=QWEN.index_heads, head_dim=QWEN.index_dim)

LENGTHS = {
    "prefill": [2048, 4096, 8192, 16384, 32768],
    "train": [2048, 4096, 8192, 16384],
    "decode": [4096, 8192, 16384, 32768, 131072],
}


def joined(runs: list[dict]) -> dict:
    """The same row of several processes: medians of the times, and of the ratios with the least and the largest."""
    row = runs[0] | {"processes": len(runs)}
    row["arms"] = {
        arm: {
            "ms": round(median(run["arms"][arm]["ms"] for run in runs), 4),
            "spread": round(max(run["arms"][arm]["spread"] for run in runs), 4),
        }
        for arm in row["arms"]
    }
    row["dense"] = round(median(run["dense"] for run in runs), 4)
    ratios = {arm: sorted(run["ratio"][arm] for run in runs) for arm in row["ratio"]}
    row["ratio"] = {arm: round(median(values), 3) for arm, values in ratios.items()}
    row["ratio_range"] = {arm: [values[0], values[-1]] for arm, values in ratios.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="*", default=[], help="all by default")
    parser.add_argument("--lengths", type=int, nargs="*", help="the table's own by default")
    parser.add_argument("--topk", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    lengths = {kind: args.lengths or known for kind, known in LENGTHS.items()}
    options = Benchmark(topk=args.topk, repeats=args.repeats, **lengths)
    if args.here:
        print(json.dumps(measure(options, args.topk, INDEXER, tuple(args.tables), full=True)))
        return
    command = [sys.executable, "-m", "benchmarks.cost", "--here", *sys.argv[1:]]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    path = Path("reports/gpu" if torch.cuda.is_available() else "reports/speed", "cost.json")
    before = json.loads(path.read_text(encoding="utf-8"))["tables"] if path.exists() else {}
    found: dict[str, list[dict]] = {}
    for name in [*before, *(name for name in runs[0] if name not in before)]:
        rows = {row["length"]: row for row in before.get(name, [])}
        for measured in zip(*(run.get(name, []) for run in runs), strict=True):
            rows[measured[0]["length"]] = joined(list(measured)) | {"commit": git_commit()}
        found[name] = [rows[length] for length in sorted(rows)]
    settings = {"device": device_name(), "torch": torch.__version__, "repeats": args.repeats}
    write_json(path, settings | summarize(found, args.topk, INDEXER))


if __name__ == "__main__":
    main()
