"""The indexer alone: a small file beside a base model that stays as published.

For those who may not or will not retrain. After the dense warm-up the backbone is the base's, bit for bit: all that was
learnt is in the indexers.
"""

import json
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dsa.config import DSAConfig
from dsa.convert import from_dense
from dsa.modeling import DSAForCausalLM

FIELDS = tuple(field.name for field in fields(DSAConfig) if field.name != "layer_types")
NAMED = {"index_topk": "topk", "index_n_heads": "n_heads", "index_head_dim": "head_dim"}  # by `from_dense`


def save_indexer(model: DSAForCausalLM, path: str | Path) -> None:
    """Write the model's indexers, and the fields of its config that are DSA's, to a safetensors file.

    Raises ValueError where the model has no indexer.
    """
    weights = {name: weight for name, weight in model.state_dict().items() if ".indexer." in name}
    if not weights:
        raise ValueError("save_indexer: the model has no indexer, index_n_heads is 0")
    about = {name: getattr(model.config, name) for name in FIELDS}
    save_file(weights, path, {"format": "pt", "model_type": model.config.model_type, "config": json.dumps(about)})


def load_indexer(base: PreTrainedModel | str | Path, path: str | Path, **config) -> DSAForCausalLM:
    """The DSA model of a dense `base` with the indexers that `save_indexer` wrote.

    `model.config.attention_mode = "dense"` switches them off, and "sparse" on again: then it is, bit for bit, the base.

    Args:
        base: as for `from_dense`, the model that the indexers were trained for; its weights are copied unchanged.
        config: fields of `DSAConfig` that shall differ from what was saved, such as index_topk.

    Raises:
        ValueError: no such file, or one that is not for this base.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        saved = json.loads(about["config"]) | config
        weights = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"load_indexer: {path} is no file of save_indexer ({error})") from None
    named = {NAMED.get(name, name): value for name, value in saved.items()}
    model = from_dense(base, **named)
    if model.config.model_type != about["model_type"]:
        raise ValueError(f"load_indexer: {path} is for {about['model_type']}, the base is {model.config.model_type}")
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if ".indexer." in name}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    if own != given:
        name = min(name for name in own | given if own.get(name) != given.get(name))
        raise ValueError(f"load_indexer: {name} is {given.get(name)} in {path}, and {own.get(name)} for this base")
    model.load_state_dict(weights, strict=False)
    return model
