"""DeepSeek Sparse Attention on dense models: lightning indexer, top-k selector, sparse attention, losses, model.

Importing the package registers the models with transformers' Auto classes. Shape letters, the same everywhere:
B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

import sys
from importlib import import_module

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from dsa.config import FAMILIES, class_name

__version__ = "0.1.0"

# Where each public name comes from. Imported when it is first asked for: transformers' models take seconds.
_HOMES = {
    "DSAForCausalLM": "modeling",
    "LightningIndexer": "indexer",
    "Qwen2DSAConfig": "config",
    "Qwen2DSAForCausalLM": "modeling",
    "export_model": "export",
    "from_dense": "convert",
    "index_scores": "indexer",
    "indexer_kl": "losses",
    "load_indexer": "adapter",
    "load_model": "families",
    "save_indexer": "adapter",
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


def _register(family: str) -> None:
    """With AutoConfig and AutoModelForCausalLM, by the names of the classes and the module that has them, as their own
    are: what their `register` takes would have to be imported first."""
    model_type, config, model = f"{family}_dsa", class_name(family, "Config"), class_name(family, "ForCausalLM")
    _HOMES.setdefault(config, "config")
    _HOMES.setdefault(model, "families")
    CONFIG_MAPPING._mapping[model_type] = config
    MODEL_FOR_CAUSAL_LM_MAPPING._reverse_config_mapping[config] = model_type
    MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping[model_type] = model
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        mapping._modules[model_type] = sys.modules[__name__]


for family in FAMILIES:
    _register(family)
