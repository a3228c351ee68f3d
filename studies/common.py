"""What the studies share: intervals, their numbers as JSON, and the page from its template."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stages.markdown import page
from stages.statistics import mean_interval


class TooFewRows(SystemExit):
    """str() is the one line to show."""


def interval(values: np.ndarray, units: np.ndarray) -> dict:
    """Mean of per-token values and its 95 % interval, the units as the independent ones.

    Raises TooFewRows for fewer than two units, which tell nothing of others.
    """
    count = len(np.unique(units))
    if count < 2:
        raise TooFewRows(f"an interval needs two rows at least, and there are {count}")
    mean, half = mean_interval(values, units)
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "units": count,
        "tokens": len(values),
    }


def write(found: dict, path: Path) -> None:
    """JSON with a line for each entry of a section."""
    sections = []
    for name, section in found.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in section.items())
        sections.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


def render(template: str, context: dict, **filters: Callable) -> str:
    """A page of this folder's templates."""
    return page(Path(__file__).parent / template, context, **filters)


def run(doc: str, analyse: Callable[[], dict], write_report: Callable[[dict, Path], None], out: Path) -> None:
    """A study's command: its numbers to `out` and its page beside them, or the page again, of a file of numbers."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, help="this file instead of the models")
    source = parser.parse_args().source
    found = json.loads(source.read_text(encoding="utf-8")) if source else analyse()
    if not source:
        write(found, out)
    write_report(found, out.parent)
