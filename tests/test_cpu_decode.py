"""Decoding on a CPU: attention of one query over the selected rows of a cache, and both kernels behind `generate`."""

import pytest
import torch

from dsa import attention, from_dense, reference, sparse_attention
from dsa.kernels.cpu import decode, select
from tests.conftest import error_ratio

SHAPES = [  # B, Hq, Hkv, S, D, K
    (1, 1, 1, 1, 16, 1),
    (1, 14, 2, 3000, 64, 1100),  # Qwen2.5-0.5B: three shares of the selected keys
    (3, 6, 2, 37, 32, 5),
    (2, 8, 8, 600, 64, 512),  # a share to the last key
    (1, 20, 1, 700, 128, 513),  # and one more; more heads on a key head than are done at once
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def inputs(B, Hq, Hkv, S, D, K, dtype, room=9):
    """A cache with room to spare, all of which that is not selected is NaN."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, Hq, 1, D, generator=g).to(dtype)
    indices = torch.stack([torch.randperm(S, generator=g)[:K].sort().values for _ in range(B)])[:, None].int()
    k, v = (torch.full((B, Hkv, S + room, D), torch.nan).to(dtype)[:, :, :S] for _ in range(2))
    for b in range(B):
        for x in (k, v):
            x[b, :, indices[b, 0].long()] = torch.randn(Hkv, K, D, generator=g).to(dtype)
    return q, k, v, indices


def expected(q, k, v, indices, scaling):
    return reference.sparse_attention(q.double(), *(x.nan_to_num().double() for x in (k, v)), indices, scaling)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_reads_the_selected_rows_and_equals_the_reference(shape, dtype, march):
    q, k, v, indices = inputs(*shape, dtype)
    got = decode.decode_attention(q, k, v, indices, 0.2)
    assert got.dtype == dtype and got.isfinite().all()
    assert error_ratio(got, expected(q, k, v, indices, 0.2)) < TOLERANCE[dtype]
    for turned in (k.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(decode.decode_attention(q, turned, v, indices, 0.2), got)


@pytest.mark.parametrize("absent", ["last", "first", "some", "all"])
def test_absent_keys_are_left_out_wherever_they_stand(absent, march):
    q, k, v, indices = inputs(2, 6, 2, 1500, 32, 1200, torch.float32)
    gone = torch.zeros(1200, dtype=torch.bool)
    gone[{"last": slice(7, None), "first": slice(0, 700), "some": slice(0, None, 3), "all": slice(0, None)}[absent]] = (
        True
    )
    indices[0, 0, gone] = -1
    got = decode.decode_attention(q, k, v, indices, 0.2)
    assert error_ratio(got, expected(q, k, v, indices, 0.2)) < 2e-6
    if absent == "all":
        assert not got[0].any()


def test_large_logits_do_not_overflow(march):
    q, k, v, indices = inputs(1, 4, 2, 700, 64, 600, torch.float32)
    got = decode.decode_attention(100 * q, k, v, indices, 1.0)
    assert got.isfinite().all()
    assert error_ratio(got, expected(100 * q, k, v, indices, 1.0)) < 1e-4  # of logits of some thousands


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_any_number_of_threads(shape, dtype, monkeypatch):
    args = *inputs(*shape, dtype), 0.2
    monkeypatch.setattr(decode, "SPLIT", 1)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(decode.decode_attention(*args))
    assert all(torch.equal(other, results[0]) for other in results)


def test_an_index_beyond_the_last_key_is_an_error():
    q, k, v, indices = inputs(1, 4, 2, 30, 64, 5, torch.float32)
    indices[0, 0, 2] = 30
    with pytest.raises(IndexError, match="30 of 30 keys"):
        decode.decode_attention(q, k, v, indices, 1.0)


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "cpu"),
        ({"dtype": torch.float16}, "gather"),
        ({"D": 24}, "gather"),
        ({"mixed": True}, "gather"),
        ({"gradient": True}, None),  # not the kernel without gradient
    ],
)
def test_what_the_kernel_cannot_do_falls_back(change, backend, monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "log_backend", lambda name, device: seen.append(name))
    calls = []
    kernel = decode.decode_attention
    monkeypatch.setattr(decode, "decode_attention", lambda *args: calls.append(1) or kernel(*args))
    D, dtype = change.get("D", 64), change.get("dtype", torch.float32)
    q, k, v, indices = inputs(1, 4, 2, 30, D, 5, dtype, room=0)
    k, v = k.nan_to_num(), v.nan_to_num()
    if "mixed" in change:
        q = q.bfloat16()
        with pytest.raises(RuntimeError):  # PyTorch's own error
            sparse_attention(q, k, v, indices)
    else:
        q.requires_grad_("gradient" in change)
        sparse_attention(q, k, v, indices)
    assert bool(calls) == (backend == "cpu") and (backend is None or seen == [backend])


@pytest.mark.parametrize("key_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_it_is_generation_without(dense_model, ids, dtype, key_dtype, monkeypatch):
    """Rows of different lengths, padded on the left. Sums are rounded otherwise, which moves no token."""
    model = from_dense(dense_model, topk=8, n_heads=2, head_dim=16).to(dtype).eval()
    model.config.index_key_dtype = key_dtype
    mask = torch.ones_like(ids)
    mask[0, :17] = 0

    def generate():
        return model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)

    fast = generate()  # and the comparison of the first use
    calls = []
    for module, name in ((select, "select_keys"), (decode, "decode_attention")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=kernel, name=name: calls.append(name) or f(*args))
    assert torch.equal(generate(), fast)
    layers = model.config.num_hidden_layers
    assert calls.count("select_keys") == 12 * layers and calls.count("decode_attention") == 11 * layers
    monkeypatch.setenv("DSA_BACKEND", "gather")
    slow = generate()
    assert len(calls) == 23 * layers
    if dtype == torch.float32:
        assert torch.equal(fast, slow)


def test_decoding_selects_what_the_whole_forward_selects(dense_model, ids, monkeypatch):
    """The first layer's inputs are the same bits in both, so its selections must be the same keys, ties and all."""
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=16).eval()
    found = []
    kernel = select.select_keys
    monkeypatch.setattr(select, "select_keys", lambda *args: found.append(kernel(*args)) or found[-1])
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        model(ids)
        cache = None
        for t in range(ids.shape[1]):
            cache = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
    whole, steps = found[0], found[layers::layers]
    for t, step in enumerate(steps):
        assert torch.equal(step[:, 0], whole[:, t, : step.shape[2]]), t
