"""DeepSeek Sparse Attention on Qwen2: lightning indexer, top-k selector, sparse attention, losses, model.

Importing the package registers the model with transformers' Auto classes. Shape letters, the same everywhere:
B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

import sys
from importlib import import_module

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

__version__ = "0.1.0"

# Where each public name comes from. Imported when it is first asked for: transformers' models take seconds.
_HOMES = {
    "LightningIndexer": "indexer",
    "Qwen2DSAConfig": "config",
    "Qwen2DSAForCausalLM": "modeling",
    "from_dense": "convert",
    "index_scores": "indexer",
    "indexer_kl": "losses",
    "select_topk": "selector",
    "sparse_attention": "attention",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(model_type: str, config: str, model: str) -> None:
    """With AutoConfig and AutoModelForCausalLM, by the names of the classes and the module that has them, as their own
    are: what their `register` takes would have to be imported first."""
    this, models = sys.modules[__name__], MODEL_FOR_CAUSAL_LM_MAPPING
    CONFIG_MAPPING._mapping[model_type] = config
    models._reverse_config_mapping[config] = model_type
    models._model_mapping[model_type] = model
    CONFIG_MAPPING._modules[model_type] = models._modules[model_type] = this


_register("qwen2_dsa", "Qwen2DSAConfig", "Qwen2DSAForCausalLM")
