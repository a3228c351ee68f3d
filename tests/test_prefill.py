import torch

from benchmarks import prefill
from dsa import from_dense, index_scores, select_topk


def test_overlap_counts_keys():
    same = torch.arange(5).expand(16, 5)
    assert prefill.overlap(same) == {"neighbour": 1.0, "union_of_16": 1.0}
    apart = torch.arange(32 * 3).view(32, 3)
    assert prefill.overlap(apart) == {"neighbour": 0.0, "union_of_16": 16.0}


def test_the_text_read_in_chunks_gives_the_selections_of_one_forward(dense_model, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 8)
    monkeypatch.setattr(prefill, "BLOCK", 4)
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=16).eval()
    ids = torch.randint(model.config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        found = prefill.read(model, ids, [16, 24])
        whole = prefill.Indices()
        model.model(torch.tensor([ids[:16]]), use_cache=False, observer=whole)
    assert sorted(found) == [16, 24]
    for i, (q, k, weights, indices) in enumerate(found[16]):
        assert torch.equal(indices, whole.layers[i][3][:, -4:])
        mask = torch.arange(16) <= torch.arange(12, 16)[:, None]
        assert torch.equal(indices, select_topk(index_scores(q, k, weights), model.config.index_topk, mask[None]))
