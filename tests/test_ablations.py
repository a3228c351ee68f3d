"""Each ablation does what it says, and keeps what holds for every indexer."""

from typing import get_args

import pytest
import torch

from dsa import Qwen2DSAForCausalLM, ablations, from_dense
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
    assert all(p.grad is None or not p.grad.any() for p in model.backbone_parameters())


@pytest.mark.parametrize("name", ["none", "per_kv_head"])
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


def test_rope_share(dense_model, ids):
    assert [build(dense_model, n).config.index_rope_dim for n in ("rope_none", "none", "rope_all")] == [0, 4, 8]
    later = torch.arange(ids.shape[1])[None] + 11
    none, moved = (watch(build(dense_model, "rope_none"), ids, position_ids=p)[0][0] for p in (None, later))
    assert torch.equal(none[1], moved[1])  # keys do not know where they are
    moved = watch(build(dense_model, "rope_all"), ids, position_ids=later)[0][0]
    assert not torch.isclose(moved[1], watch(build(dense_model, "rope_all"), ids)[0][0][1]).all(0).all(0).any()


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
