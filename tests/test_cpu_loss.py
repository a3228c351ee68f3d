"""The CPU's indexer loss over selected keys or all: the reference's value and gradients, the same bits always."""

import pytest
import torch

from dsa import indexer_kl, kernels, reference
from dsa.kernels.cpu import loss, warmup
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
    (1, 1, 14, 2, 64, 4, 64, None),  # all keys, as in the warm-up
    (2, 95, 14, 2, 64, 4, 64, None),
    (1, 192, 8, 8, 32, 3, 16, None),  # two tiles of keys and no key more
    (1, 193, 8, 2, 64, 2, 64, None),
    (2, 37, 7, 1, 16, 1, 32, None),
    (1, 98, 34, 2, 16, 6, 128, None),  # a group whose logits are made in three turns
    (1, 20, 4, 4, 128, 16, 128, None),
]
ALL = None  # as K


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
    """K random keys of each query, or None for all."""
    if K is ALL:
        return None
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
@pytest.mark.parametrize("T,K", [(37, 5), (37, ALL), (210, ALL)])
def test_padding_and_packed_documents(case, T, K, march):
    visible = visibilities(2, T)[case]
    check(*inputs(2, T, 14, 2, 64, 4, 64), visible, selection(visible, 2, K))


@pytest.mark.parametrize("S,padding", [(38, 0), (300, 0), (300, 110)])
def test_queries_behind_other_keys(S, padding, march):
    """A chunk of a row, which may begin with padding."""
    T = 37
    index, q, k = inputs(1, S, 14, 2, 64, 4, 64)
    index = [x.detach()[:, -T:].requires_grad_() if i != 1 else x for i, x in enumerate(index)]
    key_mask = torch.arange(S)[None] >= padding if padding else None
    check(index, q[:, :, -T:], k, Visibility(T, S, S - T, key_mask), None)


def test_a_whole_mask(march):
    explicit = torch.rand(2, 1, 37, 37, generator=torch.Generator().manual_seed(2)) < 0.5
    visible = Visibility(37, 37, explicit=explicit & torch.ones(37, 37, dtype=torch.bool).tril())
    check(*inputs(2, 37, 14, 2, 64, 4, 64), visible, selection(visible, 2, 5))


@pytest.mark.parametrize("K", [9, ALL])
@pytest.mark.parametrize("mixed", [False, True])
def test_bfloat16_is_rounded_at_the_ends_only(mixed, K, march):
    """As under autocast, where a layer norm leaves float32 index keys beside bfloat16 queries."""
    visible = Visibility(37, 37)
    index, q, k = inputs(2, 37, 14, 2, 64, 4, 64, torch.bfloat16)
    if mixed:
        index[1] = index[1].detach().float().requires_grad_()
    indices = selection(visible, 2, K)
    got, _ = check(index, q, k, visible, indices, 2e-3)
    expected = indexer_kl(*(x.float() for x in index), q.float(), k.float(), 0.2, visible, indices)
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


@pytest.mark.parametrize("K", [1, ALL])
def test_one_key_has_zero_loss_and_zero_gradient(K, march):
    index, q, k = inputs(1, 1, 14, 2, 64, 4, 64)
    visible = Visibility(1, 1)
    value = indexer_kl(*index, q, k, 0.2, visible, selection(visible, 1, K), backend="cpu")
    assert value.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(value, index))


@pytest.mark.parametrize("indices", [torch.full((1, 9, 3), -1), None], ids=["selected", "all"])
def test_nothing_valid_is_zero(indices, march):
    index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
    visible = Visibility(9, 9, key_mask=torch.zeros(1, 9, dtype=torch.bool))
    value = indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu")
    assert value.item() == 0 and not any(g.any() for g in torch.autograd.grad(value, index))


@pytest.mark.parametrize("K", [20, ALL])
def test_a_target_of_zeros_and_large_scores(K, march):
    """0 log 0 is 0, and the softmaxes of both sides do not overflow."""
    visible = Visibility(37, 37)
    index, q, k = inputs(1, 37, 14, 2, 64, 4, 64)
    with torch.no_grad():
        index[0] *= 30
    check(index, q * 100, k, visible, selection(visible, 1, K), 1e-5)


@pytest.mark.parametrize("K", [3, ALL])
def test_nan_comes_out(K, march):
    visible = Visibility(9, 9)
    for which in range(2):
        index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
        with torch.no_grad():
            (index[0][0, 4, 2] if which else q[0, 3, 4])[:] = torch.nan
            assert indexer_kl(*index, q, k, 0.2, visible, selection(visible, 1, K), backend="cpu").isnan()


def test_nan_at_padding_stays_there(march):
    """Of all keys the loss reads tiles, padding and what comes later with them; none of it counts."""
    real = torch.arange(30)[None] >= 11
    index, q, k = inputs(1, 30, 14, 2, 64, 4, 64)
    k = k.masked_fill(~real[:, None, :, None], torch.nan)
    visible = Visibility(30, 30, key_mask=real)
    value = indexer_kl(*index, q, k, 0.2, visible, backend="cpu")
    expected = indexer_kl(*index, q, k.nan_to_num(), 0.2, visible, backend="cpu")
    assert value.isfinite() and torch.equal(value, expected)


@pytest.mark.parametrize("K", [30, ALL])
def test_the_same_bits_on_every_number_of_threads(K, march):
    visible = Visibility(700, 700)
    (index, q, k), indices = inputs(2, 700, 8, 2, 16, 4, 32), selection(visible, 2, K)
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


@pytest.mark.parametrize("K", [5, ALL])
def test_without_gradients_the_same_value(K, march):
    visible = Visibility(37, 37)
    (index, q, k), indices = inputs(2, 37, 14, 2, 64, 4, 64), selection(visible, 2, K)
    value = indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu")
    with torch.no_grad():
        assert torch.equal(indexer_kl(*index, q, k, 0.2, visible, indices, backend="cpu"), value)


def test_the_backbone_gets_no_gradient():
    index, q, k = inputs(1, 9, 14, 2, 64, 4, 64)
    q.requires_grad_(), k.requires_grad_()
    visible = Visibility(9, 9)
    indexer_kl(*index, q, k, 0.2, visible, selection(visible, 1, 3), backend="cpu").backward()
    assert q.grad is None and k.grad is None and all(x.grad is not None for x in index)


@pytest.mark.parametrize("module,name,K", [(loss, "kl_of_selected", 3), (warmup, "kl_of_all", ALL)])
def test_it_is_chosen_and_says_what_it_cannot_run(module, name, K, monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    calls, run = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(1) or run(*args))
    visible = Visibility(9, 9)
    index, q, k = inputs(1, 9, 4, 2, 16, 4, 32)
    indices = selection(visible, 1, K)
    indexer_kl(*index, q.double(), k.double(), 0.2, visible, indices)
    assert not calls
    indexer_kl(*index, q, k, 0.2, visible, indices)
    assert calls
    narrow = [index[0][..., :24], index[1][..., :24], index[2]]
    with pytest.raises(ValueError, match=r'backend "cpu" cannot run: .* 4 index heads of 24'):
        indexer_kl(*narrow, q, k, 0.2, visible, indices, backend="cpu")


def test_all_keys_of_a_whole_mask_are_left_to_slabs():
    visible = Visibility(9, 9, explicit=torch.ones(9, 9, dtype=torch.bool).tril()[None, None])
    index, q, k = inputs(1, 9, 4, 2, 16, 4, 32)
    with pytest.raises(ValueError, match='backend "cpu" cannot run: it has no kernel'):
        indexer_kl(*index, q, k, 0.2, visible, backend="cpu")
    whole, causal = (indexer_kl(*index, q, k, 0.2, v).item() for v in (visible, Visibility(9, 9)))
    assert whole == pytest.approx(causal, rel=1e-6)


def test_an_index_beyond_the_last_key_is_an_error():
    index, q, k = inputs(1, 9, 4, 2, 16, 4, 32)
    with pytest.raises(IndexError, match="9 of 9 keys"):
        indexer_kl(*index, q, k, 0.2, Visibility(9, 9), torch.full((1, 9, 3), 9), backend="cpu")
