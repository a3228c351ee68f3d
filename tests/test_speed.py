"""What the trained model costs: the arms, the shape of the tables, and that measuring leaves nothing behind."""

import pytest
import torch
from transformers import DynamicCache

from dsa import from_dense
from stages import speed


@pytest.fixture
def model(dense_model):
    return from_dense(dense_model, topk=8, n_heads=2, head_dim=8)


def test_an_arm_that_leaves_no_key_out_is_not_measured():
    assert list(speed.settings([4, 16, 64], 16)) == ["dense", "dsa_4", "window_4"]


def test_held_out_text_repeats_itself_where_it_does_not_suffice():
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3]}]
    assert speed.held_out(rows, 7).tolist() == [[1, 2, 3, 1, 2, 3, 1]]


def test_each_arm_has_its_time_and_its_ratio_to_dense_attention(model):
    ids, config = torch.arange(33)[None] % 50, model.config.to_dict()
    found = speed.settings([8], 32)
    tables = [
        speed.prefill(model.eval(), ids[:, :32], found, 1),
        speed.decoding(model.eval(), ids, found, 1, 2),
        speed.training(model.train(), ids[:, :32], found, 1, bf16=False),
    ]
    for table in tables:
        assert table["length"] == 32 and set(table["arms"]) == {"dense", "dsa_8", "window_8"}
        for arm, ratio in table["ratio"].items():
            assert ratio == pytest.approx(table["arms"]["dense"]["ms"] / table["arms"][arm]["ms"], abs=2e-3)
        assert all(time["tokens_per_second"] > 0 for time in table["arms"].values())
    assert model.config.to_dict() == config
    assert all(p.grad is None for p in model.parameters())


def test_index_keys_are_counted_in_the_cache_of_dsa_alone(model):
    ids = torch.arange(20)[None]
    held = speed.decoding(model.eval(), ids, speed.settings([8], 19), 1, 1)["cache_bytes"]
    config = model.config
    layers, head_dim = config.num_hidden_layers, config.head_dim
    keys_and_values = layers * 2 * config.num_key_value_heads * head_dim * 4
    assert held["dsa_8"] - held["dense"] >= layers * config.index_head_dim * 4 * 19
    assert held["dense"] == held["window_8"] and held["dense"] >= 19 * keys_and_values
    assert speed.size(DynamicCache(config=config)) == 0
