"""The Triton kernels against the slow references: outputs, and every gradient.

Without a GPU the tests run in Triton's interpreter. Triton reads TRITON_INTERPRET at its first import, and in a test
session transformers imports it first; so `test_in_the_interpreter` runs this file again, in a process of its own, and
here the kernels are only compiled, for a Hopper GPU, which finds what the interpreter forgives.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch

from dsa import index_scores, indexer_kl, kernels, reference, select_topk, sparse_attention
from dsa.masks import Slab, Visibility, membership
from tests.conftest import error_ratio

triton = pytest.importorskip("triton")

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RUNS = GPU or kernels.interpreted()
needs_kernels = pytest.mark.skipif(not RUNS, reason="runs in test_in_the_interpreter's process")
needs_compiler = pytest.mark.skipif(RUNS, reason="the kernels are interpreted, or run on this GPU")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.mark.slow
@needs_compiler
def test_in_the_interpreter():
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # its products are tiny
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=os.environ | settings, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks and chunks in shapes that the interpreter can bear."""
    from dsa.kernels.triton import attention, dense_kl, inverse, sparse_kl

    monkeypatch.setattr(attention, "BLOCK_K", 16)
    monkeypatch.setattr(sparse_kl, "BLOCK_K", 16)
    monkeypatch.setattr(dense_kl, "BLOCK_S", 16)
    monkeypatch.setattr(inverse, "CHUNK", 8)


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """By relative error; where zero is expected, as for a softmax over one key, by size."""
    assert mine.isfinite().all()
    if theirs.norm() < 1e-6:
        assert mine.norm() < 1e-5
    else:
        assert error_ratio(mine, theirs) < tolerance


# Sparse attention

SHAPES = [  # B, Hq, Hkv, T, S, D, K
    (1, 1, 1, 1, 1, 32, 1),
    (2, 7, 1, 1, 37, 64, 20),
    (1, 14, 2, 5, 19, 64, 16),
    (1, 4, 2, 9, 9, 16, 9),
    (2, 2, 2, 5, 13, 128, 6),
    (1, 6, 1, 6, 7, 32, 11),
]


def attention_inputs(B, Hq, Hkv, T, S, D, K, dtype=torch.float32):
    """Non-contiguous q, k and v, and indices of K columns, the last ones -1 where K exceeds S."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, T, Hq, 2 * D, generator=g)[..., D:].transpose(1, 2)
    k = torch.randn(B, Hkv, D, S, generator=g).transpose(2, 3)
    v = torch.randn(B, S, Hkv, D, generator=g).transpose(1, 2)
    causal = torch.arange(S) <= torch.arange(T)[:, None] + S - T
    indices = select_topk(torch.randn(B, T, S, generator=g), K, causal[None])
    indices = torch.nn.functional.pad(indices, (0, K - indices.shape[2]), value=-1).to(DEVICE)
    return *(x.to(DEVICE, dtype).requires_grad_() for x in (q, k, v)), indices


def check_forward(q, k, v, indices, tolerance, scaling=0.3):
    """Outputs and LSE; returns the output and float64 twins of the inputs with their output."""
    from dsa.kernels.triton.attention import sparse_attention_triton

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference.sparse_attention(*wide, indices, scaling)
    out, lse = sparse_attention_triton(q, k, v, indices, scaling)
    assert out.dtype == q.dtype
    assert error_ratio(out, expected) < tolerance
    logits = (wide[0] @ wide[1].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)) * scaling
    logits = logits.masked_fill(~membership(indices, k.shape[2])[:, None], -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1).float(), rtol=tolerance, atol=tolerance)
    return out, wide, expected


def check_attention(q, k, v, indices, tolerance):
    """Outputs, LSE and gradients; returns the outputs and the gradients."""
    out, wide, expected = check_forward(q, k, v, indices, tolerance)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grads = torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))
    for mine, theirs in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert_close(mine, theirs, 3 * tolerance)
    return out, grads


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_equals_the_reference(shape, small_blocks):
    q, k, v, indices = attention_inputs(*shape)
    if shape[3] > 4:
        indices[:, 2] = -1  # a query without any key
        indices[:, 3, 1:] = -1  # with one
        indices[:, 4, ::2] = -1  # with gaps
    out, grads = check_attention(q, k, v, indices, TOLERANCE[q.dtype])
    if shape[3] > 4:
        assert not out[:, :, 2].any() and not grads[0][:, :, 2].any()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)])
def test_attention_in_low_precision(dtype):
    check_attention(*attention_inputs(1, 14, 2, 5, 21, 64, 16, dtype), TOLERANCE[dtype])


@needs_kernels
def test_with_every_key_it_is_dense_attention():
    q, k, v, indices = attention_inputs(1, 4, 2, 9, 9, 16, 9)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert error_ratio(sparse_attention(q, k, v, indices, backend="triton"), expected) < 1e-5


@needs_kernels
def test_equal_keys_get_equal_weight():
    q, k, v, indices = attention_inputs(1, 2, 1, 4, 20, 16, 8)
    k = k[:, :, :1].expand(-1, -1, 20, -1)  # strides of zero, and ties everywhere
    out = sparse_attention(q, k, v, indices, backend="triton")
    expected = v[0, 0][indices[0].long()].mean(1)
    assert error_ratio(out[0, 0], expected) < 1e-5


@needs_kernels
def test_a_key_that_every_query_selects(small_blocks):
    """An attention sink: its list of queries is several chunks long, the other keys' lists are short or empty."""
    q, k, v, _ = attention_inputs(1, 2, 1, 19, 19, 16, 2)
    indices = torch.stack([torch.zeros(19), torch.arange(19) // 5 * 5], -1).int()[None].to(DEVICE)
    indices[0, :5, 1] = -1
    check_attention(q, k, v, indices, 1e-5)


@needs_kernels
def test_same_bits_on_every_call(small_blocks):
    q, k, v, indices = attention_inputs(1, 6, 2, 3, 11, 32, 8)
    runs = []
    for _ in range(2):
        out = sparse_attention(q, k, v, indices, backend="triton")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_kernels
def test_decoding_splits_the_keys_over_programs(small_blocks, monkeypatch):
    from dsa.kernels.triton import decode

    merges = []
    merge = decode.merge
    monkeypatch.setattr(
        "dsa.kernels.triton.attention.merge", lambda out, *args: merges.append(len(out)) or merge(out, *args)
    )
    q, k, v, indices = attention_inputs(3, 14, 2, 1, 150, 64, 130)
    indices[1] = -1  # a row without any key
    indices[2, :, 40:] = -1  # whole parts without any
    check_forward(q, k, v, indices, 1e-5)
    assert merges == [9]  # blocks of 16 keys
    monkeypatch.setattr(decode, "TARGET_PROGRAMS", 1)
    check_forward(q, k, v, indices, 1e-5)
    assert merges == [9]


@needs_kernels
def test_gradients_through_split_keys(small_blocks):
    check_attention(*attention_inputs(1, 2, 1, 1, 40, 16, 33), 1e-5)


@needs_kernels
def test_keys_after_a_whole_block_of_none(small_blocks, monkeypatch):
    monkeypatch.setattr("dsa.kernels.triton.decode.TARGET_PROGRAMS", 1)
    q, k, v, indices = attention_inputs(1, 2, 1, 1, 40, 16, 33)
    indices[:, :, :16] = -1
    check_attention(q, k, v, indices, 1e-5)


@needs_kernels
def test_offsets_are_64_bit(monkeypatch):
    """Keys 2^30 elements apart; of the 4 GiB between them no page is touched, unless the interpreter copies its
    arguments back, which does nothing for CPU tensors but takes its time."""
    if not GPU:
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *args: None)
    q, k, v, indices = attention_inputs(1, 2, 1, 1, 3, 16, 3, torch.float16)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided(
        (1, 1, 3, 16), (2**31, 2**31, 2**30, 1)
    )
    far.copy_(k.detach())
    near = sparse_attention(q, k, v, indices, backend="triton")
    out = sparse_attention(q, far.requires_grad_(), v, indices, backend="triton")
    assert torch.equal(out, near)
    assert torch.equal(torch.autograd.grad(out.sum(), far)[0], torch.autograd.grad(near.sum(), k)[0])


@needs_kernels
def test_nothing_of_size_queries_times_keys_is_saved_for_backward():
    saved = []
    q, k, v, indices = attention_inputs(1, 2, 1, 24, 64, 16, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        sparse_attention(q, k, v, indices, backend="triton")
    assert max(saved) <= max(q.numel(), k.numel()) < 24 * 64


def test_the_inverse_index_lists_the_queries_of_each_key(monkeypatch):
    from dsa.kernels.triton import inverse

    monkeypatch.setattr(inverse, "CHUNK", 3)
    indices = torch.tensor(
        [[[0, 2, -1], [0, 1, 2], [0, 2, 4], [0, 2, 4]], [[-1] * 3, [0, -1, -1], [4, 3, -1], [-1] * 3]]
    )
    entries, entry_start, chunk_start, chunk_key = (x.tolist() for x in inverse.invert(indices, 6).pointers)
    for b in range(2):
        for s in range(6):
            mine = entries[b][entry_start[b][s] : entry_start[b][s + 1]]
            assert mine == (indices[b].flatten() == s).nonzero().flatten().tolist()
            assert chunk_key[b].count(s) == chunk_start[b][s + 1] - chunk_start[b][s] == -(-len(mine) // 3)
        assert chunk_key[b] == sorted(chunk_key[b])  # unused slots, of key 6, are the last


# Index scores


def index_inputs(B, T, S, H, D, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, T, D, generator=g).transpose(1, 2)
    k = torch.randn(B, D, S, generator=g).transpose(1, 2)
    w = torch.randn(B, H, T, generator=g).transpose(1, 2)
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), w.to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 16), (2, 5, 70, 8, 32), (1, 65, 9, 3, 48), (1, 70, 130, 4, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)])
def test_index_scores_equal_the_formula(shape, dtype):
    from dsa.kernels.triton.indexer import index_scores_triton

    q, k, w = index_inputs(*shape, dtype)
    dots = torch.einsum("bthd,bsd->bths", q.double(), k.double()).relu()
    expected = torch.einsum("bth,bths->bts", w.double(), dots) * (shape[3] * shape[4]) ** -0.5
    got = index_scores_triton(q, k, w)
    assert got.dtype == torch.float32
    assert error_ratio(got, expected) < 1e-5
    assert error_ratio(index_scores(q, k, w.contiguous()), expected) < 1e-5


@needs_kernels
@pytest.mark.parametrize("offset", [0, 20, 300])
def test_index_scores_of_the_future_are_minus_infinity(offset):
    from dsa.kernels.triton.indexer import index_scores_triton

    q, k, w = index_inputs(1, 70, 200, 2, 16)
    seen = (torch.arange(200) <= torch.arange(70)[:, None] + offset).to(DEVICE)[None]
    got = index_scores_triton(q, k, w, offset)
    assert torch.equal(got == -torch.inf, ~seen)
    assert torch.equal(got[seen], index_scores_triton(q, k, w)[seen])


@needs_kernels
def test_index_scores_lose_no_gradient_silently():
    from dsa.kernels.triton.indexer import index_scores_triton

    q, k, w = index_inputs(1, 3, 3, 1, 16)
    with pytest.raises(ValueError, match="no gradient"):
        index_scores_triton(q.requires_grad_(), k, w)


# The indexer's loss


def kl_inputs(B=2, T=21, S=None, Hq=6, Hkv=2, D=16, H=3, DI=24, dtype=torch.float32):
    S = S or T
    index = [x.requires_grad_() for x in index_inputs(B, T, S, H, DI, dtype)]
    g = torch.Generator().manual_seed(1)
    q = torch.randn(B, T, Hq, D, generator=g).transpose(1, 2).to(DEVICE, dtype)
    k = torch.randn(B, S, Hkv, D, generator=g).transpose(1, 2).to(DEVICE, dtype)
    return index, q, k


def kl_case(case, B=2, T=21):
    padding = torch.arange(T, device=DEVICE) < torch.tensor([[T * 2 // 3]] + [[T]] * (B - 1), device=DEVICE)
    documents = (torch.arange(T, device=DEVICE) // (T // 3 + 1)).expand(B, -1)
    return {
        "whole": Visibility(T, T),
        "left padding": Visibility(T, T, key_mask=padding.flip(1)),
        "right padding": Visibility(T, T, key_mask=padding),
        "an all-padding row": Visibility(T, T, key_mask=torch.arange(B, device=DEVICE)[:, None].expand(B, T) > 0),
        "packed": Visibility(T, T, documents=documents),
        "packed, ids in any order": Visibility(T, T, documents=2 - documents, key_mask=padding),
        "chunked prefill": Visibility(5, T, offset=T - 5, key_mask=padding.flip(1)),
        "empty cache slots": Visibility(5, T, offset=3),
    }[case]


CASES = ["whole", "left padding", "an all-padding row", "chunked prefill"]
MASKS = ["right padding", "packed", "packed, ids in any order", "empty cache slots"]  # the indices have them applied


def check_kl(index, q, k, visible, topk, tolerance, scaling=0.25):
    indices = None
    if topk:
        (B, T), S = q.shape[::2][:2], k.shape[2]
        scores = torch.randn(B, T, S, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        indices = select_topk(scores, topk, visible.mask(Slab(0, T, S), q.device))
    wide = [x.detach().float().contiguous().requires_grad_() for x in index]
    expected = reference.indexer_kl(*wide, q.double(), k.double(), scaling, visible, indices)
    expected_grads = torch.autograd.grad(expected * 3, wide)
    loss = indexer_kl(*index, q, k, scaling, visible, indices, backend="triton")
    grads = torch.autograd.grad(loss * 3, index)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance / 10)
    for mine, theirs, x in zip(grads, expected_grads, index, strict=True):
        assert mine.dtype == x.dtype
        assert_close(mine, theirs, 3 * tolerance)
    return loss, grads


@needs_kernels
@pytest.mark.parametrize("case", CASES + MASKS)
def test_kl_over_visible_keys_equals_the_reference(case, small_blocks):
    visible = kl_case(case)
    check_kl(*kl_inputs(T=visible.length, S=visible.keys), visible, None, 1e-5)


@needs_kernels
@pytest.mark.parametrize("case", CASES)
def test_kl_over_selected_keys_equals_the_reference(case, small_blocks):
    visible = kl_case(case, T=9)
    check_kl(*kl_inputs(T=visible.length, S=visible.keys), visible, 4, 1e-5)


@needs_kernels
@pytest.mark.parametrize("topk", [None, 30])
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"T": 11, "Hq": 14, "D": 64, "H": 4, "DI": 64},
        {"T": 5, "Hq": 2, "D": 128, "H": 1, "DI": 16},
        {"T": 5, "Hq": 7, "Hkv": 1, "D": 32, "H": 8, "DI": 128},
    ],
)
def test_kl_of_many_sizes(sizes, topk):
    index, q, k = kl_inputs(B=1, **sizes)
    loss, grads = check_kl(index, q, k, Visibility(sizes["T"], sizes["T"]), topk, 1e-5)
    if sizes["T"] == 1:  # one key: nothing to learn
        assert loss.item() == pytest.approx(0, abs=1e-6) and all(g.abs().max() < 1e-6 for g in grads)


@needs_kernels
@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=needs_gpu)])
def test_kl_in_low_precision(dtype, topk):
    check_kl(*kl_inputs(B=1, T=9, dtype=dtype), Visibility(9, 9), topk, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("topk", [None, 5])
def test_kl_on_the_plateau_of_relu(topk):
    """All scores tie at exactly zero: the loss is defined, and no gradient passes a ReLU that is at its corner."""
    index, q, k = kl_inputs(B=1, T=9)
    index[1] = torch.zeros_like(index[1]).requires_grad_()
    loss, grads = check_kl(index, q, k, Visibility(9, 9), topk, 1e-5)
    assert loss > 0 and not any(g.any() for g in grads)


@needs_kernels
@pytest.mark.parametrize("T,topk", [(21, None), (9, 4)])
def test_kl_has_the_same_bits_on_every_call(T, topk, small_blocks):
    index, q, k = kl_inputs(B=1, T=T)
    runs = [check_kl(index, q, k, Visibility(T, T), topk, 1e-5) for _ in range(2)]
    (a, grads_a), (b, grads_b) = runs
    assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(grads_a, grads_b, strict=True))


@needs_kernels
@pytest.mark.parametrize("topk", [None, 4])
def test_padding_is_no_position(topk):
    """Appending padding, whatever it holds, changes neither the loss nor the gradients."""
    index, q, k = kl_inputs(B=1, T=10)
    loss, grads = check_kl(index, q, k, Visibility(10, 10), topk, 1e-5)
    padded = [torch.cat([x, 9 * torch.randn_like(x)], 1).detach().requires_grad_() for x in index]
    q, k = (torch.cat([x, 9 * torch.randn_like(x)], 2) for x in (q, k))
    visible = Visibility(20, 20, key_mask=(torch.arange(20, device=DEVICE) < 10)[None])
    indices = None
    if topk:
        scores = torch.randn(1, 10, 10, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        scores = torch.nn.functional.pad(scores, (0, 10, 0, 10))
        indices = select_topk(scores, topk, visible.mask(Slab(0, 20, 20), q.device))
    again = indexer_kl(*padded, q, k, 0.25, visible, indices, backend="triton")
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    for mine, before in zip(torch.autograd.grad(again * 3, padded), grads, strict=True):
        assert error_ratio(mine[:, :10], before) < 1e-6
        assert not mine[:, 10:].any()


@needs_kernels
def test_the_backbone_gets_no_gradient():
    index, q, k = kl_inputs(B=1, T=3)
    indexer_kl(*index, q.requires_grad_(), k.requires_grad_(), 0.25, Visibility(3, 3), backend="triton").backward()
    assert q.grad is None and k.grad is None and all(x.grad is not None for x in index)


@needs_kernels
def test_index_keys_that_a_layer_norm_left_in_float32():
    """As under autocast: the types differ, and the kernels do not round to the narrower one."""
    index, q, k = kl_inputs(B=1, T=5)
    mixed = [index[0].detach().half().requires_grad_(), *index[1:]]
    check_kl(mixed, q, k, Visibility(5, 5), None, 1e-3)


@needs_kernels
def test_an_explicit_mask_is_an_error():
    index, q, k = kl_inputs(B=1, T=3)
    explicit = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match="explicit"):
        indexer_kl(*index, q, k, 0.25, Visibility(3, 3, explicit=explicit), backend="triton")


# Where the kernels run


def test_a_forced_backend_runs_or_says_why_not():
    q, k, v, indices = (x.cpu() for x in attention_inputs(1, 2, 1, 3, 3, 16, 2))
    with pytest.raises(ValueError, match="head size 24"):
        wide = [torch.nn.functional.pad(x, (0, 8)) for x in (q, k, v)]
        sparse_attention(*wide, indices, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        sparse_attention(q.double(), k.double(), v.double(), indices, backend="triton")
    if kernels.interpreted():
        with pytest.raises(ValueError, match="bfloat16"):
            sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), indices, backend="triton")
    else:
        with pytest.raises(ValueError, match="not on cpu"):
            sparse_attention(q, k, v, indices, backend="triton")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_first_use_on_a_device_compares_with_the_references(dtype, monkeypatch):
    """Forced by the variable, as it is by a CUDA device; a wrong kernel stops the program with what to set."""
    from dsa.kernels import check

    device = torch.device("cuda" if GPU else "cpu")
    monkeypatch.setenv("DSA_BACKEND", "triton")
    check.verify.cache_clear()
    x = torch.zeros(1, device=device, dtype=dtype)
    with torch.no_grad():  # as in selection and evaluation
        assert kernels.chosen(x, 32) == "triton"
    check.verify.cache_clear()
    with torch.inference_mode():
        assert kernels.chosen(x, 32) == "triton"
    check.verify.cache_clear()
    monkeypatch.setattr(check, "_scores", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match=r"index scores kernel .* is off by 5\.0e-01 .*DSA_BACKEND=gather"):
        kernels.chosen(x, 32)
    monkeypatch.setattr(check, "_scores", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"index scores kernel .* does not run"):
        kernels.chosen(x, 32)
    check.verify.cache_clear()


def test_without_triton_the_reason_is_its_absence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernels.obstacle.cache_clear()
    assert "not installed" in kernels.obstacle(torch.device("cuda"), torch.float16, 64)
    kernels.obstacle.cache_clear()


@pytest.mark.parametrize("backend", ["gather", pytest.param("triton", marks=needs_kernels)])
def test_the_choice_for_scores_and_loss_is_logged_once(backend, monkeypatch, caplog):
    monkeypatch.setenv("DSA_BACKEND", backend)
    kernels.log_choice.cache_clear()
    index, q, k = kl_inputs(B=1, T=3)
    with caplog.at_level(logging.INFO, logger="dsa.kernels"), torch.no_grad():
        for _ in range(2):
            index_scores(*index)
            indexer_kl(*index, q, k, 0.25, Visibility(3, 3))
    choice = "Triton kernels" if backend == "triton" else "PyTorch"
    expected = [f"{operation}: {choice} on {DEVICE}" for operation in ("index scores", "indexer loss")]
    assert [record.getMessage() for record in caplog.records] == expected


@needs_gpu
def test_cuda_tensors_take_the_kernels_unless_they_cannot(monkeypatch):
    chosen = []
    monkeypatch.setattr("dsa.attention.log_backend", lambda backend, device: chosen.append(backend))
    for D in (32, 24):
        q, k, v, indices = attention_inputs(1, 2, 1, 3, 3, D, 2)
        sparse_attention(q, k, v, indices)
    assert chosen == ["triton", "gather"]


@needs_compiler
def test_every_kernel_compiles_for_hopper(monkeypatch, tmp_path):
    """Launches at Qwen2.5-0.5B's geometry go to the compiler only, tensors on the CPU standing for those on a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from dsa.kernels.triton.attention import sparse_attention_triton
    from dsa.kernels.triton.indexer import index_scores_triton

    class Hopper:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    compiled = set()
    launch = JITFunction.run

    def compile_only(self, *args, warmup, **kwargs):
        compiled.add(self.fn.__qualname__ + " " + self.fn.__module__)
        kernel = launch(self, *args, warmup=True, **kwargs)
        assert kernel.metadata.shared <= 227 * 1024  # bytes that a program can have
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for module in ("attention", "indexer", "losses"):
        monkeypatch.setattr(f"dsa.kernels.triton.{module}.require", lambda tensor, head_dim: None)
    monkeypatch.setattr(driver, "_active", Hopper())
    q, k, v, indices = attention_inputs(1, 14, 2, 40, 40, 64, 16, torch.bfloat16)
    sparse_attention_triton(q, k, v, indices, 0.125)[0].sum().backward()
    wide = indices[:, :1].repeat(1, 1, 16)
    sparse_attention_triton(q[:, :, :1], k, v, wide, 0.125)
    index = index_inputs(1, 40, 40, 4, 64, torch.bfloat16)
    index_scores_triton(*index, offset=0)
    index = [x.requires_grad_() for x in index]
    for chosen in (None, indices):
        indexer_kl(*index, q, k, 0.125, Visibility(40, 40), chosen, backend="triton").backward()
    assert len(compiled) == 13
