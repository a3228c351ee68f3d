import pytest
import torch
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from dsa import LightningIndexer, Qwen2DSAConfig, index_scores, indexer, reference, select_topk
from dsa.indexer import pack_int8
from tests.conftest import error_ratio


@pytest.mark.parametrize("B,T,S,H,D", [(1, 1, 1, 1, 4), (2, 5, 9, 4, 16), (3, 7, 7, 3, 8)])
def test_index_scores_equal_the_formula(B, T, S, H, D):
    q, k, w = torch.randn(B, T, H, D), torch.randn(B, S, D), torch.randn(B, T, H)
    expected = torch.zeros(B, T, S, dtype=torch.float64)
    for h in range(H):
        dots = torch.einsum("btd,bsd->bts", q[:, :, h].double(), k.double())
        expected += w[:, :, h, None].double() * dots.clamp(min=0) * D**-0.5 * H**-0.5
    got = index_scores(q, k, w)
    assert got.dtype == torch.float32
    assert error_ratio(got, expected) < 1e-6
    assert error_ratio(reference.index_scores(q, k, w), expected) < 1e-6


def test_scores_of_low_precision_inputs_are_float32():
    q, k, w = torch.randn(1, 6, 2, 8).bfloat16(), torch.randn(1, 6, 8).bfloat16(), torch.randn(1, 6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = index_scores(q, k, w)
    assert got.dtype == torch.float32
    assert torch.equal(got, index_scores(q.float(), k.float(), w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B,S,H,D", [(1, 1, 1, 4), (2, 37, 4, 16), (3, 50, 2, 6)])
def test_decoding_scores_equal_those_of_the_same_query_among_others(B, S, H, D, dtype, monkeypatch):
    monkeypatch.setattr(indexer, "TILE", 16)  # borders inside the keys
    q, w = torch.randn(B, 3, H, D).to(dtype), torch.randn(B, 3, H)
    k = torch.full((B, S + 9, D), torch.nan, dtype=dtype)[:, :S]  # as a cache with room to spare hands it out
    k.copy_(torch.randn(B, S, D))
    expected = index_scores(q, k, w)
    for t in range(3):
        got = index_scores(q[:, t : t + 1], k, w[:, t : t + 1])
        assert got.dtype == torch.float32 and got.shape == (B, 1, S)
        assert error_ratio(got, expected[:, t : t + 1]) < 1e-6


@pytest.mark.parametrize("B,T,S,H,D", [(1, 1, 1, 1, 4), (2, 1, 37, 4, 16), (2, 5, 9, 4, 64)])
def test_int8_scores_are_the_scores_of_the_rounded_numbers(B, T, S, H, D):
    q, k, w = torch.randn(B, T, H, D), torch.randn(B, S, D), torch.randn(B, T, H)
    k[:, 0] = 0  # a key without any scale

    def rounded(x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return (x / step.clamp(min=1e-30)).round() * step

    packed = torch.zeros(B, S + 5, D + 4, dtype=torch.int8)[:, :S].copy_(pack_int8(k))
    got = index_scores(q, packed, w)
    assert got.dtype == torch.float32 and not got[..., 0].any()
    assert error_ratio(got, index_scores(rounded(q), rounded(k), w)) < 1e-6
    assert S == 1 or error_ratio(got, index_scores(q, k, w)) < 0.02


def test_int8_products_are_exact_in_decoding_and_in_prefill():
    """With one head nothing is left to round but two scales: the same bits, so the same keys."""
    q, k, w = torch.randn(1, 40, 1, 64), pack_int8(torch.randn(1, 500, 64)), torch.rand(1, 40, 1)
    whole = index_scores(q, k, w)
    steps = [index_scores(q[:, t : t + 1], k, w[:, t : t + 1]) for t in range(40)]
    assert torch.equal(whole, torch.cat(steps, 1))


def both_indexers(hidden=32, heads=4, dim=16, rope=8, topk=5):
    torch.manual_seed(0)
    ours = LightningIndexer(
        Qwen2DSAConfig(
            hidden_size=hidden,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            index_n_heads=heads,
            index_head_dim=dim,
            index_rope_dim=rope,
            index_topk=topk,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        ),
        0,
    )
    theirs = DeepseekV32Indexer(
        DeepseekV32Config(
            hidden_size=hidden,
            q_lora_rank=hidden,
            index_n_heads=heads,
            index_head_dim=dim,
            qk_rope_head_dim=rope,
            index_topk=topk,
            num_hidden_layers=1,
        ),
        0,
    )
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict({name.replace("wq.", "wq_b."): value for name, value in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("T,topk", [(64, 5), (33, 1), (128, 16)])
def test_selects_what_transformers_deepseek_indexer_selects(T, topk):
    """With k well below S, where a wrong RoPE layout shows."""
    ours, theirs = both_indexers(topk=topk)
    x, positions = torch.randn(2, T, 32), torch.arange(T)[None]
    frequency = 100.0 ** (-torch.arange(0, 8, 2).float() / 8)
    angle = torch.cat([positions[..., None] * frequency] * 2, -1)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None].expand(2, -1, -1)
    expected = theirs(x, x, (angle.cos(), angle.sin()), mask, positions)
    scores = index_scores(*ours(x, positions))
    got = select_topk(scores, topk, mask)
    scores, got, expected = scores[:, topk:], got[:, topk:], expected[:, topk:]
    mine, reference = (scores.gather(2, i.long()).sort(-1).values for i in (got, expected))
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)  # their ties on the plateau are theirs
    positive = reference[:, :, :1].squeeze(-1) > 0  # no plateau within the selection: the very same keys
    assert positive.float().mean() > 0.3
    same = got.sort(-1).values == expected.sort(-1).values
    assert same.all(-1)[positive].all()


def test_the_scale_is_the_indexers_own():
    q, k, w = torch.ones(1, 1, 4, 64), torch.ones(1, 1, 64), torch.ones(1, 1, 4)
    assert index_scores(q, k, w).item() == pytest.approx(4 * 64 * 64**-0.5 * 4**-0.5)


def test_scores_depend_on_relative_positions_only():
    ours, _ = both_indexers()
    x = torch.randn(1, 12, 32)
    near = index_scores(*ours(x, torch.arange(12)[None]))
    far = index_scores(*ours(x, torch.arange(1000, 1012)[None]))
    assert error_ratio(far, near) < 1e-4


def test_input_is_detached():
    ours, _ = both_indexers()
    x = torch.randn(1, 4, 32, requires_grad=True)
    index_scores(*ours(x, torch.arange(4)[None])).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"index_topk": 0},
        {"index_rope_dim": 3},
        {"index_rope_dim": 32},
        {"attention_mode": "spars"},
        {"selector": "best"},
        {"index_key_dtype": "int4"},
        {"index_key_dtype": "int8", "index_head_dim": 6, "index_rope_dim": 2},
        {"index_n_heads": 0},
        {"use_sliding_window": True},
    ],
)
def test_a_config_that_cannot_work_is_an_error(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Qwen2DSAConfig(**({"index_head_dim": 16} | change))


def test_decoding_scores_whatever_the_default_type_is():
    q, k, weights = torch.randn(1, 1, 2, 8), torch.randn(1, 5, 8), torch.rand(1, 1, 2)
    expected = index_scores(q, k, weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(index_scores(q, k, weights), expected)
    finally:
        torch.set_default_dtype(torch.float32)
