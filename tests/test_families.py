"""Every family keeps the contracts that tests/test_modeling.py and tests/test_generation.py try on Qwen2 in depth."""

import copy
import pickle
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache

from dsa import from_dense
from dsa.config import FAMILIES, config_class_of
from dsa.families import family
from tests.conftest import error_ratio, small_model

TINY = {"n_heads": 4, "head_dim": 8}
# What a family cannot share with the others' small model, or is more itself with.
OWN = {
    "helium": {"head_dim": 8},  # its output projection is square
    "mistral": {"sliding_window": None},
    "granite": {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "llama": {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}

REFUSALS = [
    ("deepseek_v3", {}, "no DSA for a 'deepseek_v3' model: latent attention"),
    ("bloom", {}, "no DSA for a 'bloom' model: ALiBi"),
    ("falcon", {"alibi": True}, "no DSA for a 'falcon' model: ALiBi"),
    ("gemma2", {}, "no DSA for a 'gemma2' model: sliding windows"),
    ("phi3", {"sliding_window": 2047}, "no DSA for a 'phi3' model: sliding windows"),
    ("gpt2", {}, "no DSA for a 'gpt2' model: none of arcee, .*, qwen2, qwen3$"),
    ("mistral", {"sliding_window": 4096}, "sliding_window: DSA replaces"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window: DSA replaces"),
]


def dense_of(model_type):
    model = small_model(model_type, **OWN.get(model_type, {}))
    with torch.no_grad():  # norms that are all ones would hide where they stand
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=FAMILIES)
def dense(request):
    return dense_of(request.param)


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return mask


def test_dense_mode_equals_transformers_own(dense, ids, mask):
    for implementation in ("sdpa", "eager"):
        dense.set_attn_implementation(implementation)
        model = from_dense(dense, topk=4, **TINY, attention_mode="dense")
        for attention_mask in (None, mask):
            expected = dense(ids, attention_mask=attention_mask, labels=ids)
            got = model(ids, attention_mask=attention_mask, labels=ids)
            real = mask.bool() if attention_mask is not None else ...
            assert torch.equal(got.logits[real], expected.logits[real])
        dense.zero_grad()
        got.loss.backward()
        expected.loss.backward()
        for name, parameter in dense.named_parameters():
            assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_sparse_mode_with_every_key_equals_dense(dense, ids, mask):
    model = from_dense(dense, topk=40, **TINY)
    got, expected = model(ids, attention_mask=mask, labels=ids), dense(ids, attention_mask=mask, labels=ids)
    assert error_ratio(got.logits[mask.bool()], expected.logits[mask.bool()]) < 1e-5
    got.loss.backward()
    expected.loss.backward()
    for name, parameter in dense.named_parameters():
        assert error_ratio(model.get_parameter(name).grad, parameter.grad) < 1e-3, name
    few = from_dense(dense, topk=5, **TINY)(ids).logits
    assert error_ratio(few[:, 20:], dense(ids).logits[:, 20:]) > 0.01


def test_packed_documents_give_what_they_give_alone(dense, ids):
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    for mode in ("dense", "sparse"):
        model = from_dense(dense, topk=6, **TINY, attention_mode=mode)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(ids[:, :15]).logits, model(ids[:, 15:]).logits], 1)
        assert error_ratio(packed, alone) < 1e-5


def test_the_two_losses_never_meet(dense, ids):
    for mode in ("dense", "sparse"):
        model = from_dense(dense, topk=6, **TINY, attention_mode=mode).train()
        out = model(ids, labels=ids, output_indexer_kl=True)
        backbone = torch.autograd.grad(out.loss, model.parameters(), allow_unused=True, retain_graph=True)
        indexer = torch.autograd.grad(out.indexer_kl.sum(), model.parameters(), allow_unused=True)
        for (name, _), from_loss, from_kl in zip(model.named_parameters(), backbone, indexer, strict=True):
            ours, theirs = (from_kl, from_loss) if ".indexer." in name else (from_loss, from_kl)
            assert theirs is None and ours is not None and ours.any(), name


def test_gradient_checkpointing_changes_no_gradient(dense, ids):
    model = from_dense(dense, topk=6, **TINY).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        out = model(ids, labels=ids, output_indexer_kl=True)
        (out.loss + out.indexer_kl.sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_cached_decoding_equals_the_whole_forward(dense, ids, mask):
    model = from_dense(dense, topk=6, **TINY)
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    for more in ({}, {"num_beams": 3}):
        got, expected = (model.generate(ids, use_cache=use_cache, **kwargs, **more) for use_cache in (True, False))
        assert torch.equal(got, expected)
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, at], past_key_values=cache).logits for at in (slice(0, 25), slice(25, 26), slice(26, 40))]
    assert error_ratio(torch.cat(parts, 1), model(ids, use_cache=False).logits) < 1e-5
    assert [tuple(layer.indexer_keys.shape) for layer in cache.layers] == [(2, 40, 8)] * 3


def test_save_and_load_through_the_auto_classes(dense, ids, tmp_path):
    dense.bfloat16().save_pretrained(tmp_path / "dense")
    model = from_dense(tmp_path / "dense", topk=6, **TINY)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.to_diff_dict() == model.config.to_diff_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) is family(dense.config.model_type)
    assert loaded.model.layers[0].self_attn.indexer.weights_proj.weight.dtype == torch.float32
    for copied in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(ids).logits, model(ids).logits)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in dense.state_dict().items())


def test_a_model_is_never_split_within_a_layer(dense):
    """FSDP and device maps look for these classes by name: one that is not in the model is an error."""
    model = from_dense(dense, topk=6, **TINY)
    assert model._no_split_modules == {type(layer).__name__ for layer in model.model.layers}


def test_llama_keeps_its_scaled_rope():
    dense = dense_of("llama")
    model = from_dense(dense, topk=6, **TINY)
    assert torch.equal(model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    unscaled = 1000.0 ** (-torch.arange(0, 16, 2) / 16)
    assert not torch.allclose(model.model.rotary_emb.inv_freq, unscaled)


def refusal(model_type: str, fields: dict) -> str:
    """What is said to a config or a model of them."""
    config = CONFIG_MAPPING[model_type](**fields)
    small = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 8, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "intermediate_size": 8, "head_dim": 8}
    with pytest.raises(ValueError) as error:
        config_class_of(config)
        from_dense(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**fields | small)), topk=6, **TINY)
    return str(error.value)


@pytest.mark.parametrize("model_type,fields,line", REFUSALS)
def test_a_family_that_cannot_work_is_refused_in_one_line(model_type, fields, line):
    said = refusal(model_type, fields)
    assert re.match(line, said) and "\n" not in said
