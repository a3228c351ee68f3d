"""Which checkpoint a rerun goes on from, and that no two runs write it."""

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import common, dense, dpo, params
from stages.checkpoints import Seal, last_checkpoint
from stages.training import checkpoints
from tests.conftest import ROOT, copy_of_code

TRAINED = ["dense", "warmup", "sparse", "window", "dpo@dense", "dpo@dsa"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's own files, with a file in each folder that a stage would have made."""
    copy_of_code(tmp_path)
    for stage in TRAINED:
        for name in params.dependencies(stage, tmp_path)["deps"]:
            if not (path := tmp_path / name).exists():
                path.mkdir(parents=True)
                (path / "part").write_bytes(b"0")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("stage", TRAINED)
def test_a_checkpoint_of_other_code_data_or_libraries_is_not_continued(project, stage, monkeypatch):
    """torchforge #631: what a dependency of dvc.yaml changes is another run's."""
    first = checkpoints(stage)
    for name in params.dependencies(stage)["deps"]:
        path = next(p for p in (Path(name), *sorted(Path(name).rglob("*"))) if p.is_file())
        before = path.read_bytes()
        path.write_bytes(before + b"#")
        assert checkpoints(stage) != first, path
        path.write_bytes(before)
    edited = Path("profiles/cpu.yaml").read_text(encoding="utf-8").replace("learning_rate: ", "learning_rate: 1")
    Path("profiles/cpu.yaml").write_text(edited, encoding="utf-8")
    assert checkpoints(stage) != first
    shutil.copy(ROOT / "profiles/cpu.yaml", "profiles/cpu.yaml")
    assert checkpoints(stage) == first
    monkeypatch.setattr(common, "version", lambda name: "0" if name == "transformers" else "1")
    older = checkpoints(stage)
    monkeypatch.setattr(common, "version", lambda name: "1")
    assert first != older != checkpoints(stage) != first


def test_what_a_stage_does_not_depend_on_keeps_its_checkpoint(project):
    first = {stage: checkpoints(stage) for stage in TRAINED}
    Path("stages/report.py").write_text("", encoding="utf-8")
    Path("dsa/kernels/__pycache__").mkdir()
    Path("dsa/kernels/__pycache__/select.pyc").write_bytes(b"made by the first run")
    knobs = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(knobs.replace("topk: 256", "topk: 128"), encoding="utf-8")
    changed = {stage for stage in TRAINED if checkpoints(stage) != first[stage]}
    assert changed == {"sparse", "window"}


def test_a_checkpoint_of_another_precision_is_not_continued(project, monkeypatch):
    """The scratch folder of a cluster is seen by machines with and without bfloat16."""
    names = []
    for supported in (True, False):
        monkeypatch.setattr("stages.training.supports_bf16", lambda supported=supported: supported)
        names.append(checkpoints("dense"))
    assert names[0] != names[1]


HOLD = """
import sys, time
from pathlib import Path
from stages.common import owned

with owned(Path(sys.argv[1])) as folder:
    (folder / "checkpoint").write_text("half of it")
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_by_another_run(folder):
    run = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "held\n"
        yield run.pid
    finally:
        run.kill()
        run.wait()
        run.stdout.close()


def test_a_second_run_does_not_touch_what_another_is_writing(tmp_path):
    folder = tmp_path / "scratch/dense-0"
    with held_by_another_run(folder) as pid:
        with (
            pytest.raises(
                params.ParamsError, match=f"DSA_SCRATCH: process {pid} on .* is at work in {folder}"
            ) as error,
            common.owned(folder),
        ):
            pytest.fail("two owners")
        assert len(str(error.value).splitlines()) == 1
        assert (folder / "checkpoint").read_text(encoding="utf-8") == "half of it"
    with common.owned(folder):  # which a kill has freed
        assert (folder / "checkpoint").exists()
    assert not list(folder.parent.iterdir())


def test_a_run_that_fails_leaves_its_scratch_folder_to_the_next(tmp_path):
    folder = tmp_path / "dense-0"
    with pytest.raises(ZeroDivisionError), common.owned(folder):
        (folder / "checkpoint").write_text("", encoding="utf-8")
        _ = 1 / 0
    with common.owned(folder):
        assert (folder / "checkpoint").exists()


def test_the_other_processes_of_a_run_share_its_folder(tmp_path, monkeypatch):
    with common.owned(tmp_path / "dense-0") as folder:
        monkeypatch.setenv("RANK", "1")
        with common.owned(folder):
            pass
        assert folder.is_dir()


@pytest.mark.slow
def test_every_stage_with_a_scratch_folder_holds_it(project, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DSA_SCRATCH", str(tmp_path_factory.mktemp("scratch")))
    shutil.rmtree("models/base")
    shutil.copytree(ROOT / "data/base", "models/base")
    for folder, start in ((checkpoints("dense"), dense.main), (checkpoints("dpo@dsa"), lambda: dpo.main("dsa"))):
        with common.owned(folder), pytest.raises(params.ParamsError, match=f"at work in {folder}"):
            start()


def sealed(folder, step):
    """A checkpoint as a Trainer leaves it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (path / name).write_bytes(f"{name} of {step}".encode())
    trainer = SimpleNamespace(output_dir=folder), SimpleNamespace(global_step=step, is_world_process_zero=True)
    Seal().on_save(*trainer, None)
    return path


def test_the_newest_checkpoint_is_taken_the_tenth_after_the_ninth(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        sealed(tmp_path, step)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", "sha256.json"]
)
def test_a_checkpoint_in_which_a_bit_has_flipped_is_not_gone_on_from(tmp_path, name):
    """Weights and optimizer states have no checksum of their own: one bit of an exponent, and the model is lost."""
    older, newer = sealed(tmp_path, 1), sealed(tmp_path, 2)
    content = bytearray((newer / name).read_bytes())
    content[len(content) // 2] ^= 4
    (newer / name).write_bytes(content)
    assert last_checkpoint(tmp_path) == str(older) and not newer.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "sha256.json"])
def test_a_checkpoint_that_a_kill_cut_short_is_not_gone_on_from(tmp_path, name, monkeypatch):
    older, newer = sealed(tmp_path, 1), sealed(tmp_path, 2)
    (newer / name).unlink()
    with monkeypatch.context() as second:
        second.setenv("RANK", "1")  # which leaves it to the first to delete
        assert last_checkpoint(tmp_path) == str(older) and newer.exists()
    assert last_checkpoint(tmp_path) == str(older) and not newer.exists()


def test_what_other_processes_may_still_be_writing_is_not_sealed(tmp_path):
    newest = sealed(tmp_path, 1)
    (newest / "rng_state_1.pth").write_bytes(b"half of it")
    assert last_checkpoint(tmp_path) == str(newest)
