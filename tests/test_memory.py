"""Peak memory grows with the length and not with its square: nothing of size T x S is ever held."""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM
from dsa.training.trainer import freeze
from stages.common import peak_of_process

LENGTHS = (512, 3072, 6144)  # the first one warms up
TOPK = 64


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def peaks(kind: str) -> list[int]:
    """Peak memory of a pass at each length, above what the process held before the first, in bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2DSAConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=TOPK,
        attention_mode="dense" if kind == "warmup" else "sparse",
        max_position_embeddings=LENGTHS[-1],
    )
    model = Qwen2DSAForCausalLM(config)
    freeze(model, backbone=kind == "warmup", indexer=False)
    found, before = [], resident()
    for length in LENGTHS:
        ids = torch.randint(0, 64, (1, length))
        if kind == "prefill":
            with torch.no_grad():
                model(ids, logits_to_keep=1)
        else:
            labels = None if kind == "warmup" else ids
            out = model(ids, labels=labels, use_cache=False, output_indexer_kl=True, logits_to_keep=int(labels is None))
            (out.indexer_kl.sum() + (0 if labels is None else out.loss)).backward()
            model.zero_grad()
            del out
        found.append(peak_of_process() - before)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["warmup", "sparse", "prefill"])
def test_peak_memory_grows_linearly(kind):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # whose peak is nobody else's
        _, shorter, longer = pool.submit(peaks, kind).result()
    assert shorter > 0
    # Twice is linear, four times would be square. With slabs of all queries it is 3.3 and more.
    assert longer < 2.7 * shorter, f"{shorter / 2**20:.0f} MiB at {LENGTHS[1]} tokens, {longer / 2**20:.0f} at twice"
