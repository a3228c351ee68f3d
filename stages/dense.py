"""Stage `dense`: the baseline. Same rows, order, number of tokens and code, with attention to every token."""

from pathlib import Path

from dsa import from_dense
from stages import check, params
from stages.training import train


def main() -> None:
    p = params.load("dense")
    check.experiment()
    base = Path("models/base")
    model = from_dense(base, topk=1, n_heads=0, head_dim=4, attention_mode="dense", dtype="float32")
    train("dense", model, p.dense, seed=p.seed, max_length=p.data.max_length, source=base, out=Path("models/dense"))


if __name__ == "__main__":
    main()
