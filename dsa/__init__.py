"""DeepSeek Sparse Attention on dense models: lightning indexer, top-k selector, sparse attention, losses, model.

Importing the package registers the models with transformers' Auto classes. Shape letters, the same everywhere:
B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from dsa.adapter import load_indexer, save_indexer
from dsa.attention import sparse_attention
from dsa.config import CONFIGS, Qwen2DSAConfig
from dsa.convert import from_dense
from dsa.export import export_model
from dsa.families import MODELS, load_model
from dsa.indexer import LightningIndexer, index_scores
from dsa.losses import indexer_kl
from dsa.modeling import DSAForCausalLM, Qwen2DSAForCausalLM
from dsa.selector import select_topk

for family, config in CONFIGS.items():
    AutoConfig.register(config.model_type, config)
    AutoModelForCausalLM.register(config, MODELS[family])

__all__ = [
    "DSAForCausalLM",
    "LightningIndexer",
    "Qwen2DSAConfig",
    "Qwen2DSAForCausalLM",
    "export_model",
    "from_dense",
    "index_scores",
    "indexer_kl",
    "load_indexer",
    "load_model",
    "save_indexer",
    "select_topk",
    "sparse_attention",
]
