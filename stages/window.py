"""Stage `window`: the control arm. The same sparse training, but each query keeps the latest top-k keys; no indexer."""

from pathlib import Path

from dsa import from_dense
from stages import check, params
from stages.training import train


def main() -> None:
    p = params.load("window")
    check.experiment()
    base = Path("models/base")
    model = from_dense(base, topk=p.topk, n_heads=0, head_dim=4, selector="window", dtype="float32")
    train("window", model, p.sparse, seed=p.seed, max_length=p.data.max_length, source=base, out=Path("models/window"))


if __name__ == "__main__":
    main()
