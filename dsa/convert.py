"""From a dense checkpoint of any of the families to a DSA model."""

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from dsa.config import DSAConfig, config_class_of
from dsa.families import family
from dsa.modeling import DSAForCausalLM


def config_of(dense: PreTrainedConfig, **fields) -> DSAConfig:
    """A dense model's config with further fields. Raises ValueError for a family without DSA and what cannot work."""
    config_class = config_class_of(dense)
    kept = dense.to_dict()
    for name in ("model_type", "architectures", "layer_types", "transformers_version"):
        kept.pop(name, None)
    return config_class(**kept | fields)


def from_dense(
    model_or_path: PreTrainedModel | str | Path,
    *,
    topk: int,
    n_heads: int,
    head_dim: int,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
    **config,
) -> DSAForCausalLM:
    """Add lightning indexers to a dense model of one of `dsa.config.FAMILIES`.

    Args:
        model_or_path: a model such as `Qwen2ForCausalLM`, or what `AutoModelForCausalLM.from_pretrained` takes.
        topk, n_heads, head_dim: `index_topk`, `index_n_heads`, `index_head_dim` of the new config.
        seed: of the new indexers' weights; the global generator is left as it was.
        dtype: of a model that is loaded here; the checkpoint's own by default.
        config: further fields of `DSAConfig`, such as attention_mode.

    Returns:
        A model whose base weights are those of the dense one bit for bit (copies), tied where they were tied.

    Raises:
        ValueError: the model's family has no DSA, or its weights do not fit.
    """
    dense = model_or_path
    if not isinstance(dense, PreTrainedModel):
        dense = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
    new_config = config_of(dense.config, index_topk=topk, index_n_heads=n_heads, index_head_dim=head_dim, **config)
    new_config._attn_implementation = dense.config._attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family(dense.config.model_type)(new_config)
    model.to(dense.device)
    for name, parameter in model.named_parameters():
        if "indexer.weights_proj" not in name:  # stays in float32, see modeling
            parameter.data = parameter.data.to(dense.dtype)
    for name, buffer in dense.named_buffers():  # RoPE frequencies, which no state dict holds
        model.get_buffer(name).data = buffer.detach().clone()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    missing = [name for name in missing if ".indexer." not in name]
    if missing or unexpected:
        raise ValueError(f"from_dense: weights do not fit: missing {missing}, unexpected {unexpected}")
    model.generation_config = deepcopy(dense.generation_config)
    return model.train(dense.training)
