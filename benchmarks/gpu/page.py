"""reports/gpu/README.md: what `python -m benchmarks.gpu` found, device by device, from the JSON files beside it."""

import json
from pathlib import Path


def write_page(folder: Path) -> None:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    sections = [section(report) for report in reports if "parts" in report]
    text = "\n\n".join(["# Measured on GPUs", "By `python -m benchmarks.gpu`, random tensors and weights.", *sections])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


def section(report: dict) -> str:
    """The page of a device."""
    parts = report["parts"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    memory = f"{report['gb']} GB, driver {report['driver']}, " if "gb" in report else ""
    blocks = [
        f"## {report['device']}",
        f"{memory}{versions}; commit {report['commit']}; {report['seconds']} s in all."
        + (" **A rehearsal on a CPU: its times mean nothing.**" if report["rehearsal"] else ""),
        "### Against the reference in float64",
        correctness(parts),
        "### A layer's kernels over a whole causal row, ms",
        "Dense attention is SDPA's causal one. `train` is forward and backward; the losses are with their gradients.",
        kernels(parts.get("lengths", {}).get("cases", {})),
        "### A layer of Qwen2.5-0.5B, dense attention's time over DSA's",
        "Above 1 DSA is faster. Prefill and training with projections and MLP, decoding one token behind so many.",
        layers(parts.get("lengths", {}).get("cases", {})),
        "### A training step of the whole model, one row",
        "Float32 weights, bfloat16 autocast, AdamW; with activation checkpointing (c) where it did not fit without. "
        "Compiled: each layer but for its attention.",
        steps(parts),
        problems(parts),
    ]
    return "\n\n".join(block for block in blocks if block)


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def correctness(parts: dict) -> str:
    rows = []
    for part, found in parts.items():
        kinds: dict[str, list[dict]] = {}
        for name, case in found["cases"].items() if part.startswith("right_") else ():
            kinds.setdefault(name.split(" ")[0], []).append(case)
        for kind, cases in kinds.items():
            right = sum(case.get("right", False) for case in cases)
            worst = max((error for case in cases for error in case.get("errors", {}).values()), default=0.0)
            rows.append(
                [kind, part.removeprefix("right_"), f"{right} of {len(cases)}", f"{worst:.1e}" if worst else "–"]
            )
    return table(["operation", "type", "right", "largest relative error"], rows)


def by_length(cases: dict, kind: str) -> list[dict]:
    found = [case for name, case in cases.items() if name.split(" ")[0] == kind and "failed" not in case]
    return sorted(found, key=lambda case: case["length"])


def kernels(cases: dict) -> str:
    rows = by_length(cases, "kernels")
    arms = list(dict.fromkeys(arm for row in rows for arm in row["arms"]))
    body = [[arm, *(f"{r['arms'][arm]['ms']:.3f}" if arm in r["arms"] else "–" for r in rows)] for arm in arms]
    return table(["ms", *(f"{row['length']:,} tokens" for row in rows)], body)


def layers(cases: dict) -> str:
    body = []
    for kind in ("prefill", "train", "decode"):
        for row in by_length(cases, kind):
            ratios = [f"{arm.removeprefix('dsa_')}: {ratio:.2f}" for arm, ratio in row["ratio"].items()]
            body.append([kind, f"{row['length']:,}", f"{row['dense']:.3f}", row["dense_by"], ", ".join(ratios)])
    return table(["", "tokens", "dense, ms", "by", "k: dense / DSA"], body)


def steps(parts: dict) -> str:
    compiled, body = parts.get("compiled", {}).get("cases", {}), []
    for name, case in parts.get("steps", {}).get("cases", {}).items():
        cells = [name.split(" ")[0], f"{int(name.split(' ')[1]):,}"]
        for found in (case, compiled.get(name, {})):
            if "ms" in found:
                cells += [f"{found['ms']:.0f}", f"{found['tokens_per_second']:,}"]
                cells += [f"{found['peak_gb']:.1f}" + (" (c)" if found["checkpointing"] else "")]
            else:
                cells += ["–"] * 3
        body.append(cells)
    body.sort(key=lambda cells: (cells[0], int(cells[1].replace(",", ""))))
    measured = ["ms", "tokens/s", "peak GB"]
    return table(["stage", "tokens", *measured, *(f"compiled: {name}" for name in measured)], body)


def problems(parts: dict) -> str:
    """What failed or was wrong, and what there was no time for."""
    lines = []
    for part, found in parts.items():
        for name, case in found["cases"].items():
            if "failed" in case or not case.get("right", True):
                lines.append(f"- {part}, {name}: `{case.get('failed', case.get('errors'))}`")
        if found.get("left_out"):
            lines.append(f"- {part}: no time for {', '.join(found['left_out'])}")
    return "### Failed, wrong or left out\n\n" + "\n".join(lines) if lines else ""
