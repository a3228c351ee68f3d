"""Stage `warmup`: the dense warm-up. Attention stays dense, only the new indexers learn, towards what attention does.

It does not depend on top-k: a sweep over k reuses it.
"""

from pathlib import Path

from dsa import ablations, from_dense
from dsa.training.trainer import freeze
from stages import check, params
from stages.training import train


def main() -> None:
    p = params.load("warmup")
    check.experiment()
    base = Path("models/base")
    model = from_dense(
        base,
        topk=1,  # of no effect under dense attention; the next stage sets it
        n_heads=p.indexer.n_heads,
        head_dim=p.indexer.head_dim,
        seed=p.seed,
        attention_mode="dense",
        **ablations.fields(p.ablation, p.indexer.head_dim),
        dtype="float32",
    )
    freeze(model, backbone=True, indexer=False)
    train("warmup", model, p.warmup, seed=p.seed, max_length=p.data.max_length, source=base, out=Path("models/warmup"))


if __name__ == "__main__":
    main()
