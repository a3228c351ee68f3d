"""reports/long_context.md and its figures from the numbers of studies/long_context.py."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter

from stages.arms import COLORS, LABELS
from stages.figures import line, plt, save
from stages.lock import made_elsewhere
from stages.statistics import MARGIN as TOLERANCE
from studies.common import render

TITLES = {
    "needle": "One needle",
    "multikey": "One of several needles",
    "kv": "Key-value retrieval",
}


def side(e: dict) -> int:
    """Of which side of 0 an interval is: 1 above, -1 below, 0 where it holds 0."""
    return int(e["low"] > 0) - int(e["high"] < 0)


def verdict(gaps: dict) -> str:
    """What the differences of an arm from dense attention say, by the two measures that are no yes or no."""
    words = {-1: ("fewer tokens right", "a lower loss"), 1: ("more tokens right", "a higher loss")}
    sides = [side(gaps["tokens"]), side(gaps["nats"])]
    told = [words[s][i] for i, s in enumerate(sides) if s]
    if len(told) == 2:
        return f"{told[0]} and {told[1]}"
    if told:
        return f"{told[0]}; the {'loss' if sides[0] else 'share of tokens right'} is not told apart"
    return "not told apart"


def draw_heatmap(task: dict, arms: list[str], title: str, trained: int, path: Path) -> None:
    """Arms side by side, depth by length; above the share of tokens right, below their loss, each on one scale."""
    cells, lengths, depths = task["cells"], task["lengths"], task["depths"]
    losses = [np.array(cells[arm]["nats"], float) for arm in arms]
    top = float(np.nanmax(losses))
    figure, axes = plt.subplots(
        2,
        len(arms),
        figsize=(1.2 + (0.7 + 0.42 * len(lengths)) * len(arms), 5.2),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for panels, measure, scale, colors, label in (
        (axes[0], "tokens", 1.0, "viridis", "tokens right"),
        (axes[1], "nats", top, "viridis_r", "loss (nats a token)"),
    ):
        for axis, arm in zip(panels, arms, strict=True):
            values = np.array(cells[arm][measure], float)
            image = axis.imshow(values, cmap=colors, vmin=0, vmax=scale, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    dark = (value / scale < 0.6) == (measure == "tokens")
                    text = f"{100 * value:.0f}" if measure == "tokens" else f"{value:.1f}"
                    axis.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
            within = sum(n <= trained for n in lengths)
            if 0 < within < len(lengths):
                axis.axvline(within - 0.5, color=COLORS["dsa"], linewidth=2, linestyle="--")
            axis.grid(False)
            axis.set_xticks(range(len(lengths)), lengths, rotation=45 if len(lengths) > 3 else 0)
            axis.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
        ticks = PercentFormatter(scale) if measure == "tokens" else None
        figure.colorbar(image, ax=panels.tolist(), label=label, pad=0.01, format=ticks)
        panels[0].set_ylabel("depth of the fact")
    for axis, arm in zip(axes[0], arms, strict=True):
        axis.set_title(LABELS[arm], fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("tokens of the row")
    mark = f"; dashed: right of it, longer than the {trained} trained tokens" if lengths[-1] > trained else ""
    figure.suptitle(f"{title} (above: % of tokens right, below: loss{mark})", fontsize=11)
    save(figure, path)


def draw_extrapolation(found: dict, arms: list[str], trained: int, topk: int, path: Path) -> None:
    """Left: loss of each arm by position. Right: its paired difference from dense attention."""
    bins = found["bins"]
    at = np.array(
        [
            (b["from"] + after) / 2
            for b, after in zip(bins, [*(b["from"] for b in bins[1:]), found["positions"]], strict=True)
        ]
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for arm in arms:
        left.plot(at, [b["means"][arm] for b in bins], **line(arm), marker=".")
        if arm != "dense":
            e = [b["gaps"][arm] for b in bins]
            right.plot(at, [x["mean"] for x in e], **line(arm), marker=".")
            band = [x["low"] for x in e], [x["high"] for x in e]
            right.fill_between(at, *band, color=COLORS[arm], alpha=0.2, linewidth=0)
    for axis in (left, right):
        axis.axvline(topk, color="#999999", linestyle=":")
        if found["positions"] > trained:
            axis.axvline(trained, color="#555555", linestyle="--")
        axis.set_xlabel("position in the text (tokens)")
    right.axhline(0, color=COLORS["dense"], linewidth=1)
    low = left.get_ylim()[0]
    left.annotate(f" k = {topk}", (topk, low), va="bottom", color="#777777")
    if found["positions"] > trained:
        left.annotate(f" trained: {trained}", (trained, low), va="bottom", color="#555555")
    left.set_ylabel("loss (nats per token)")
    right.set_ylabel("loss minus dense (nats per token)")
    for axis in (left, right):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8)
    figure.suptitle(f"Loss by position, {found['documents']} held-out texts (band: 95 % interval over texts)")
    save(figure, path)


def write_report(found: dict, folder: Path) -> None:
    """long_context.md and long_context/*.png in a folder."""
    setup = found["setup"]
    arms, trained = setup["arms"], setup["trained"]
    tasks = [name for name in TITLES if name in found]
    for name in tasks:
        draw_heatmap(found[name], arms, TITLES[name], trained, folder / f"long_context/{name}.png")
    draw_extrapolation(found["extrapolation"], arms, trained, setup["topk"], folder / "long_context/extrapolation.png")
    context = {
        **found,
        "elsewhere": made_elsewhere(found["run"]),
        "tasks": {name: found[name] for name in tasks},
        "arms": arms,
        "others": arms[1:],
        "names": LABELS,
        "titles": TITLES,
        "tolerance": TOLERANCE,
    }
    text = render("long_context.md.jinja", context, verdict=verdict, side=side)
    (folder / "long_context.md").write_text(text + "\n", encoding="utf-8")
