"""Stage `report`: all numbers and figures on one page, reports/report.md and a self-contained report.html.

What is computed here from the predictions goes to reports/report.json first. The page is made of that file and of those
that the other stages wrote, so that every number on it stands in a JSON file under reports/; the template only formats.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median

import pandas as pd

from stages import figures, params, preference
from stages.arms import ARMS, GROUPS, LABELS, PAIR, RETRIEVING, TRAINED, UNTRAINED
from stages.common import device_name, git_commit
from stages.files import write_json
from stages.html import to_html
from stages.markdown import page
from stages.statistics import KINDS, MARGIN, Predictions, equivalence, plain
from stages.summary import summarize

REPORTS = Path("reports")
FIGURES = REPORTS / "figures"
EMBEDDED = "data/base"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "dvc", "trl")


def read(path: str) -> dict:
    return json.loads((REPORTS / path).read_text(encoding="utf-8"))


def read_stages() -> dict:
    """What the other stages wrote under reports/, and of the embedded base model, None for another base."""
    model = read("data/model.json")
    embedded = model["source"] == EMBEDDED
    return {
        "evaluations": {name: read(f"evaluate/{name}.json") for name in GROUPS},
        "dpo": {arm: read(f"dpo/{arm}.json") for arm in PAIR},
        "train": {name: read(f"train/{name}.json") for name in ("dense", "warmup", "sparse", "window")},
        "data": {"model": model} | {name: read(f"data/{name}.json") for name in ("download", "filter", "pairs")},
        "estimates": read("preflight.json")["stages"],
        "cost": read("benchmark/cost.json"),
        "speed": read("benchmark/speed.json"),
        "harness": {arm: read(f"harness/{arm}.json")["tasks"] for arm in PAIR},
        "base": json.loads(Path(EMBEDDED, "pretrain.json").read_text(encoding="utf-8")) if embedded else None,
    }


def compare(predictions: Predictions, arms: dict, names: tuple[str, ...], reference: str) -> list[dict]:
    """The rows of a table: each arm against the reference on the same weights or the same budget. Differences are
    pairs, with half of their 95 % intervals."""
    return [
        {
            "arm": arm,
            **arms[arm],
            "gap": predictions.gap(arm, reference),
            "gap_all": predictions.gap(arm, reference, answers=False),
            "share_gap": predictions.lookups("share", arm, reference),
            "agreement": predictions.agreement(arm, reference),
        }
        for arm in names
    ]


def by_kind(predictions: Predictions) -> list[dict]:
    """The gap of each trained arm to dense attention on the answers of rows of a kind, where there is more than one."""
    kinds, found = predictions.kinds, []
    for kind in KINDS:
        if 0 < (rows := int((kinds == kind).sum())) < len(kinds):
            here = kinds[predictions.rows] == kind
            gaps = {arm: predictions.gap(arm, "dense", where=here) for arm in TRAINED if arm != "dense"}
            found.append({"kind": kind, "rows": rows, "gap": gaps})
    return found


def exact(arm: dict, cells: list[dict]) -> dict[str, float]:
    """Shares of what was asked for and found whole: look-ups, and pairs and needles at the longest row."""
    shares = {"look-ups": arm["retrieval"]} if arm["lookups"] else {}
    longest = max((cell["length"] for cell in cells), default=0)
    return shares | {cell["test"]: cell["exact"] for cell in cells if cell["length"] == longest}


def budgets(p: params.Params, found: dict, few: Predictions) -> list[dict]:
    """The DSA model's weights under dense attention, and at each k with the indexer's choice and the latest keys: loss
    against dense attention on those same weights, exact answers, and the time of a token in prefill, milliseconds."""
    at = {row["length"]: row["arms"] for row in found["speed"]["tables"]["prefill"]}.get(p.data.max_length, {})
    rows = []
    for budget in found["evaluations"]["dsa"]["budgets"]:
        time = at.get(budget["name"])
        gap = few.gap(f"budget_{budget['name']}", "budget_dense")
        rows.append({**budget, "gap": gap, "ms": time and time["ms"] / p.data.max_length})
    return rows


def checked(p: params.Params, data: dict, base: dict | None, train: dict, dpo: dict) -> dict:
    """What the page says in words, from what the stages wrote down."""

    def of_corpus(name: str) -> bool:
        return data["download"][name]["source"] == "python-packages"

    def unit(split_by: str, name: str) -> str:
        return "prompt" if split_by == "prompt" else "file family" if of_corpus(name) else "data source"

    def plural(unit: str) -> str:
        return {"file family": "file families"}.get(unit, f"{unit}s")

    unit_of_rows = unit(p.data.split_by, "sft")
    independent = "row" if unit_of_rows == "prompt" else unit_of_rows
    families = set(data["download"].get("python_packages", {}).get("test_families", []))
    known = base is not None and unit_of_rows == "file family"
    runs = (*train.values(), *dpo.values())
    devices = sorted({m["run"]["device"] for m in runs})
    return {
        "base_saw_no_family": known and families <= set(base["held_out_families"]),
        "unit": unit_of_rows,
        "pair_unit": (pair_unit := unit(p.preference.split_by, "preference")),
        "pair_units": plural(pair_unit),
        "independent": (independent, plural(independent)),
        "answers": ("right", "wrong") if of_corpus("preference") else ("chosen", "rejected"),
        "same_training": len({(train[n]["rows"], train[n]["tokens"]) for n in ("dense", "sparse", "window")}) == 1,
        "same_pairs": len({(m["pairs"], m["tokens"]) for m in dpo.values()}) == 1,
        "devices": devices,
        "precisions": sorted({m["precision"] for m in runs}),
    }


def cost_spread(cost: dict) -> tuple[float, float]:
    """Distance of the quartiles of a measured time, as a share of its median: in the middle case, and at most."""
    times = [time for rows in cost["tables"].values() for row in rows for time in row["arms"].values()]
    shares = [time["spread"] / time["ms"] for time in times]
    return median(shares), max(shares)


def stages_table(found: dict) -> list[dict]:
    """Wall time, memory and speed of each stage, from its own metrics, beside what the preflight had estimated."""
    rows = [
        {"stage": name, **m["run"]}
        for name, m in (found["data"] | {"benchmark": found["cost"], "speed": found["speed"]}).items()
    ]
    trained = found["train"] | {f"dpo@{arm}": m for arm, m in found["dpo"].items()}
    rows += [
        {"stage": name, **m["run"], "tokens_per_second": m["tokens_per_second"], "tokens": m["tokens"]}
        for name, m in trained.items()
    ]
    rows += [{"stage": f"evaluate@{name}", **m["run"]} for name, m in found["evaluations"].items()]
    nothing = {"seconds": None, "peak_memory_gb": None}
    return [row | {"estimate": found["estimates"].get(row["stage"], nothing)} for row in rows]


def measure(p: params.Params, found: dict, predictions: Predictions) -> dict:
    """reports/report.json: what the predictions say of each arm, and where the page was made."""
    evaluations = found["evaluations"]
    arms = {arm: numbers for e in evaluations.values() for arm, numbers in e["arms"].items()}
    few, seen = predictions.first(p.evaluate.control_rows), predictions.positions <= p.topk
    retrieval = {arm: evaluations[ARMS[arm].group]["retrieval"][arm] for arm in RETRIEVING}
    trained = compare(predictions, arms, TRAINED, "dense")
    return {
        "trained": [row | {"exact": exact(row, retrieval[row["arm"]])} for row in trained],
        "untrained": compare(predictions, arms, UNTRAINED, "base"),
        "budgets": budgets(p, found, few),
        "equivalence": equivalence(*predictions.gap("dsa", "dense"), predictions.count),
        "margin": MARGIN,
        "units": predictions.count,
        "by_kind": by_kind(predictions),
        "up_to_k": {arm: predictions.gap(arm, "dense", False, seen) for arm in TRAINED if arm != "dense"},
        "control": {
            "dsa": few.gap("dsa", "dense"),
            "oracle": few.gap("dsa_oracle", "dense"),
            "indexer": few.gap("dsa", "dsa_oracle"),
        },
        "retrieval": retrieval,
        "floors": evaluations["dense"]["floors"],
        "preference": preference.summarize(found["dpo"], p.dpo.beta, predictions),
        "cost_spread": cost_spread(found["cost"]),
        "run": {
            "device": device_name(),
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "commit": git_commit(),
        },
    }


def draw(p: params.Params, found: dict, tables: dict, predictions: Predictions) -> None:
    """All figures."""
    arms = {arm: predictions.nll(arm) for arm in TRAINED}
    figures.loss_by_position(arms, predictions.positions, predictions.units, p.topk, FIGURES / "loss_by_position.png")
    figures.payoff(pd.DataFrame(tables["budgets"]), p.topk, p.data.max_length, FIGURES / "payoff.png")
    selections = {arm: found["evaluations"][arm]["selection"] for arm in ("warmup", "dsa")}
    figures.mass_by_layer(selections, p.topk, FIGURES / "mass_by_layer.png")
    curves = {name: pd.read_csv(REPORTS / f"train/{name}.csv") for name in found["train"]}
    figures.training_curves(curves, FIGURES / "training_curves.png")
    if len(distance := predictions.arrays["lookup_distance"]):
        shares = {arm: predictions.arrays[f"share_{arm}"] for arm in TRAINED}
        units = predictions.unit_of[predictions.arrays["lookup_row"]]
        figures.retrieval_by_distance(distance, units, shares, p.topk, FIGURES / "retrieval_by_distance.png")
    maps = (predictions.arrays["heatmap_wanted"], predictions.arrays["heatmap_offered"])
    figures.heatmap(*maps, int(predictions.arrays["heatmap_layer"]), FIGURES / "heatmap.png")
    if found["base"]:
        curve = pd.read_csv(f"{EMBEDDED}/pretrain.csv")
        figures.base_curve(curve, FIGURES / "base_curve.png")
    dpo = {arm: pd.read_csv(REPORTS / f"dpo/{arm}.csv") for arm in PAIR}
    figures.preference(dpo, FIGURES / "preference.png")
    histogram = found["data"]["filter"]["length_histogram"]
    figures.row_lengths(histogram, p.data.min_tokens, p.data.max_length, FIGURES / "row_lengths.png")
    if p.evaluate.retrieval.lengths:
        figures.retrieval(tables["retrieval"], p.topk, FIGURES / "retrieval.png")
    figures.dense_over_dsa(found["cost"], FIGURES / "dense_over_dsa.png")


def write_page(p: params.Params, found: dict, tables: dict) -> None:
    """report.md and report.html."""
    generations = (found["evaluations"][arm]["generations"] for arm in PAIR)
    answers = (found["dpo"][arm]["generations"] for arm in PAIR)
    context = {
        **found,
        **tables,
        "p": p,
        "labels": LABELS,
        "params": params.dump(params.read(Path("params.yaml"))).strip(),
        "rows": {row["arm"]: row for table in ("trained", "untrained") for row in tables[table]},
        "checked": checked(p, *(found[name] for name in ("data", "base", "train", "dpo"))),
        "kinds": figures.KINDS,
        "stages": stages_table(found),
        "generations": list(zip(*generations, strict=True)),
        "answers": list(zip(*answers, strict=True)),
    }
    markdown = page(Path(__file__).with_name("report.md.jinja"), context)
    (REPORTS / "report.md").write_text(markdown, encoding="utf-8")
    (REPORTS / "report.html").write_text(to_html(markdown, REPORTS), encoding="utf-8")


def main() -> None:
    p = params.load("report")
    found, predictions = read_stages(), Predictions(tuple(GROUPS), p.data.split_by)
    write_json(REPORTS / "report.json", plain(measure(p, found, predictions)))
    tables = read("report.json")
    FIGURES.mkdir(parents=True, exist_ok=True)
    draw(p, found, tables, predictions)
    write_page(p, found, tables)
    rows = {row["arm"]: row for row in tables["trained"]}
    selection = found["evaluations"]["dsa"]["selection"]
    write_json(REPORTS / "summary.json", summarize(rows, selection, tables["preference"], stages_table(found)))


if __name__ == "__main__":
    main()
