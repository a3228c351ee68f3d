"""The indexers as a file of their own, beside a base that nothing changes."""

import pytest
import torch
from safetensors.torch import save_file

from dsa import adapter, from_dense, load_indexer, save_indexer
from dsa.training.trainer import freeze
from tests.conftest import small_model

TINY = {"n_heads": 4, "head_dim": 8}


@pytest.fixture
def warm(dense_model, ids):
    """A model after a few steps of warm-up."""
    model = from_dense(dense_model, topk=6, **TINY, attention_mode="dense", index_rope_dim=8).train()
    freeze(model, backbone=True, indexer=False)
    optimizer = torch.optim.Adam(model.indexer_parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, output_indexer_kl=True).indexer_kl.sum().backward()
        optimizer.step()
    model.config.attention_mode = "sparse"
    return model.eval()


def test_a_warmed_up_model_is_its_base_and_the_file(dense_model, warm, ids, tmp_path):
    save_indexer(warm, tmp_path / "indexer.safetensors")
    dense_model.save_pretrained(tmp_path / "base")
    for base in (dense_model, tmp_path / "base"):
        model = load_indexer(base, tmp_path / "indexer.safetensors").eval()
        assert torch.equal(model(ids).logits, warm(ids).logits)
        assert all(getattr(model.config, name) == getattr(warm.config, name) for name in adapter.FIELDS)
        for name, weight in dense_model.state_dict().items():
            assert torch.equal(model.state_dict()[name], weight), name
    assert sum(p.numel() for p in model.indexer_parameters()) * 4 < (tmp_path / "indexer.safetensors").stat().st_size
    assert (tmp_path / "indexer.safetensors").stat().st_size < 30_000  # 3 layers of 2,128 numbers, and their names


def test_switched_off_it_is_the_base_and_switched_on_it_selects(dense_model, warm, ids, tmp_path):
    save_indexer(warm, tmp_path / "indexer")
    model = load_indexer(dense_model, tmp_path / "indexer")
    expected, sparse = dense_model(ids).logits, model(ids).logits
    model.config.attention_mode = "dense"
    assert torch.equal(model(ids).logits, expected) and not torch.equal(sparse, expected)
    model.config.attention_mode = "sparse"
    assert torch.equal(model(ids).logits, sparse)


def test_what_was_saved_can_be_changed_at_loading(dense_model, warm, tmp_path):
    save_indexer(warm, tmp_path / "indexer")
    model = load_indexer(dense_model, tmp_path / "indexer", index_topk=9)
    assert (model.config.index_topk, model.config.index_n_heads, model.config.index_rope_dim) == (9, 4, 8)


def test_a_bfloat16_base_keeps_its_type(dense_model, warm, tmp_path):
    save_indexer(warm, tmp_path / "indexer")
    model = load_indexer(dense_model.bfloat16(), tmp_path / "indexer")
    indexer = model.model.layers[0].self_attn.indexer
    assert indexer.wq.weight.dtype == torch.bfloat16 and indexer.weights_proj.weight.dtype == torch.float32


def test_what_does_not_fit_is_refused_in_one_line(dense_model, warm, tmp_path):
    path = tmp_path / "indexer"
    save_indexer(warm, path)
    with pytest.raises(ValueError, match=r"no file of save_indexer \(.*nothing"):
        load_indexer(dense_model, tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no file of save_indexer"):
        load_indexer(dense_model, tmp_path / "other")
    with pytest.raises(ValueError, match="is for qwen2_dsa, the base is llama_dsa"):
        load_indexer(small_model("llama"), path)
    with pytest.raises(ValueError, match=r"layers\.0\..*k_norm\.bias is \(8,\) in .*, and \(16,\) for this base"):
        load_indexer(dense_model, path, index_head_dim=16)
    with pytest.raises(ValueError, match=r"layers\.2\..* is \(8,\) in .*, and None for this base"):
        load_indexer(small_model(num_hidden_layers=2), path)
    with pytest.raises(ValueError, match="no indexer"):
        save_indexer(from_dense(dense_model, topk=3, n_heads=0, head_dim=8, selector="window"), path)
