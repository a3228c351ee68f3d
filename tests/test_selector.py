import pytest
import torch

from dsa import reference, select_topk
from dsa.selector import STRIDE, control_scores, latest_keys


def naive(scores, topk, mask):
    """Sort (score descending, index ascending) in Python, row by row."""
    B, T, S = scores.shape
    k = min(topk, S)
    out = torch.full((B, T, k), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            allowed = [s for s in range(S) if mask[b, t, s]]
            best = sorted(sorted(allowed, key=lambda s: (-scores[b, t, s].item(), s))[:k])
            out[b, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


@pytest.mark.parametrize("T,S,topk", [(1, 1, 1), (1, 17, 4), (5, 17, 17), (5, 17, 40), (9, 33, 1), (16, 64, 8)])
@pytest.mark.parametrize("kind", ["normal", "ties", "plateau", "infinite"])
def test_equals_a_sort(T, S, topk, kind):
    g = torch.Generator().manual_seed(T * 100 + S)
    scores = torch.randn(2, T, S, generator=g)
    if kind == "ties":
        scores = (scores * 2).round() / 2
    if kind == "plateau":  # ReLU makes exact zeros, of both signs
        scores = scores.relu() * torch.where(torch.rand(2, T, S, generator=g) < 0.5, -1.0, 1.0)
    if kind == "infinite":
        scores[torch.rand(2, T, S, generator=g) < 0.3] = -torch.inf
        scores[torch.rand(2, T, S, generator=g) < 0.1] = torch.inf
    mask = torch.rand(2, T, S, generator=g) < 0.7
    mask[0, 0] = False  # a row without any key
    mask[1, -1] = False
    mask[1, -1, S // 2] = True  # a row with one
    got = select_topk(scores, topk, mask)
    assert got.dtype == torch.int32
    assert torch.equal(got, naive(scores, topk, mask))
    assert torch.equal(reference.select_topk(scores, topk, mask), got)


def test_topk_larger_than_the_context_is_clamped():
    got = select_topk(torch.zeros(1, 3, 5), 2048, torch.ones(3, 5, dtype=torch.bool).tril()[None])
    assert got.tolist() == [[[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 1, 2, -1, -1]]]


def test_a_masked_key_never_outranks_an_allowed_minus_infinity():
    scores = torch.tensor([[[0.0, -torch.inf, 5.0, torch.finfo(torch.float32).min]]])
    mask = torch.tensor([[[False, True, False, False]]])
    assert select_topk(scores, 2, mask).tolist() == [[[1, -1]]]


def test_ties_go_to_the_lower_index():
    scores = torch.full((1, 1, 4096), 0.25)
    scores[0, 0, 4000] = 1.0
    assert select_topk(scores, 4).tolist() == [[[0, 1, 2, 4000]]]


def test_the_zero_plateau_of_relu_gives_the_same_set_every_time():
    scores = torch.zeros(2, 8, 1000)
    scores[..., ::7] = 1.0
    scores[..., 1::7] = -0.0
    runs = [select_topk(scores.clone(), 300) for _ in range(10)]
    assert all(torch.equal(runs[0], run) for run in runs)
    rest = [i for i in range(1000) if i % 7][: 300 - len(range(0, 1000, 7))]
    assert runs[0][0, 0].tolist() == sorted([*range(0, 1000, 7), *rest])


def test_slabs_select_what_the_whole_selects():
    scores = (torch.randn(1, 64, 64) * 2).round()
    mask = torch.ones(64, 64, dtype=torch.bool).tril()[None]
    whole = select_topk(scores, 9, mask)
    slabs = [select_topk(scores[:, a : a + 7, : a + 7], 9, mask[:, a : a + 7, : a + 7]) for a in range(0, 64, 7)]
    slabs = [torch.nn.functional.pad(s, (0, 9 - s.shape[-1]), value=-1) for s in slabs]
    assert torch.equal(whole, torch.cat(slabs, 1))


def test_nan_counts_as_minus_infinity():
    scores = torch.tensor([[[torch.nan, 1.0, 2.0, 0.0]]])
    assert select_topk(scores, 2).tolist() == [[[1, 2]]]
    assert select_topk(scores, 3).tolist() == [[[1, 2, 3]]]


def decoding_scores(kind, keys, g):
    scores = torch.randn(2, 1, keys, generator=g)
    if kind == "ties":
        scores = (scores * 3).round() / 3
    if kind == "plateau":
        scores = scores.relu() * torch.where(torch.rand(scores.shape, generator=g) < 0.5, -1.0, 1.0)
    if kind == "unlucky":  # all that is large lies where the sample looks, so its guess is too high
        scores[..., ::STRIDE] += 10
    if kind == "hidden":  # and nowhere there: too low
        scores[..., ::STRIDE] -= 10
    if kind == "few":
        scores[..., 5:] = -torch.inf
    if kind == "nan":
        scores[torch.rand(scores.shape, generator=g) < 0.3] = torch.nan
    if kind == "infinite":
        scores[torch.rand(scores.shape, generator=g) < 0.3] = -torch.inf
        scores[torch.rand(scores.shape, generator=g) < 0.1] = torch.inf
    return scores


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys,topk", [(4099, 7), (4099, 150), (4099, 4098), (20_000, 300), (130, 60)])
@pytest.mark.parametrize("kind", ["normal", "ties", "plateau", "unlucky", "hidden", "few", "nan", "infinite"])
def test_decoding_over_many_keys_equals_a_stable_sort(kind, keys, topk, masked):
    g = torch.Generator().manual_seed(keys + topk)
    scores = decoding_scores(kind, keys, g)
    mask = torch.rand(2, 1, keys, generator=g) < 0.8 if masked else torch.ones(2, 1, keys, dtype=torch.bool)
    got = select_topk(scores, topk, mask if masked else None)
    for b in range(2):
        allowed = mask[b, 0].nonzero().squeeze(1)
        order = scores[b, 0, allowed].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        best = allowed[order.sort(descending=True, stable=True).indices[:topk]].sort().values
        assert got[b, 0, : len(best)].tolist() == best.tolist()
        assert (got[b, 0, len(best) :] == -1).all()


@pytest.mark.parametrize("topk", [0, -1])
def test_topk_below_one_is_an_error(topk):
    with pytest.raises(ValueError, match="topk"):
        select_topk(torch.zeros(1, 1, 4), topk)


@pytest.mark.parametrize(("positions", "keys"), [((0, 20), 20), ((13, 20), 20), ((19, 20), 20), ((5, 9), 30)])
@pytest.mark.parametrize("sinks", [0, 2, 7])
@pytest.mark.parametrize("topk", [1, 5, 20, 40])
def test_latest_keys_are_what_top_k_of_the_positions_selects(positions, keys, sinks, topk):
    """With a prefill, a chunk, a decoding step, and a static cache that is not full; sinks may outnumber k."""
    queries = torch.arange(*positions)
    scores = control_scores("sink_window" if sinks else "window", queries, keys, sinks, 0)
    mask = (torch.arange(keys) <= queries[:, None])[None]
    assert torch.equal(latest_keys(queries, topk, keys, sinks), select_topk(scores, topk, mask))


@pytest.mark.parametrize("shape", [(0, 1, 6), (2, 0, 6)])
def test_nothing_to_select_for(shape):
    assert select_topk(torch.zeros(shape), 3).shape == (*shape[:2], 3)


def test_control_arms():
    queries = torch.arange(20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None]
    window = select_topk(control_scores("window", queries, 20, 2, 0), 5, mask)
    assert window[0, 19].tolist() == [15, 16, 17, 18, 19]
    sinks = select_topk(control_scores("sink_window", queries, 20, 2, 0), 5, mask)
    assert sinks[0, 19].tolist() == [0, 1, 17, 18, 19]
    random = control_scores("random", queries, 20, 2, 0)
    assert torch.equal(random[:, 5:9, :7], control_scores("random", queries[5:9], 7, 2, 0))
    assert not torch.equal(random, control_scores("random", queries, 20, 2, 1))
    counts = torch.zeros(20)
    for query in range(400):
        counts[select_topk(control_scores("random", torch.tensor([query]), 20, 0, 3), 5)[0, 0].long()] += 1
    assert counts.min() > 60 and counts.max() < 140  # 100 each
    with pytest.raises(ValueError, match="nonsense"):
        control_scores("nonsense", queries, 20, 2, 0)
