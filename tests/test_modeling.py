import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM, from_dense, modeling
from dsa.kernels import check
from tests.conftest import error_ratio

TINY = {"n_heads": 4, "head_dim": 8}


def padding(ids, left=7):
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    return mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_mode_equals_qwen2(dense_model, ids, implementation):
    dense_model.set_attn_implementation(implementation)
    model = from_dense(dense_model, topk=4, **TINY, attention_mode="dense")
    mask = padding(ids)
    for kwargs in ({}, {"attention_mask": mask}, {"labels": ids}, {"attention_mask": mask.flip(1), "labels": ids}):
        expected, got = dense_model(ids, **kwargs), model(ids, **kwargs)
        real = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
        assert torch.equal(got.logits[real], expected.logits[real])
        if "labels" in kwargs:
            assert torch.equal(got.loss, expected.loss)
            got.loss.backward()
            expected.loss.backward()
            for name, parameter in dense_model.named_parameters():
                assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("topk", [40, 1000])
def test_sparse_mode_with_every_key_equals_dense(dense_model, ids, topk):
    model = from_dense(dense_model, topk=topk, **TINY)
    mask = padding(ids)
    expected = dense_model(ids, attention_mask=mask, labels=ids)
    got = model(ids, attention_mask=mask, labels=ids)
    assert error_ratio(got.logits[mask.bool()], expected.logits[mask.bool()]) < 1e-5
    grads = [
        torch.autograd.grad(m.loss, x.parameters(), allow_unused=True)[0]
        for m, x in ((got, model), (expected, dense_model))
    ]
    assert error_ratio(*grads) < 1e-4


def test_sparse_mode_below_the_context_is_something_else(dense_model, ids):
    got = from_dense(dense_model, topk=5, **TINY)(ids).logits
    expected = dense_model(ids).logits
    assert error_ratio(got[:, :5], expected[:, :5]) < 1e-5  # the first k queries see every key
    assert error_ratio(got[:, 20:], expected[:, 20:]) > 0.05


def selected(model, monkeypatch, *args, **kwargs):
    """The indices that the layers really used, and the masks they came from."""
    calls = []
    select_topk, latest_keys = modeling.select_topk, modeling.latest_keys

    def spy(scores, topk, mask=None):
        calls.append((select_topk(scores, topk, mask), mask))
        return calls[-1][0]

    def spy_latest(*args):
        calls.append((latest_keys(*args), None))
        return calls[-1][0]

    monkeypatch.setattr(modeling, "select_topk", spy)
    monkeypatch.setattr(modeling, "latest_keys", spy_latest)
    model(*args, **kwargs)
    return calls


def test_no_future_padded_or_foreign_key_is_ever_selected(dense_model, ids, monkeypatch):
    model = from_dense(dense_model, topk=6, **TINY)
    T = ids.shape[1]
    query = torch.arange(T)[None, :, None]
    mask = padding(ids)
    for indices, _ in selected(model, monkeypatch, ids, attention_mask=mask):
        real = indices >= 0
        assert (indices <= query)[real].all()
        at = indices.clamp(min=0).long().flatten(1)
        assert mask.gather(1, at).view_as(indices)[real].all()
        assert (real.sum(-1)[1] == torch.arange(1, T + 1).clamp(max=6)).all()
    positions = (torch.arange(T) % 13)[None].expand(2, -1)
    for indices, _ in selected(model, monkeypatch, ids, position_ids=positions):
        assert ((indices // 13) == (query // 13))[indices >= 0].all()


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_packed_documents_give_what_they_give_alone(dense_model, ids, mode):
    model = from_dense(dense_model, topk=6, **TINY, attention_mode=mode)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None].expand(2, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(ids[:, :15]).logits, model(ids[:, 15:]).logits], 1)
    assert error_ratio(packed, alone) < 1e-5


def test_padding_changes_no_real_token(dense_model, ids):
    model = from_dense(dense_model, topk=6, **TINY)
    row = ids[:1, 7:]
    expected = model(row).logits
    left = model(ids[:1], attention_mask=padding(ids)[:1], position_ids=(torch.arange(40) - 7).clamp(min=0)[None])
    assert error_ratio(left.logits[:, 7:], expected) < 1e-5
    right = torch.cat([row, row[:, :5]], 1)
    mask = (torch.arange(38) < 33).long()[None]
    assert error_ratio(model(right, attention_mask=mask).logits[:, :33], expected) < 1e-5


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_two_losses_never_meet(dense_model, ids, mode):
    model = from_dense(dense_model, topk=6, **TINY, attention_mode=mode).train()
    out = model(ids, labels=ids, output_indexer_kl=True)
    backbone = torch.autograd.grad(out.loss, model.parameters(), allow_unused=True, retain_graph=True)
    indexer = torch.autograd.grad(out.indexer_kl.sum(), model.parameters(), allow_unused=True)
    for (name, _), from_loss, from_kl in zip(model.named_parameters(), backbone, indexer, strict=True):
        ours, theirs = (from_kl, from_loss) if ".indexer." in name else (from_loss, from_kl)
        assert theirs is None, name
        assert ours is not None and ours.any(), name


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradient_checkpointing_changes_no_gradient(dense_model, ids, mode):
    model = from_dense(dense_model, topk=6, **TINY, attention_mode=mode).train()

    def gradients():
        model.zero_grad()
        out = model(ids, labels=ids, output_indexer_kl=True)
        (out.loss + out.indexer_kl.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable()
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dense_kl_does_not_depend_on_topk(dense_model, ids):
    kl = [
        from_dense(dense_model, topk=k, **TINY, attention_mode="dense")(ids, output_indexer_kl=True).indexer_kl
        for k in (1, 30)
    ]
    assert torch.equal(*kl)


def test_conversion_keeps_every_bit(dense_model, tmp_path):
    dense_model.bfloat16().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    model = from_dense(tmp_path, topk=7, n_heads=2, head_dim=8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.dtype == torch.bfloat16
    for name, parameter in dense_model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.config.index_topk, model.config.index_n_heads, model.config.index_head_dim) == (7, 2, 8)
    assert model.config.index_rope_dim == 4
    again = from_dense(tmp_path, topk=7, n_heads=2, head_dim=8)
    other = from_dense(tmp_path, topk=7, n_heads=2, head_dim=8, seed=1)
    key = "model.layers.1.self_attn.indexer.wq.weight"
    assert torch.equal(again.get_parameter(key), model.get_parameter(key))
    assert not torch.equal(other.get_parameter(key), model.get_parameter(key))
    assert not torch.equal(model.get_parameter(key.replace(".1.", ".0.")), model.get_parameter(key))


def test_conversion_leaves_the_dense_models_generation_settings_alone(dense_model):
    model = from_dense(dense_model, topk=7, n_heads=2, head_dim=8)
    model.generation_config.eos_token_id = [5, 6]  # as training sets it
    assert dense_model.generation_config.eos_token_id == 1


def test_conversion_of_something_else_is_an_error(dense_model, tmp_path):
    with pytest.raises(ValueError, match="qwen2_dsa"):
        from_dense(from_dense(dense_model, topk=3, **TINY), topk=3, **TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_through_the_auto_classes(dense_model, ids, tmp_path, dtype):
    dense_model.to(dtype).save_pretrained(tmp_path / "dense")
    model = from_dense(tmp_path / "dense", topk=6, **TINY).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is Qwen2DSAConfig and config.index_topk == 6 and config.attention_mode == "sparse"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is Qwen2DSAForCausalLM and loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.model.layers[0].self_attn.indexer.weights_proj.weight.dtype == torch.float32
    changed = AutoModelForCausalLM.from_pretrained(tmp_path, index_topk=9, attention_mode="dense")
    assert changed.config.index_topk == 9 and changed.config.attention_mode == "dense"


@pytest.mark.parametrize("selector", ["window", "sink_window", "random", "oracle"])
def test_control_arms_run_the_same_path_without_indexer(dense_model, ids, selector, monkeypatch):
    model = from_dense(dense_model, topk=6, n_heads=0, head_dim=8, selector=selector)
    assert not model.indexer_parameters()
    calls = selected(model, monkeypatch, ids)
    assert len(calls) == 3
    indices = calls[0][0]
    assert ((indices >= 0).sum(-1)[0] == torch.arange(1, 41).clamp(max=6)).all()
    if selector == "window":
        assert indices[0, -1].tolist() == [34, 35, 36, 37, 38, 39]
    full = from_dense(dense_model, topk=40, n_heads=0, head_dim=8, selector=selector)
    assert error_ratio(full(ids).logits, dense_model(ids).logits) < 1e-5


def test_the_oracle_beats_the_others_at_equal_k(dense_model, ids):
    """It keeps the most attention, so its output is nearest to dense."""
    expected = dense_model(ids).logits[:, 20:]
    errors = {
        s: error_ratio(
            from_dense(dense_model, topk=12, n_heads=0, head_dim=8, selector=s)(ids).logits[:, 20:], expected
        )
        for s in ("oracle", "window", "random")
    }
    assert errors["oracle"] < min(errors["window"], errors["random"])


def test_full_size_geometry():
    """Qwen2.5-0.5B's indexers have the size that the design says: 290,432 parameters a layer."""
    config = Qwen2Config(
        hidden_size=896, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=1, vocab_size=8
    )
    model = from_dense(Qwen2ForCausalLM(config), topk=2048, n_heads=4, head_dim=64)
    assert sum(p.numel() for p in model.indexer_parameters()) == 290_432


def test_where_no_fused_kernel_takes_groups_dense_attention_computes_the_same(dense_model, ids, monkeypatch):
    """As on a GPU in float32: keys and values are repeated for each query head, and the cache has them once."""
    model = from_dense(dense_model, topk=4, n_heads=2, head_dim=8, attention_mode="dense")

    def all_of_it():
        out = model(ids, labels=ids, use_cache=True, output_indexer_kl=True)
        out.loss.backward()
        found = [out.logits, out.indexer_kl, *(p.grad.clone() for p in model.backbone_parameters())]
        model.zero_grad()
        return found, out.past_key_values.layers[0].keys.shape

    expected, shape = all_of_it()
    heads, attend = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def seen(module, q, k, *args, **kwargs):
        heads.append(k.shape[1])
        return attend(module, q, k, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", seen)
    monkeypatch.setattr("dsa.modeling.takes_groups", lambda q: False)
    found, cached = all_of_it()
    assert set(heads) == {dense_model.config.num_attention_heads} and cached == shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_kernel_may_be_compared_within_a_layer_that_is_recomputed(dense_model, ids):
    """The first use of a kernel compares it, with gradients of its own, and that first use may be a checkpoint's."""
    check.verify_cpu.cache_clear()
    check.verify.cache_clear()
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=8).train()
    model.activation_checkpointing_enable()
    out = model(ids, labels=ids, output_indexer_kl=True)
    (out.loss + out.indexer_kl.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
