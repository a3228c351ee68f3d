"""What model, params and machine decide about later stages, checked before the first long one.

A ParamsError is one line that names the key.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from dsa import ablations
from dsa.convert import config_of
from dsa.data.recall import Recall
from dsa.data.rows import END_OF_TURN
from stages import params
from stages.training import split_batch

BASE = Path("models/base")


@contextmanager
def named(keys: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, params.ParamsError) as error:
        raise params.ParamsError(f"{keys}: {' '.join(str(error).split())}") from None


def base_model() -> None:
    """That the base model is one that every stage can use."""
    with named("model.source"):
        config_of(AutoConfig.from_pretrained(BASE), index_n_heads=0, attention_mode="dense")
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        if tokenizer.chat_template is None:
            raise ValueError("its tokenizer has no chat template")
        if END_OF_TURN not in tokenizer.get_vocab():
            raise ValueError(f"its tokenizer does not know {END_OF_TURN}")


def experiment() -> None:
    """That no later stage will refuse its params, on this model and this number of processes."""
    p = params.load()
    for name in ("dense", "warmup", "sparse", "dpo"):
        with named(name):
            split_batch(getattr(p, name).batch_size)
    with named("indexer, ablation"):
        fields = ablations.fields(p.ablation, p.indexer.head_dim)
        heads = {"index_n_heads": p.indexer.n_heads, "index_head_dim": p.indexer.head_dim}
        config_of(AutoConfig.from_pretrained(BASE), index_topk=p.topk, **heads, **fields)
    with named("evaluate"):
        if lengths := p.evaluate.retrieval.lengths:
            Recall(AutoTokenizer.from_pretrained(BASE), torch.zeros(0)).pairs_row(0, min(lengths))
