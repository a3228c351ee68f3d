"""What an indexer without one of its parts, or with another choice, is worth: each ablation is a few config fields.

`-S ablation=<name>` trains one. Names: a reader of the paper asks "is X needed?".
"""

NAMES = (
    "none",
    "no_relu",
    "no_key_norm",
    "rope_none",
    "rope_all",
    "attached",
    "no_kl",
    "dense_first",
    "dense_ends",
    "shared_2",
    "shared_4",
    "per_kv_head",
)


def fields(name: str, head_dim: int) -> dict:
    """The fields of `Qwen2DSAConfig` that an ablation sets. "no_kl" sets none: in the sparse stage the indexer is
    frozen, as the warm-up left it."""
    return {
        "none": {},
        "no_relu": {"index_relu": False},
        "no_key_norm": {"index_key_norm": False},
        "rope_none": {"index_rope_dim": 0},
        "rope_all": {"index_rope_dim": head_dim},
        "attached": {"index_detach": False},
        "no_kl": {},
        "dense_first": {"index_dense_layers": [0]},
        "dense_ends": {"index_dense_layers": [0, -1]},
        "shared_2": {"index_share": 2},
        "shared_4": {"index_share": 4},
        "per_kv_head": {"index_per_kv_head": True},
    }[name]
