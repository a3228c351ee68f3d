"""The CPU's attention over each query's own keys: the reference, gradients too, and the same bits in every call."""

import pytest
import torch

from dsa import attention, kernels, reference, sparse_attention
from dsa.kernels.cpu import attend, build
from tests.conftest import error_ratio

SHAPES = [  # B, Hq, Hkv, T, S, D, K
    (1, 1, 1, 1, 1, 16, 1),
    (1, 14, 2, 1, 90, 64, 90),  # one query that wants gradients
    (3, 14, 2, 37, 37, 64, 5),
    (1, 8, 2, 70, 300, 64, 256),  # a chunk of a prefill; several blocks, the last one short
    (1, 7, 1, 9, 90, 32, 90),  # every key, a group of seven
    (2, 8, 8, 9, 40, 64, 33),  # no groups
    (1, 4, 1, 20, 50, 128, 17),
    (1, 32, 8, 9, 40, 16, 12),  # two sets of key heads
    (1, 9, 3, 9, 40, 32, 12),  # three
    (1, 20, 1, 9, 40, 32, 12),  # a group that needs two calls
    (1, 16, 4, 9, 40, 64, 12),
]


def inputs(B, Hq, Hkv, T, S, D, K, dtype=torch.float32):
    """q, k and v with gradients, all of them strided; causal indices of K columns."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, Hq, 2 * D, generator=g)[..., D:].transpose(1, 2)
    k = torch.randn(B, Hkv, D, S, generator=g).transpose(2, 3)  # not even the numbers of a head are neighbours
    v = torch.randn(B, Hkv, S + 7, D, generator=g)[:, :, :S]  # a cache with room to spare
    causal = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    indices = reference.select_topk(torch.randn(B, T, S, generator=g), K, causal[None])
    return *(x.to(dtype).requires_grad_() for x in (q, k, v)), indices


def check(q, k, v, indices, tolerance, scaling=0.3):
    """Against the reference in float64; returns the output and the gradients."""
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference.sparse_attention(*wide, indices, scaling)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    got = sparse_attention(q, k, v, indices, scaling, "cpu")
    assert got.dtype == q.dtype and got.shape == q.shape
    assert error_ratio(got, expected) < tolerance
    grads = torch.autograd.grad(got, (q, k, v), grad)
    for mine, theirs, x in zip(grads, torch.autograd.grad(expected, wide, grad.double()), (q, k, v), strict=True):
        assert mine.dtype == x.dtype and mine.isfinite().all()
        # over one key the gradients in q and k are zeros, but for rounding
        assert error_ratio(mine, theirs) < 2 * tolerance or mine.norm() < tolerance * wide[2].norm()
    return got, grads


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_in_outputs_and_gradients(shape, march):
    check(*inputs(*shape), 2e-6)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[5], SHAPES[7]])
def test_bfloat16_is_rounded_at_the_ends_only(shape, march):
    """Of inputs that are exact in bfloat16: an accumulator of that type would be off by more."""
    check(*inputs(*shape, torch.bfloat16), 4e-3)


@pytest.mark.parametrize("shape", [(2, 14, 2, 9, 50, 64, 30), (1, 8, 8, 9, 50, 32, 30)])
def test_missing_keys(shape, march):
    q, k, v, indices = inputs(*shape)
    indices[:, 2] = -1  # a query without any key
    indices[:, 3, 1:] = -1  # with one
    indices[:, 4, ::2] = -1  # between the others
    indices[:, 5, :20] = -1  # a whole vector of none
    indices[:, 6] = indices[:, 6].flip(-1)  # in any order
    got, (dq, _, _) = check(q, k, v, indices, 2e-6)
    assert not got[:, :, 2].any() and not dq[:, :, 2].any()


def test_no_query_selects_anything(march):
    q, k, v, indices = inputs(1, 14, 2, 9, 50, 64, 30)
    got = sparse_attention(q, k, v, torch.full_like(indices, -1), 0.3, "cpu")
    assert not got.any() and not any(g.any() for g in torch.autograd.grad(got.sum(), (q, k, v)))


def test_keys_that_nobody_selected_are_not_read(march):
    q, k, v, indices = inputs(1, 14, 2, 9, 50, 64, 12)
    unread = torch.ones(50, dtype=torch.bool)
    unread[indices[indices >= 0].long()] = False
    assert unread.any()
    poisoned = [x.detach().masked_fill(unread[:, None], torch.nan).requires_grad_() for x in (k, v)]
    got = sparse_attention(q, *poisoned, indices, 0.3, "cpu")
    assert torch.equal(got, sparse_attention(q, k, v, indices, 0.3, "cpu"))
    _, dk, dv = torch.autograd.grad(got.sum(), (q, *poisoned))
    assert not dk[:, :, unread].any() and not dv[:, :, unread].any()


def test_nan_comes_out_where_it_went_in(march):
    """A softmax that picks the larger of two numbers may lose it, and a training run goes on with nonsense."""
    q, k, v, indices = inputs(1, 14, 2, 9, 50, 64, 12)
    with torch.no_grad():
        q[0, 3, 4] = torch.nan
        got = sparse_attention(q, k, v, indices, 0.3, "cpu")
    assert got[0, 3, 4].isnan().all()
    got[0, 3, 4] = 0
    assert got.isfinite().all()


def test_large_logits_do_not_overflow(march):
    q, k, v, indices = inputs(1, 8, 2, 9, 150, 64, 140)
    with torch.no_grad():
        q *= 50
    check(q, k, v, indices, 1e-4)


def test_long_rows_go_by_ranges_of_keys(march):
    """More keys than a range, and queries that have none in some."""
    B, Hq, Hkv, T, S, D, K = 1, 4, 2, 70, 5000, 16, 200
    q, k, v, indices = inputs(B, Hq, Hkv, T, S, D, K)
    indices[:, 1] = torch.arange(K) + 4000
    indices[:, 2] = torch.arange(K) + 1900  # over a border
    check(q, k, v, indices, 2e-6)


@pytest.mark.parametrize("shape", [(1, 14, 2, 1100, 1100, 64, 32), (2, 32, 8, 300, 300, 16, 20)])
def test_the_same_bits_on_every_number_of_threads(shape, march):
    q, k, v, indices = inputs(*shape)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = sparse_attention(q, k, v, indices, 0.3, "cpu")
            runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_a_querys_bits_do_not_depend_on_its_neighbours(march):
    """Chunked prefill equals the whole row."""
    q, k, v, indices = inputs(1, 14, 2, 300, 300, 64, 40)
    with torch.no_grad():
        whole = sparse_attention(q, k, v, indices, 0.3, "cpu")
        part = sparse_attention(q[:, :, 37:105], k, v, indices[:, 37:105], 0.3, "cpu")
    assert torch.equal(whole[:, :, 37:105], part)


def test_nothing_of_size_queries_times_keys_is_saved():
    saved = []
    q, k, v, indices = inputs(1, 4, 2, 512, 512, 16, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        sparse_attention(q, k, v, indices, backend="cpu")
    assert max(saved) <= q.numel() < 512 * 512


def test_an_index_beyond_the_last_key_is_an_error():
    q, k, v, indices = inputs(1, 4, 2, 9, 9, 16, 3)
    indices[0, 4, 0] = 9
    with pytest.raises(IndexError, match="9 of 9 keys"):
        sparse_attention(q, k, v, indices, backend="cpu")


def test_what_it_cannot_run_is_said_or_left_to_others():
    q, k, v, indices = inputs(1, 4, 2, 9, 9, 16, 3)
    with pytest.raises(ValueError, match=r'backend "cpu" cannot run: torch\.float64'):
        sparse_attention(q.double(), k.double(), v.double(), indices, backend="cpu")
    wide = [torch.nn.functional.pad(x, (0, 8)) for x in (q, k, v)]
    with pytest.raises(ValueError, match="head size 24"):
        sparse_attention(*wide, indices, backend="cpu")
    with pytest.raises(ValueError, match='backend "cpu" cannot run'):
        sparse_attention(q, k, v.double(), indices, backend="cpu")
    assert sparse_attention(*wide, indices).shape == (1, 4, 9, 24)


@pytest.mark.parametrize(
    "T, S, dtype, backend",
    [(64, 64, torch.float32, "cpu"), (64, 64, torch.float16, "gather"), (2, 2000, torch.float32, "gather")],
)
def test_it_is_chosen_where_it_pays(T, S, dtype, backend, monkeypatch):
    """Few queries of a long row: all keys would be packed for them."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    chosen = []
    monkeypatch.setattr(attention, "log_backend", lambda name, device: chosen.append(name))
    sparse_attention(*inputs(1, 4, 2, T, S, 16, 8, dtype))
    assert chosen == [backend]


def test_a_wrong_kernel_stops_the_program(monkeypatch):
    from dsa.kernels import check

    run = attend.sparse_attention_cpu
    monkeypatch.setattr(attend, "sparse_attention_cpu", lambda *args: run(*args) * 1.01)
    check.verify_cpu.cache_clear()
    with pytest.raises(RuntimeError, match=r"sparse attention kernel .* is off by 1\.0e-02 .*DSA_BACKEND=gather"):
        sparse_attention(*inputs(1, 4, 2, 9, 9, 16, 3))
    check.verify_cpu.cache_clear()


def test_without_a_compiler_gather_runs(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(build, "obstacle", lambda *args, **defines: "no compiler")
    monkeypatch.setattr(attend, "sparse_attention_cpu", None)
    q, k, v, indices = inputs(1, 4, 2, 9, 9, 16, 3)
    expected = reference.sparse_attention(q, k, v, indices, 0.3)
    assert error_ratio(sparse_attention(q, k, v, indices, 0.3), expected) < 1e-6
