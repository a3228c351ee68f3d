"""Each ablation does what it says, and keeps what holds for every indexer."""

from typing import get_args

import pytest
import torch

from dsa import Qwen2DSAForCausalLM, ablations, from_dense
from dsa.indexer import index_scores
from dsa.losses import attention_target
from stages import params
from tests.conftest import error_ratio
from tests.test_modeling import padding

HEAD_DIM = 8


def build(dense_model, name, topk=6, **config):
    return from_dense(
        dense_model, topk=topk, n_heads=4, head_dim=HEAD_DIM, **ablations.fields(name, HEAD_DIM), **config
    )


class Seen:
    """Observer: what each layer's attention worked with."""

    def __init__(self):
        self.layers = {}

    def observe(self, layer, index, q, k, visible, indices):
        self.layers[layer.layer_idx] = index, q, k, visible, indices


def watch(model, ids, **kwargs) -> dict:
    seen = Seen()
    model.model(ids, observer=seen, use_cache=False, **kwargs)
    return seen.layers


def test_params_know_every_ablation():
    assert get_args(params.Ablation) == ablations.NAMES


@pytest.mark.parametrize("name", ablations.NAMES)
def test_holds_for_every_ablation(dense_model, ids, name, tmp_path):
    model = build(dense_model, name)
    mask = padding(ids)
    whole = model(ids, attention_mask=mask).logits
    changed = ids.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 90 + 2
    assert torch.equal(model(changed, attention_mask=mask).logits[:, :30], whole[:, :30])  # causal
    foreign = ids.clone()
    foreign[0, :7] = 5  # padding is not read
    assert torch.equal(model(foreign, attention_mask=mask).logits[0, 7:], whole[0, 7:])

    first = model(ids[:, :25], attention_mask=mask[:, :25], use_cache=True)  # decoding equals the whole
    steps, cache = [first.logits], first.past_key_values
    for t in range(25, 40):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
        steps.append(out.logits)
    assert error_ratio(torch.cat(steps, 1)[mask.bool()], whole[mask.bool()]) < 1e-5

    model.save_pretrained(tmp_path)
    again = Qwen2DSAForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids, attention_mask=mask).logits, whole)

    every = build(dense_model, name, topk=40)
    assert error_ratio(every(ids).logits, dense_model(ids).logits) < 1e-5


@pytest.mark.parametrize("name", ablations.NAMES)
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_gradients_of_the_two_losses(dense_model, ids, name, mode):
    model = build(dense_model, name, attention_mode=mode).train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.indexer_parameters())
    model.zero_grad()
    model(ids, output_indexer_kl=True).indexer_kl.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.indexer_parameters())
    reached = any(p.grad is not None and p.grad.any() for p in model.backbone_parameters())
    assert reached == (name == "attached")


@pytest.mark.parametrize("name", ["none", "shared_2", "per_kv_head", "dense_ends"])
def test_checkpointing_changes_no_gradient(dense_model, ids, name):
    model = build(dense_model, name).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        out = model(ids, labels=ids, output_indexer_kl=True)
        (out.loss + out.indexer_kl.sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter, gradient in gradients[0].items():
        assert error_ratio(gradients[1][parameter], gradient) < 1e-6, parameter


def test_without_relu_the_scores_are_linear(dense_model, ids):
    with_relu, without = build(dense_model, "none"), build(dense_model, "no_relu")
    for layer in range(3):
        q, k, weights = watch(with_relu, ids)[layer][0]
        got = index_scores(*watch(without, ids)[layer][0])
        if layer == 0:  # below, the layers see other inputs
            expected = torch.einsum("bthd,bsd,bth->bts", q, k, weights) * (HEAD_DIM * 4) ** -0.5
            assert error_ratio(got, expected) < 1e-5
            assert error_ratio(got, index_scores(q, k, weights)) > 0.1


def test_rope_and_key_norm(dense_model, ids):
    assert [build(dense_model, n).config.index_rope_dim for n in ("rope_none", "none", "rope_all")] == [0, 4, 8]
    later = torch.arange(ids.shape[1])[None] + 11
    none, moved = (watch(build(dense_model, "rope_none"), ids, position_ids=p)[0][0] for p in (None, later))
    assert torch.equal(none[1], moved[1])  # keys do not know where they are
    moved = watch(build(dense_model, "rope_all"), ids, position_ids=later)[0][0]
    assert not torch.isclose(moved[1], watch(build(dense_model, "rope_all"), ids)[0][0][1]).all(0).all(0).any()
    sizes = {n: watch(build(dense_model, n), ids)[0][0][1].norm(dim=-1) for n in ("none", "no_key_norm")}
    assert sizes["none"].std() < 1e-4 * sizes["none"].mean()
    assert sizes["no_key_norm"].std() > 1e-2 * sizes["no_key_norm"].mean()


def test_dense_layers_have_no_indexer(dense_model, ids):
    model = build(dense_model, "dense_ends", topk=3)
    assert [layer.self_attn.indexer is None for layer in model.model.layers] == [True, False, True]
    layers = watch(model, ids)
    assert list(layers) == [1] and layers[1][-1].shape[-1] == 3
    assert len(model(ids, output_indexer_kl=True).indexer_kl) == 1
    sparse = build(dense_model, "none", topk=3)
    assert error_ratio(model(ids).logits, sparse(ids).logits) > 0.01


@pytest.mark.parametrize("layer", [3, -4])
def test_a_dense_layer_that_does_not_exist_is_an_error(dense_model, layer):
    with pytest.raises(ValueError, match="index_dense_layers"):
        from_dense(dense_model, topk=6, n_heads=4, head_dim=HEAD_DIM, index_dense_layers=[layer])


def test_layers_share_a_selection_and_its_loss(dense_model, ids):
    model = build(dense_model, "shared_2")
    assert [layer.self_attn.indexer is None for layer in model.model.layers] == [False, True, False]
    layers = watch(model, ids)
    assert layers[0][0] is layers[1][0] and torch.equal(layers[0][-1], layers[1][-1])
    assert not torch.equal(layers[0][-1], layers[2][-1])
    # The mean of the layers' losses has the gradient of the loss whose target is the layers' mean.
    model = build(dense_model, "shared_2", attention_mode="dense").train()
    q, k, weights = watch(model, ids)[0][0]
    visible = torch.ones(40, 40, dtype=torch.bool).tril()[None]
    targets = [attention_target(*watch(model, ids)[i][1:3], visible, 16**-0.5) for i in (0, 1)]
    log_p = index_scores(q, k, weights).masked_fill(~visible, -1e9).log_softmax(-1)
    expected = -(sum(targets) / 2 * log_p).sum(-1).mean()
    names = [n for n, _ in model.named_parameters() if "layers.0.self_attn.indexer" in n]
    wanted = torch.autograd.grad(expected, [model.get_parameter(n) for n in names])
    (model(ids, output_indexer_kl=True).indexer_kl[:2].mean()).backward()
    for name, gradient in zip(names, wanted, strict=True):
        assert error_ratio(model.get_parameter(name).grad, gradient) < 1e-4, name


def test_a_dense_layer_leaves_the_lead_to_the_next(dense_model, ids):
    model = from_dense(dense_model, topk=6, n_heads=4, head_dim=HEAD_DIM, index_share=3, index_dense_layers=[0])
    assert [layer.self_attn.indexer is None for layer in model.model.layers] == [True, False, True]
    layers = watch(model, ids)
    assert list(layers) == [1, 2] and torch.equal(layers[1][-1], layers[2][-1])


@pytest.mark.parametrize("name", ["none", "shared_2"])
def test_selections_are_kept_for_other_layers_only_where_some_share(dense_model, ids, name):
    model, kept = build(dense_model, name), []
    model.model.layers[2].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["shared"] and list(kwargs["shared"])), with_kwargs=True
    )
    model(ids)
    assert kept == [[0] if name == "shared_2" else None]


def test_heads_that_select_for_themselves_take_a_mask_of_one_row_for_the_batch(dense_model, ids):
    model = build(dense_model, "per_kv_head")
    packed = torch.cat([torch.arange(25), torch.arange(15)])[None]
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    for name, mask in (("position_ids", packed), ("attention_mask", causal)):
        each = mask.expand(2, *mask.shape[1:])
        one, two = (model(ids, **{name: m}, output_indexer_kl=True) for m in (mask, each))
        assert torch.equal(one.logits, two.logits) and torch.equal(one.indexer_kl, two.indexer_kl), name


def test_each_kv_head_selects_for_itself(dense_model, ids):
    model = build(dense_model, "per_kv_head")
    index, q, k, _, indices = watch(model, ids)[0]
    assert indices.shape == (2 * 2, 40, 6) and q.shape == (4, 3, 40, 16) and k.shape == (4, 1, 40, 16)
    assert not torch.equal(indices[0], indices[1])
    plain = watch(build(dense_model, "none"), ids)[0][0]
    for row in range(4):
        b, head = divmod(row, 2)
        heads = slice(2 * head, 2 * head + 2)
        assert torch.equal(index[0][row], plain[0][b, :, heads]) and torch.equal(index[1][row], plain[1][b])
        assert torch.equal(index[2][row], plain[2][b, :, heads])
