"""Stage `report`: all numbers and figures on one page, reports/report.md and a self-contained report.html.

Every number comes from a file under reports/ or data/evaluate/; the template only formats.
"""

import base64
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from statistics import median

import markdown_it
import pandas as pd

from stages import figures, params, preference
from stages.arms import ARMS, GROUPS, LABELS, PAIR, TRAINED, UNTRAINED
from stages.common import device_name, git_commit
from stages.files import write_json
from stages.markdown import page
from stages.statistics import Predictions
from stages.summary import summarize

REPORTS = Path("reports")
FIGURES = REPORTS / "figures"
EMBEDDED = "data/base"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "dvc", "trl")


def read(path: str) -> dict:
    return json.loads((REPORTS / path).read_text(encoding="utf-8"))


def compare(predictions: Predictions, arms: dict, names: tuple[str, ...], reference: str) -> list[dict]:
    """The rows of a table: each arm against the reference on the same weights or the same budget."""
    table = []
    for arm in names:
        gap, error = predictions.gap(arm, reference)
        gap_all, error_all = predictions.gap(arm, reference, answers=False)
        retrieval_gap, retrieval_error = predictions.lookups("right", arm, reference)
        share_gap, share_error = predictions.lookups("share", arm, reference)
        table.append(
            {
                "arm": arm,
                **arms[arm],
                "gap": gap,
                "gap_se": error,
                "gap_all": gap_all,
                "gap_all_se": error_all,
                "retrieval_gap": retrieval_gap,
                "retrieval_gap_se": retrieval_error,
                "share_gap": share_gap,
                "share_gap_se": share_error,
                "agreement": predictions.agreement(arm, reference),
            }
        )
    return table


def checked(p: params.Params, data: dict, base: dict | None, train: dict, dpo: dict) -> dict:
    """What the page says in words, from what the stages wrote down."""

    def of_corpus(name: str) -> bool:
        return data["download"][name]["source"] == "python-packages"

    def unit(split_by: str, name: str) -> str:
        return "prompt" if split_by == "prompt" else "file family" if of_corpus(name) else "data source"

    unit_of_rows = unit(p.data.split_by, "sft")
    families = set(data["download"].get("python_packages", {}).get("test_families", []))
    known = base is not None and unit_of_rows == "file family"
    runs = (*train.values(), *dpo.values())
    devices = sorted({m["run"]["device"] for m in runs})
    return {
        "base_saw_no_family": known and families <= set(base["held_out_families"]),
        "unit": unit_of_rows,
        "pair_units": {"file family": "file families"}.get(u := unit(p.preference.split_by, "preference"), f"{u}s"),
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


def stages_table(train: dict, dpo: dict, evaluations: dict, others: dict) -> list[dict]:
    """Wall time, memory and speed of each stage, from its own metrics."""
    rows = [{"stage": name, **m["run"]} for name, m in others.items()]
    rows += [
        {"stage": n, **m["run"], "tokens_per_second": m["tokens_per_second"], "tokens": m["tokens"]}
        for n, m in (train | {f"dpo@{arm}": m for arm, m in dpo.items()}).items()
    ]
    rows += [{"stage": f"evaluate@{name}", **m["run"]} for name, m in evaluations.items()]
    return rows


def draw(
    p: params.Params,
    predictions: Predictions,
    tables: dict,
    selections: dict,
    curves: dict,
    cost: dict,
    histogram: dict[str, int],
    base: dict | None,
) -> None:
    """All figures. histogram: rows by tokens. base: the metrics of the embedded base model, None for another base."""
    arms = {arm: predictions.nll(arm) for arm in TRAINED}
    figures.loss_by_position(arms, predictions.positions, predictions.rows, p.topk, FIGURES / "loss_by_position.png")
    sweep = pd.DataFrame(tables["sweep"])
    figures.quality_by_topk(sweep, **tables["sweep_reference"], topk=p.topk, path=FIGURES / "quality_by_topk.png")
    figures.mass_by_layer(selections, p.topk, FIGURES / "mass_by_layer.png")
    figures.training_curves(curves, FIGURES / "training_curves.png")
    if len(distance := predictions.arrays["lookup_distance"]):
        shares = {arm: predictions.arrays[f"share_{arm}"] for arm in TRAINED}
        rows_of = predictions.arrays["lookup_row"]
        figures.retrieval_by_distance(distance, rows_of, shares, p.topk, FIGURES / "retrieval_by_distance.png")
    maps = (predictions.arrays["heatmap_wanted"], predictions.arrays["heatmap_offered"])
    figures.heatmap(*maps, int(predictions.arrays["heatmap_layer"]), FIGURES / "heatmap.png")
    if base:
        curve = pd.read_csv(f"{EMBEDDED}/pretrain.csv")
        figures.base_curve(curve, base["held_out_loss"], FIGURES / "base_curve.png")
    dpo = {arm: pd.read_csv(REPORTS / f"dpo/{arm}.csv") for arm in PAIR}
    figures.preference(dpo, tables["preference"], FIGURES / "preference.png")
    figures.row_lengths(histogram, p.data.min_tokens, p.data.max_length, FIGURES / "row_lengths.png")
    if p.evaluate.retrieval.lengths:
        figures.retrieval(tables["retrieval"], FIGURES / "retrieval.png")
    figures.dense_over_dsa(cost, FIGURES / "dense_over_dsa.png")


def to_html(markdown: str) -> str:
    """One file: the rendered text, with every figure inside."""
    body = markdown_it.MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inline(match: re.Match) -> str:
        data = base64.b64encode((REPORTS / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[^"]+)"', inline, body)
    style = """
        body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
        img { max-width: 100% }
        table { border-collapse: collapse; font-size: .92em }
        th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left }
        pre, code { background: #f6f6f6 }
        pre { padding: .7rem; overflow-x: auto; white-space: pre-wrap }
    """
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>DSA report</title><style>{style}</style>'
    return f"{head}<body>{body}</body></html>\n"


def main() -> None:
    p = params.load("report")
    evaluations = {name: read(f"evaluate/{name}.json") for name in GROUPS}
    dpo = {arm: read(f"dpo/{arm}.json") for arm in PAIR}
    train = {name: read(f"train/{name}.json") for name in ("dense", "warmup", "sparse", "window")}
    data = {name: read(f"data/{name}.json") for name in ("model", "download", "filter", "pairs")}
    cost = read("benchmark/cost.json")
    curves = {name: pd.read_csv(REPORTS / f"train/{name}.csv") for name in train}
    predictions = Predictions(tuple(GROUPS))
    arms = {arm: numbers for e in evaluations.values() for arm, numbers in e["arms"].items()}
    few = predictions.first(p.evaluate.control_rows)
    sweep = [
        {"topk": int(k), **numbers, **few.summary("dsa" if int(k) == p.topk else f"k{k}", "dense")}
        for k, numbers in evaluations["dsa"]["topk_sweep"].items()
    ]
    tables = {
        "trained": compare(predictions, arms, TRAINED, "dense"),
        "untrained": compare(predictions, arms, UNTRAINED, "base"),
        "sweep": sweep,
        "sweep_reference": {arm: few.summary(arm, "dense") for arm in ("dense", "window_trained")},
        "retrieval": {arm: evaluations[ARMS[arm].group]["retrieval"] for arm in TRAINED},
        "preference": preference.summarize(dpo, p.dpo.beta, predictions),
    }
    selections = {"warmup": evaluations["warmup"]["selection"], "dsa": evaluations["dsa"]["selection"]}
    FIGURES.mkdir(parents=True, exist_ok=True)
    embedded = data["model"]["source"] == EMBEDDED
    base = json.loads(Path(EMBEDDED, "pretrain.json").read_text(encoding="utf-8")) if embedded else None
    draw(p, predictions, tables, selections, curves, cost, data["filter"]["length_histogram"], base)
    rows = {row["arm"]: row for table in ("trained", "untrained") for row in tables[table]}
    stages = stages_table(train, dpo, evaluations, data | {"benchmark": cost})
    context = {
        "p": p,
        "labels": LABELS,
        "params": params.dump(params.read(Path("params.yaml"))).strip(),
        "rows": rows,
        **tables,
        "train": train,
        "checked": checked(p, data, base, train, dpo),
        "data": data,
        "base": base,
        "cost": cost,
        "cost_spread": cost_spread(cost),
        "harness": {arm: read(f"harness/{arm}.json")["tasks"] for arm in PAIR},
        "selections": selections,
        "generations": list(zip(evaluations["dense"]["generations"], evaluations["dsa"]["generations"], strict=True)),
        "stages": stages,
        "control_gap": few.gap("dsa", "dense"),
        "oracle_gap": few.gap("dsa_oracle", "dense"),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "device": device_name(),
        "commit": git_commit(),
    }
    markdown = page(Path(__file__).with_name("report.md.jinja"), context)
    (REPORTS / "report.md").write_text(markdown, encoding="utf-8")
    (REPORTS / "report.html").write_text(to_html(markdown), encoding="utf-8")
    write_json(REPORTS / "summary.json", summarize(rows, selections["dsa"], tables["preference"], stages))


if __name__ == "__main__":
    main()
