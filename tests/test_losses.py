import pytest
import torch

from dsa import indexer_kl, select_topk
from dsa.masks import Visibility
from tests.conftest import error_ratio


def inputs(B=2, T=37, Hq=6, Hkv=2, D=16, H=4, DI=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = [torch.randn(*s, generator=g) for s in ((B, T, H, DI), (B, T, DI), (B, T, H))]
    q, k = torch.randn(B, Hq, T, D, generator=g), torch.randn(B, Hkv, T, D, generator=g)
    return [x.requires_grad_() for x in index], q.requires_grad_(), k.requires_grad_()


def visibilities(B, T):
    right = torch.ones(B, T, dtype=torch.bool)
    right[0, T - 9 :] = False
    documents = torch.arange(T).expand(B, -1) // 11
    left = right.flip(1)
    return {
        "whole": Visibility(T, T),
        "right padding": Visibility(T, T, key_mask=right),
        "left padding": Visibility(T, T, key_mask=left),
        "an all-padding row": Visibility(T, T, key_mask=torch.arange(B)[:, None].expand(B, T) > 0),
        "packed": Visibility(T, T, documents=documents),
    }


def float64_kl(index, q, k, scaling, visible, indices):
    """Query by query, head by head, key by key."""
    index_q, index_k, weights = (x.detach().double() for x in index)
    q, k = q.detach().double(), k.detach().double()
    B, Hq, T, _ = q.shape
    group, H, DI = Hq // k.shape[1], *index_q.shape[2:]
    total, count = 0.0, 0
    for b in range(B):
        for t in range(T):
            if visible.key_mask is not None and not visible.key_mask[b, t]:
                continue
            count += 1
            keys = [
                s
                for s in range(t + 1)
                if (visible.key_mask is None or visible.key_mask[b, s])
                and (visible.documents is None or visible.documents[b, s] == visible.documents[b, t])
                and (indices is None or s in indices[b, t].tolist())
            ]
            p = torch.zeros(len(keys), dtype=torch.float64)
            for h in range(Hq):
                p += (k[b, h // group, keys] @ q[b, h, t] * scaling).softmax(-1)
            p /= p.sum()  # the paper's L1 norm of the head sum
            scores = sum(weights[b, t, j] * (index_k[b, keys] @ index_q[b, t, j]).relu() for j in range(H))
            log_q = (scores * DI**-0.5 * H**-0.5).log_softmax(-1)
            total += (p * (p.log() - log_q)).sum().item()
    return total / max(count, 1)


@pytest.mark.parametrize("case", list(visibilities(1, 20)))
@pytest.mark.parametrize("topk", [None, 1, 5, 100])
def test_equals_a_float64_loop_and_the_reference_with_gradients(case, topk):
    index, q, k = inputs()
    visible = visibilities(2, 37)[case]
    indices = None
    if topk:
        (slab,) = visible.slabs(2, 6)
        scores = torch.randn(2, 37, 37, generator=torch.Generator().manual_seed(3))
        indices = select_topk(scores, topk, visible.mask(slab, scores.device))
    loss = indexer_kl(*index, q, k, 0.25, visible, indices)
    assert loss.item() == pytest.approx(float64_kl(index, q, k, 0.25, visible, indices), rel=2e-5, abs=2e-6)
    reference = indexer_kl(*index, q, k, 0.25, visible, indices, backend="reference")
    assert loss.item() == pytest.approx(reference.item(), rel=2e-5, abs=2e-6)
    got = torch.autograd.grad(loss * 3, index)
    expected = torch.autograd.grad(reference * 3, index)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.isfinite().all()
        assert error_ratio(mine, theirs) < 2e-5 or theirs.norm() < 1e-5


def test_slabs_change_nothing(monkeypatch):
    index, q, k = inputs(T=100)
    whole = indexer_kl(*index, q, k, 0.25, Visibility(100, 100))
    whole_grads = torch.autograd.grad(whole, index)
    monkeypatch.setattr("dsa.masks.SLAB_ELEMENTS", 1)
    slabs = indexer_kl(*index, q, k, 0.25, Visibility(100, 100))
    assert slabs.item() == pytest.approx(whole.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(slabs, index), whole_grads, strict=True):
        assert error_ratio(a, b) < 1e-5


def test_zero_for_equal_distributions():
    T, D = 12, 8
    x, y = torch.rand(1, T, D), torch.rand(1, T, D)  # positive: ReLU passes every product
    loss = indexer_kl(x[:, :, None], y, torch.ones(1, T, 1), x[:, None], y[:, None], D**-0.5, Visibility(T, T))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_one_key_has_zero_loss_and_zero_gradient():
    index, q, k = inputs(B=1, T=1)
    loss = indexer_kl(*index, q, k, 0.25, Visibility(1, 1))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, index))


def test_the_backbone_gets_no_gradient():
    index, q, k = inputs()
    indexer_kl(*index, q, k, 0.25, Visibility(37, 37)).backward()
    assert q.grad is None and k.grad is None


def test_padding_is_no_position():
    """Appending padding to a row changes neither the loss nor the gradients."""
    index, q, k = inputs(B=1, T=20)
    loss = indexer_kl(*index, q, k, 0.25, Visibility(20, 20))
    grads = torch.autograd.grad(loss, index)
    padded = [torch.cat([x, torch.randn_like(x)], 1).detach().requires_grad_() for x in index]
    q2, k2 = torch.cat([q, torch.randn_like(q)], 2), torch.cat([k, torch.randn_like(k)], 2)
    visible = Visibility(40, 40, key_mask=(torch.arange(40) < 20)[None])
    again = indexer_kl(*padded, q2, k2, 0.25, visible)
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(again, padded), grads, strict=True):
        assert error_ratio(a[:, :20], b) < 1e-6
        assert not a[:, 20:].any()


def test_the_target_is_normalised_over_the_selected_keys():
    """A selected-set loss must not see the mass that attention would put elsewhere."""
    index, q, k = inputs(B=1, T=30)
    indices = select_topk(torch.randn(1, 30, 30), 4, torch.ones(30, 30, dtype=torch.bool).tril()[None])
    loss = indexer_kl(*index, q, k, 0.25, Visibility(30, 30), indices)
    far = k.detach().clone()
    unused = [s for s in range(30) if not (indices[0, 29] == s).any()]
    far[:, :, unused] += 5.0
    last = Visibility(30, 30, explicit=torch.zeros(1, 1, 30, 30, dtype=torch.bool))
    last.explicit[0, 0, 29] = True  # look at the last query alone
    only = torch.full_like(indices, -1)
    only[0, 29] = indices[0, 29]
    a = indexer_kl(*index, q, k, 0.25, last, only)
    b = indexer_kl(*index, q, far, 0.25, last, only)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert loss.isfinite()


def test_packed_documents_do_not_leak():
    index, q, k = inputs(B=1, T=24)
    documents = (torch.arange(24) >= 10).long()[None]
    packed = indexer_kl(*index, q, k, 0.25, Visibility(24, 24, documents=documents))
    parts = 0.0
    for part in (slice(0, 10), slice(10, 24)):
        n = part.stop - part.start
        one = [x[:, part] for x in index]
        parts += n * indexer_kl(*one, q[:, :, part], k[:, :, part], 0.25, Visibility(n, n)).item()
    assert packed.item() == pytest.approx(parts / 24, rel=1e-5)
