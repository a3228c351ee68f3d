"""Stage `sparse`: sparse training. Attention runs over the selected keys; the backbone learns by the language-model
loss, the indexer by its KL over the selected keys, from detached inputs."""

from pathlib import Path

from dsa import load_model
from dsa.training.trainer import freeze
from stages import check, params
from stages.training import train


def main() -> None:
    p = params.load("sparse")
    check.experiment()
    warm = Path("models/warmup")
    model = load_model(warm, dtype="float32", attention_mode="sparse", index_topk=p.topk)
    freeze(model, backbone=False, indexer=p.ablation == "no_kl")
    train(
        "sparse",
        model,
        p.sparse,
        seed=p.seed,
        max_length=p.data.max_length,
        source=warm,
        out=Path("models/dsa"),
        indexer_learning_rate=p.sparse.indexer_learning_rate,
    )


if __name__ == "__main__":
    main()
