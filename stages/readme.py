"""Fill in the numbers of README and of the pages under docs/, in both languages, from the committed files.

    python -m stages.readme

What stands between `<!-- numbers: NAME -->` and `<!-- end -->` is the macro NAME of stages/readme.md.jinja, on a page
named *.zh.md of stages/readme.zh.md.jinja. Run it when reports/ changed; tests/test_readme.py says when it is due.
"""

import json
import re
from pathlib import Path

import pandas as pd

from stages import params
from stages.arms import TRAINED
from stages.lock import made_elsewhere
from stages.markdown import load, percent

BLOCK = re.compile(r"(<!-- numbers: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RUNS = ("reports", "reports/long")  # the default's, and that of the profile long
STAGES = ("data", "train", "dpo", "evaluate", "harness", "benchmark")  # folders of reports/ with what each stage cost


def pages() -> list[Path]:
    return [*sorted(Path().glob("README*.md")), *sorted(Path("docs").glob("*.md"))]


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def cost_tables(files: list[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """{kind: {arm: {tokens: the ratio and the least that any process measured}}}; the first file to have one counts.

    A later file whose layer or model has another shape than the first one's has nothing to add to a row of it.
    """
    found: dict = {}
    shapes = files[0].get("shapes", {})
    for file in files:
        for kind, rows in file["tables"].items():
            of = kind.split("_")[0]
            if of in shapes and file["shapes"][of] != shapes[of]:
                continue
            for row in rows:
                for arm, ratio in row["ratio"].items():
                    least = row.get("ratio_range", {}).get(arm, [ratio])[0]
                    lengths = found.setdefault(kind, {}).setdefault(arm, {})
                    lengths.setdefault(row["length"], {"ratio": ratio, "least": least})
    return found


def faster_from(lengths: dict[int, dict]) -> int | None:
    """The least length that was measured from which on DSA was faster in every process; None where there is none."""
    slower = max((n for n, row in lengths.items() if row["least"] <= 1), default=0)
    return min((n for n in lengths if n > slower), default=None)


def indexer_bytes(base: dict, heads: int, size: int) -> int:
    """Of all layers' indexers in float32: projections of queries, key and the heads' weights, and the key's norm."""
    return 4 * base["num_hidden_layers"] * (base["hidden_size"] * (heads * size + size + heads) + 2 * size)


def run_of(folder: Path) -> dict:
    """Its arms by name, and how many times as fast as dense attention each is at the length it was trained for."""
    report, speed = read(folder / "report.json"), read(folder / "benchmark/speed.json")
    length, topk = speed["trained_length"], speed["topk"]
    names = {"dsa": f"dsa_{topk}", "window_trained": f"window_{topk}"}
    own = {kind: row["ratio"] for kind, rows in speed["tables"].items() for row in rows if row["length"] == length}
    rows = {row["arm"]: row for row in report["trained"]}
    times = {arm: {kind: ratio[name] for kind, ratio in own.items()} for arm, name in names.items()}
    oracle = {cell["test"]: cell["exact"] for cell in report["retrieval"]["dsa_oracle"] if cell["length"] == length}
    about = {"length": length, "topk": topk, "units": report["units"]}
    return about | {"rows": rows, "oracle": oracle, "times": times}


PAPER = {  # DeepSeek-V3.2 (arXiv 2512.02556); its sizes are those of its released code
    "parameters": "671 B",
    "length": 128 * 1024,
    "topk": 2048,
    "indexer": (64, 128),
    "attention": 128 * (576 + 512),  # multiply-adds a key: multi-query, 128 heads on the latent, both products
    "warmup": ("2.1 B", 1e-3),
    "sparse": ("943.7 B", 7.3e-6),
    "warmup_share": 2.1 / (2.1 + 943.7),
}


def scale(p: params.Params, base: dict, own: dict, train: dict) -> list[tuple[str, str, str]]:
    """The paper's run beside the default one: (name, there, here). own: of reports/benchmark/cost.json."""
    heads, size = PAPER["indexer"]
    warmup, sparse = (train[name]["tokens"] for name in ("warmup", "sparse"))
    return [
        ("parameters", PAPER["parameters"], f"{base['parameters'] / 1e6:.1f} M"),
        ("length", f"{PAPER['length']:,}", f"{p.data.max_length:,}"),
        ("topk", f"{PAPER['topk']:,}", f"{p.topk:,}"),
        ("share", f"1/{PAPER['length'] / PAPER['topk']:g}", f"1/{p.data.max_length / p.topk:g}"),
        ("indexer", f"{heads} × {size}", f"{p.indexer.n_heads} × {p.indexer.head_dim}"),
        ("score", percent(heads * size / PAPER["attention"], 0), percent(own["score"] / own["attention"], 0)),
        ("warmup", PAPER["warmup"][0], f"{warmup:,}"),
        ("sparse", PAPER["sparse"][0], f"{sparse:,}"),
        ("warmup_share", percent(PAPER["warmup_share"]), percent(warmup / (warmup + sparse))),
        ("warmup_rate", f"{PAPER['warmup'][1]:g}", f"{p.warmup.learning_rate:g}"),
        ("sparse_rate", f"{PAPER['sparse'][1]:g}", f"{p.sparse.learning_rate:g}"),
    ]


def sweep_means(sweep: dict) -> dict[str, list[dict]]:
    """Answer loss minus dense, mean over seeds: by k, and at a scarce k by the indexer, the warm-up, the ablation."""
    rows, base = pd.DataFrame(sweep["experiments"]), sweep["base"]
    rows["gap"] = [metrics["gap"] for metrics in rows["metrics"]]
    knobs = {"topk": ["topk"], "indexer": ["n_heads", "head_dim"], "warmup": ["warmup_steps"], "ablation": ["ablation"]}
    scarce = min(rows.loc[rows["ablation"] != base["ablation"], "topk"], default=base["topk"])
    found = {"scarce": scarce}
    for name, varied in knobs.items():
        fixed = {knob: base[knob] for of in knobs.values() for knob in of if knob not in varied}
        if name != "topk":
            fixed["topk"] = scarce
        some = rows[(rows[list(fixed)] == pd.Series(fixed)).all(axis=1)]
        found[name] = some.groupby(varied, as_index=False)["gap"].mean().to_dict("records")
    return found


def context() -> dict:
    """Everything that the templates read."""
    cost, speed = read("reports/benchmark/cost.json"), read("reports/speed/cost.json")
    runs = [run for name in STAGES for path in Path("reports", name).glob("*.json") if (run := read(path).get("run"))]
    tables, trained = cost_tables([cost, speed]), read("reports/benchmark/speed.json")
    report, p, base = read("reports/report.json"), params.load(), read("data/base/pretrain.json")
    train = {name: read(f"reports/train/{name}.json") for name in ("dense", "warmup", "sparse")}
    failures, many_keys = read("reports/failures.json"), read("reports/many_keys.json")
    return {
        "p": p,
        "rows": {row["arm"]: row for row in report["trained"]},
        "trained": TRAINED,
        "report": report,
        "runs": [run_of(Path(name)) for name in RUNS],
        "cost": cost,
        "speed": trained,
        "own": cost_tables([trained]),
        "tables": tables,
        "faster_from": faster_from,
        "train": train,
        "base": base,
        "scale": scale(p, base, cost["own"], train),
        "minutes": sum(run["seconds"] for run in runs) / 60,
        "memory": max(run["peak_memory_gb"] for run in runs),
        "device": cost["run"]["device"],
        "sweep": sweep_means(read("reports/sweep.json")) | {"context": read("reports/sweep.json")["context"]},
        "failures": failures,
        "many_keys": many_keys,
        "elsewhere": {"failures": made_elsewhere(failures["run"]), "many_keys": made_elsewhere(many_keys["run"])},
        "full_size": read("reports/speed/full_size.json")["rows"],
        "int8_keys": read("reports/speed/int8_keys.json"),
        "batches": read("reports/speed/batches.json"),
        "indexer_bytes": indexer_bytes(read("data/base/config.json"), p.indexer.n_heads, p.indexer.head_dim),
        "warmed_up": next(row for row in report["untrained"] if row["arm"] == "warmup"),
    }


def filled(text: str, template: Path, numbers: dict) -> str:
    """A page with its blocks made anew."""
    module = load(template).make_module(numbers)
    return BLOCK.sub(lambda match: f"{match[1]}\n{str(getattr(module, match[2])()).strip()}\n\n{match[3]}", text)


def main() -> None:
    numbers, folder = context(), Path(__file__).parent
    for path in pages():
        template = folder / ("readme.zh.md.jinja" if path.name.endswith(".zh.md") else "readme.md.jinja")
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text, template, numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
