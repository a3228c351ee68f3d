"""DeepSeek Sparse Attention as mixins for the classes of a transformers family, and Qwen2 with them.

In dense mode the model computes what the family's own computes with the same weights. In sparse mode every layer scores
the keys, selects `index_topk` of them for each query and attends to those only. The two losses never meet: the indexer
reads detached hidden states, and the selected indices carry no gradient. The other families are in dsa/families.py.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple

from dsa.attention import sparse_attention
from dsa.cache import growing
from dsa.config import DSAConfig, Qwen2DSAConfig
from dsa.indexer import IndexScores, LightningIndexer, Rotation, rotation
from dsa.losses import indexer_kl
from dsa.masks import Slab, Visibility
from dsa.reference import attention_target
from dsa.selector import DeferredScores, control_scores, latest_keys, select_topk

Index = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # index queries, keys and weights


def takes_groups(q: torch.Tensor) -> bool:
    """Whether a fused kernel of SDPA takes queries of more heads than keys have. On a GPU none does in float32, and
    what is left to it has all logits in memory: 56 GB for a row of 32K tokens and Qwen2.5-0.5B's heads."""
    return not q.is_cuda or q.dtype != torch.float32 or torch.is_autocast_enabled("cuda")


class AttentionObserver(Protocol):
    """Sees what a layer's attention worked with; passed to the model's forward as `observer`."""

    def observe(
        self, layer: "DSAAttention", index: Index | None, q, k, visible: Visibility, indices: torch.Tensor | None
    ) -> None:
        """q [B, Hq, T, D] and k [B, Hkv, S, D] after RoPE; `indices` [B, T, K] is None in dense mode."""


class IndexerLoss:
    """Collects each layer's `indexer_kl`: over all visible keys in dense mode, the selected ones in sparse mode."""

    def __init__(self):
        self.kl: list[torch.Tensor] = []

    def observe(self, layer, index, q, k, visible, indices) -> None:
        if index is None:
            raise ValueError("the indexer loss needs an indexer: index_n_heads is 0, or the selector is a control")
        if index[1].dtype == torch.int8:
            raise ValueError("the indexer loss needs index keys that are not rounded: index_key_dtype is int8")
        self.kl.append(indexer_kl(*index, q, k, layer.scaling, visible, indices))


def split_kv_heads(index: Index, q, k, v, visible: Visibility) -> tuple:
    """The key-value heads as rows of the batch, B * Hkv of them, each with its query heads and its index heads."""
    index_q, index_k, weights = index
    (B, Hkv, S, D), T = k.shape, q.shape[2]
    index_q = index_q.reshape(B, T, Hkv, -1, index_q.shape[-1]).transpose(1, 2).flatten(0, 1)  # (B*Hkv, T, H / Hkv, DI)
    weights = weights.reshape(B, T, Hkv, -1).transpose(1, 2).flatten(0, 1)  # (B*Hkv, T, H / Hkv)
    index = index_q, index_k.repeat_interleave(Hkv, dim=0), weights  # keys (B*Hkv, S, DI)
    q = q.reshape(B * Hkv, -1, T, D)  # (B*Hkv, Hq / Hkv, T, D)
    return index, q, k.reshape(B * Hkv, 1, S, D), v.reshape(B * Hkv, 1, S, D), visible.repeat(Hkv)


class DSAAttention:
    """A family's attention, over all earlier tokens (dense mode) or over the selected ones (sparse mode)."""

    apply_rotary: staticmethod  # the family's, of (q, k, cos, sin)

    def __init__(self, config: DSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.indexer = LightningIndexer(config, layer_idx) if config.index_n_heads else None

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T, hidden] -> q [B, T, Hq, D], k and v [B, T, Hkv, D], before RoPE."""
        B, T, _ = hidden_states.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        return tuple(projection(hidden_states).view(B, T, -1, self.head_dim) for projection in projections)

    @torch.compiler.disable(reason="kernels are chosen by shape, and buffers of the cache told apart by their address")
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Visibility,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        observer: AttentionObserver | None = None,
        index_rotation: Rotation | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        past_key_values = kwargs.pop("cache", past_key_values)  # its name from transformers 5.24 on
        visible = attention_mask
        sparse = self.config.attention_mode == "sparse"
        B, T, _ = hidden_states.shape
        q, k, v = (x.transpose(1, 2) for x in self.project(hidden_states))  # (B, Hq, T, D), (B, Hkv, T, D) twice
        q, k = self.apply_rotary(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # (B, Hkv, S, D)

        index = indices = weights = None
        if self.indexer is not None and self.config.selector == "indexer" and (sparse or observer):
            # (B, T, H, DI), (B, S, DI), (B, T, H)
            index = self.indexer(hidden_states, position_ids, past_key_values, index_rotation)
        if not sparse:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            keys, values = k, v
            plain = visible.dense_mask is None and self.config._attn_implementation == "sdpa"
            if plain and T > 1 and not takes_groups(q):
                keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            out, weights = attend(
                self, q, keys, values, visible.dense_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        if index is not None and self.config.index_per_kv_head:
            index, q, k, v, visible = split_kv_heads(index, q, k, v, visible)
        if sparse:
            q, k = q.to(v.dtype), k.to(v.dtype)  # RoPE leaves float32 under autocast
            indices = self.select(index, q, k, visible)  # (B, T, K)
            out = sparse_attention(q, k, v, indices, self.scaling).reshape(B, -1, T, self.head_dim).transpose(1, 2)
        if observer is not None:
            observer.observe(self, index, q, k, visible, indices)
        return self.o_proj(out.reshape(B, T, -1).contiguous()), weights

    @torch.no_grad()
    def select(self, index: Index | None, q: torch.Tensor, k: torch.Tensor, visible: Visibility) -> torch.Tensor:
        """The keys of each query: int32 [B, T, min(topk, S)]."""
        topk, selector, sinks = self.config.index_topk, self.config.selector, self.config.index_sinks
        heads = max(q.shape[1], self.config.index_n_heads)
        if selector == "indexer":
            return select_topk(IndexScores(*index, visible, heads), topk)
        if selector in ("window", "sink_window") and visible.causal_only:
            positions = torch.arange(visible.length, device=q.device) + visible.offset  # (T)
            sinks = sinks if selector == "sink_window" else 0
            return latest_keys(positions, topk, k.shape[2], sinks).expand(len(q), -1, -1)  # (B, T, K)

        def rows(slab: Slab) -> torch.Tensor:
            if selector == "oracle":
                seen = visible.mask(slab, q.device)
                return attention_target(q[:, :, slab.queries], k[:, :, : slab.keys], seen, self.scaling)
            positions = torch.arange(slab.start, slab.stop, device=q.device) + visible.offset
            return control_scores(selector, positions, slab.keys, sinks, self.layer_idx).expand(len(q), -1, -1)

        return select_topk(DeferredScores(rows, visible, q, heads), topk)


class DSADecoderLayer:
    """A family's layer around the attention of `attention_class`."""

    attention_class: type[DSAAttention]

    def __init__(self, config: DSAConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = self.attention_class(config, layer_idx)


class DSASettings:
    """What transformers asks of a model's class."""

    _keep_in_fp32_modules_strict = ["indexer.weights_proj"]  # "strict": in bfloat16 checkpoints too
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False


class DSAModel(DSASettings):
    """A family's decoder, of layers of `layer_class`."""

    layer_class: type[DSADecoderLayer]

    def __init__(self, config: DSAConfig):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        self._no_split_modules = {self.layer_class.__name__}
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As the family's own. `attention_mask` is [B, S] (1 token, 0 padding), or a whole [B, 1, T, S] mask;
        `position_ids` that restart within a row, with neither mask nor cache, mark packed documents."""
        past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (B, T, hidden)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        packed = position_ids if past_key_values is None and attention_mask is None else None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            past_key_values = growing(past_key_values)
        if position_ids is None:
            past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        visible = self.visibility(inputs_embeds, attention_mask, position_ids, past_key_values, packed)
        return super().forward(
            **self.handed_down(visible, inputs_embeds),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            index_rotation=rotation(position_ids, self.config) if self.config.attention_mode == "sparse" else None,
            **kwargs,
        )

    def handed_down(self, visible: Visibility, inputs_embeds: torch.Tensor) -> dict:
        """The arguments by which the family's own forward hands `visible` to each layer as its attention_mask."""
        return {"attention_mask": {"indexed_attention": visible}}

    def visibility(self, inputs_embeds, attention_mask, position_ids, past_key_values, packed) -> Visibility:
        if isinstance(attention_mask, dict):  # prepared by `generate` for a static cache
            attention_mask = attention_mask["indexed_attention"]
        length, offset = inputs_embeds.shape[1], 0
        keys = length
        if past_key_values is not None:
            offset = int(past_key_values.get_seq_length())
            keys, _ = past_key_values.get_mask_sizes(length, 0)
        if attention_mask is not None and attention_mask.dim() == 4:
            explicit = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
            return Visibility(length, explicit.shape[-1], offset, explicit=explicit, dense_mask=attention_mask)
        key_mask = documents = dense_mask = None
        if attention_mask is not None and not attention_mask.all():
            key_mask = attention_mask.bool()  # (B, S), or fewer keys where the cache is static
            key_mask = torch.nn.functional.pad(key_mask, (0, max(0, keys - key_mask.shape[1])))[:, :keys]
        if packed is not None:
            starts = torch.nn.functional.pad(packed.diff(dim=-1) != 1, (1, 0))  # (B, T), True where one begins
            if starts.any():
                documents = starts.cumsum(-1)  # (B, T)
        if self.config.attention_mode == "dense":
            dense_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values if packed is None else None,  # it looks for documents without one
                position_ids=position_ids,
            )
        return Visibility(length, keys, offset, key_mask, documents, dense_mask=dense_mask)


@dataclass
class DSACausalLMOutput(CausalLMOutputWithPast):
    """With `indexer_kl` [layers], each the mean over valid query positions, where the forward was asked for it."""

    indexer_kl: torch.FloatTensor | None = None


class DSAForCausalLM(DSASettings):
    """A family's language model around a decoder of `model_class`."""

    model_class: type[DSAModel]

    def __init__(self, config: DSAConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self._no_split_modules = None  # forgets the family's own layer, which is in the model no more
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_indexer_kl: bool = False,
        **kwargs,
    ) -> DSACausalLMOutput:
        """As the family's own, each parameter by its name: transformers decides by them what `generate`
        computes and infers, and what a Trainer keeps of a dataset.

        output_indexer_kl: also compute the indexer's loss, `indexer_kl` in the output. Its gradient reaches the
            indexer only, that of `loss` everything else.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        if output_indexer_kl:
            kwargs["observer"] = indexer_loss = IndexerLoss()
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return DSACausalLMOutput(**outputs, indexer_kl=torch.stack(indexer_loss.kl) if output_indexer_kl else None)

    def indexer_parameters(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def backbone_parameters(self) -> list[torch.nn.Parameter]:
        return [p for name, p in self.named_parameters() if ".indexer." not in name]


class Qwen2DSAAttention(DSAAttention, Qwen2Attention):
    apply_rotary = staticmethod(apply_rotary_pos_emb)


class Qwen2DSADecoderLayer(DSADecoderLayer, Qwen2DecoderLayer):
    attention_class = Qwen2DSAAttention


class Qwen2DSAModel(DSAModel, Qwen2Model):
    config: Qwen2DSAConfig
    layer_class = Qwen2DSADecoderLayer


class Qwen2DSAForCausalLM(DSAForCausalLM, Qwen2ForCausalLM):
    config: Qwen2DSAConfig
    model_class = Qwen2DSAModel
