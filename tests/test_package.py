"""`dsa` as others install it: a wheel with all it needs, which imports in little time, in a folder that is not ours."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dsa
from tests.conftest import ROOT

# In a process whose dsa.modeling nobody has imported yet.
LAZY = """
import sys
import dsa
slow = {"dsa.modeling", "scipy", "sympy", "torch._dynamo", "torch.distributed.tensor", "triton"} & sys.modules.keys()
assert not slow, slow
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("qwen2_dsa", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                              num_attention_heads=1, num_key_value_heads=1)
mapping = AutoModelForCausalLM._model_mapping
assert type(config) is dsa.Qwen2DSAConfig and type(config) in mapping
assert "dsa.modeling" not in sys.modules
AutoModelForCausalLM.from_config(config).save_pretrained("model")
model = AutoModelForCausalLM.from_pretrained("model")
assert type(model) is dsa.Qwen2DSAForCausalLM is mapping[dsa.Qwen2DSAConfig]
assert type(AutoConfig.from_pretrained("model")) is dsa.Qwen2DSAConfig
"""
# What README's lines take for granted.
BEFORE = """
import importlib.metadata
import torch
import dsa

assert dsa.__version__ == importlib.metadata.version("dsa-reproduction")
print(dsa.__file__)
input_ids = labels = torch.arange(40)[None]
dsa.from_dense({base!r}, topk=8, n_heads=2, head_dim=8).save_pretrained("models/dsa")
"""


def python(code: str, folder: Path, **environment: str) -> str:
    command, environment = [sys.executable, "-c", code], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_a_wheel_has_the_package_whole_and_nothing_else(wheel):
    files = subprocess.run(["git", "ls-files", "dsa"], cwd=ROOT, capture_output=True, encoding="utf-8").stdout
    if not files:
        pytest.skip("this is no clone: git does not say what belongs to it")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed >= {"dsa/__init__.py", "dsa/kernels/cpu/select.c", "dsa/kernels/cpu/vec.h"}
    assert packed >= set(files.split()) and all(name.startswith("dsa/") for name in packed)
    assert wheel.name == f"dsa_reproduction-{dsa.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_readmes_lines_run_from_another_folder(wheel, tmp_path):
    """`import dsa` worked from the root of the repository only; compiled kernels need their C sources installed."""
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [b for page in pages for b in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)]
    (lines,) = [block for block in blocks if "dsa.from_dense(" in block]
    base = str(ROOT / "data/base")
    lines = BEFORE.format(base=base) + lines.replace('"Qwen/Qwen2.5-0.5B"', repr(base))
    cache = str(tmp_path / "kernels")
    out = python(lines, elsewhere, PYTHONPATH=str(installed), DSA_KERNEL_CACHE=cache)
    assert out.split()[0] == str(installed / "dsa/__init__.py")


@pytest.mark.slow
def test_importing_registers_the_model_and_does_not_import_it(tmp_path):
    """What transformers' models import takes seconds, and half of the stages have no model."""
    python(LAZY, tmp_path, PYTHONPATH=str(ROOT))


def test_public_names_are_there():
    assert {name: getattr(dsa, name).__name__ for name in dsa.__all__} == {name: name for name in dsa.__all__}
    assert set(dsa.__all__) <= set(dir(dsa))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dsa.no_such_name
