"""DeepSeek Sparse Attention on Qwen2: lightning indexer, top-k selector, sparse attention, losses, model.

Importing the package registers the model with transformers' Auto classes. Shape letters, the same everywhere:
B batch, T query positions, S key positions, H heads, D head size, K selected keys.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from dsa.attention import sparse_attention
from dsa.config import Qwen2DSAConfig
from dsa.convert import from_dense
from dsa.indexer import LightningIndexer, index_scores
from dsa.losses import indexer_kl
from dsa.modeling import Qwen2DSAForCausalLM
from dsa.selector import select_topk

AutoConfig.register(Qwen2DSAConfig.model_type, Qwen2DSAConfig)
AutoModelForCausalLM.register(Qwen2DSAConfig, Qwen2DSAForCausalLM)

__all__ = [
    "LightningIndexer",
    "Qwen2DSAConfig",
    "Qwen2DSAForCausalLM",
    "from_dense",
    "index_scores",
    "indexer_kl",
    "select_topk",
    "sparse_attention",
]
