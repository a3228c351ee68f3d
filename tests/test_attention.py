import logging

import pytest
import torch
import torch.nn.functional as F

from dsa import attention, masks, select_topk, sparse_attention
from tests.conftest import error_ratio

SHAPES = [  # B, Hq, Hkv, T, S, D, K
    (1, 1, 1, 1, 1, 8, 1),
    (2, 6, 2, 1, 37, 16, 5),
    (2, 6, 2, 37, 37, 16, 5),
    (1, 14, 2, 70, 70, 64, 16),
    (2, 4, 4, 9, 9, 32, 9),
    (1, 4, 1, 33, 65, 8, 64),
]


def inputs(B, Hq, Hkv, T, S, D, K, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, D, generator=g).to(dtype) for h, n in ((Hq, T), (Hkv, S), (Hkv, S)))
    mask = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    indices = select_topk(torch.randn(B, T, S, generator=g), K, mask[None])
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), indices


def loop(q, k, v, indices, scaling):
    """Every head of every query on its own, in float64."""
    B, Hq, T, _ = q.shape
    group = Hq // k.shape[1]
    out = torch.zeros_like(q, dtype=torch.float64)
    for b in range(B):
        for h in range(Hq):
            for t in range(T):
                chosen = indices[b, t][indices[b, t] >= 0].long()
                if len(chosen):
                    keys, values = k[b, h // group, chosen].double(), v[b, h // group, chosen].double()
                    out[b, h, t] = (keys @ q[b, h, t].double() * scaling).softmax(-1) @ values
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_loops(shape):
    q, k, v, indices = inputs(*shape)
    got = sparse_attention(q, k, v, indices, backend="reference")
    assert error_ratio(got, loop(q, k, v, indices, shape[5] ** -0.5)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 256])
def test_gather_equals_the_reference_in_outputs_and_gradients(shape, rows, monkeypatch):
    monkeypatch.setattr(attention, "GATHER_ROWS", rows)  # borders of slabs inside the sequence
    q, k, v, indices = inputs(*shape)
    if shape[3] > 4:
        indices[:, 2] = -1  # a query without any key
        indices[:, 3, 1:] = -1  # with one
    grad = torch.randn_like(q)
    expected = sparse_attention(q, k, v, indices, scaling=0.3, backend="reference")
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    got = sparse_attention(q, k, v, indices, scaling=0.3, backend="gather")
    got_grads = torch.autograd.grad(got, (q, k, v), grad)
    assert error_ratio(got, expected) < 2e-6
    for mine, reference in zip(got_grads, expected_grads, strict=True):
        assert mine.isfinite().all()
        # of a single key softmax has no gradient, and what is left is rounding
        assert error_ratio(mine, reference) < 2e-5 or (not reference.any() and mine.abs().max() < 1e-6)
    if shape[3] > 4:
        assert not got[:, :, 2].any() and not got_grads[0][:, :, 2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("shape", [(2, 6, 2, 37, 37, 16, 5), (1, 14, 2, 70, 70, 64, 16), (1, 4, 1, 33, 65, 8, 1)])
def test_each_querys_own_keys_give_the_reference_too(shape, rows, dtype, monkeypatch):
    calls = []
    own_attention = attention.own_attention
    monkeypatch.setattr(attention, "own_attention", lambda *args: calls.append(1) or own_attention(*args))
    monkeypatch.setattr(attention, "OWN_LENGTH", 0)
    monkeypatch.setattr(attention, "OWN_UNION", 1)
    monkeypatch.setattr(attention, "OWN_ROWS", rows)
    q, k, v, indices = inputs(*shape, dtype=dtype)
    indices[:, 2] = -1  # a query without any key
    indices[:, 3, 1:] = -1  # with one
    expected = sparse_attention(q, k, v, indices, scaling=0.3, backend="reference")
    learned = sparse_attention(q, k, v, indices, scaling=0.3, backend="gather")
    assert not calls and learned.requires_grad  # the backward is that of the union
    with torch.no_grad():
        unread = torch.ones(shape[0], shape[4], dtype=torch.bool)
        for b in range(shape[0]):
            unread[b, indices[b][indices[b] >= 0].long()] = False
        unread[:, 0] = False  # stands in for no key, and is masked
        q, k, v = q.detach(), *(x.masked_fill(unread[:, None, :, None], torch.nan) for x in (k, v))
        got = sparse_attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, indices, 0.3, "gather")
    assert calls and got.dtype == dtype and not got[:, :, 2].any()
    assert error_ratio(got, expected) < (2e-6 if dtype == torch.float32 else 1e-2)


def test_rows_of_up_to_4096_tokens_keep_the_union(monkeypatch):
    """What the stages train and evaluate must not change in a single bit with the machine's way to prefill."""
    monkeypatch.setattr(attention, "own_attention", None)
    q, k, v = (torch.zeros(1, 1, n, 8) for n in (64, 4096, 4096))
    indices = torch.randint(4096, (1, 64, 64), generator=torch.Generator().manual_seed(0))
    assert not sparse_attention(q, k, v, indices, backend="gather").any()


def test_low_precision_stays_close_to_the_reference():
    q, k, v, indices = inputs(1, 6, 2, 50, 50, 32, 12, torch.bfloat16)
    got = sparse_attention(q, k, v, indices, backend="gather")
    assert got.dtype == torch.bfloat16
    assert error_ratio(got, sparse_attention(q, k, v, indices, backend="reference")) < 1e-2


def test_gather_takes_heads_whose_numbers_are_no_neighbours():
    q, k, v, indices = inputs(2, 6, 2, 37, 37, 16, 5)
    expected = sparse_attention(q, k, v, indices, backend="reference")
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    got = sparse_attention(*strided, indices, backend="gather")
    assert error_ratio(got, expected) < 2e-6
    grads = torch.autograd.grad(got.square().sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        assert error_ratio(mine, theirs) < 2e-5


def test_with_every_key_it_is_dense_attention():
    q, k, v, indices = inputs(2, 6, 2, 40, 40, 16, 40)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for backend in ("reference", "gather"):
        assert error_ratio(sparse_attention(q, k, v, indices, backend=backend), expected) < 1e-6


def test_same_bits_on_every_call():
    q, k, v, indices = inputs(1, 14, 2, 200, 200, 64, 32)
    runs = [torch.autograd.grad(sparse_attention(q, k, v, indices).sum(), (q, k, v)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_nothing_of_size_queries_times_keys_is_saved_for_backward():
    saved = []
    q, k, v, indices = inputs(1, 4, 2, 512, 512, 16, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        sparse_attention(q, k, v, indices)
    assert max(saved) <= q.numel() < 512 * 512


@pytest.mark.parametrize("device_backend", ["flash", "", "Gather"])
def test_an_unknown_backend_is_an_error(device_backend):
    q, k, v, indices = inputs(*SHAPES[1])
    with pytest.raises(ValueError, match="backend"):
        sparse_attention(q, k, v, indices, backend=device_backend)


def test_shapes_that_do_not_fit_are_an_error():
    q, k, v, indices = inputs(*SHAPES[2])
    with pytest.raises(ValueError, match="do not fit"):
        sparse_attention(q, k[:, :, :, :8], v, indices)
    with pytest.raises(ValueError, match="do not fit"):
        sparse_attention(q, k, v, indices[:, :3])


def test_the_backend_is_logged_once(caplog):
    attention.log_backend.cache_clear()
    q, k, v, indices = inputs(*SHAPES[1])
    with caplog.at_level(logging.INFO, logger="dsa.attention"):
        sparse_attention(q, k, v, indices)
        sparse_attention(q, k, v, indices)
    assert [r.getMessage() for r in caplog.records] == ["sparse attention: backend gather on cpu"]


def test_membership():
    indices = torch.tensor([[[0, 2, -1], [-1, -1, -1]]])
    assert masks.membership(indices, 4).tolist() == [[[True, False, True, False], [False] * 4]]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 2, 1, 37, 16, 5), (1, 14, 2, 1, 300, 64, 64), (2, 1, 1, 1, 1, 8, 1)])
def test_decoding_reads_the_selected_rows_and_equals_the_reference(shape, contiguous):
    q, k, v, indices = inputs(*shape)
    with torch.no_grad():
        if not contiguous:  # a cache with room to spare hands out views
            k, v = (torch.cat([x, torch.full_like(x, torch.nan)], dim=2)[:, :, : shape[4]] for x in (k, v))
        indices[0, 0, -2:] = -1  # none left where K = 1
        unread = torch.ones(shape[0], shape[4], dtype=torch.bool)
        for b in range(shape[0]):
            unread[b, indices[b, 0][indices[b, 0] >= 0].long()] = False
        k, v = (x.masked_fill(unread[:, None, :, None], torch.nan) for x in (k, v)) if contiguous else (k, v)
        got = sparse_attention(q, k, v, indices)
        clean = (x.nan_to_num() for x in (k, v))
        expected = sparse_attention(q, *clean, indices, backend="reference")
        assert got.isfinite().all() and error_ratio(got, expected) < 2e-6


def test_the_machines_choice_of_backend_is_checked(monkeypatch):
    q, k, v, indices = inputs(1, 2, 2, 4, 4, 8, 2)
    monkeypatch.setenv("DSA_BACKEND", "cuda")
    with pytest.raises(ValueError, match="DSA_BACKEND: 'cuda' is neither triton nor gather"):
        sparse_attention(q, k, v, indices)
    monkeypatch.setenv("DSA_BACKEND", "gather")
    assert sparse_attention(q, k, v, indices).shape == q.shape
