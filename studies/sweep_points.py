"""The points of the sweeps: what each experiment sets, and the plan of those that answer the questions."""

from dataclasses import dataclass
from itertools import product
from typing import get_args

from stages import params

TOPK = (32, 64, 128, 256, 512, 1024)
INDEXERS = ((1, 16), (1, 32), (2, 16), (2, 32), (4, 16), (4, 32), (2, 64), (16, 16))  # heads x size
SCARCE_TOPK = (64,)  # of the groups below the first: a bad choice of keys costs more where they are few
WARMUP = (0, 25, 50, 100, 200)  # steps
ABLATIONS = get_args(params.Ablation)
SEEDS = (0, 1, 2)
GROUPS = ("topk", "indexer", "warmup", "ablation")


@dataclass(frozen=True)
class Point:
    """What varies from experiment to experiment."""

    topk: int
    n_heads: int
    head_dim: int
    warmup_steps: int
    seed: int
    ablation: str = "none"

    def name(self, profile: str) -> str:
        name = f"{profile}-k{self.topk}-i{self.n_heads}x{self.head_dim}-w{self.warmup_steps}-s{self.seed}"
        return name if self.ablation == "none" else f"{name}-{self.ablation.replace('_', '-')}"

    def settings(self, profile: str) -> list[str]:
        """The values of `dvc exp run -S`."""
        return [
            f"profile={profile}",
            f"seed={self.seed}",
            f"topk={self.topk}",
            f"indexer.n_heads={self.n_heads}",
            f"indexer.head_dim={self.head_dim}",
            *([f"ablation={self.ablation}"] if self.ablation != "none" else []),
            f"profiles/{profile}.yaml:warmup.steps={self.warmup_steps}",
        ]

    def command(self, profile: str) -> list[str]:
        settings = [part for setting in self.settings(profile) for part in ("-S", setting)]
        return ["dvc", "exp", "run", "--queue", "-n", self.name(profile), *settings, "compare"]


def base_point(profile: str) -> Point:
    """The default of every knob: what a group of points leaves as it is."""
    p = params.load(profile=profile)
    return Point(p.topk, p.indexer.n_heads, p.indexer.head_dim, p.warmup.steps, p.seed, p.ablation)


def plan(base: Point, topk=TOPK, seeds=SEEDS) -> dict[str, list[Point]]:
    """The points of each group, seed by seed. A point may be in several groups; it is one experiment."""
    size = (base.n_heads, base.head_dim)
    return {
        "topk": [Point(k, *size, base.warmup_steps, s) for s, k in product(seeds, topk)],
        "indexer": [Point(k, *i, base.warmup_steps, s) for k, s, i in product(SCARCE_TOPK, seeds, INDEXERS)],
        "warmup": [Point(k, *size, steps, s) for k, s, steps in product(SCARCE_TOPK, seeds, WARMUP)],
        "ablation": [
            Point(k, *size, base.warmup_steps, s, name) for k, s, name in product(SCARCE_TOPK, seeds, ABLATIONS)
        ],
    }
