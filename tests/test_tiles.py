"""The loss in tiles is the loss of all logits, and so are its gradients."""

import copy

import pytest
import torch

from dsa import from_dense
from dsa.data.rows import IGNORE
from dsa.training import tiles
from tests.test_training import train


def loss_and_gradients(model, labels, bf16, **kwargs):
    model.zero_grad()
    ids = torch.arange(labels.numel()).view_as(labels) % 97
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(ids, labels=labels, use_cache=False, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("bf16", "near"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize("items", [None, 7])
def test_loss_and_gradients_are_those_of_all_logits(dense_model, monkeypatch, bf16, near, items):
    model = copy.deepcopy(dense_model).train()
    monkeypatch.setattr(tiles, "TILE", 16)
    labels = torch.randint(97, (3, 50), generator=torch.Generator().manual_seed(1))
    labels[0, :20] = labels[1, 30:] = IGNORE
    loss, gradients = loss_and_gradients(model, labels, bf16, num_items_in_batch=items)
    with tiles.tiled(model):
        tiled, of_tiles = loss_and_gradients(model, labels, bf16, num_items_in_batch=items)
    torch.testing.assert_close(tiled, loss, rtol=near / 10, atol=0)
    assert of_tiles.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (of_tiles[name] - gradient).norm() <= near * gradient.norm(), name
    again, _ = loss_and_gradients(model, labels, bf16, num_items_in_batch=items)
    assert again == loss  # the model is as it was


def test_the_logits_are_never_there(dense_model):
    model, ids = copy.deepcopy(dense_model), torch.arange(40)[None]
    with tiles.tiled(model):
        assert model(ids, labels=ids).logits.shape == (1, 40, model.config.hidden_size)
    assert model(ids, labels=ids).logits.shape == (1, 40, model.config.vocab_size)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_training_in_tiles_is_the_same_training(dense_model, tmp_path, monkeypatch, mode):
    losses = {}
    monkeypatch.setattr(tiles, "DEVICES", ("cpu",))
    for limit in (tiles.LOGITS_BYTES, 0):
        monkeypatch.setattr(tiles, "LOGITS_BYTES", limit)
        model = from_dense(dense_model, topk=8, n_heads=2, head_dim=8, attention_mode=mode)
        log = train(model, tmp_path / str(limit), steps=3).state.log_history
        losses[limit] = [entry["lm_loss"] for entry in log if "lm_loss" in entry]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[tiles.LOGITS_BYTES], rel=1e-4)


def test_large_logits_alone_are_worth_it_and_on_a_gpu(dense_model, monkeypatch):
    model = copy.deepcopy(dense_model)
    assert not tiles.worth_it(model, 10**12)
    monkeypatch.setattr(tiles, "DEVICES", ("cpu",))
    few = tiles.LOGITS_BYTES // (4 * model.config.vocab_size)
    assert tiles.worth_it(model, few + 1) and not tiles.worth_it(model, few)
    model.config.final_logit_softcapping = 30.0
    assert not tiles.worth_it(model, few + 1)
