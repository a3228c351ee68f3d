"""What an indexer without one of its parts, or with another choice, is worth: each ablation is a few config fields.

`-S ablation=<name>` trains one. Names: a reader of the paper asks "is X needed?".
"""


def variants(head_dim: int) -> dict[str, dict]:
    """{name: the fields of `DSAConfig` that it sets}. "no_kl" sets none: in the sparse stage the indexer is
    frozen, as the warm-up left it."""
    return {
        "none": {},
        "rope_none": {"index_rope_dim": 0},
        "rope_all": {"index_rope_dim": head_dim},
        "no_kl": {},
        "per_kv_head": {"index_per_kv_head": True},
    }


NAMES = tuple(variants(head_dim=0))


def fields(name: str, head_dim: int) -> dict:
    """The fields of one of `NAMES`."""
    return variants(head_dim)[name]
