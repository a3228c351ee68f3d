"""The CPU's indexer loss over selected keys: the reference's value and gradients, the same bits in every call."""

import pytest
import torch

from dsa import indexer_kl, kernels, reference
from dsa.kernels.cpu import loss
from dsa.masks import Slab, Visibility
from tests.conftest import error_ratio
from tests.test_losses import visibilities

SHAPES = [  # B, T, Hq, Hkv, D, H, DI, K
    (1, 1, 14, 2, 64, 4, 64, 1),
    (3, 37, 14, 2, 64, 4, 64, 5),
    (1, 300, 8, 2, 64, 2, 64, 131),
    (2, 37, 7, 1, 16, 1, 32, 37),  # every key
    (1, 20, 8, 8, 32, 3, 16, 9),
    (1, 20, 9, 3, 32, 16, 128, 9),  # three sets of key heads
    (1, 20, 34, 2, 16, 6, 16, 9),  # a group that needs two calls
    (1, 20, 4, 4, 128, 8, 128, 17),
]


def inputs(B, T, Hq, Hkv, D, H, DI, dtype=torch.float32):
    """Index tensors with gradients, q and k; all of them strided."""
    g = torch.Generator().manual_seed(0)
    index_q = torch.randn(B, H, T, DI, generator=g).transpose(1, 2)
    index_k = torch.randn(B, T, DI + 3, generator=g)[..., 3:]
    weights = torch.randn(B, H, T, generator=g).transpose(1, 2)
    q = torch.randn(B, T, Hq, D, generator=g).transpose(1, 2)
    k = torch.randn(B, Hkv, D, T, generator=g).transpose(2, 3)
    index = [x.to(dtype).requires_grad_() for x in (index_q, index_k)]
    return [*index, weights.requires_grad_()], q.to(dtype), k.to(dtype)


def selection(visible, B, K, seed=3):
    T = visible.length
    scores = torch.randn(B, T, T, generator=torch.Generator().manual_seed(seed))
    return reference.select_topk(scores, K, visible.mask(Slab(0, T, T), scores.device))


def check(index, q, k, visible, indices, tolerance=1e-6):
    """Against the reference in float64, times three: the gradient of what comes after is passed on."""
    wide = [x.detach().double().requires_grad_() for x in index]
    expected = reference.indexer_kl(*wide, q.double(), k.double(), 0.2, visible, indices)
    got = indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu")
    assert got.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    grads = torch.autograd.grad(got * 3, index)
    for mine, theirs, x in zip(grads, torch.autograd.grad(expected * 3, wide), index, strict=True):
        assert mine.dtype == x.dtype and mine.isfinite().all()
        assert error_ratio(mine, theirs) < 2 * tolerance or mine.norm() < 1e-5
    return got, grads


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_with_gradients(shape, march):
    B, T, *sizes, K = shape
    visible = Visibility(T, T)
    check(*inputs(B, T, *sizes), visible, selection(visible, B, K))


@pytest.mark.parametrize("case", list(visibilities(1, 20)))
def test_padding_and_packed_documents(case, march):
    visible = visibilities(2, 37)[case]
    check(*inputs(2, 37, 14, 2, 64, 4, 64), visible, selection(visible, 2, 5))


def test_a_whole_mask(march):
    explicit = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(2)) < 0.5
    visible = Visibility(37, 37, explicit=explicit & torch.ones(37, 37, dtype=torch.bool).tril())
    check(*inputs(2, 37, 14, 2, 64, 4, 64), visible, selection(visible, 2, 5))


@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_is_rounded_at_the_ends_only(mixed, march):
    """As under autocast, where a layer norm leaves float32 index keys beside bfloat16 queries."""
    visible = Visibility(37, 37)
    index, q, k = inputs(2, 37, 14, 2, 64, 4, 64, torch.bfloat16)
    if mixed:
        index[1] = index[1].detach().float().requires_grad_()
    got, _ = check(index, q, k, visible, selection(visible, 2, 9), 2e-3)
    expected = indexer_kl(*(x.float() for x in index), q.float(), k.float(), 0.2, visible, selection(visible, 2, 9))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_missing_keys(march):
    visible = Visibility(37, 37)
    indices = selection(visible, 2, 20)
    indices[:, 5] = -1  # a query without any key
    indices[:, 6, 1:] = -1  # with one
    indices[:, 30, ::2] = -1  # between the others
    indices[:, 31] = indices[:, 31].flip(-1)  # in any order
    _, (dq, _, dw) = check(*inputs(2, 37, 14, 2, 64, 4, 64), visible, indices)
    assert not dq[:, 5:7].any() and not dw[:, 5:7].any()


def test_one_key_has_zero_loss_and_zero_gradient(march):
    index, q, k = inputs(1, 1, 14, 2, 64, 4, 64)
    value = indexer_kl(*index, q, k, 0.2, Visibility(1, 1), torch.zeros(1, 1, 1, dtype=torch.int32), backend="cpu")
    assert value.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(value, index))


def test_nothing_valid_is_zero(march):
    index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
    visible = Visibility(9, 9, key_mask=torch.zeros(1, 9, dtype=torch.bool))
    value = indexer_kl(*index, q, k, 0.2, visible, torch.full((1, 9, 3), -1), backend="cpu")
    assert value.item() == 0 and not any(g.any() for g in torch.autograd.grad(value, index))


def test_a_target_of_zeros_and_large_scores(march):
    """0 log 0 is 0, and the softmaxes of both sides do not overflow."""
    visible = Visibility(37, 37)
    index, q, k = inputs(1, 37, 14, 2, 64, 4, 64)
    with torch.no_grad():
        index[0] *= 30
    check(index, q * 100, k, visible, selection(visible, 1, 20), 1e-5)


def test_nan_comes_out(march):
    visible = Visibility(9, 9)
    for which in range(2):
        index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
        with torch.no_grad():
            (index[0][0, 4, 2] if which else q[0, 3, 4])[:] = torch.nan
            assert indexer_kl(*index, q, k, 0.2, visible, selection(visible, 1, 3), backend="cpu").isnan()


def test_the_same_bits_on_every_number_of_threads(march):
    visible = Visibility(700, 700)
    (index, q, k), indices = inputs(2, 700, 8, 2, 16, 4, 32), selection(visible, 2, 30)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            value = indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu")
            runs.append([value, *torch.autograd.grad(value, index)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_without_gradients_the_same_value(march):
    visible = Visibility(37, 37)
    (index, q, k), indices = inputs(2, 37, 14, 2, 64, 4, 64), selection(visible, 2, 5)
    value = indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu")
    with torch.no_grad():
        assert torch.equal(indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu"), value)


def test_the_backbone_gets_no_gradient():
    index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
    q.requires_grad_(), k.requires_grad_()
    visible = Visibility(9, 9)
    indexer_kl(*index, q, k, 0.2, visible, selection(visible, 1, 3), backend="cpu").backward()
    assert q.grad is None and k.grad is None and all(x.grad is not None for x in index)


def test_it_is_chosen_for_selected_keys_and_says_what_it_cannot_run(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    calls, run = [], loss.kl_of_selected
    monkeypatch.setattr(loss, "kl_of_selected", lambda *args: calls.append(1) or run(*args))
    visible = Visibility(9, 9)
    index, q, k = inputs(1, 9, 4, 2, 16, 4, 32)
    indices = selection(visible, 1, 3)
    indexer_kl(*index, q, k, 0.2, visible)  # the warm-up
    indexer_kl(*index, q.double(), k.double(), 0.2, visible, indices)
    assert not calls
    indexer_kl(*index, q, k, 0.2, visible, indices)
    assert calls
    with pytest.raises(ValueError, match='backend "cpu" cannot run: it has no kernel'):
        indexer_kl(*index, q, k, 0.2, visible, backend="cpu")
    narrow = [index[0][..., :24], index[1][..., :24], index[2]]
    with pytest.raises(ValueError, match=r'backend "cpu" cannot run: .* 4 index heads of 24'):
        indexer_kl(*narrow, q, k, 0.2, visible, indices, backend="cpu")
    with pytest.raises(IndexError, match="9 of 9 keys"):
        indexer_kl(*index, q, k, 0.2, visible, torch.full_like(indices, 9), backend="cpu")
