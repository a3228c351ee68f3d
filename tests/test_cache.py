"""The growing cache: the same contents as transformers' own, without copying everything at each step."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from dsa import from_dense
from dsa.cache import GrowingIndexedLayer, growing

NAMES = ("keys", "values", "indexer_keys")


def tokens(count, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, 2, count, 4, generator=g) for _ in range(2))
    return keys, values, torch.randn(batch, count, 3, generator=g)


def feed(layers, count, seed=0, batch=2):
    keys, values, index = tokens(count, batch, seed)
    for layer in layers:
        with torch.no_grad():
            layer.update(keys, values)
            layer.update_indexer(index)


def same(ours, theirs):
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in NAMES)


CHANGES = {
    "nothing": lambda layer: None,
    "crop": lambda layer: layer.crop(-3),
    "crop to nothing": lambda layer: layer.crop(-10),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_contents_as_transformers_cache_after(change):
    ours, theirs = GrowingIndexedLayer(), DynamicIndexedLayer()
    feed((ours, theirs), 10)
    for layer in (ours, theirs):
        CHANGES[change](layer)
    batch = 4 if change == "repeat" else 2
    for i in range(700):  # past the room, more than once
        feed((ours, theirs), 1 + i % 3, seed=i, batch=batch)
        if i in (0, 100, 699):
            assert same(ours, theirs), i
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_step_copies_nothing_but_the_new_token():
    layer = GrowingIndexedLayer()
    feed((layer,), 1000)
    moved = 0
    for i in range(400):
        before = [getattr(layer, name).data_ptr() for name in NAMES]
        feed((layer,), 1, seed=i)
        moved += before != [getattr(layer, name).data_ptr() for name in NAMES]
    assert moved == 1  # the room of 256 tokens was used up once


def test_a_copy_of_a_cache_is_apart_from_it():
    """A prompt's cache is often copied to be continued in two ways."""
    layer = GrowingIndexedLayer()
    feed((layer,), 10)
    other = copy.deepcopy(layer)
    feed((layer,), 1, seed=1)
    feed((other,), 1, seed=2)
    reference = [DynamicIndexedLayer(), DynamicIndexedLayer()]
    feed(reference, 10)
    feed(reference[:1], 1, seed=1)
    feed(reference[1:], 1, seed=2)
    assert same(layer, reference[0]) and same(other, reference[1])


def test_what_inference_mode_began_goes_on_outside_of_it(dense_model, ids):
    model = from_dense(dense_model, topk=8, n_heads=2, head_dim=8)
    with torch.inference_mode():
        cache = model(ids[:, :30], use_cache=True).past_key_values
    with torch.no_grad():
        rest = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 40)]
        assert torch.allclose(torch.cat(rest, dim=1), model(ids).logits[:, 30:], atol=1e-4)


def test_gradients_flow_through_a_cache_where_they_are_wanted():
    layer = GrowingIndexedLayer()
    keys, values, _ = tokens(3)
    keys.requires_grad_()
    layer.update(keys, values)
    out, _ = layer.update(*tokens(1)[:2])
    out.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_generation_uses_it_and_a_filled_cache_is_left_alone(dense_model, ids):
    model = from_dense(dense_model, topk=8, n_heads=2, head_dim=8)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert all(type(layer) is GrowingIndexedLayer for layer in out.past_key_values.layers)
    cache = DynamicCache(config=model.config)
    feed((cache.layers[0],), 3)
    assert type(growing(cache).layers[0]) is DynamicIndexedLayer
