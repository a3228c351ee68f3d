"""reports/failures.md and its figure from the numbers of studies/failures.py."""

import math
from pathlib import Path

import numpy as np
from markupsafe import Markup

from stages.arms import COLORS
from stages.figures import plt, save
from stages.lock import made_elsewhere
from stages.markdown import code, percent
from stages.statistics import MARGIN
from studies.common import render

WAYS = {  # of attending to a context: label, colour
    "fixed": ("DSA, k = {topk} at every length", COLORS["dsa"]),
    "share": ("DSA, k = {share} of the context", COLORS["warmup"]),
    "every": ("DSA's weights, every key", COLORS["base"]),
}
TESTS = {"text": "the same last tokens of a text", "values": "values to be found in the context"}


def token(text: str) -> Markup:
    """A token as a code span, its spaces shown too."""
    return code(text.replace(" ", "␣"))


def chance(nll: float) -> Markup:
    """The probability of a token from its loss."""
    return percent(math.exp(-nll))


def verdict(e: dict) -> str:
    """What an interval says of a difference of losses: higher is worse."""
    if e["low"] > 0:
        return "a loss" if e["high"] >= MARGIN else f"a loss, of less than {MARGIN} nats"
    if e["high"] < 0:
        return "a gain" if e["low"] <= -MARGIN else f"a gain, of less than {MARGIN} nats"
    if max(abs(e["low"]), abs(e["high"])) < MARGIN:
        return f"not told apart from nothing, and less than {MARGIN} nats either way"
    return f"not told apart from nothing, and {MARGIN} nats or more is not excluded"


def errors(estimates: list[dict]) -> np.ndarray:
    """[2, N], how far the intervals reach below and above the means."""
    return np.array([[e["mean"] - e["low"], e["high"] - e["mean"]] for e in estimates]).T


def names(setup: dict) -> dict[str, str]:
    """The labels of `WAYS`."""
    share = f"1/{setup['lengths'][-1] / setup['topk']:g}"
    return {way: label.format(topk=setup["topk"], share=share) for way, (label, _) in WAYS.items()}


def draw(found: dict, path: Path) -> None:
    """Left and middle: the gap to dense attention against the length of the context. Right: layer by layer."""
    setup, layers = found["setup"], found["layers"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), width_ratios=(3, 3, 2.4))
    at = setup["lengths"]
    for axis, (test, title) in zip(axes, TESTS.items(), strict=False):
        for place, (way, (_, color)) in enumerate(WAYS.items()):
            e = found["context"][test][way]["at"]
            x = np.array(at) * 2 ** (0.06 * (place - 1))  # beside each other
            axis.errorbar(x, [y["mean"] for y in e], errors(e), color=color, marker="o", label=names(setup)[way])
        axis.set_xscale("log", base=2)
        axis.set_xticks(at, [f"{n:,}" for n in at])
        axis.minorticks_off()
        axis.set_xlabel("tokens of context")
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("loss minus dense attention (nats a token)")
    axes[0].legend(fontsize=8)
    e = [*layers["alone"], layers["every"]]
    colors = [COLORS["dsa"]] * len(layers["alone"]) + [COLORS["base"]]
    axes[2].bar(range(len(e)), [x["mean"] for x in e], yerr=errors(e), color=colors, width=0.6, capsize=4)
    axes[2].set_xticks(range(len(e)), [*map(str, range(len(e) - 1)), "all"])
    axes[2].set_xlabel("the layer that alone is sparse")
    axes[2].set_title("answer loss minus that where no layer is", fontsize=10)
    for axis in axes:
        axis.axhline(0, color=COLORS["dense"], linewidth=1)
        axis.axhspan(-MARGIN, MARGIN, color="#999999", alpha=0.15, linewidth=0)
    figure.suptitle(f"Where DSA loses (bars: 95 % intervals; grey: ± {MARGIN} nats, which counts as equal)")
    save(figure, path)


def write_report(found: dict, folder: Path) -> None:
    """failures.md and failures.png in a folder."""
    draw(found, folder / "failures.png")
    worst, layers = found["worst"], found["layers"]
    tokens = [row["token"] for row in worst["shown"]]
    by_keys = [t for t in tokens if t["nll"]["dsa"] - t["nll"]["every"] > t["nll"]["every"] - t["nll"]["dense"]]
    gaps = np.sort(worst["gaps"])
    context = {
        **found,
        "elsewhere": made_elsewhere(found["run"]),
        "ways": names(found["setup"]),
        "tests": TESTS,
        "margin": MARGIN,
        "costly": [i for i, e in enumerate(layers["alone"]) if e["low"] > 0],
        "costliest": int(np.argmax([e["mean"] for e in layers["alone"]])),
        "by_keys": len(by_keys),
        "worse": int((gaps > 0).sum()),
        "best": gaps[: len(worst["shown"])].tolist(),
    }
    text = render("failures.md.jinja", context, token=token, chance=chance, verdict=verdict)
    (folder / "failures.md").write_text(text + "\n", encoding="utf-8")
