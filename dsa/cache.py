"""A key-value cache that grows without copying everything at each step.

transformers' dynamic cache concatenates: at 32K tokens a step of Qwen2.5-0.5B would copy 16 MB of keys and values a
layer to add half a KB. Here keys, values and index keys are the heads of buffers with room to spare. Everything else
(beams, cropping, batch selection, offloading) is transformers' own.
"""

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer

GROWTH = 1.5  # of a buffer that is full: each token is copied twice on average, whatever the length
ROOM = 256  # tokens, at least


class Buffer:
    """The spare room behind a cached tensor whose tokens lie along `dim`."""

    def __init__(self, dim: int):
        self.dim = dim
        self.storage: torch.Tensor | None = None

    def append(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """`old` followed by `new`; written into the room where `old` is still the head of this buffer.

        It is not after beams were reordered or rows selected, which makes new tensors.
        """
        length = 0 if old is None or old.numel() == 0 else old.shape[self.dim]
        if torch.is_grad_enabled() and (new.requires_grad or (length and old.requires_grad)):
            return torch.cat([old, new], self.dim) if length else new  # autograd needs the old values as they were
        total = length + new.shape[self.dim]
        if not (length and self.is_head(old)) or total > self.storage.shape[self.dim]:
            shape = list(new.shape)
            shape[self.dim] = max(int(total * GROWTH), total + ROOM) if length else total + ROOM
            self.storage = new.new_empty(shape)
            if length:
                self.storage.narrow(self.dim, 0, length).copy_(old)
        self.storage.narrow(self.dim, length, total - length).copy_(new)
        return self.storage.narrow(self.dim, 0, total)

    def is_head(self, tensor: torch.Tensor) -> bool:
        storage = self.storage
        return (
            storage is not None
            and tensor.data_ptr() == storage.data_ptr()
            and tensor.stride() == storage.stride()
            and tensor.dtype == storage.dtype
            and (torch.is_inference_mode_enabled() or not storage.is_inference())  # which nothing may write to outside
        )


class GrowingIndexedLayer(DynamicIndexedLayer):
    """`DynamicIndexedLayer` on buffers: `keys`, `values` [B, Hkv, S, D] and `indexer_keys` [B, S, D] are views."""

    def __init__(self):
        super().__init__()
        self.buffers = {"keys": Buffer(2), "values": Buffer(2), "indexer_keys": Buffer(1)}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self.buffers["keys"].append(self.keys, key_states)
        self.values = self.buffers["values"].append(self.values, value_states)
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        if not self.is_indexer_initialized:
            self.lazy_initialization_indexer(indexer_key_states)
        self.indexer_keys = self.buffers["indexer_keys"].append(self.indexer_keys, indexer_key_states)
        return self.indexer_keys

    def offload(self) -> None:
        """Keys and values go to the CPU, and their room on the device is free. Index keys stay: transformers offloads a
        layer as soon as its keys are updated, and the indexer reads its own after that."""
        DynamicLayer.offload(self)
        self.buffers |= {"keys": Buffer(2), "values": Buffer(2)}


def growing(cache: Cache) -> Cache:
    """The same cache, its layers on buffers, where it is transformers' dynamic one and still empty.

    One that was made without the model's config, or with another's, gets room for index keys here.
    """
    if isinstance(cache, DynamicCache):
        if cache.layer_class_to_replicate is DynamicLayer and not cache.layers:
            cache.layer_class_to_replicate = GrowingIndexedLayer
        for i, layer in enumerate(cache.layers):
            if type(layer) in (DynamicLayer, DynamicIndexedLayer) and not layer.is_initialized:
                cache.layers[i] = GrowingIndexedLayer()
    return cache
