"""reports/failures.md and its figures from the numbers of studies/failures.py."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from stages.arms import COLORS
from stages.figures import plt, save
from stages.lock import made_elsewhere
from stages.markdown import code
from stages.statistics import MARGIN as TOLERANCE
from studies.common import render

LAYERS_SHOWN = 4  # of a token: those where the indexer misses most
NAMES = {
    "base": "warm-up only − dense",
    "base_budget": "oracle − dense: the budget",
    "base_indexer": "warm-up only − oracle: the indexer",
    "trained": "DSA − dense",
    "trained_budget": "oracle − dense: budget and adaptation",
    "trained_indexer": "DSA − oracle: the indexer",
    "change": "of the whole gap",
    "change_budget": "of oracle − dense",
    "change_indexer": "of the indexer's part",
}
TITLES = {"base": "base model's weights", "trained": "after training", "change": "trained − base model's: the change"}
TONES = {"base": COLORS["warmup"], "trained": COLORS["dsa"], "change": COLORS["oracle"]}


def token(text: str) -> Markup:
    """A token as a code span, its spaces shown too."""
    return code(text.replace(" ", "␣"))


def verdict(e: dict) -> str:
    """What an interval says of a difference of losses: higher is worse."""
    if e["low"] > 0:
        return "a loss" if e["high"] >= TOLERANCE else f"a loss, of less than {TOLERANCE} nats"
    if e["high"] < 0:
        return "a gain" if e["low"] <= -TOLERANCE else f"a gain, of less than {TOLERANCE} nats"
    if max(abs(e["low"]), abs(e["high"])) < TOLERANCE:
        return f"not told apart from nothing, and less than {TOLERANCE} nats either way"
    return f"not told apart from nothing, and {TOLERANCE} nats or more is not excluded"


def errors(estimates: list[dict]) -> np.ndarray:
    """[2, N], how far the intervals reach below and above the means."""
    return np.array([[e["mean"] - e["low"], e["high"] - e["mean"]] for e in estimates]).T


def draw_decomposition(contrasts: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3), sharex=True)
    for axis, (group, title) in zip(axes, TITLES.items(), strict=True):
        names = [name for name in contrasts if name.split("_")[0] == group][::-1]
        e = [contrasts[name] for name in names]
        axis.barh(range(len(e)), [x["mean"] for x in e], xerr=errors(e), color=TONES[group], height=0.55, capsize=4)
        axis.set_yticks(range(len(e)), [NAMES[name] for name in names], fontsize=8)
        axis.axvline(0, color=COLORS["dense"], linewidth=1)
        for x in (-TOLERANCE, TOLERANCE):
            axis.axvline(x, color="#999999", linestyle=":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("nats per answer token")
    figure.suptitle(f"What the gap is made of (bars: 95 % interval over rows; dotted: ± {TOLERANCE})")
    save(figure, path)


def draw_layers(layers: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    cost = [*layers["cost"], layers["every"]]
    places = np.arange(len(cost))
    colors = [COLORS["dsa"]] * len(layers["cost"]) + [COLORS["base"]]
    left.bar(places, [e["mean"] for e in cost], yerr=errors(cost), color=colors, width=0.6, capsize=4)
    left.axhline(0, color=COLORS["dense"], linewidth=1)
    left.set_ylabel("loss minus all dense (nats per answer token)")
    names = [f"layer {i}" if len(cost) < 9 else str(i) for i in range(len(cost) - 1)]
    left.set_xticks(places, [*names, "all"])
    left.set_title("what it costs if this layer alone is sparse", fontsize=10)
    width = 0.35
    for shift, name, arm, hatch, label in (
        (-width / 2, "mass", "dsa", "", "by the indexer's k keys"),
        (width / 2, "oracle_mass", "oracle", "//", "by the best k keys"),
    ):
        style = {"color": COLORS[arm], "hatch": hatch, "edgecolor": "white", "width": width, "label": label}
        right.bar(places[:-1] + shift, 1 - np.array(layers[name]), **style)
    right.set_ylabel("share of attention missed")
    right.set_xticks(places[:-1], names)
    right.set_title(f"what the layer misses, k = {layers['topk']}", fontsize=10)
    right.legend()
    figure.suptitle("Layer by layer, the DSA model's weights (bars: 95 % interval over rows)")
    save(figure, path)


def draw_rows(worst: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 4))
    counts, gaps = np.array(worst["answer_tokens"]), np.array(worst["gaps"])
    axis.scatter(counts, gaps, s=14, color=COLORS["base"], label="a held-out row")
    shown = worst["shown"]
    axis.scatter(
        [row["answer_tokens"] for row in shown],
        [row["gap"] for row in shown],
        s=30,
        color=COLORS["dsa"],
        label="shown below",
    )
    for place, row in enumerate(shown):
        at, offset = (row["answer_tokens"], row["gap"]), (5, 4) if place % 2 else (5, -10)
        axis.annotate(f"row {row['row']}", at, offset, textcoords="offset points", fontsize=7)
    axis.axhline(0, color=COLORS["dense"], linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("answer tokens of the row")
    axis.set_ylabel("DSA − dense (nats per answer token)")
    axis.set_title("The gap, row by row", fontsize=10)
    axis.legend()
    save(figure, path)


def explained(tokens: list[dict]) -> dict[str, list[dict]]:
    """Shown tokens by whether most of their gap goes when the same weights see every key."""

    def keys(token: dict) -> bool:
        nll = token["nll"]
        return nll["dsa"] - nll["dsa_as_dense"] > nll["dsa_as_dense"] - nll["dense"]

    return {"keys": [t for t in tokens if keys(t)], "weights": [t for t in tokens if not keys(t)]}


def layers_of(token: dict) -> list[tuple[int, dict]]:
    """The layers of a shown token where keys were missed, most missed mass first; as many as are shown."""
    order = sorted(enumerate(token["layers"]), key=lambda pair: -pair[1]["missed"])
    return [(i, layer) for i, layer in order[:LAYERS_SHOWN] if layer["keys"]]


def write_report(found: dict, folder: Path) -> None:
    """failures.md and failures/*.png in a folder."""
    d, layers, worst = found["decomposition"], found["layers"], found["worst"]
    draw_decomposition(d, folder / "failures/decomposition.png")
    draw_layers(layers, folder / "failures/layers.png")
    draw_rows(worst, folder / "failures/rows.png")
    tokens = [token for row in worst["shown"] for token in row["tokens"]]
    gaps = np.sort(worst["gaps"])
    context = {
        **found,
        "elsewhere": made_elsewhere(found["run"]),
        "d": d,
        "names": NAMES,
        "titles": TITLES,
        "groups": {group: [name for name in d if name.split("_")[0] == group] for group in TITLES},
        "tolerance": TOLERANCE,
        "costly": [i for i, e in enumerate(layers["cost"]) if e["low"] > 0],
        "costliest": int(np.argmax([e["mean"] for e in layers["cost"]])),
        "blindest": int(np.argmin(layers["mass"])),
        "missed": float(
            np.average([r["missed"] for r in worst["shown"]], weights=[r["answer_tokens"] for r in worst["shown"]])
        ),
        "missed_there": float(np.mean([layer["missed"] for token in tokens for layer in token["layers"]])),
        "tokens": tokens,
        "explained": explained(tokens),
        "worse": int((gaps > 0).sum()),
        "best_rows": gaps[: len(worst["shown"])].tolist(),
    }
    text = render("failures.md.jinja", context, token=token, verdict=verdict, layers_of=layers_of)
    (folder / "failures.md").write_text(text + "\n", encoding="utf-8")
