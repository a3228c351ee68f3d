"""DSAConfig: what a config says of the lightning indexer and of the selector, and the families that have one."""

from dataclasses import dataclass
from functools import cache

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ATTENTION_MODES = ("dense", "sparse")
# By transformers' model_type: decoders of multi-head or grouped-query attention with RoPE, over all earlier tokens.
FAMILIES = (
    *("arcee", "ernie4_5", "gemma", "glm", "glm4", "granite", "helium", "hyperclovax"),
    *("jais2", "llama", "mistral", "qwen2", "qwen3"),
)
SELECTORS = ("indexer", "oracle", "window", "sink_window", "random")


@dataclass(kw_only=True, repr=False)
class DSAConfig:
    r"""
    The fields that DSA adds to a family's config. Names follow transformers' `DeepseekV32Config`. A config that cannot
    work raises ValueError.

    index_topk (`int`): keys that each query attends to in sparse mode.
    index_n_heads (`int`): heads of the lightning indexer; 0 leaves the indexer out (dense baseline, control arms).
    index_head_dim (`int`): size of an indexer head.
    index_rope_dim (`int`, *optional*): leading dims of an index query and key that RoPE turns, by default half.
    index_key_dtype (`str`, *optional*): "int8" rounds index keys, each by its own scale, outside of training: half the
        bytes of bfloat16 in the cache, and on a CPU about half the time to score at long contexts. By default they
        have the model's type.
    index_per_kv_head (`bool`): each key-value head has its own share of the index heads, and its own selection.
    attention_mode (`str`): "dense" attends to every earlier token, "sparse" to the selected ones.
    selector (`str`): what scores the keys in sparse mode. "indexer" is DSA; the others are controls on the same code
        path: "oracle" (the attention itself, averaged over the heads), "window" (the latest keys), "sink_window" (the
        first `index_sinks` keys and the latest), "random".
    index_sinks (`int`): first keys that "sink_window" always keeps.
    """

    layer_types: list[str] | None = None
    index_topk: int = 2048
    index_n_heads: int = 4
    index_head_dim: int = 64
    index_rope_dim: int | None = None
    index_key_dtype: str | None = None
    index_per_kv_head: bool = False
    attention_mode: str = "sparse"
    selector: str = "indexer"
    index_sinks: int = 4

    def __post_init__(self, **kwargs):
        # The cache then holds index keys beside keys and values, and follows beams, crops and resets.
        self.layer_types = ["indexed_attention"] * self.num_hidden_layers
        if self.index_rope_dim is None:
            self.index_rope_dim = self.index_head_dim // 2
        super().__post_init__(**kwargs)
        for name in ("use_sliding_window", "sliding_window"):
            if getattr(self, name, None):
                raise ValueError(f"{name}: DSA replaces sliding windows")
        if self.attention_mode not in ATTENTION_MODES:
            raise ValueError(f"attention_mode: {self.attention_mode!r} is not one of {ATTENTION_MODES}")
        if self.selector not in SELECTORS:
            raise ValueError(f"selector: {self.selector!r} is not one of {SELECTORS}")
        if self.index_key_dtype not in (None, "int8"):
            raise ValueError(f"index_key_dtype: {self.index_key_dtype!r} is neither int8 nor None")
        if self.index_key_dtype == "int8" and self.index_head_dim % 4:
            raise ValueError(f"index_key_dtype: int8 needs a multiple of 4 as {self.index_head_dim=}")
        if self.index_topk < 1:
            raise ValueError(f"index_topk: {self.index_topk} is less than 1")
        if self.index_rope_dim % 2 or not 0 <= self.index_rope_dim <= self.index_head_dim:
            raise ValueError(f"index_rope_dim: {self.index_rope_dim} is odd or larger than {self.index_head_dim=}")
        if self.index_per_kv_head and self.index_n_heads % self.num_key_value_heads:
            raise ValueError(f"index_per_kv_head: {self.index_n_heads=} is no multiple of {self.num_key_value_heads=}")
        if self.index_n_heads < 1 and self.attention_mode == "sparse" and self.selector == "indexer":
            raise ValueError("index_n_heads: sparse attention by the indexer needs at least one head")


@strict
class Qwen2DSAConfig(DSAConfig, Qwen2Config):
    model_type = "qwen2_dsa"


def class_name(model_type: str, part: str) -> str:
    """Of a family's class: `LlamaDSAConfig`, `LlamaDSAForCausalLM`."""
    return CONFIG_MAPPING_NAMES[model_type].removesuffix("Config") + "DSA" + part


@cache
def family_config(model_type: str) -> type[DSAConfig]:
    """A family's config class with the fields of DSA, as `Qwen2DSAConfig` is Qwen2's."""
    if model_type == "qwen2":
        return Qwen2DSAConfig
    bases, fields = (DSAConfig, CONFIG_MAPPING[model_type]), {"model_type": f"{model_type}_dsa"}
    cls = globals()[class_name(model_type, "Config")] = strict(type(class_name(model_type, "Config"), bases, fields))
    return cls


def __getattr__(name: str) -> type[DSAConfig]:
    """A family's class is made when it is first asked for: what it is made of takes seconds to import."""
    for model_type in FAMILIES:
        if name == class_name(model_type, "Config"):
            return family_config(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def config_class_of(dense: PreTrainedConfig) -> type[DSAConfig]:
    """That of a dense model's family. Raises ValueError, one line that says why, where there is none."""
    model_type = dense.model_type
    if model_type in FAMILIES:
        return family_config(model_type)
    if hasattr(dense, "kv_lora_rank"):
        why = "latent attention, for which transformers' deepseek_v32 has an indexer"
    elif getattr(dense, "alibi", False) or model_type in ("bloom", "mpt"):
        why = "ALiBi, and the indexer is made for RoPE"
    elif getattr(dense, "sliding_window", None) or "sliding_attention" in (getattr(dense, "layer_types", None) or ()):
        why = "sliding windows, which DSA replaces"
    else:
        why = f"none of {', '.join(FAMILIES)}"
    raise ValueError(f"no DSA for a {model_type!r} model: {why}")
