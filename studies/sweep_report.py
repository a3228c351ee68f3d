"""reports/sweep.md and its figures from the sweep's experiments (studies/sweep.py): tables, intervals, sentences.

Other seeds would train other models, and other file families ask for other things: a bootstrap draws both anew, and
each interval holds what the two do together. Of several comparisons in a table p is corrected (Holm).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator
from scipy import stats

from stages.arms import COLORS
from stages.figures import plt, save
from stages.statistics import LEVEL, MARGIN, holm, quantile
from studies.common import render
from studies.sweep_points import ABLATIONS, SCARCE_TOPK, Point, plan

DRAWS = 4_000  # of the bootstrap
CHANGES = {  # what each does: those of dsa/ablations.py, and those that the model had once
    "none": "the paper's indexer",
    "no_relu": "no ReLU: scores are linear in the key",
    "no_key_norm": "no LayerNorm on the index key",
    "rope_none": "no RoPE in the indexer",
    "rope_all": "RoPE on the whole index head, not on half of it",
    "attached": "the indexer's input not detached: its KL trains the backbone too",
    "no_kl": "no KL in the sparse stage: the indexer stays as the warm-up left it",
    "dense_first": "the first layer dense",
    "dense_ends": "the first and the last layer dense",
    "shared_2": "one selection for two neighbouring layers",
    "shared_4": "one selection for four neighbouring layers",
    "per_kv_head": "a selection for each key-value head, by its share of the index heads",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and rows, its 95 % interval, and p that it is 0 and that it is `MARGIN` or more."""

    mean: float
    low: float
    high: float
    p: float
    p_large: float
    seeds: int

    def __mul__(self, factor: float) -> "Estimate":
        return replace(self, **{name: factor * getattr(self, name) for name in ("mean", "low", "high")})


def over_seeds(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of [seeds]; NaN of a single one, which tells nothing of others."""
    n = len(values)
    return float(quantile(n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else np.nan


def estimate(sums: np.ndarray, counts: np.ndarray, families: np.ndarray) -> Estimate:
    """From the sums of each seed and row [seeds, rows] and the counts and families of each row [rows].

    The standard error is that of a bootstrap that draws seeds and families at once (Owen 2007), of n seeds n - 1, and
    so of the families, which makes its variance unbiased (Rao and Wu 1988). Student's t has the degrees of freedom of
    the seeds' part and the families' part together (Satterthwaite): three seeds say little of their own spread.
    """
    units = np.unique(families, return_inverse=True)[1]
    n, by_family = np.bincount(units, counts), np.stack([np.bincount(units, row) for row in sums])
    n, by_family = n[n > 0], by_family[:, n > 0]
    seeds, count = by_family.shape
    mean = float(sums.sum() / counts.sum() / seeds)
    rng = np.random.default_rng(0)

    def drawn(of: int) -> np.ndarray:
        return rng.multinomial(of - 1, np.full(of, 1 / of), DRAWS) if of > 1 else np.ones((DRAWS, 1))

    s, f = drawn(seeds), drawn(count)
    variance = (((s @ by_family) * f).sum(1) / s.sum(1) / (f @ n)).var()
    of_seeds = (sums.sum(1) / counts.sum()).var(ddof=1) / seeds if seeds > 1 else 0.0
    of_seeds = min(of_seeds, variance)
    parts = of_seeds**2 / max(1, seeds - 1) + (variance - of_seeds) ** 2 / max(1, count - 1)
    if not parts > 0:  # every seed and family has the same
        return Estimate(mean, mean, mean, float(mean == 0), float(mean >= MARGIN), seeds)
    error, freedom = variance**0.5, variance**2 / parts
    half = quantile(freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom), stats.t.cdf((mean - MARGIN) / error, freedom)
    return Estimate(mean, mean - half, mean + half, *map(float, p), seeds)


def indexer_cost(n_heads: int, head_dim: int, hidden: int, context: int) -> dict[str, int]:
    """Of a token in a layer: bytes of its key in the cache (bfloat16), and FLOPs of its projections and of scoring
    `context` keys, multiply-adds twice."""
    projections = hidden * (n_heads * head_dim + head_dim + n_heads)
    return {"bytes": 2 * head_dim, "flops": 2 * (projections + n_heads * head_dim * context)}


class Sweep:
    """The experiments by what they vary, each point with all of its seeds."""

    def __init__(self, sweep: dict):
        self.sweep = sweep
        self.base = Point(**sweep["base"])
        self.counts = {name: np.array(sweep["rows"][name], float) for name in ("tokens", "lookups")}
        self.families = np.array(sweep["rows"].get("family", range(len(self.counts["tokens"]))))
        self.points: dict[tuple, dict[int, dict]] = {}
        for row in sweep["experiments"]:
            self.points.setdefault(self.key(Point(*(row[k] for k in Point.__dataclass_fields__))), {})[row["seed"]] = (
                row
            )

    @staticmethod
    def key(point: Point) -> tuple:
        return point.topk, point.n_heads, point.head_dim, point.warmup_steps, point.ablation

    def rows(self, point: Point) -> dict[int, dict]:
        """{seed: experiment}."""
        return self.points.get(self.key(point), {})

    def paired(self, what: str, point: Point, reference: Point | None = None) -> Estimate | None:
        """DSA minus dense attention on the same rows, or that of a point minus that of the reference, seed by seed.

        Dense attention of a seed is the same in both, so the latter is the difference of the two DSA models. None where
        they have no seed in common.
        """
        counts = self.counts["tokens" if what == "gap" else "lookups"]
        ours, theirs = self.rows(point), self.rows(reference) if reference else None
        seeds = [s for s in sorted(ours) if theirs is None or s in theirs]
        if not seeds or not counts.sum():
            return None
        sums = np.array([ours[s]["rows"][what] for s in seeds], float)
        if theirs is not None:
            sums -= np.array([theirs[s]["rows"][what] for s in seeds], float)
        return estimate(sums, counts, self.families)

    def mean(self, name: str, point: Point) -> tuple[float, float]:
        """A metric's mean over seeds, and half of its 95 % interval."""
        values = np.array([row["metrics"][name] for row in self.rows(point).values()], float)
        return float(values.mean()), over_seeds(values)

    def line(self, point: Point, reference: Point) -> dict:
        """A line of a table."""
        share = self.paired("share_gap", point)
        return {
            "point": point,
            "size": f"{point.n_heads} × {point.head_dim}",
            **indexer_cost(point.n_heads, point.head_dim, self.sweep["hidden_size"], self.sweep["context"]),
            "gap": self.paired("gap", point),
            "beyond": self.mean("gap_beyond_k", point),
            "share": tuple(100 * x for x in self.mean("share", point)),
            "share_gap": share * 100 if share else None,
            "mass": self.mean("mass", point),
            "oracle_mass": self.mean("oracle_mass", point),
            "change": self.paired("gap", point, reference) if point != reference else None,
        }

    def table(self, group: str, knob: Callable[[Point], tuple], topk: int | None = None) -> list[dict]:
        """The points of a group that ran, in the order of its knob, each beside the base at its own k.

        topk: the group's; of the group topk, whose knob it is, the reference has the base's.
        """
        reference = replace(self.base, topk=topk or self.base.topk)
        lines = [self.line(point, reference) for point in sorted(self.varied(group, topk), key=knob)]
        for what in ("gap", "change"):
            compared = [line for line in lines if line[what] is not None]
            for line, p in zip(compared, holm([line[what].p for line in compared]), strict=True):
                line[f"{what}_p"] = float(p)
        return lines

    def varied(self, group: str, topk: int | None) -> list[Point]:
        """What ran and differs from the base in nothing but k and what the group varies; the seed is of no meaning."""
        fixed = {"topk": (1, 2, 3, 4), "indexer": (3, 4), "warmup": (1, 2, 4), "ablation": (1, 2, 3)}[group]
        base = self.key(self.base)
        ran = [key for key in self.points if all(key[i] == base[i] for i in fixed) and topk in (key[0], None)]
        return [Point(*key[:4], seed=self.base.seed, ablation=key[4]) for key in ran]

    def tables(self, group: str, knob: Callable[[Point], tuple]) -> dict[int, list[dict]]:
        """{k: table} of a group below the first, where more than the base ran."""
        tables = {topk: self.table(group, knob, topk) for topk in SCARCE_TOPK}
        return {topk: table for topk, table in tables.items() if len(table) > 1}

    def missing(self) -> list[str]:
        """The points of the plan without an experiment."""
        points = dict.fromkeys(point for group in plan(self.base).values() for point in group)
        return [p.name(self.sweep["profile"]) for p in points if p.seed not in self.rows(p)]


def pareto(table: list[dict], cost: str) -> list[dict]:
    """The lines that no other beats: none is as cheap with a smaller gap, or cheaper with as small a one."""
    front, best = [], np.inf
    for line in sorted(table, key=lambda line: (line[cost], line["gap"].mean)):
        if line["gap"].mean < best:
            front.append(line)
            best = line["gap"].mean
    return front


def verdicts(table: list[dict], what: str) -> dict[str, list[dict]]:
    """The lines by what is shown of the difference `what`, p corrected for all comparisons of the table: within (less
    than the margin is lost), worse (something is, and it may be that much), open (the rest). The reference is in none.
    """
    lines: dict[str, list[dict]] = {"within": [], "worse": [], "open": []}
    compared = [line for line in table if line[what] is not None]
    small = holm([line[what].p_large for line in compared]) < (1 - LEVEL) / 2
    for line, within in zip(compared, small, strict=True):
        worse = line[f"{what}_p"] < 1 - LEVEL and line[what].mean > 0
        lines["within" if within else "worse" if worse else "open"].append(line)
    return lines


def halves(estimates: list[Estimate]) -> list[float]:
    """Of their intervals, which are symmetric."""
    return [e.high - e.mean for e in estimates]


def draw_topk(table: list[dict], base: Point, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    ks = [line["point"].topk for line in table]
    gap = [line["gap"] for line in table]
    axes[0].errorbar(ks, [e.mean for e in gap], halves(gap), color=COLORS["dsa"], marker="o")
    axes[0].axhline(0, color=COLORS["dense"], linewidth=1)
    axes[0].axhline(MARGIN, color="#999999", linestyle=":")
    axes[0].set_ylabel("answer loss minus dense (nats a token)")
    if table[0]["share_gap"]:
        share = [line["share_gap"] for line in table]
        axes[1].errorbar(ks, [e.mean for e in share], halves(share), color=COLORS["dsa"], marker="o")
    axes[1].axhline(0, color=COLORS["dense"], linewidth=1)
    axes[1].set_ylabel("look-up tokens right, minus dense (points)")
    for name, color, marker, label in (
        ("mass", "dsa", "o", "indexer's k keys"),
        ("oracle_mass", "oracle", "s", "best k keys"),
    ):
        values = np.array([line[name] for line in table])
        axes[2].errorbar(ks, values[:, 0], values[:, 1], color=COLORS[color], marker=marker, label=label)
    axes[2].set_ylabel("mass@k, share of attention")
    axes[2].set_ylim(0, 1)
    axes[2].legend()
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.set_xlabel("k, trained for each")
        axis.axvline(base.topk, color="#999999", linestyle=":")
    figure.suptitle("Quality against k (bars: 95 % intervals)")
    save(figure, path)


def draw_indexer(tables: dict[int, list[dict]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, cost, label in zip(
        axes, ("flops", "bytes"), ("FLOPs a token and layer", "bytes a token and layer"), strict=True
    ):
        for (topk, table), color in zip(tables.items(), ("dsa", "window_trained", "oracle", "warmup"), strict=False):
            gap = [line["gap"] for line in table]
            axis.errorbar(
                [line[cost] for line in table],
                [e.mean for e in gap],
                halves(gap),
                color=COLORS[color],
                marker="o",
                linestyle="",
                label=f"k = {topk}",
            )
            front = pareto(table, cost)
            steps = [line[cost] for line in front], [line["gap"].mean for line in front]
            axis.step(*steps, where="post", color=COLORS[color], linewidth=1, linestyle="--", alpha=0.6)
            for line in table:
                axis.annotate(
                    line["size"], (line[cost], line["gap"].mean), (4, 4), textcoords="offset points", fontsize=7
                )
        axis.set_xscale("log", base=2)
        axis.margins(x=0.12)  # for the labels
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 3)) if cost == "flops" else LogLocator(base=2))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.minorticks_off()
        axis.axhline(0, color=COLORS["dense"], linewidth=1)
        axis.set_xlabel(f"indexer: {label}")
        axis.legend()
    axes[0].set_ylabel("answer loss minus dense (nats a token)")
    figure.suptitle("Quality against the indexer's cost, heads × size (bars: 95 % intervals; dashed: Pareto front)")
    save(figure, path)


def draw_warmup(tables: dict[int, list[dict]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    lowest = 0.0
    for (topk, table), color in zip(tables.items(), ("dsa", "window_trained", "oracle", "warmup"), strict=False):
        steps = [line["point"].warmup_steps for line in table]
        gap = [line["gap"] for line in table]
        style = {"color": COLORS[color], "marker": "o", "label": f"k = {topk}"}
        axes[0].errorbar(steps, [e.mean for e in gap], halves(gap), **style)
        lowest = min(lowest, *(e.low for e in gap))
        mass = np.array([line["mass"] for line in table])
        axes[1].errorbar(steps, mass[:, 0], mass[:, 1], **style)
    axes[0].axhline(0, color=COLORS["dense"], linewidth=1)
    axes[0].set_yscale("symlog", linthresh=MARGIN)  # of both signs, over orders of magnitude
    axes[0].set_ylim(bottom=lowest)
    axes[0].set_ylabel("answer loss minus dense (nats a token)")
    axes[1].set_ylabel("mass@k after sparse training")
    axes[1].set_ylim(0, 1)
    for axis in axes:
        axis.set_xlabel("steps of dense warm-up")
        axis.legend()
    figure.suptitle("What the warm-up is worth (bars: 95 % intervals)")
    save(figure, path)


def draw_ablation(tables: dict[int, list[dict]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(10 * len(tables), 4.5), squeeze=False)
    for axis, (topk, table) in zip(axes[0], tables.items(), strict=True):
        lines = [line for line in table if line["change"]][::-1]
        for y, line in enumerate(lines):
            x = line["change"]
            axis.errorbar(x.mean, y, xerr=[[x.mean - x.low], [x.high - x.mean]], color=COLORS["dsa"], marker="o")
        axis.set_yticks(range(len(lines)), [CHANGES[line["point"].ablation] for line in lines], fontsize=8)
        axis.axvline(0, color=COLORS["dense"], linewidth=1)
        axis.axvline(MARGIN, color="#999999", linestyle=":")
        axis.set_xscale("symlog", linthresh=MARGIN)  # differences of both signs over orders of magnitude
        axis.set_xlabel(f"answer loss minus that of the paper's indexer (nats a token), k = {topk}")
    figure.suptitle("Ablations of the indexer (bars: 95 % intervals; to the left is better)")
    save(figure, path)


def stage_counts(logged: list[dict]) -> dict | None:
    """How often stages ran and were reused in the experiments that still have DVC's log; None where none has."""
    if not logged:
        return None
    ran = Counter(stage for row in logged for stage in row["ran"])
    reused = sum(len(row["reused"]) for row in logged)
    return {"experiments": len(logged), "ran": ran.total(), "reused": reused, "of": dict(ran.most_common())}


def write_report(sweep: dict, folder: Path) -> None:
    """sweep.md and sweep/*.png in a folder. What was not run is said, and left out."""
    s = Sweep(sweep)
    base = s.base
    topk = s.table("topk", lambda p: (p.topk,))
    indexer = s.tables("indexer", lambda p: (p.n_heads * p.head_dim, p.head_dim))
    warmup = s.tables("warmup", lambda p: (p.warmup_steps,))
    ablation = s.tables("ablation", lambda p: (list(CHANGES).index(p.ablation),))
    if len(topk) > 1:
        draw_topk(topk, base, folder / "sweep/topk.png")
    for draw, tables, name in (
        (draw_indexer, indexer, "indexer"),
        (draw_warmup, warmup, "warmup"),
        (draw_ablation, ablation, "ablation"),
    ):
        if tables:
            draw(tables, folder / f"sweep/{name}.png")
    ran = [row for row in sweep["experiments"] if row["ran"] is not None]
    context = {
        "sweep": sweep,
        "base": base,
        "seeds": sorted({row["seed"] for row in sweep["experiments"]}),
        "topk": topk if len(topk) > 1 else [],
        "topk_verdicts": verdicts(topk, "gap"),
        "indexer": indexer,
        "indexer_verdicts": {k: verdicts(table, "change") for k, table in indexer.items()},
        "base_flops": indexer_cost(base.n_heads, base.head_dim, sweep["hidden_size"], sweep["context"])["flops"],
        "fronts": {
            k: {cost: [line["size"] for line in pareto(table, cost)] for cost in ("flops", "bytes")}
            for k, table in indexer.items()
        },
        "warmup": warmup,
        "ablation": ablation,
        "what": CHANGES,
        "removed": {row["ablation"]: row["commit"] for row in sweep["experiments"] if row["ablation"] not in ABLATIONS},
        "commits": sorted({row["commit"] for row in sweep["experiments"]}),
        "devices": sorted({row["device"] for row in sweep["experiments"]}),
        "margin": MARGIN,
        "units": len(set(s.families)),
        "unit": ("family", "families") if "family" in sweep["rows"] else ("row", "rows"),
        "missing": s.missing(),
        "planned": len(sweep["experiments"]) + len(s.missing()),
        "command": " ".join(base.command(sweep["profile"])),
        "counts": stage_counts(ran),
        "tokens": int(s.counts["tokens"].sum()),
        "lookups": int(s.counts["lookups"].sum()),
    }
    text = render("sweep.md.jinja", context)
    (folder / "sweep.md").write_text(text, encoding="utf-8")
