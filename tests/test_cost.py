"""The benchmark's arithmetic by brute force, and its baselines against every dense path that PyTorch has."""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2ForCausalLM

from benchmarks import batches
from benchmarks.cost import joined
from stages import cost
from stages.benchmark import own_model, pays_from
from stages.params import Indexer

TINY = cost.Shape(64, 96, 2, 4, 2, 16, 50, 2, 16)


@pytest.mark.parametrize("topk", [None, 1, 7, 100])
def test_the_bound_counts_each_product_of_each_query(topk):
    """A wrong bound would make a kernel look as good as it can be."""
    macs = 0
    for t in range(20):
        visible = t + 1
        attended = visible if topk is None else min(topk, visible)
        macs += 2 * 4 * 16 * attended  # q . k and p v
        if topk is not None and visible > topk:
            macs += 2 * 16 * visible
    assert TINY.prefill(20, topk, linear=False) == 2 * macs


def test_linear_work_is_the_size_of_the_weights():
    model = cost.model_of(TINY, 4, torch.float32)
    dense = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".indexer." not in n)
    indexer = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and ".indexer." in n)
    assert TINY.linear(False) == dense - 50 * 64
    assert TINY.linear(True) == dense - 50 * 64 + indexer


def test_bytes_of_a_token_are_those_of_the_cache():
    model = cost.model_of(TINY, 4, torch.float32)
    cache = cost.filled_cache(model, 10)
    size = sum(x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values))
    index = sum(layer.indexer_keys.numel() * 4 for layer in cache.layers)
    assert TINY.read(10, None, 4, weights=False) == size
    assert TINY.read(10, 3, 4, weights=False) == size * 3 // 10 + index


@pytest.mark.parametrize("generate", [0, 3])
def test_decoding_repeats_the_same_token(generate):
    """A cache that grew from repeat to repeat would be measured at another length."""
    row = cost.decoding(TINY, 32, [8], torch.float32, 2, generate=generate)
    assert row["length"] == 32 and set(row["arms"]) == {
        "dense",
        "dense_grouped",
        "dense_grouped_sdpa",
        "dsa_8",
        "dsa_int8_8",
    }
    assert row["dense"] == min(times["ms"] for arm, times in row["arms"].items() if "dense" in arm)
    assert row["bound"]["dsa_8"]["bytes"] < row["bound"]["dsa_int8_8"]["bytes"]


def test_all_tables_run_on_a_tiny_shape(monkeypatch):
    monkeypatch.setattr(cost, "FLUSHED", 20_000)
    for row in (
        cost.attention_of_a_row(TINY, 32, [8, 64], torch.float32, 1),
        cost.attention_module(TINY, 32, [8, 64], torch.float32, 1),
        cost.attention_of_a_token(TINY, 32, [8, 64], torch.float32, 1),
        cost.prefill(TINY, 32, [8], torch.float32, 1),
        cost.training(TINY, 32, [8], False, 1),
        cost.training(TINY, 32, [8], True, 1, layers=1),
    ):
        assert "dsa_8" in row["ratio"] and "dsa_64" not in row["ratio"]  # with k >= L there is nothing to compare
        assert row["ratio"]["dsa_8"] == pytest.approx(row["dense"] / row["arms"]["dsa_8"]["ms"], abs=1e-3)


def test_processes_are_joined_by_their_median_with_the_range():
    def run(ms):
        arms = {"dense": {"ms": 6.0, "spread": 1.0}, "dsa_8": {"ms": ms, "spread": ms}}
        return {"length": 9} | cost.compared(arms, {"dsa_8": 4.0})

    row = joined([run(1.0), run(3.0), run(2.0)])
    assert row["ratio"]["dsa_8"] == 3.0 and row["ratio_range"]["dsa_8"] == [2.0, 6.0] and row["processes"] == 3
    assert row["arms"]["dsa_8"] == {"ms": 2.0, "spread": 3.0}


def test_dsa_pays_from_the_length_behind_the_last_that_is_slower():
    rows = [{"length": n, "ratio": {"dsa_8": r}} for n, r in ((1, 1.2), (2, 0.9), (4, 1.1), (8, 2.0))]
    assert pays_from(rows, "dsa_8") == 4
    assert pays_from(rows[:2], "dsa_8") is None


def test_the_runs_own_shape_comes_from_its_config():
    own = own_model(TINY.config, Indexer(n_heads=2, head_dim=16), 8, [16, 32])
    assert own["shape"] == vars(TINY)
    assert [row["length"] for row in own["bounds"]] == [16, 32]
    assert own["attention"] == 4 * 4 * 16 and own["score"] == 2 * 2 * 16


def excess(calls: dict, ours, rounds: int = 6) -> float:
    """The fastest of our calls over the fastest of all, by each one's least seconds, in turns. Other work on the
    machine slows some calls and hastens none, so what is not within a tenth is given more turns."""
    best, ratio = dict.fromkeys(calls, float("inf")), float("inf")
    for turn in range(5 * rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
        ratio = min(best[name] for name in ours) / min(best.values())
        if turn + 1 >= rounds and ratio <= 1.1:
            break
    return ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_dense_prefill_is_the_fastest_that_pytorch_has(dtype):
    """The old benchmark's dense prefill, a block of queries under an explicit mask, took four times as long."""
    if dtype == torch.bfloat16 and not torch.cuda.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 here")
    L, shape = 1024, replace(cost.QWEN, layers=1)
    q = torch.randn(1, shape.query_heads, L, shape.head_dim, dtype=dtype)
    k, v = torch.randn(2, 1, shape.kv_heads, L, shape.head_dim, dtype=dtype)
    group = shape.query_heads // shape.kv_heads
    mask = torch.ones(L, L, dtype=torch.bool).tril()

    def by_math():
        with sdpa_kernel(SDPBackend.MATH):
            return cost.repeated_sdpa(q, k, v)

    calls = {
        **{way: lambda attend=attend: attend(q, k, v) for way, attend in cost.DENSE.items()},
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        "math": by_math,
        "products": lambda: (
            repeated_logits(q, k, group).masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)
        ),
    }
    assert excess(calls, cost.DENSE) <= 1.1


def repeated_logits(q, k, group):
    return q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5


@torch.no_grad()
def test_dense_decoding_is_the_fastest_that_pytorch_has():
    L, shape = 8192, cost.QWEN
    q = torch.randn(1, shape.query_heads, 1, shape.head_dim)
    k, v = torch.randn(2, 1, shape.kv_heads, L, shape.head_dim)
    group, scaling = shape.query_heads // shape.kv_heads, shape.head_dim**-0.5
    calls = {
        "products": lambda: cost.grouped_attention(q, k, v, scaling),
        "grouped sdpa": lambda: cost.grouped_sdpa(None, q, k, v, None, scaling),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "repeated": lambda: F.scaled_dot_product_attention(
            q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        ),
        "plain products": lambda: repeated_logits(q, k, group).softmax(-1) @ v.repeat_interleave(group, 1),
    }
    assert excess(calls, ("products", "grouped sdpa", "sdpa")) <= 1.1


@torch.no_grad()
def test_the_ways_of_dense_decoding_agree():
    q, (k, v) = torch.randn(1, 4, 1, 16), torch.randn(2, 1, 2, 50, 16)
    first, *others = (attend(q, k, v).reshape(1, 4, 16) for attend in cost.DENSE_TOKEN.values())
    for other in others:
        torch.testing.assert_close(other, first)


@torch.no_grad()
def test_a_models_dense_prefill_is_transformers_own(monkeypatch):
    """Same weights in Qwen2ForCausalLM and in our dense mode: the same calls of SDPA, is_causal and without a mask."""
    seen, calls = [], []
    original = F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append((kwargs["is_causal"], kwargs["attn_mask"] is None, kwargs.get("enable_gqa", False)))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ours, ids = cost.model_of(TINY, 4, torch.float32).eval(), torch.randint(50, (1, 16))
    cost.switch(ours, attention_mode="dense")
    for model in (Qwen2ForCausalLM(TINY.config).eval(), ours):
        seen.clear()
        model(ids, use_cache=True)
        calls.append(list(seen))
    assert calls[0] == calls[1]
    assert [call[:2] for call in calls[0]] == [(True, True)] * TINY.layers


def test_a_padded_batch_is_decoded_alike_in_each_of_the_dense_ways():
    model, lengths = cost.model_of(cost.SMALL, 16, torch.float32).eval(), batches.row_lengths(3, 64)
    assert lengths.tolist() == [32, 48, 64]
    mask = (torch.arange(65) >= 64 - lengths[:, None]).long()
    logits = {}
    for way in ("sdpa", *batches.WAYS):
        cost.switch(model, attention_mode="dense", _attn_implementation=way)
        cache = cost.filled_cache(model, 64, len(lengths))
        ids = torch.zeros(3, 1, dtype=torch.long)
        with torch.no_grad():
            logits[way] = model(ids, attention_mask=mask, position_ids=lengths[:, None], past_key_values=cache).logits
    for way in batches.WAYS:
        torch.testing.assert_close(logits[way], logits["sdpa"])
    row = batches.measure(cost.SMALL, 3, 64, [16], 1)
    assert set(row["ratio"]) == {"dsa_16", "dsa_int8_16"} and row["bound"]["dsa_int8_16"] > row["bound"]["dsa_16"] > 0
