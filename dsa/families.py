"""The models of all families that DSA is for, each made of its own classes and the mixins of dsa/modeling.py.

`family` makes them by transformers' model_type, when they are first asked for: `LlamaDSAForCausalLM` of "llama".
"""

from functools import cache
from importlib import import_module

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dsa.config import FAMILIES, class_name, family_config
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


ATTENTION = {"qwen3": NormedAttention}


@cache
def family(model_type: str) -> type[DSAForCausalLM]:
    """A family's model, and the classes that it is made of, as dsa/modeling.py spells them out for Qwen2."""
    if model_type == "qwen2":
        return Qwen2DSAForCausalLM
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = family_config(model_type)
    name = config.__name__.removesuffix("DSAConfig")
    one_mask = not hasattr(CONFIG_MAPPING[model_type], "layer_types")  # else a mask for each type of layer

    def derived(part: str, mixin: type, **attributes) -> type:
        cls = type(f"{name}DSA{part}", (mixin, getattr(module, name + part)), attributes)
        globals()[cls.__name__] = cls  # where pickle and AutoModel look for it
        return cls

    rotary = staticmethod(module.apply_rotary_pos_emb)
    attention = derived("Attention", ATTENTION.get(model_type, DSAAttention), apply_rotary=rotary)
    layer = derived("DecoderLayer", OneMaskDecoderLayer if one_mask else DSADecoderLayer, attention_class=attention)
    model = derived("Model", OneMaskModel if one_mask else DSAModel, config_class=config, layer_class=layer)
    return derived("ForCausalLM", DSAForCausalLM, config_class=config, model_class=model)


def __getattr__(name: str) -> type[DSAForCausalLM]:
    for model_type in FAMILIES:
        if name == class_name(model_type, "ForCausalLM"):
            return family(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_model(path, **kwargs) -> DSAForCausalLM:
    """`from_pretrained` of whichever family's DSA model is saved there."""
    return AutoModelForCausalLM.from_pretrained(path, **kwargs)
