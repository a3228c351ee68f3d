"""The families of transformers that DSA is for, each made of its own classes and the mixins of dsa/modeling.py.

They are decoders of multi-head or grouped-query attention with RoPE, over all earlier tokens. Importing this module
registers their DSA models with the Auto classes: `llama_dsa` is a `LlamaDSAForCausalLM`, and so on.
"""

from importlib import import_module

import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dsa.config import DSAConfig
from dsa.masks import Visibility
from dsa.modeling import DSAAttention, DSADecoderLayer, DSAForCausalLM, DSAModel, Qwen2DSAForCausalLM


class NormedAttention(DSAAttention):
    """Of a family that normalises each head's queries and keys before RoPE (QK-norm)."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().project(hidden_states)
        return self.q_norm(q), self.k_norm(k), v


class OneMaskModel(DSAModel):
    """Of a family whose forward makes one mask for all layers. One of four dimensions it leaves as it is, any other
    that is no tensor it cannot take: so what the layers get comes to them beside it."""

    def handed_down(self, visible: Visibility, inputs_embeds: torch.Tensor) -> dict:
        return {"attention_mask": inputs_embeds.new_empty(0, 0, 0, 0), "visible": visible}


class OneMaskDecoderLayer(DSADecoderLayer):
    def forward(self, hidden_states: torch.Tensor, attention_mask=None, visible: Visibility | None = None, **kwargs):
        return super().forward(hidden_states, attention_mask=visible, **kwargs)


def family(model_type: str, attention: type[DSAAttention] = DSAAttention) -> type[DSAForCausalLM]:
    """A family's DSA classes, as dsa/modeling.py spells them out for Qwen2."""
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type].removesuffix("ForCausalLM")
    dense_config = CONFIG_MAPPING[model_type]
    one_mask = not hasattr(dense_config, "layer_types")  # else a mask for each type of layer

    def derived(part: str, mixin: type, **attributes) -> type:
        base = getattr(module, name + part)
        cls = type(f"{name}DSA{part}", (mixin, base), attributes)
        globals()[cls.__name__] = cls  # where pickle and AutoModel look for it
        return cls

    config = type(f"{name}DSAConfig", (DSAConfig, dense_config), {"model_type": f"{model_type}_dsa"})
    globals()[config.__name__] = config = strict(config)
    attention = derived("Attention", attention, apply_rotary=staticmethod(module.apply_rotary_pos_emb))
    layer = derived("DecoderLayer", OneMaskDecoderLayer if one_mask else DSADecoderLayer, attention_class=attention)
    model = derived("Model", OneMaskModel if one_mask else DSAModel, config_class=config, layer_class=layer)
    return derived("ForCausalLM", DSAForCausalLM, config_class=config, model_class=model)


PLAIN = (
    *("arcee", "ernie4_5", "gemma", "glm", "glm4", "granite", "helium"),
    *("hyperclovax", "jais2", "llama", "mistral"),
)
FAMILIES: dict[str, type[DSAForCausalLM]] = {
    "qwen2": Qwen2DSAForCausalLM,
    "qwen3": family("qwen3", NormedAttention),
    **{model_type: family(model_type) for model_type in PLAIN},
}
for model_class in FAMILIES.values():
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class)
    AutoModelForCausalLM.register(model_class.config_class, model_class)


def family_of(dense: PreTrainedConfig) -> type[DSAForCausalLM]:
    """The DSA model of a dense model's family. Raises ValueError, one line that says why, where there is none."""
    model_type = dense.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if hasattr(dense, "kv_lora_rank"):
        why = "latent attention, for which transformers' deepseek_v32 has an indexer"
    elif getattr(dense, "alibi", False) or model_type in ("bloom", "mpt"):
        why = "ALiBi, and the indexer is made for RoPE"
    elif getattr(dense, "sliding_window", None) or "sliding_attention" in (getattr(dense, "layer_types", None) or ()):
        why = "sliding windows, which DSA replaces"
    else:
        why = f"none of {', '.join(sorted(FAMILIES))}"
    raise ValueError(f"no DSA for a {model_type!r} model: {why}")


def load_model(path, **kwargs) -> DSAForCausalLM:
    """`from_pretrained` of whichever family's DSA model is saved there."""
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)
