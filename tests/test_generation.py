import pytest
import torch
from transformers import DynamicCache

from dsa import from_dense
from tests.conftest import error_ratio

NEW = 12


@pytest.fixture(params=["sparse", "dense", "window", "random"])
def model(request, dense_model):
    kind = request.param
    if kind in ("window", "random"):
        return from_dense(dense_model, topk=6, n_heads=0, head_dim=8, selector=kind)
    return from_dense(dense_model, topk=6, n_heads=4, head_dim=8, attention_mode=kind)


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return mask


def uncached(model, ids, mask, steps, choose=lambda logits: logits.argmax(-1)):
    """Decode by running the whole model again for every token."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, choose(logits)[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_left_padded_batch_equals_the_uncached_forward(model, ids, mask, cache):
    got = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, cache_implementation=cache
    )
    assert torch.equal(got, uncached(model, ids, mask, NEW))


def test_sampling_equals_the_uncached_forward(model, ids, mask):
    torch.manual_seed(5)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0, eos_token_id=-1)
    torch.manual_seed(5)

    def sample(logits):
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    assert torch.equal(got, uncached(model, ids, mask, NEW, sample))


def test_beams_with_a_cache_equal_beams_without(model, ids, mask):
    kwargs = {"attention_mask": mask, "max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **kwargs))


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [13, 1, 26], [39, 1]])
def test_chunked_prefill_equals_one_forward(model, ids, chunks):
    expected = model(ids, use_cache=False).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    for size in chunks:
        parts.append(model(ids[:, start : start + size], past_key_values=cache).logits)
        start += size
    assert error_ratio(torch.cat(parts, 1), expected) < 1e-5


@pytest.mark.parametrize("made", ["without a config", "with Qwen2's config"])
def test_a_dynamic_cache_is_taken_however_it_was_made(model, dense_model, ids, made):
    """fla #569: `DynamicCache()` without a config, which Qwen2 takes."""

    def cache():
        return DynamicCache() if made == "without a config" else DynamicCache(config=dense_model.config)

    first, second = cache(), cache()
    parts = [model(ids[:, :25], past_key_values=first).logits, model(ids[:, 25:], past_key_values=first).logits]
    assert error_ratio(torch.cat(parts, 1), model(ids, use_cache=False).logits) < 1e-5
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, past_key_values=second, **kwargs), model.generate(ids, **kwargs))
    first.crop(-20)
    again = model(ids[:, 20:], past_key_values=first).logits
    assert error_ratio(again, model(ids, use_cache=False).logits[:, 20:]) < 1e-5


def test_cropping_the_cache_forgets_keys_and_index_keys(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-15)
    again = model(ids[:, 25:], past_key_values=cache).logits
    assert error_ratio(again, model(ids, use_cache=False).logits[:, 25:]) < 1e-5


def test_two_generations_do_not_share_state(model, ids, mask):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    first = model.generate(ids[1:], **kwargs)
    model.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(model.generate(ids[1:], **kwargs), first)


def test_the_cache_holds_index_keys(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=4, head_dim=8)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert [tuple(layer.indexer_keys.shape) for layer in cache.layers] == [(2, 40, 8)] * 3


def test_int8_index_keys_are_a_byte_a_number_and_a_scale(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=4, head_dim=8, index_key_dtype="int8")
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    keys = [layer.indexer_keys for layer in cache.layers]
    assert [(tuple(k.shape), k.dtype) for k in keys] == [((2, 40, 8 + 4), torch.int8)] * 3
    mask = torch.ones_like(ids)  # no padding: rounded keys do depend on where positions begin
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert torch.equal(got, uncached(model, ids, mask, NEW))
    with pytest.raises(ValueError, match="index_key_dtype"):  # the loss is of the true keys
        model(ids, output_indexer_kl=True)
    assert model.train()(ids, output_indexer_kl=True).indexer_kl.isfinite().all()
