"""The ten minutes on a GPU, rehearsed: every case of every part runs, and the page shows it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

ABSENT = ("accelerate", "datasets", "dvc", "matplotlib", "pandas", "pyarrow", "pydantic", "ruamel", "trl", "ziglang")


@pytest.mark.skipif(
    "DSA_REHEARSAL" not in os.environ, reason="the interpreter takes a quarter of an hour: set DSA_REHEARSAL"
)
def test_the_rehearsal_runs_every_case(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "rehearsal.json").read_text(encoding="utf-8"))
    assert found["commit"] == "abc" and set(found["parts"]) == {
        "right_float32",
        "right_float16",
        "lengths",
        "steps",
        "compiled",
    }
    for name, part in found["parts"].items():
        assert "left_out" not in part
        for case, result in part["cases"].items():
            assert "failed" not in result and result.get("right", True), (name, case, result)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "abc" in page and "mean nothing" in page and "Failed" not in page and "| sparse | 10 |" in page


@pytest.mark.slow
def test_it_needs_no_other_package():
    """Machines with a GPU have PyTorch, Triton and transformers: the rest is as if it were not installed here."""
    code = (
        "import sys\n"
        f"sys.modules |= dict.fromkeys({ABSENT!r})\n"  # whose import is then an ImportError
        "import benchmarks.gpu.__main__, benchmarks.gpu.cases, stages.files\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.slow
def test_without_a_device_one_line_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode and "--rehearse" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
