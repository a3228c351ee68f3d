"""DeepSeek Sparse Attention on Qwen2: lightning indexer, top-k selector, sparse attention, losses, model.

Importing the package registers the model with transformers' Auto classes. Shape letters, the same everywhere:
B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

import sys
from importlib import import_module

from transformers import AutoConfig, AutoModelForCausalLM

from dsa.config import Qwen2DSAConfig

__version__ = "0.1.0"

# Where each public name comes from. Imported when it is first asked for: transformers' models take seconds.
_HOMES = {
    "LightningIndexer": "indexer",
    "Qwen2DSAForCausalLM": "modeling",
    "from_dense": "convert",
    "index_scores": "indexer",
    "indexer_kl": "losses",
    "select_topk": "selector",
    "sparse_attention": "attention",
}
__all__ = ["Qwen2DSAConfig", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register(config: type, model: str) -> None:
    """With the Auto classes, as `AutoModelForCausalLM.register` does it, which takes the imported class: so only its
    name is given here, for which this module is asked, as transformers' own are for theirs."""
    AutoConfig.register(config.model_type, config)
    models = AutoModelForCausalLM._model_mapping
    models._reverse_config_mapping[config.__name__] = config.model_type
    models._model_mapping[config.model_type] = model
    models._modules[config.model_type] = sys.modules[__name__]


_register(Qwen2DSAConfig, "Qwen2DSAForCausalLM")
