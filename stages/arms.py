"""The one table of arms: what each query attends to, on whose weights, and how pages and figures name and draw it.

Arms of a group share a model; the stage `evaluate` runs a group at a time. Figures and pages list arms in this order.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """measures: what `evaluate` does with the model as it was trained, beside the losses of the arms.
    sparse: whether the experiment's k is of any effect."""

    model: str
    measures: tuple[str, ...] = ()
    sparse: bool = True


@dataclass(frozen=True)
class Arm:
    """changes: of the model's config. color: None where no figure has the arm. line: more of how its line is drawn.
    trained_by: the stage that trained the whole model under this very attention; such arms are scored on all held-out
    rows, the others on the first of them."""

    group: str
    label: str
    changes: dict = field(default_factory=dict)
    color: str | None = None
    line: dict = field(default_factory=dict)
    trained_by: str | None = None


def sparse(selector: str) -> dict:
    return {"attention_mode": "sparse", "selector": selector}


GROUPS = {
    "dense": Group("models/dense", ("generations", "retrieval", "floors"), sparse=False),
    "warmup": Group("models/warmup", ("selection",)),
    "dsa": Group("models/dsa", ("generations", "retrieval", "selection", "budgets", "heatmap")),
    "window": Group("models/window", ("retrieval",)),
    "dpo_dense": Group("models/dpo-dense", sparse=False),
    "dpo_dsa": Group("models/dpo-dsa"),
}
# Dashes so that arms are told apart without colour, and dense attention wide, under a line that lies on it.
ARMS = {
    "dense": Arm("dense", "dense attention", color="#222222", line={"linewidth": 3.5}, trained_by="dense"),
    "base": Arm("warmup", "base model, dense", color="#888888"),
    "oracle": Arm("warmup", "oracle top-k", sparse("oracle"), color="#66a182"),
    "warmup": Arm("warmup", "DSA, warm-up only", sparse("indexer"), color="#edae49"),
    "sink_window": Arm("warmup", "sink + recency window", sparse("sink_window")),
    "window": Arm("warmup", "recency window", sparse("window")),
    "random": Arm("warmup", "random keys", sparse("random")),
    "dsa": Arm("dsa", "DSA", sparse("indexer"), color="#d1495b", trained_by="sparse"),
    "dsa_oracle": Arm("dsa", "oracle top-k, DSA model", sparse("oracle"), color="#66a182"),
    "window_trained": Arm(
        "window",
        "recency window, trained",
        sparse("window"),
        color="#2e86ab",
        line={"linestyle": "--"},
        trained_by="window",
    ),
    "dpo_dense": Arm("dpo_dense", "dense attention after DPO"),
    "dpo_dsa": Arm("dpo_dsa", "DSA after DPO", sparse("indexer")),
}
PAIR = ("dense", "dsa")  # the two that are compared throughout: by `compare`, `dpo`, `harness` and side by side
RETRIEVING = ("dense", "dsa", "dsa_oracle", "window_trained")  # are asked for pairs and needles
TRAINED = tuple(name for name, arm in ARMS.items() if arm.trained_by)
UNTRAINED = tuple(name for name, arm in ARMS.items() if arm.group == "warmup")
LABELS = {name: arm.label for name, arm in ARMS.items()}
COLORS = {name: arm.color for name, arm in ARMS.items() if arm.color}


def budgets(topks: list[int]) -> dict[str, dict]:
    """What changes in the config of one set of weights, by name: `dense`, attention to all keys; and of each k
    `dsa_<k>`, the keys that the indexer scores highest, and `window_<k>`, the latest ones."""
    found: dict[str, dict] = {"dense": {"attention_mode": "dense"}}
    for arm, selector in (("dsa", "indexer"), ("window", "window")):
        found |= {f"{arm}_{k}": {**sparse(selector), "index_topk": k} for k in sorted(topks)}
    return found


def of(group: str) -> dict[str, Arm]:
    """The arms of a group, by name."""
    return {name: arm for name, arm in ARMS.items() if arm.group == group}


def model_of(arm: str) -> str:
    return GROUPS[ARMS[arm].group].model


def groups_of(*names: str) -> tuple[str, ...]:
    """The groups that hold these arms."""
    return tuple(dict.fromkeys(ARMS[name].group for name in names))
