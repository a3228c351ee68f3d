"""transformers' other caches and ways to decode: each gives what greedy decoding gives, or is refused in one line."""

from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer

from dsa import from_dense
from tests.conftest import small_model

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}


@pytest.fixture(params=["sparse", "dense"])
def model(request, dense_model):
    return from_dense(dense_model, topk=6, n_heads=4, head_dim=8, attention_mode=request.param)


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is between a GPU and the CPU")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_gives_the_same(model, ids, mask, cache):
    model, ids, mask = model.cuda(), ids.cuda(), mask.cuda()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    got = model.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)
    assert torch.equal(got, expected)


def test_an_offloaded_cache_keeps_nothing_of_keys_and_values_on_the_device(model, ids, mask, monkeypatch):
    """The same without a GPU: streams that do nothing, and copies where tensors would move."""
    away = []

    class Stream(nullcontext):
        def wait_stream(self, other):
            pass

    def moved(layer):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        away.append(layer)

    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(DynamicLayer, "offload", moved)
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: layer.is_initialized and moved(layer))
    got = model.generate(ids, attention_mask=mask, cache_implementation="offloaded", **GREEDY)
    assert torch.equal(got, expected)
    assert len(away) > 2 * GREEDY["max_new_tokens"]
    for layer in away:
        assert layer.buffers["keys"].storage is layer.buffers["values"].storage is None


def test_a_prompt_that_is_read_in_chunks_gives_the_same(model, ids, mask):
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=mask, prefill_chunk_size=13, **GREEDY), expected)


@pytest.mark.parametrize("guesses", ["of another model", "looked up in the prompt"])
def test_speculative_decoding_gives_the_same(model, ids, guesses):
    """What is guessed wrongly is cropped from keys, values and index keys."""
    prompt = torch.cat([ids[1:]] * 2, dim=1)  # in which there is something to look up
    if guesses == "of another model":
        options = {"assistant_model": small_model(initializer_range=0.3)}
    else:
        options = {"prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(prompt, **options, **GREEDY), model.generate(prompt, **GREEDY))


def test_what_transformers_cannot_do_for_index_keys_is_refused_in_one_line(model, ids):
    """A quantized cache and continuous batching have no place for them: none of both may go on without."""
    with pytest.raises(ValueError, match=r"^[^\n]*indexed_attention[^\n]*$"):
        model.generate(ids, cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match=r"^[^\n]*indexed_attention[^\n]*$"):
        model.generate_batch(ids.tolist(), generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))


@pytest.mark.slow
def test_a_compiled_decoding_step_gives_the_same(ids):
    """torch.compile ended in an internal error of its own. Attention is left out, so one graph of all is refused."""
    model = from_dense(small_model(num_hidden_layers=1), topk=6, n_heads=4, head_dim=8)
    compiled = torch.compile(model, backend="eager")

    def decoded(step):
        with torch.no_grad():
            cache = model(ids[:, :30], use_cache=True).past_key_values
            return torch.cat([step(ids[:, t : t + 1], past_key_values=cache).logits for t in range(30, 34)], dim=1)

    assert torch.equal(decoded(compiled), decoded(model))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="kernels are chosen by shape"):
        decoded(torch.compile(model, backend="eager", fullgraph=True))
