"""What a container, a cluster node or a course machine looks like."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.common import scratch
from tests.conftest import ROOT


def test_a_scratch_folder_needs_no_home_directory(monkeypatch, tmp_path):
    """The home directory was asked for although DSA_SCRATCH was set: a traceback where a user has none."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setenv("DSA_SCRATCH", str(tmp_path))
    assert scratch("dense", {}, []).parent == tmp_path
    monkeypatch.delenv("DSA_SCRATCH")
    with pytest.raises(SystemExit, match="DSA_SCRATCH: has to be set"):
        scratch("dense", {}, [])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux says what the launcher was given")
@pytest.mark.parametrize("asked", [None, "1"])
def test_the_number_of_threads_is_the_users(tmp_path, asked):
    """OMP_NUM_THREADS=1 became all cores, as the launcher sets 1 too where nothing is set."""
    script = tmp_path / "threads.py"
    script.write_text(
        "import torch\nfrom stages.training import use_all_cores\nuse_all_cores()\nprint(torch.get_num_threads())",
        encoding="utf-8",
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    environment |= {} if asked is None else {"OMP_NUM_THREADS": asked}
    launcher = Path(sys.executable).with_name("accelerate")
    command = [launcher, "launch", "--cpu", "--num_processes=1", script]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.stdout.split()[-1:] == [asked or str(len(os.sched_getaffinity(0)))], done.stderr
