"""The CPU's selection kernel: exactly what the reference selects, and for a query the same bits in every call."""

import pytest
import torch

from dsa import from_dense, reference
from dsa.indexer import IndexScores, pack_int8, quantize
from dsa.kernels.cpu import select
from dsa.masks import Slab, Visibility
from dsa.selector import select_topk
from tests.conftest import error_ratio

DTYPES = [torch.float32, torch.bfloat16, torch.int8]
TILE = 96


def integers(B, T, S, H, D, dtype, seed=0, high=3):
    """q, k and weights of whole numbers, so that every sum is exact and ties are many; and k as the kernel gets it."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randint(-high, high + 1, shape, generator=g).float() for shape in ((B, T, H, D), (B, S, D)))
    weights = torch.randint(-2, 3, (B, T, H), generator=g).float()
    if dtype != torch.int8:
        return (q.to(dtype), k.to(dtype), weights), k.to(dtype)
    scale = 2.0 ** torch.randint(-2, 3, (B, S, 1), generator=g)
    q[..., 0] = 127  # a scale of one: nothing is rounded
    return (q, k * scale, weights), torch.cat([k.to(dtype), scale.view(dtype)], dim=-1)


def reference_selection(q, k, weights, topk, visible):
    H, D = q.shape[2:]
    scores = reference.index_scores(q.double(), k.double(), weights.double()) * (H * D) ** 0.5
    mask = visible.mask(Slab(0, visible.length, visible.keys), q.device).expand_as(scores)
    keys = reference.select_topk(scores, topk, mask)
    return keys, scores.gather(2, keys.long().clamp(min=0)).masked_fill(keys < 0, 0).float()


HEADS = [(1, 16), (2, 64), (3, 32), (4, 64), (6, 128), (16, 16)]  # H, D: each is a compilation
SHAPES = [  # B, T, S, H, D, topk
    (1, 1, 1, 1, 16, 1),
    (1, 1, 1, 4, 64, 8),  # more than there are keys
    (3, 37, 37, 4, 64, 5),
    (1, 9, 700, 3, 32, 1),
    (2, 130, 300, 2, 64, 256),  # a chunk of a prefill
    (1, 97, 97, 16, 16, 97),  # every key
    (1, 5, 96, 16, 16, 40),  # S is one tile
    (1, 3, 193, 6, 128, 64),  # heads that are no multiple of four
    (3, 1, 5000, 4, 64, 100),  # decoding
    (1, 1, 20_000, 2, 64, 600),
    (1, 4, 6000, 1, 16, 100),  # lists that are cut back many times
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_whole_numbers_give_the_very_keys_and_scores_of_the_reference(shape, dtype, march):
    *sizes, topk = shape
    T, S = sizes[1:3]
    for high in (1, 3):
        (q, k, weights), rows = integers(*sizes, dtype, high=high)
        visible = Visibility(T, S, S - T)
        keys, scores = select.select(q, rows, weights, 1.0, topk, visible)
        expected = reference_selection(q, k, weights, topk, visible)
        assert keys.dtype == torch.int32
        assert torch.equal(keys, expected[0]) and torch.equal(scores, expected[1])
        assert torch.equal(select.select_keys(q, rows, weights, 1.0, topk, visible), keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,D", HEADS)
def test_scores_and_keys_of_real_numbers_are_the_references_up_to_rounding(H, D, dtype, march):
    g = torch.Generator().manual_seed(0)
    T, S, topk = 60, 400, 32
    q, k, weights = (torch.randn(*shape, generator=g) for shape in ((2, T, H, D), (2, S, D), (2, T, H)))
    rows, scale = k.to(dtype), (H * D) ** -0.5
    if dtype == torch.int8:
        rows = pack_int8(k)
        k = rows[..., :-4].float() * rows.view(torch.float32)[..., -1:]
    else:
        q, k = q.to(dtype), rows
    visible = Visibility(T, S, S - T)
    keys, scores = select.select(q, rows, weights, scale, topk, visible)
    if dtype == torch.int8:
        rounded, q_scale = quantize(q)
        q = rounded.float() * q_scale
    exact = reference.index_scores(q.double(), k.double(), weights.double())
    mask = visible.mask(Slab(0, T, S), q.device).expand_as(exact)
    best = exact.gather(2, reference.select_topk(exact, topk, mask).long())
    ours = exact.gather(2, keys.long())
    assert error_ratio(scores, ours) < 1e-6  # each score is that of its key
    assert error_ratio(ours.sort().values, best.sort().values) < 1e-6


def masks(B, T, S):
    """Every kind of mask that the kernel takes: name, mask."""
    left, right, holes = (torch.ones(B, S, dtype=torch.bool) for _ in range(3))
    left[0, : S // 2] = False
    left[-1, : S - 1] = False
    right[0, S // 3 :] = False
    right[-1] = False  # a row of padding
    holes[:, ::3] = False
    cut = S // 3 + 1
    documents = (torch.arange(S) >= cut).long() + (torch.arange(S) >= cut + 1).long()  # one of a single token
    return {
        "offset": Visibility(T, S, S - T),
        "static cache": Visibility(T, S, (S - T) // 2),  # slots behind the last query are not filled yet
        "left padding": Visibility(T, S, S - T, key_mask=left),
        "right padding": Visibility(T, S, S - T, key_mask=right),
        "one mask for all": Visibility(T, S, S - T, key_mask=holes[:1]),
        "documents": Visibility(S, S, 0, documents=documents[None]),
        "documents and padding": Visibility(S, S, 0, key_mask=right, documents=documents.expand(B, S)),
    }


@pytest.mark.parametrize("name", masks(1, 1, 1))
@pytest.mark.parametrize("T,S,topk", [(1, 300, 20), (30, 300, 20), (30, 300, 290), (20, 20, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_hidden_key_is_ever_selected(T, S, topk, name, dtype, march):
    visible = masks(3, T, S)[name]
    (q, k, weights), rows = integers(3, visible.length, S, 4, 64, dtype)
    keys, scores = select.select(q, rows, weights, 1.0, topk, visible)
    expected = reference_selection(q, k, weights, topk, visible)
    assert torch.equal(keys, expected[0]) and torch.equal(scores, expected[1])
    assert torch.equal(select.select_keys(q, rows, weights, 1.0, topk, visible), keys)


@pytest.mark.parametrize("T", [1, 20])
@pytest.mark.parametrize("kind", ["zeros", "rising", "falling", "infinite", "nan", "few"])
def test_scores_of_every_kind(kind, T, march):
    """One head of which one number is not zero, so that a key's number is its score."""
    S, topk = 3000, 50
    g = torch.Generator().manual_seed(0)
    values = torch.zeros(S)
    if kind in ("rising", "falling"):  # each key beats, or none beats, what came before
        values = torch.arange(S).float() * (1 if kind == "rising" else -1) + S
    if kind in ("infinite", "nan", "few"):
        values = torch.randint(0, 9, (S,), generator=g).float()
        values[torch.rand(S, generator=g) < 0.2] = torch.inf
    weights = torch.ones(1, T, 1)
    weights[:, ::2] = -1.0  # then many scores are -inf, which beat forbidden keys only
    if kind == "nan":
        values[torch.rand(S, generator=g) < 0.3] = torch.nan
    if kind == "few":
        values[:-3] = torch.nan
    q, k = torch.zeros(1, T, 1, 16), torch.zeros(1, S, 16)
    q[..., 5], k[..., 5] = 1.0, values
    visible = Visibility(T, S, S - T, key_mask=(torch.rand(1, S, generator=g) < 0.7))
    keys = select.select_keys(q, k, weights, 1.0, topk, visible)
    scores = reference.index_scores(q, k, weights)
    mask = visible.mask(Slab(0, T, S), q.device)
    assert torch.equal(keys, reference.select_topk(scores, topk, mask))


def real_numbers(B, T, S, H, D, dtype):
    g = torch.Generator().manual_seed(0)
    q, k, weights = (torch.randn(*shape, generator=g) for shape in ((B, T, H, D), (B, S, D), (B, T, H)))
    return (q, pack_int8(k), weights) if dtype == torch.int8 else (q.to(dtype), k.to(dtype), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H,D", HEADS[:4])
def test_a_querys_bits_depend_on_nothing_but_itself_and_its_keys(H, D, dtype, march):
    """Chunks of a prefill, rows of a batch and decoding select what the whole selects, although sums are rounded."""
    B, S, topk = 2, 450, 40
    q, k, weights = real_numbers(B, S, S, H, D, dtype)
    whole = select.select(q, k, weights, 0.1, topk, Visibility(S, S))

    def same(queries: slice, rows: slice = slice(None)):
        stop = queries.stop
        some = q[rows, queries], k[rows, :stop], weights[rows, queries]
        part = select.select(*some, 0.1, topk, Visibility(stop - queries.start, stop, queries.start))
        width = part[0].shape[2]
        assert all(torch.equal(a, b[rows, queries, :width]) for a, b in zip(part, whole, strict=True))

    for queries in (slice(0, 130), slice(130, 131), slice(131, 300), slice(300, S)):
        same(queries)
        same(queries, slice(1, 2))
    for t in (0, 1, 95, 96, 97, 449):
        same(slice(t, t + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B,T,S", [(1, 600, 600), (3, 1, 700), (1, 1, 700), (2, 1, 100)])
def test_the_same_bits_on_any_number_of_threads(B, T, S, dtype, monkeypatch, march):
    monkeypatch.setattr(select, "SPLIT", TILE)  # as many parts of one query's keys as threads
    monkeypatch.setattr(select, "ROWS", 50)
    args = *real_numbers(B, T, S, 4, 64, dtype), 0.1, 33, Visibility(T, S, S - T)
    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        results.append(select.select(*args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("T", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(T, dtype):
    """A cache with room to spare, of which the unused part is NaN; queries that are a view."""
    S = 150
    q, k, weights = real_numbers(2, T, S, 4, 64, dtype)
    room = torch.full((2, S + 70, k.shape[2]), torch.nan).to(dtype)[:, :S]
    room.copy_(k)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2), room, weights.transpose(1, 2).contiguous().transpose(1, 2)
    visible = Visibility(T, S, S - T)
    expected = select.select(q, k, weights, 0.1, 20, visible)
    for args in (turned, (q, k.transpose(1, 2).contiguous().transpose(1, 2), weights)):
        got = select.select(*args, 0.1, 20, visible)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 1), (2, 0), (0, 5)])
def test_nothing_to_select_for(shape):
    B, T = shape
    q, k, weights = torch.randn(B, T, 4, 64), torch.randn(B, 9, 64), torch.randn(B, T, 4)
    assert select.select_keys(q, k, weights, 1.0, 3, Visibility(T, 9, 9 - T)).shape == (B, T, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["offset", "left padding", "documents", "explicit"])
def test_deferred_scores_are_selected_alike_with_and_without_the_kernel(name, dtype, monkeypatch):
    """As the model asks; an explicit mask is what the kernel does not take."""
    T, S = 40, 130
    visible = masks(2, T, S).get(name) or Visibility(T, S, 0, explicit=torch.rand(2, 1, T, S) < 0.5)
    (q, k, weights), _ = integers(2, visible.length, S, 4, 64, torch.float32)
    index = q, pack_int8(k) if dtype == torch.int8 else k.to(dtype), weights
    calls = []
    kernel = select.select_keys
    monkeypatch.setattr(select, "select_keys", lambda *args: calls.append(1) or kernel(*args))
    keys = select_topk(IndexScores(*index, visible), 20)
    assert len(calls) == (name != "explicit")
    monkeypatch.setenv("DSA_BACKEND", "gather")
    slow = select_topk(IndexScores(*index, visible), 20)
    if dtype != torch.int8:  # whose scales round
        assert torch.equal(keys, slow)
    assert len(calls) == (name != "explicit")
    assert ((keys >= 0) == (slow >= 0)).all()


def test_topk_below_one_is_an_error_here_too():
    index = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 16), torch.randn(1, 3, 2)
    with pytest.raises(ValueError, match="topk"):
        select_topk(IndexScores(*index, Visibility(3, 3)), 0)


def test_the_model_selects_with_it(dense_model, ids, monkeypatch):
    """One call a layer, training or not, and the logits are those of the slow path."""
    model = from_dense(dense_model, topk=6, n_heads=2, head_dim=16)
    calls = []
    kernel = select.select_keys
    monkeypatch.setattr(select, "select_keys", lambda *args: calls.append(1) or kernel(*args))
    fast = model(ids, labels=ids)
    fast.loss.backward()
    assert len(calls) == model.config.num_hidden_layers
    monkeypatch.setenv("DSA_BACKEND", "gather")
    assert error_ratio(fast.logits, model(ids).logits) < 1e-5
