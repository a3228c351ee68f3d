"""The table of families and contracts: every test of tests/test_families.py on every family, and the pipeline's.

python -m tests.families             # reports/families.json, and from it reports/families.md; some minutes
"""

import inspect
import json
import os
import re
import sys
from importlib.metadata import version

import pytest

from dsa.config import FAMILIES
from stages.common import git_commit
from stages.files import write_json
from tests import test_families
from tests.conftest import ROOT

REPORT = ROOT / "reports/families.json"
PIPELINE = "test_the_pipeline_trains_and_evaluates_another_family"
FILES = ["tests/test_families.py", f"tests/test_family_pipeline.py::{PIPELINE}"]
SHOWN = {"passed": "✓", "failed": "✗"}


def contracts() -> list[str]:
    """The tests that take a model of each family, in the order of the file."""
    found = vars(test_families).items()
    return [name for name, test in found if name.startswith("test_") and "dense" in inspect.signature(test).parameters]


class Outcomes:
    """A plugin of pytest that keeps how each test ended, by its name and family."""

    def __init__(self):
        self.found: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            name, _, rest = report.nodeid.split("::")[-1].partition("[")
            family = re.match(r"\w*", rest)[0]
            family = next((f for f in FAMILIES if rest.startswith((f"{f}-", f"{f}]"))), family)
            self.found.setdefault(name, {})[family] = report.outcome


def words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def page(found: dict) -> str:
    outcomes = found["outcomes"]
    lines = [["", *FAMILIES], ["---", *[":---:"] * len(FAMILIES)]]
    for name in [*contracts(), PIPELINE]:
        lines.append([words(name), *(SHOWN.get(outcomes[name].get(family), "") for family in FAMILIES)])
    return "\n\n".join(
        [
            "# Families and contracts",
            "Each cell is a test that was run on a small model of that family with random weights, float32, on a CPU: "
            "[tests/test_families.py](../tests/test_families.py), and for the last line "
            "[tests/test_family_pipeline.py](../tests/test_family_pipeline.py), the stages of the smoke profile from "
            "data to evaluation, for Llama all of them with the report. Cached decoding is of rows padded on the left, "
            "greedy and by beams; that the two losses never meet is an audit of every parameter's gradients.",
            "\n".join("| " + " | ".join(line) + " |" for line in lines),
            "Refused in one line that says why:",
            "\n".join(f"- `{name}`: {said}" for name, said in found["refused"].items()),
            f"Made by `python -m tests.families` at {found['commit']}, transformers {found['transformers']}, "
            f"torch {found['torch']}.",
        ]
    )


def main() -> None:
    os.environ["DSA_EVERY_FAMILY"] = "1"
    outcomes = Outcomes()
    ended = pytest.main(["-q", "--rootdir", str(ROOT), *(str(ROOT / file) for file in FILES)], plugins=[outcomes])
    found = {"commit": git_commit(), **{name: version(name) for name in ("transformers", "torch")}}
    found["outcomes"] = {name: outcomes.found.get(name, {}) for name in [*contracts(), PIPELINE]}
    found["refused"] = {
        f"{name} {json.dumps(fields)}" if fields else name: test_families.refusal(name, fields)
        for name, fields, _ in test_families.REFUSALS
    }
    write_json(REPORT, found)
    REPORT.with_suffix(".md").write_text(page(found) + "\n", encoding="utf-8")
    sys.exit(ended)


if __name__ == "__main__":
    main()
