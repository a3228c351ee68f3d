"""What DSA and dense attention cost, as a user runs both: whole rows and whole models, through the model's own path.

Dense attention is what transformers runs, at its best: causal SDPA over the whole row in prefill and training, and in
decoding the fastest of SDPA, SDPA over the heads of a group, and plain matrix products. All arms of a measurement take
turns, so that whatever else the machine does falls on each. Beside every ratio stands its bound, by multiply-adds and
by the bytes that are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Measurement, TaskSpec, timer
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import AttentionInterface

from dsa import Qwen2DSAConfig, Qwen2DSAForCausalLM, from_dense, sparse_attention
from dsa.cache import growing
from dsa.indexer import SCALE_BYTES, pack_int8
from dsa.masks import Visibility
from dsa.modeling import takes_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLUSHED = 2**28  # bytes of caches that a processor's own memory does not hold
MIN_SECONDS, MAX_REPEATS = 0.5, 100  # of a short call: a few repeats of a tenth of a millisecond tell nothing


@dataclass(frozen=True)
class Shape:
    """A model's sizes and its indexer's."""

    hidden: int
    mlp: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    index_heads: int
    index_dim: int

    @property
    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )

    def linear(self, dsa: bool) -> int:
        """Multiply-adds of a token in all layers' projections."""
        attention = 2 * (self.query_heads + self.kv_heads) * self.head_dim
        indexer = (self.index_heads + 1) * self.index_dim + self.index_heads
        return self.layers * self.hidden * (attention + 3 * self.mlp + dsa * indexer)

    def keys(self, visible: int, topk: int | None) -> int:
        """Multiply-adds of a query that sees so many keys, in all layers; `topk` is None for dense attention."""
        attended = visible if topk is None else min(topk, visible)
        scored = 0 if topk is None or topk >= visible else visible
        return self.layers * (
            2 * self.query_heads * self.head_dim * attended + self.index_heads * self.index_dim * scored
        )

    def prefill(self, length: int, topk: int | None, linear: bool = True) -> int:
        tokens = self.linear(topk is not None) * length if linear else 0
        return tokens + sum(self.keys(t + 1, topk) for t in range(length))

    def training(self, length: int, topk: int | None) -> int:
        """Forward and backward: of a product two more; attention has five where its forward has two. The indexer's loss
        takes the logits again, the scores of the selected keys, and two products for their gradients."""
        attended = sum(min(t + 1, topk or length) for t in range(length))
        scored = sum(t + 1 for t in range(topk or length, length))
        attention = 7 * self.query_heads * self.head_dim * attended
        indexer = 0
        if topk is not None:
            index = self.index_heads * self.index_dim
            indexer = index * (scored + 3 * attended) + self.query_heads * self.head_dim * attended
        head = 3 * self.hidden * self.vocab * length
        return 3 * self.linear(topk is not None) * length + self.layers * (attention + indexer) + head

    def read(self, length: int, topk: int | None, width: int, int8: bool = False, weights: bool = True) -> int:
        """Bytes that decoding one token reads: weights, keys and values, index keys. `width`: bytes of a number."""
        attended = length if topk is None else min(topk, length)
        index_key = (self.index_dim + SCALE_BYTES) if int8 else self.index_dim * width
        cache = 2 * self.kv_heads * self.head_dim * width * attended + (0 if topk is None else index_key * length)
        parameters = (self.linear(topk is not None) + self.hidden * self.vocab) * width
        return self.layers * cache + (parameters if weights else 0)


QWEN = Shape(896, 4864, 24, 14, 2, 64, 151936, 4, 64)  # Qwen2.5-0.5B
SMALL = Shape(256, 704, 4, 8, 2, 64, 4096, 2, 64)  # where attention is most of the work at a few thousand tokens


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: median, and spread between the quartiles. The first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    while len(next(iter(times.values()))) < repeats or (
        sum(map(sum, times.values())) < MIN_SECONDS and len(next(iter(times.values()))) < MAX_REPEATS
    ):
        for name, call in calls.items():
            start = timer()
            call()
            times[name].append(timer() - start)
    found = {name: Measurement(1, raw, TaskSpec(name, "")) for name, raw in times.items()}
    return {name: {"ms": round(m.median * 1e3, 4), "spread": round(m.iqr * 1e3, 4)} for name, m in found.items()}


def compared(times: dict[str, dict[str, float]], bounds: dict[str, float | dict]) -> dict:
    """Times, `dense` the faster of its ways, and the ratio dense / DSA of each DSA arm beside its bound."""
    ways = {name: t for name, t in times.items() if name.startswith("dense")}
    best = min(ways, key=lambda name: ways[name]["ms"])
    ratios = {name: round(ways[best]["ms"] / t["ms"], 3) for name, t in times.items() if name not in ways}
    return {"arms": times, "dense": ways[best]["ms"], "dense_by": best, "ratio": ratios, "bound": bounds}


def grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense attention of one query as two matrix products: K and V are read once for all heads of a group. mask: bool
    [B, 1, 1, S]."""
    B, Hq, T, D = q.shape
    logits = (q.view(B, k.shape[1], -1, D) @ k.transpose(2, 3)).view(B, Hq, T, -1) * scaling
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1).view(B, k.shape[1], -1, k.shape[2]) @ v).view(B, Hq, T, D)


def grouped(module, q, k, v, attention_mask, scaling=None, **kwargs):
    """`grouped_attention` as an attention function of transformers."""
    return grouped_attention(q, k, v, scaling, attention_mask).transpose(1, 2), None


def grouped_sdpa(module, q, k, v, attention_mask, scaling=None, **kwargs):
    """SDPA of one query with the heads of a group as its rows."""
    B, Hq, T, D = q.shape
    rows = q.reshape(B, k.shape[1], -1, D)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=attention_mask, scale=scaling)
    return out.view(B, Hq, T, D).transpose(1, 2), None


AttentionInterface.register("grouped", grouped)
AttentionInterface.register("grouped_sdpa", grouped_sdpa)


def causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What transformers' `sdpa` calls for a whole causal row: q [1, Hq, L, D], k and v [1, Hkv, L, D]."""
    if not takes_groups(q):
        return repeated_sdpa(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def repeated_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same, keys and values repeated for each query head, which in bfloat16 can be a little faster."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def one_query(attend: Callable) -> Callable:
    """An attention function of transformers, as a function of q, k and v."""
    return lambda q, k, v: attend(None, q, k, v, None, q.shape[-1] ** -0.5)[0]


DENSE_TOKEN = {
    "dense": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "dense_grouped": one_query(grouped),
    "dense_grouped_sdpa": one_query(grouped_sdpa),
}
DENSE = {"dense": causal_sdpa, "dense_repeated": repeated_sdpa}


def model_of(shape: Shape, topk: int, dtype: torch.dtype, layers: int | None = None) -> Qwen2DSAForCausalLM:
    """A DSA model with random weights."""
    torch.manual_seed(0)
    shape = shape if layers is None else replace(shape, layers=layers)
    dense = Qwen2ForCausalLM(shape.config).to(DEVICE, dtype)
    return from_dense(dense, topk=topk, n_heads=shape.index_heads, head_dim=shape.index_dim)


def switch(model: Qwen2DSAForCausalLM, **settings) -> None:
    """Make the model another arm; all share the weights."""
    settings = {"attention_mode": "sparse", "index_key_dtype": None, "_attn_implementation": "sdpa"} | settings
    for name, value in settings.items():
        setattr(model.config, name, value)


def arms(topks: list[int], length: int, *, int8: bool = False, grouped: bool = False) -> dict[str, dict]:
    """name -> settings of the model's config."""
    found: dict[str, dict] = {"dense": {"attention_mode": "dense"}}
    if grouped:
        for way in ("grouped", "grouped_sdpa"):
            found[f"dense_{way}"] = {"attention_mode": "dense", "_attn_implementation": way}
    for topk in topks:
        if topk < length:
            found[f"dsa_{topk}"] = {"index_topk": topk}
            if int8:
                found[f"dsa_int8_{topk}"] = {"index_topk": topk, "index_key_dtype": "int8"}
    return found


def topk_of(arm: str) -> int:
    return int(arm.rsplit("_", 1)[1])


@torch.no_grad()
def attention_of_a_row(shape: Shape, length: int, topks: list[int], dtype: torch.dtype, repeats: int) -> dict:
    """One layer's selection and attention over a whole causal row of random queries and keys."""
    shape = replace(shape, layers=1)
    layer = model_of(replace(shape, vocab=16), max(topks), dtype).model.layers[0].self_attn.eval()
    generator = torch.Generator().manual_seed(length)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    q, k, v = (
        random(1, shape.query_heads, length, shape.head_dim),
        *random(2, 1, shape.kv_heads, length, shape.head_dim),
    )
    index_q = random(1, length, shape.index_heads, shape.index_dim)
    index_k, weights = random(1, length, shape.index_dim), random(1, length, shape.index_heads).float()
    index_k8, visible = pack_int8(index_k), Visibility(length, length)

    def dsa(arm: str) -> torch.Tensor:
        layer.config.index_topk = topk_of(arm)
        keys = index_k8 if "int8" in arm else index_k
        return sparse_attention(q, k, v, layer.select((index_q, keys, weights), q, k, visible), layer.scaling)

    calls: dict[str, Callable] = {way: lambda attend=attend: attend(q, k, v) for way, attend in DENSE.items()}
    names = [arm for arm in arms(topks, length, int8=True) if arm != "dense"]
    calls |= {arm: lambda arm=arm: dsa(arm) for arm in names}
    work = shape.prefill(length, None, linear=False)
    bounds = {arm: round(work / shape.prefill(length, topk_of(arm), linear=False), 2) for arm in names}
    return {"length": length} | compared(in_turn(calls, repeats), bounds)


@torch.no_grad()
def attention_module(shape: Shape, length: int, topks: list[int], dtype: torch.dtype, repeats: int) -> dict:
    """One layer's attention with its projections, the indexer's among them, over a whole row; no MLP, no cache."""
    shape = replace(shape, layers=1, mlp=0)
    model = model_of(replace(shape, mlp=16, vocab=16), max(topks), dtype).eval()
    layer, positions = model.model.layers[0].self_attn, torch.arange(length, device=DEVICE)[None]
    hidden = torch.randn(1, length, shape.hidden, generator=torch.Generator().manual_seed(length)).to(DEVICE, dtype)
    rope = model.model.rotary_emb(hidden, positions)

    def call(settings: dict) -> None:
        switch(model, **settings)
        layer(hidden, rope, Visibility(length, length), position_ids=positions)

    found = arms(topks, length)
    times = in_turn({arm: lambda s=settings: call(s) for arm, settings in found.items()}, repeats)
    work = shape.prefill(length, None)
    bounds = {arm: round(work / shape.prefill(length, topk_of(arm)), 2) for arm in found if arm != "dense"}
    return {"length": length} | compared(times, bounds)


@torch.no_grad()
def prefill(shape: Shape, length: int, topks: list[int], dtype: torch.dtype, repeats: int, layers=None) -> dict:
    """A whole model, or so many of its layers, reads a row into its cache and gives the last token's logits."""
    shape = shape if layers is None else replace(shape, layers=layers, vocab=16)
    model = model_of(shape, max(topks), dtype).eval()
    ids = torch.randint(shape.vocab, (1, length), device=DEVICE)

    def call(settings: dict) -> None:
        switch(model, **settings)
        model(ids, use_cache=True, logits_to_keep=1)

    found = arms(topks, length)
    times = in_turn({arm: lambda s=settings: call(s) for arm, settings in found.items()}, repeats)
    work = shape.prefill(length, None)
    bounds = {arm: round(work / shape.prefill(length, topk_of(arm)), 2) for arm in found if arm != "dense"}
    return {"length": length} | compared(times, bounds)


def training(shape: Shape, length: int, topks: list[int], bf16: bool, repeats: int, layers=None) -> dict:
    """Forward and backward of a whole model on one row, or of so many layers; DSA with the indexer's loss, dense
    attention without an indexer. float32 weights, under bfloat16 autocast where asked for."""
    shape = shape if layers is None else replace(shape, layers=layers, vocab=16)
    dsa = model_of(shape, max(topks), torch.float32).train()
    torch.manual_seed(0)
    config = Qwen2DSAConfig(
        **shape.config.to_dict() | {"model_type": "qwen2_dsa"}, attention_mode="dense", index_n_heads=0
    )
    dense = Qwen2DSAForCausalLM(config).to(DEVICE).train()
    ids = torch.randint(shape.vocab, (1, length), device=DEVICE)

    def call(arm: str) -> None:
        model = dense if arm == "dense" else dsa
        if arm != "dense":
            dsa.config.index_topk = topk_of(arm)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            out = model(ids, labels=ids, use_cache=False, output_indexer_kl=arm != "dense")
        (out.loss if arm == "dense" else out.loss + out.indexer_kl.sum()).backward()
        model.zero_grad()

    names = list(arms(topks, length))
    work = shape.training(length, None)
    bounds = {arm: round(work / shape.training(length, topk_of(arm)), 2) for arm in names if arm != "dense"}
    return {"length": length} | compared(in_turn({arm: lambda arm=arm: call(arm) for arm in names}, repeats), bounds)


@torch.no_grad()
def attention_of_a_token(shape: Shape, length: int, topks: list[int], dtype: torch.dtype, repeats: int) -> dict:
    """One layer's selection and attention of a decoded token over random keys and values of `length` tokens.

    Each call takes the next of so many caches that none is left in the processor's own from the call before, as in a
    model of many layers.
    """
    shape = replace(shape, layers=1)
    layer = model_of(replace(shape, mlp=16, vocab=16), max(topks), dtype).model.layers[0].self_attn.eval()
    generator, width = torch.Generator().manual_seed(length), dtype.itemsize

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    def cache() -> tuple[torch.Tensor, ...]:
        k, v = random(2, 1, shape.kv_heads, length, shape.head_dim)
        index_k = random(1, length, shape.index_dim)
        return k, v, index_k, pack_int8(index_k)

    caches = [cache() for _ in range(2 + FLUSHED // shape.read(length, None, width, weights=False))]
    q, index_q = random(1, shape.query_heads, 1, shape.head_dim), random(1, 1, shape.index_heads, shape.index_dim)
    weights, visible = random(1, 1, shape.index_heads).float(), Visibility(1, length, length - 1)
    names = [arm for arm in arms(topks, length, int8=True) if arm != "dense"]
    turns = dict.fromkeys([*DENSE_TOKEN, *names], 0)

    def call(arm: str) -> torch.Tensor:
        turns[arm] += 1
        k, v, *index_k = caches[turns[arm] % len(caches)]
        if arm in DENSE_TOKEN:
            return DENSE_TOKEN[arm](q, k, v)
        layer.config.index_topk = topk_of(arm)
        index = index_q, index_k["int8" in arm], weights
        return sparse_attention(q, k, v, layer.select(index, q, k, visible), layer.scaling)

    times = in_turn({arm: lambda arm=arm: call(arm) for arm in turns}, repeats)
    bounds = {arm: token_bounds(shape, length, arm, width, whole=False) for arm in names}
    return {"length": length} | compared(times, bounds)


def token_bounds(shape: Shape, length: int, arm: str, width: int, whole: bool = True) -> dict[str, float]:
    """Bounds of a decoded token's ratio, of a whole model or of its attention alone."""
    weights = [shape.linear(dsa) + shape.hidden * shape.vocab if whole else 0 for dsa in (False, True)]
    macs = [w + shape.keys(length, topk) for w, topk in zip(weights, (None, topk_of(arm)), strict=True)]
    read = [shape.read(length, None, width, weights=whole)]
    read.append(shape.read(length, topk_of(arm), width, "int8" in arm, weights=whole))
    return {"multiply_adds": round(macs[0] / macs[1], 2), "bytes": round(read[0] / read[1], 2)}


def filled_cache(model: Qwen2DSAForCausalLM, length: int, batch: int = 1) -> DynamicCache:
    """A cache of random keys, values and index keys, instead of a long prefill."""
    config = model.config
    cache = growing(DynamicCache(config=config))
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    generator = torch.Generator().manual_seed(length)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(model.device, model.dtype)

    for layer in cache.layers:
        layer.update(random(*shape), random(*shape))
        if config.attention_mode == "sparse":
            keys = random(batch, length, config.index_head_dim)
            layer.update_indexer(pack_int8(keys) if config.index_key_dtype == "int8" else keys)
    return cache


@torch.no_grad()
def decoding(
    shape: Shape, length: int, topks: list[int], dtype: torch.dtype, repeats: int, layers=None, generate: int = 0
) -> dict:
    """One token of a whole model, or of so many layers, behind `length` tokens in its cache; or, with `generate`, so
    many tokens through transformers' `generate`, milliseconds a token."""
    shape = shape if layers is None else replace(shape, layers=layers, vocab=16)
    model = model_of(shape, max(topks), dtype).eval()
    model.generation_config.eos_token_id = None
    found, caches = arms(topks, length, int8=True, grouped=True), {}
    for arm, settings in found.items():
        switch(model, **settings)
        caches[arm] = filled_cache(model, length)
    ids = torch.zeros(1, length + 1, dtype=torch.long, device=DEVICE)
    mask = torch.ones_like(ids)  # from its length `generate` knows how much of the ids is in the cache

    def call(arm: str) -> None:
        switch(model, **found[arm])
        cache = caches[arm]
        if extra := cache.get_seq_length() - length:
            cache.crop(-extra)
        if generate:
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=generate, do_sample=False)
        else:
            model(ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    times = in_turn({arm: lambda arm=arm: call(arm) for arm in found}, repeats)
    for t in times.values():
        t.update({name: round(value / max(1, generate), 4) for name, value in t.items()})
    bounds = {arm: token_bounds(shape, length, arm, dtype.itemsize) for arm in found if not arm.startswith("dense")}
    return {"length": length} | compared(times, bounds)
