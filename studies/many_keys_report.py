"""reports/many_keys.md and its figure from the numbers of studies/many_keys.py."""

from pathlib import Path

import numpy as np

from stages.arms import COLORS
from stages.figures import plt, save
from stages.lock import made_elsewhere
from studies.common import render

CHOICES = {"dsa": "DSA's indexer", "oracle": "oracle: the keys that attention wants most", "window": "the latest keys"}


def draw(found: dict, path: Path) -> None:
    """A panel a choice of keys, a line a k: right answers against the votes that were cast."""
    setup, right = found["setup"], found["right"]
    asked, shades = setup["asked"], plt.cm.plasma(np.linspace(0.15, 0.8, len(setup["topk"])))
    figure, axes = plt.subplots(1, len(CHOICES), figsize=(14, 4.2), sharey=True)

    def means(of: dict) -> list[float]:
        return [100 * of[str(m)]["mean"] for m in asked]

    for axis, (choice, title) in zip(axes, CHOICES.items(), strict=True):
        axis.plot(asked, means(right["dense"]), color=COLORS["dense"], linewidth=3.5, label="every key")
        for k, shade in zip(setup["topk"], shades, strict=True):
            of = right[f"{choice}_{k}"]
            low, high = (100 * np.array([of[str(m)][end] for m in asked]) for end in ("low", "high"))
            axis.plot(asked, means(of), color=shade, marker="o", label=f"k = {k}")
            axis.fill_between(asked, low, high, color=shade, alpha=0.12, linewidth=0)
            axis.axvline(k, color=shade, linestyle=":", linewidth=1)
        axis.axhline(50, color="#999999", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(asked, asked)
        axis.minorticks_off()
        axis.set_ylim(0, 103)
        axis.set_xlabel("votes that were cast (dotted: as many as k)")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("right answers (%)")
    axes[0].annotate("chance", (asked[0], 50), va="bottom", fontsize=8)
    axes[0].legend(loc="lower left", ncols=2)
    figure.suptitle("Which of two votes was cast more often? One set of weights (bands: 95 % intervals)")
    save(figure, path)


def breaks(found: dict, choice: str) -> dict[int, int | None]:
    """Of each k, the fewest votes from which on a choice of keys is told apart from every key; None if nowhere."""
    setup, right = found["setup"], found["right"]
    worse = {
        k: [right[f"{choice}_{k}"][str(m)]["high"] < right["dense"][str(m)]["low"] for m in setup["asked"]]
        for k in setup["topk"]
    }
    return {
        k: next((m for i, m in enumerate(setup["asked"]) if all(w[i:])), None) if w[-1] else None
        for k, w in worse.items()
    }


def write_report(found: dict, folder: Path) -> None:
    """many_keys.md and many_keys.png in a folder."""
    draw(found, folder / "many_keys.png")
    context = {
        **found,
        "elsewhere": made_elsewhere(found["run"]),
        "choices": CHOICES,
        "breaks": {choice: breaks(found, choice) for choice in CHOICES},
        "weakest": min(found["right"]["dense"].values(), key=lambda e: e["mean"])["mean"],
    }
    (folder / "many_keys.md").write_text(render("many_keys.md.jinja", context) + "\n", encoding="utf-8")
