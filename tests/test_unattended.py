"""A run in a log file that is told to end: what it says, its exit code, and what the next run makes of it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from dsa import from_dense
from stages import training
from stages.unattended import GO_ON
from tests.conftest import ROOT
from tests.test_reproducible import DATA, run_stages, small_project
from tests.test_training import trainer_for

STEPS = 20
COMMAND = [sys.executable, "-m", "stages.unattended", "repro", "-f", "-s", "dense"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts the stage `dense` through DVC and accelerate's launcher, its output in the file `log`."""
    project = small_project(tmp_path_factory.mktemp("unattended") / "project", dense={"steps": STEPS})
    home = project.parent
    environment = {"DSA_SCRATCH": str(home / "scratch"), "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_MININTERVAL": "0", "TQDM_DELAY": "0"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run_stages(project, DATA | {"dense": ""}, environment)  # without DVC, the launcher and an interruption

    def start():
        with (project / "log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(COMMAND, cwd=project, env=os.environ | environment, stdout=log, stderr=log)

    start.project, start.scratch = project, home / "scratch"
    return start


def result(project):
    metrics = json.loads((project / "reports/train/dense.json").read_text(encoding="utf-8"))
    files = ("models/dense/model.safetensors", "reports/train/dense.csv")
    return metrics["resumed_at_step"], metrics["tokens"], [(project / name).read_bytes() for name in files]


@pytest.mark.slow
def test_a_run_told_to_end_says_go_on_and_the_next_one_ends_in_the_same_bits(run):
    log = run.project / "log"
    resumed, *whole = result(run.project)
    assert resumed == 0
    first = run()
    deadline = time.monotonic() + 200
    while not (found := list(run.scratch.glob("dense-*/checkpoint-*/trainer_state.json"))):
        assert time.monotonic() < deadline and first.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == GO_ON
    text = log.read_text(encoding="utf-8")
    (kept,) = re.findall(rf"^SIGTERM: step (\d+) of {STEPS} is kept", text, re.MULTILINE)
    assert "\r" not in text and re.search(rf"^dense .* of {STEPS}, .* tokens/s$", text, re.MULTILINE)
    assert (found[0].parents[1] / f"checkpoint-{kept}/trainer_state.json").exists()
    assert run().wait() == 0
    resumed, *again = result(run.project)
    assert resumed == int(kept) and again == whole


class Signal(TrainerCallback):
    """SIGTERM in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_sigterm_ends_a_training_after_its_step_and_a_rerun_has_the_same_weights(dense_model, tmp_path, capfd):
    def model():
        return from_dense(dense_model, topk=8, n_heads=2, head_dim=8)

    def trainer(folder, *callbacks):
        options = {"micro": 2, "accumulate": 2, "steps": 5, "callbacks": callbacks}
        return trainer_for(model(), tmp_path / folder, **options)

    before = signal.getsignal(signal.SIGTERM)
    whole = trainer("whole")
    numbers = training.run(whole, tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        training.run(trainer("cut", Signal(step=2)), tmp_path / "cut")
    assert stopped.value.code == GO_ON and "SIGTERM: step 3 of 5 is kept" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    again = trainer("cut")
    resumed = training.run(again, tmp_path / "cut")
    assert resumed["resumed_at_step"] == 3 and resumed["tokens"] == numbers["tokens"]
    weights = again.model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in whole.model.state_dict().items())


def test_any_other_failure_has_dvcs_code(tmp_path):
    command = [sys.executable, "-m", "stages.unattended", "repro", "no-such-stage"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode not in (0, GO_ON) and "no-such-stage" in done.stderr


def test_what_is_no_training_ends_at_once(tmp_path):
    """It inherits from the command above that SIGTERM is ignored, which is for DVC and the launcher."""
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); import stages; signal.raise_signal(15)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == -signal.SIGTERM


BARS = """
import time, stages
from tqdm.auto import tqdm
for _ in tqdm(range(20), desc="rows"):
    time.sleep(0.02)
"""


def test_in_a_log_file_progress_is_lines_and_short_work_says_nothing():
    def log(**environment):
        environment = os.environ | environment
        return subprocess.run([sys.executable, "-c", BARS], cwd=ROOT, env=environment, stderr=subprocess.PIPE).stderr

    assert log() == b""
    lines = log(TQDM_MININTERVAL="0.1", TQDM_DELAY="0.1", DVC_STAGE="filter").decode().splitlines()
    assert len(lines) >= 2 and lines[0].startswith("filter rows ") and " of 20, " in lines[0]


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "code,line",
    [
        ("open('/dev/full', 'w').write('x' * 10**6)", "OSError: .*No space left on device"),
        ("import torch; torch.save(torch.ones(10**6), '/dev/full')", "RuntimeError: .*"),
        ("import torch; torch.empty(10**14)", "RuntimeError: .*"),
        ("'x' * 10**15", "MemoryError: no memory left"),
    ],
)
def test_a_machine_that_is_too_small_is_one_line(code, line):
    environment = os.environ | {"DVC_STAGE": "dense"}
    command = [sys.executable, "-c", f"import stages; {code}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")
    said = [text for text in done.stderr.splitlines() if "Warning" not in text and not text.startswith(" ")]
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert re.fullmatch(f"dense: {line}: run it again where there is room", said[0])


def test_an_interruption_is_one_line():
    command = [sys.executable, "-c", "import stages; raise KeyboardInterrupt"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DVC_STAGE": "dense"}, stderr=subprocess.PIPE)
    assert done.returncode and done.stderr.decode().splitlines()[-1:] == ["dense: interrupted: run it again"]
    assert b"Traceback" not in done.stderr


def test_a_fault_of_the_code_has_its_traceback():
    done = subprocess.run([sys.executable, "-c", "import stages; 1 / 0"], cwd=ROOT, stderr=subprocess.PIPE)
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"ZeroDivisionError" in done.stderr
