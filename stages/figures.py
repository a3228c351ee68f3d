"""The report's figures: each takes numbers and a path, and draws one picture that a stranger understands."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from stages.arms import ARMS, COLORS, LABELS, TRAINED
from stages.statistics import MARGIN, mean_interval, ratio_interval

BIN = 128  # positions

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.08,
        "font.size": 10,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "dsa",
    }
)


def line(arm: str) -> dict:
    """How an arm's line is drawn, and its label."""
    return {"color": COLORS[arm], "label": LABELS[arm], **ARMS[arm].line}


def plain_log(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def by_position(positions: np.ndarray, units: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """Mean and half of the 95 % interval of per-token values in bins of `BIN` positions that enough units have."""
    frame = pd.DataFrame({"bin": positions // BIN, "unit": units, "value": values})
    cells = frame.groupby(["bin", "unit"])["value"].agg(["sum", "count"]).reset_index()

    def ratio(cell: pd.DataFrame) -> pd.Series:
        mean, half = ratio_interval(cell["sum"].to_numpy(), cell["count"].to_numpy())
        return pd.Series({"mean": mean, "half": half, "units": len(cell)})

    table = cells.groupby("bin")[["sum", "count"]].apply(ratio)
    table["position"] = table.index * BIN + BIN / 2
    return table[table["units"] >= 5]


def loss_by_position(nll: dict[str, np.ndarray], positions, units, topk: int, path: Path) -> None:
    """Left: loss of each trained arm. Right: its difference from dense attention, token by token, on an axis that is
    linear near the margin of equivalence and logarithmic beyond, where the window is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for arm, values in nll.items():
        table = by_position(positions, units, values)
        left.plot(table["position"], table["mean"], **line(arm))
        if arm != "dense":
            gap = by_position(positions, units, values - nll["dense"])
            right.plot(gap["position"], gap["mean"], **line(arm))
            band = gap["mean"] - gap["half"], gap["mean"] + gap["half"]
            right.fill_between(gap["position"], *band, color=COLORS[arm], alpha=0.2, linewidth=0)
    for axis in (left, right):
        axis.axvline(topk, color="#999999", linestyle=":")
        axis.set_xlabel("position in the sequence (tokens)")
    right.axhline(0, color="#222222", linewidth=1)
    right.axhspan(-MARGIN, MARGIN, color="#999999", alpha=0.15, linewidth=0, label=f"± {MARGIN}, counts as equal")
    right.set_yscale("symlog", linthresh=2 * MARGIN, linscale=1.5)
    right.yaxis.set_major_locator(FixedLocator([-0.1, -0.05, -0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]))
    right.yaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
    right.yaxis.set_minor_formatter(NullFormatter())
    right.annotate(f" k = {topk}", (topk, right.get_ylim()[0]), va="bottom", color="#777777")
    left.set_ylabel("held-out loss (nats per token)")
    right.set_ylabel("loss minus dense (nats per token)")
    left.legend()
    right.legend()
    figure.suptitle("What sparse attention costs in quality, by position (bands: 95 % intervals)")
    save(figure, path)


def payoff(budgets: pd.DataFrame, topk: int, length: int, path: Path) -> None:
    """Quality against cost of one set of weights: dense attention, DSA and a window at several k. Left exact answers,
    right the loss; across, the time of a token in prefill, or k where no time was measured."""
    timed, asks = budgets["ms"].notna().all(), "pairs" in budgets
    panels = ["pairs", "gap"] if asks else ["gap"]
    budgets = budgets.assign(gap=[mean for mean, _ in budgets["gap"]])
    across = 1e3 * budgets["ms"] if timed else budgets["topk"].fillna(length)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.7 * len(panels), 4.4), squeeze=False)
    looks = {"dense": ("dense", "D"), "dsa": ("dsa", "o"), "window": ("window_trained", "s")}
    for axis, what in zip(axes[0], panels, strict=True):
        for arm, (color, marker) in looks.items():
            rows = budgets[budgets["arm"] == arm]
            x, y = across[rows.index], rows[what] * (100 if what == "pairs" else 1)
            axis.plot(
                x, y, color=COLORS[color], marker=marker, label=LABELS[arm], linestyle="-" if arm != "dense" else ""
            )
            for number, (place, k, height) in enumerate(zip(x, rows["topk"], y, strict=True)):
                name = "all keys" if arm == "dense" else f"k={k:.0f}" if k == topk else f"{k:.0f}"
                above = 7 if number % 2 == 0 else -15  # so that neighbours do not lie on each other
                axis.annotate(name, (place, height), xytext=(0, above), textcoords="offset points", ha="center",
                              fontsize=8, color=COLORS[color], weight="bold" if k == topk else "normal")  # fmt: skip
        if not timed:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(f"prefill, microseconds a token at {length:,} tokens" if timed else "k, keys per query")
        axis.margins(y=0.12)
        if timed:
            axis.set_xlim(left=0)
    if asks:
        axes[0, 0].set_ylabel("key-value pairs found exactly (%)")
        axes[0, 0].set_ylim(-10, 110)
    axes[0, -1].axhline(0, color=COLORS["dense"], linewidth=0.8)
    axes[0, -1].set_ylabel("answer loss minus dense (nats per token)")
    axes[0, -1].legend(loc="upper right")  # where neither curve comes
    figure.suptitle(f"One set of weights, trained with k = {topk}: what attention to fewer keys saves and costs")
    save(figure, path)


def mass_by_layer(selections: dict[str, dict], topk: int, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    layers = np.arange(len(selections["dsa"]["mass"]))
    for shift, (arm, values) in zip((-0.25, 0.05), selections.items(), strict=True):
        left.bar(layers + shift, values["mass"], width=0.28, color=COLORS[arm], label=f"indexer, {LABELS[arm]}")
        right.bar(layers + shift, values["recall"], width=0.28, color=COLORS[arm], label=LABELS[arm])
    best = selections["dsa"]["oracle_mass"]
    left.hlines(best, layers - 0.4, layers + 0.2, color=COLORS["oracle"], linewidth=2, label="best k keys, DSA model")
    left.set_ylabel(f"share of attention on the {topk} keys")
    right.set_ylabel(f"recall of the best {topk} keys")
    for axis in (left, right):
        axis.set_xticks(layers, [f"layer {i}" if len(layers) < 9 else str(i) for i in layers])
        axis.set_ylim(0, 1)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)
    figure.suptitle("How much of what attention wants the indexer finds")
    save(figure, path)


def training_curves(curves: dict[str, pd.DataFrame], path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 4))
    for arm in TRAINED:
        curve = curves[ARMS[arm].trained_by]
        left.plot(curve["step"], curve["lm_loss"], color=COLORS[arm], alpha=0.2)
        left.plot(curve["step"], curve["lm_loss"].rolling(8, min_periods=1).mean(), **line(arm))
    left.set_ylabel("training loss on answers (nats per token)")
    left.set_title("each step pale, mean of eight steps dark", fontsize=10)
    left.legend()
    begun = curves["warmup"]["step"].max() if len(curves["warmup"]) else 0
    for stage, arm, start in (("warmup", "warmup", 0), ("sparse", "dsa", begun)):
        if "kl" not in curves[stage]:  # the indexer was frozen
            continue
        name = "dense warm-up, over all keys" if stage == "warmup" else "sparse training, over selected keys"
        middle.plot(curves[stage]["step"] + start, curves[stage]["kl"], color=COLORS[arm], label=name)
    middle.set_ylabel("indexer KL (nats, mean of layers)")
    middle.set_yscale("log")
    plain_log(middle.yaxis)
    middle.legend(loc="upper right", fontsize=8)
    names = {c for stage in ("warmup", "sparse") for c in curves[stage] if c.startswith("mass_layer_")}
    layers = sorted(int(name.removeprefix("mass_layer_")) for name in names)
    for i in layers:
        name = f"mass_layer_{i}"
        warmup, sparse = (curves[stage].reindex(columns=["step", name]).dropna() for stage in ("warmup", "sparse"))
        mass = pd.concat([warmup, sparse.assign(step=lambda c: c["step"] + begun)])
        shade = plt.cm.viridis(i / max(1, len(layers) - 0.5))
        right.plot(mass["step"], mass[name], marker=".", color=shade, label=f"layer {i}")
    right.axvline(begun, color="#999999", linestyle=":")
    right.set_ylim(0, 1)
    right.set_ylabel("share of attention on the indexer's best keys")
    right.set_title("an eighth of the keys, one held-out row", fontsize=10)
    right.legend(ncols=1 + len(layers) // 9)
    for axis, text in ((left, "step"), (middle, "step (warm-up, then sparse)"), (right, "step (warm-up | sparse)")):
        axis.set_xlabel(text)
    save(figure, path)


def base_curve(curve: pd.DataFrame, path: Path) -> None:
    """curve: the loss by kind of row, on what each row is asked for; means of 25 steps."""
    figure, axis = plt.subplots(figsize=(7.5, 3.5))
    for name in sorted(c for c in curve if c.startswith("loss_")):
        smooth = curve[name].rolling(4, min_periods=1).mean()
        axis.plot(curve["tokens"] / 1e6, smooth, label=name.removeprefix("loss_"))
    axis.set_xlabel("tokens (millions)")
    axis.set_ylabel("training loss (nats per token)")
    axis.set_ylim(bottom=0)
    axis.legend(ncols=3)
    save(figure, path)


def row_lengths(histogram: dict[str, int], least: int, longest: int, path: Path) -> None:
    """histogram: rows by tokens, {"256-511": 7}; rows over `least` tokens are kept, and cut at `longest`."""
    figure, axis = plt.subplots(figsize=(7.5, 2.8))
    ends = np.array([[int(end) for end in name.split("-")] for name in histogram]).reshape(-1, 2)
    axis.bar(ends[:, 0], histogram.values(), width=ends[:, 1] + 1 - ends[:, 0], align="edge", color=COLORS["base"])
    for at, style, label in ((least, ":", "kept: longer than"), (longest, "--", "cut to")):
        axis.axvline(at, color=COLORS["dense"], linestyle=style, label=f"{label} {at} tokens")
    axis.set_yscale("log")  # a few rows are very long
    plain_log(axis.yaxis)
    axis.set_xlabel("tokens of an instruction row")
    axis.set_ylabel("rows")
    axis.legend()
    save(figure, path)


def retrieval_by_distance(
    distance: np.ndarray, units: np.ndarray, shares: dict[str, np.ndarray], topk: int, path: Path
) -> None:
    edges = np.array([0, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 1 << 20])
    edges = edges[: np.searchsorted(edges, distance.max(initial=1), side="right") + 1]
    figure, axis = plt.subplots(figsize=(7.5, 4))
    which = np.digitize(distance, edges) - 1
    bins = [b for b in range(len(edges) - 1) if (which == b).sum() >= 8]
    for place, (arm, share) in enumerate(shares.items()):
        mean, half = np.array([mean_interval(share[which == b], units[which == b]) for b in bins]).T.reshape(2, -1)
        at = np.arange(len(bins)) + 0.08 * (place - 1)  # beside each other
        axis.errorbar(at, 100 * mean, 100 * half, **line(arm) | {"linewidth": 1.5}, marker="osD"[place])
    names = [f"{edges[b]}–{min(edges[b + 1], distance.max())}\nn={(which == b).sum()}" for b in bins]
    axis.set_xticks(range(len(bins)), names)
    axis.set_xlabel(f"tokens between the definition and the answer (k = {topk})")
    axis.set_ylabel("answer tokens right (%)")
    axis.set_title("Looking a definition up, by distance (bars: 95 % intervals)")
    axis.set_ylim(0, 100)
    axis.legend()
    save(figure, path)


def heatmap(wanted: np.ndarray, offered: np.ndarray, layer: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    first = wanted.shape[1] - wanted.shape[0]
    titles = (
        f"what attention wanted (layer {layer}, mean of heads)",
        "what the indexer offers (softmax of its scores)",
    )
    for axis, values, title in zip(axes, (wanted, offered), titles, strict=True):
        values = np.log10(np.maximum(values.astype(np.float32), 1e-5))
        image = axis.imshow(
            values, aspect="auto", cmap="magma", vmin=-5, vmax=-1, extent=(0, wanted.shape[1], wanted.shape[1], first)
        )
        axis.set_title(title)
        axis.set_xlabel("key position")
        axis.grid(False)
    axes[0].set_ylabel("query position")
    figure.colorbar(image, ax=axes, label="log10 of the probability", fraction=0.03)
    save(figure, path)


KINDS = {  # of stages/benchmark.py's tables
    "layer_attention": "selection and attention, a layer of Qwen2.5-0.5B",
    "layer_prefill": "prefill, that layer with projections and MLP",
    "layer_train": "forward and backward, that layer",
    "layer_decode": "a decoded token, that layer",
    "model_prefill": "prefill, small model",
    "model_train": "forward and backward, small model",
    "model_decode": "a decoded token, small model",
    "model_generate": "a decoded token through generate, small model",
}


def dense_over_dsa(cost: dict, path: Path) -> None:
    """How many times as fast as dense attention DSA is with the fewest keys: a bar a measurement, a mark its bound."""
    arm, rows = f"dsa_{cost['topk'][0]}", []
    for kind, label in KINDS.items():
        for suffix, number in (("", "float32"), ("_bf16", "bfloat16")):
            rows += [
                (f"{label}, {row['length'] // 1024}K", number, row["ratio"][arm], row["bound"][arm])
                for row in cost["tables"].get(kind + suffix, [])
                if arm in row["ratio"]
            ]
    places = {name: -i for i, name in enumerate(dict.fromkeys(name for name, *_ in rows))}
    figure, axis = plt.subplots(figsize=(10, 0.42 * len(places) + 1.4))
    colors = {"float32": COLORS["dsa"], "bfloat16": COLORS["warmup"]}
    types = list(dict.fromkeys(number for _, number, *_ in rows))
    for number, shift in zip(types, (0.2, -0.2) if len(types) > 1 else (0.0,), strict=True):
        own = [(places[name] + shift, ratio, bound) for name, n, ratio, bound in rows if n == number]
        axis.barh([y for y, *_ in own], [r for _, r, _ in own], height=0.36, color=colors[number], label=number)
        for y, ratio, bound in own:
            limit = bound["bytes"] if isinstance(bound, dict) else bound
            axis.plot([limit, limit], [y - 0.2, y + 0.2], color="#222222", linewidth=2)
            axis.annotate(f"{ratio:.2f}", (0.04, y), va="center", fontsize=8, color="white")
    axis.plot([], [], color="#222222", linewidth=2, label="bound, by multiply-adds; in decoding by bytes")
    axis.axvline(1, color="#999999", linestyle=":")
    axis.set_yticks(list(places.values()), list(places))
    axis.set_xlabel(f"time of dense attention / time of DSA, k = {cost['topk'][0]} (right of 1, DSA is faster)")
    axis.margins(y=0.02)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    save(figure, path)


def preference(curves: dict[str, pd.DataFrame], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for arm, curve in curves.items():
        left.plot(curve["step"], curve["loss"], **line(arm))
        right.plot(curve["step"], curve["rewards/margins"], **line(arm))
    left.axhline(np.log(2), color="#999999", linestyle=":", label="no preference, log 2")
    left.set_ylabel("DPO loss (nats per pair)")
    left.set_ylim(bottom=0)
    left.legend(loc="lower left")
    right.set_ylabel("reward margin on the training pairs")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)


def retrieval(grids: dict[str, list[dict]], topk: int, path: Path) -> None:
    """A heat map an arm and test: values found exactly, by length and by fifths of the depth. A line marks the latest k
    keys: what stands below it, a window reaches."""
    tests = list(dict.fromkeys(cell["test"] for cells in grids.values() for cell in cells))
    lengths = sorted({cell["length"] for cells in grids.values() for cell in cells})
    size = (1.2 + (0.6 + 0.75 * max(2, len(lengths))) * len(grids), 2.9 * len(tests))
    figure, axes = plt.subplots(len(tests), len(grids), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line_of_axes, test in zip(axes, tests, strict=True):
        for axis, cells in zip(line_of_axes, grids.values(), strict=True):
            table = pd.DataFrame({cell["length"]: cell["by_depth"] for cell in cells if cell["test"] == test})
            image = axis.imshow(100 * table, cmap="viridis", vmin=0, vmax=100, aspect="auto")
            for (y, x), value in np.ndenumerate(table.to_numpy()):
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
            for x, length in enumerate(table.columns):
                axis.hlines(5 * (1 - topk / length) - 0.5, x - 0.5, x + 0.5, color="w", linestyle=":", linewidth=1.5)
            axis.set_xticks(range(len(table.columns)), [f"{length:,}" for length in table.columns])
            axis.set_yticks(range(5), ["first fifth", "2nd", "3rd", "4th", "last fifth"])
            axis.grid(False)
        line_of_axes[0].set_ylabel(f"{test}: where they stand")
    for axis, arm in zip(axes[0], grids, strict=True):
        axis.set_title(LABELS[arm], fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of the row")
    figure.colorbar(image, ax=axes, label="found exactly (%)", fraction=0.03)
    save(figure, path)
