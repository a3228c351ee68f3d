"""What kernels, layers and training steps cost at Qwen2.5-0.5B's sizes, in milliseconds and GB; random tensors.

Dense attention is FlashAttention, through PyTorch's SDPA.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM, indexer_kl, select_topk, sparse_attention
from dsa.indexer import IndexScores
from dsa.masks import Visibility
from dsa.training import tiles
from dsa.training.trainer import freeze
from stages import cost
from stages.cost import DEVICE, QWEN, Shape

STAGES = ("dense", "warmup", "sparse")
LONGEST_WARMUP = 32768  # tokens of a row whose loss over all keys is measured: square in the length


@dataclass(frozen=True)
class Scale:
    """What is measured. compiled: lengths with torch.compile."""

    shape: Shape
    topks: list[int]
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    compiled: tuple[int, ...]
    dtype: torch.dtype
    backend: str  # of torch.compile

    def repeats(self, length: int) -> int:
        return max(2, min(10, 2**18 // length)) if DEVICE == "cuda" else 1


FULL = Scale(
    QWEN,
    [256, 2048],
    (4096, 16384, 32768, 131072, 8192, 65536),
    (4096, 2048, 8192, 16384, 32768),
    (2048, 8192),
    torch.bfloat16,
    "inductor",
)
TILES = hasattr(F, "linear_cross_entropy")  # from torch 2.13 on
REHEARSAL = Scale(Shape(32, 32, 1, 4, 2, 16, 64, 2, 16), [4], (10,), (10,), (10,), torch.float32, "aot_eager")


def lengths(rehearse: bool) -> dict[str, Callable[[], dict]]:
    s, found = REHEARSAL if rehearse else FULL, {}
    for n in s.lengths:
        found[f"kernels {n}"] = partial(kernels, s, n)
        common = s.shape, n, s.topks
        found[f"prefill {n}"] = partial(cost.prefill, *common, s.dtype, s.repeats(n), layers=1)
        found[f"decode {n}"] = partial(cost.decoding, *common, s.dtype, s.repeats(n), layers=1)
        found[f"train {n}"] = partial(cost.training, *common, s.dtype == torch.bfloat16, s.repeats(n), layers=1)
    return {name: partial(freed, call) for name, call in found.items()}


def steps(rehearse: bool) -> dict[str, Callable[[], dict]]:
    s = REHEARSAL if rehearse else FULL
    return {f"{stage} {n}": partial(step_that_fits, s, stage, n) for n in s.steps for stage in STAGES}


def compiled(rehearse: bool) -> dict[str, Callable[[], dict]]:
    s = REHEARSAL if rehearse else FULL
    return {f"{stage} {n}": partial(step_that_fits, s, stage, n, compiled=True) for n in s.compiled for stage in STAGES}


def freed(call: Callable[[], dict]) -> dict:
    """The result of a call that has all of the device's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    return call()


def kernels(s: Scale, length: int) -> dict:
    """Selection, attention and losses of a layer over a whole causal row: forward, and with all gradients."""
    shape, topks = s.shape, [k for k in s.topks if k < length]
    generator = torch.Generator(DEVICE).manual_seed(length)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=DEVICE, dtype=s.dtype).requires_grad_()

    q = random(1, shape.query_heads, length, shape.head_dim)
    k, v = (random(1, shape.kv_heads, length, shape.head_dim) for _ in range(2))
    index = random(1, length, shape.index_heads, shape.index_dim), random(1, length, shape.index_dim)
    index = *index, random(1, length, shape.index_heads).float().detach().requires_grad_()
    visible, scaling, grad = Visibility(length, length), shape.head_dim**-0.5, random(*q.shape).detach()

    def forward(attend: Callable) -> None:
        with torch.no_grad():
            attend()

    def backward(attend: Callable) -> None:
        torch.autograd.grad(attend(), (q, k, v), grad)

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @torch.no_grad()
    def select(topk: int) -> torch.Tensor:
        return select_topk(IndexScores(*index, visible, shape.query_heads), topk)

    def loss(indices: torch.Tensor | None) -> None:
        torch.autograd.grad(indexer_kl(*index, q, k, scaling, visible, indices), index)

    ways = {"dense": lambda: cost.causal_sdpa(q, k, v)} | ({"dense_flash": flash} if DEVICE == "cuda" else {})
    indices = {topk: select(topk) for topk in topks}
    ways |= {f"dsa_{topk}": lambda i=indices[topk]: sparse_attention(q, k, v, i, scaling) for topk in topks}
    calls = {f"select_{topk}": partial(select, topk) for topk in topks}
    calls |= {name: partial(forward, way) for name, way in ways.items()}
    calls |= {f"{name}_train": partial(backward, way) for name, way in ways.items()}
    calls |= {f"loss_{topk}": partial(loss, indices[topk]) for topk in topks}
    if length <= LONGEST_WARMUP:
        calls["loss_dense"] = partial(loss, None)
    return {"length": length, "arms": cost.in_turn(calls, s.repeats(length))}


def step_that_fits(s: Scale, stage: str, length: int, compiled: bool = False) -> dict:
    """With activation checkpointing where it does not fit without; the warm-up, which keeps nothing, has none."""
    try:
        return freed(partial(step, s, stage, length, False, compiled))
    except torch.OutOfMemoryError:
        if stage == "warmup":
            raise
    return freed(partial(step, s, stage, length, True, compiled))


def step(s: Scale, stage: str, length: int, checkpointing: bool, compiled: bool) -> dict:
    """A step of the whole model on one row: float32 weights, bfloat16 autocast, AdamW, as the stages train."""
    torch.manual_seed(0)
    config = Qwen2DSAConfig(
        **s.shape.config.to_dict() | {"model_type": "qwen2_dsa"},
        attention_mode="sparse" if stage == "sparse" else "dense",
        index_n_heads=0 if stage == "dense" else s.shape.index_heads,
        index_head_dim=s.shape.index_dim,
        index_topk=s.topks[0],
    )
    with torch.device(DEVICE):
        model = Qwen2DSAForCausalLM(config).train()
        ids = torch.randint(config.vocab_size, (1, length))
    freeze(model, backbone=stage == "warmup", indexer=False)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        compile_layers(model, s.backend)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=DEVICE == "cuda")
    inputs = {"logits_to_keep": 1} if stage == "warmup" else {"labels": ids}
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def call() -> None:
        large = tiles.tiled_if_large(model, length if TILES and "labels" in inputs else 0)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=s.dtype == torch.bfloat16), large:
            out = model(ids, use_cache=False, output_indexer_kl=stage != "dense", **inputs)
        sum(x.sum() for x in (out.loss, out.indexer_kl) if x is not None).backward()
        optimizer.step()
        optimizer.zero_grad()

    begin = time.monotonic()
    call()
    first = time.monotonic() - begin
    found = cost.in_turn({"step": call}, 3 if DEVICE == "cuda" else 1)["step"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
    found |= {"first_seconds": round(first, 1), "peak_gb": round(peak, 2), "checkpointing": checkpointing}
    return found | {"length": length, "stage": stage, "tokens_per_second": round(1e3 * length / found["ms"])}


def compile_layers(model: Qwen2DSAForCausalLM, backend: str) -> None:
    """torch.compile of each decoder layer but for its attention, which chooses and launches kernels."""
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compiler.disable(layer.self_attn.forward)
        layer.compile(backend=backend, dynamic=False)
