"""reports/summary.json, which is all that DVC's own commands list of a run."""

import json
import subprocess
import sys

import pytest
import yaml

from stages import summary
from tests.conftest import ROOT
from tests.test_pipeline import copy_of_project

ORDER = "loss_dense loss_dsa gap gap_ci gap_window lookups pairs_dense pairs mass dpo seconds gb"
ROW = {"loss": 2.31736, "gap": (0.00164, 0.0009)}
ROW |= {"retrieval_tokens": 0.78743, "exact": {"pairs": 0.98}}
ARMS = {
    "dense": ROW,
    "dsa": ROW | {"loss": 2.31896, "retrieval_tokens": 0.79, "exact": {"pairs": 0.97}},
    "window_trained": ROW | {"gap": (0.16, 0.02)},
}
STAGES = [
    {"seconds": 10.4, "peak_memory_gb": 3.32},
    {"seconds": 20.2, "peak_memory_gb": 9.9, "peak_device_memory_gb": 5.04},  # the accelerator's is the scarce one
]


@pytest.fixture
def written():
    preference = {"arms": {"dsa": {"accuracy": (0.918, 0.01)}}}
    return summary.summarize(ARMS, {"mass": [0.8, 0.9]}, preference, STAGES)


def test_the_numbers_are_few_and_in_a_fixed_order(written):
    assert list(written) == ORDER.split() and len(written) <= summary.COLUMNS
    assert (written["loss_dense"], written["loss_dsa"], written["gap_window"]) == (2.3174, 2.319, 0.16)
    assert (written["lookups"], written["mass"], written["dpo"]) == (0.79, 0.85, 0.918)
    assert (written["pairs_dense"], written["pairs"]) == (0.98, 0.97)
    assert (written["seconds"], written["gb"]) == (31, 5.0)


def test_dvc_lists_these_numbers_and_no_others(written, tmp_path):
    project = copy_of_project(tmp_path / "project")
    (project / "reports/summary.json").write_text(json.dumps(written), encoding="utf-8")

    def dvc(*command):
        command = [sys.executable, "-m", "dvc", *command]
        return subprocess.run(command, cwd=project, capture_output=True, encoding="utf-8", check=True).stdout

    head, row = dvc("metrics", "show").splitlines()
    assert head.split() == ["Path", *sorted(ORDER.split())] and len(head) <= 160
    assert row.split()[0] == "reports/summary.json" and "2.3174" in row
    (columns,) = json.loads(dvc("exp", "show", "--json"))[0]["data"]["metrics"].values()
    assert list(columns["data"]) == ORDER.split()


def test_no_other_output_is_a_metric_and_every_plot_is_an_output():
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    stages = [stage.get("do", stage) for stage in pipeline["stages"].values()]
    metrics = [stage["metrics"] for stage in stages if "metrics" in stage]
    assert metrics == [[{"reports/summary.json": {"cache": False}}]]
    assert not [stage for stage in stages if "plots" in stage]
    images = [plot for plot in pipeline["plots"] if isinstance(plot, str)]
    assert images and all((ROOT / image).is_file() for image in images)
    made = {arm["path"] for arm in pipeline["artifacts"].values()}
    assert made <= {out for stage in stages for out in stage.get("outs", []) if isinstance(out, str)}
