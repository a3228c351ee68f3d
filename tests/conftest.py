import os
import platform
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from dsa.kernels.cpu import build

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:  # else each takes all cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def small_model(model_type: str = "qwen2", **changes) -> PreTrainedModel:
    """A small random dense model with grouped queries and weights large enough for attention to have opinions."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config | changes)).eval()


def copy_of_code(folder: Path) -> None:
    """What a stage reads of the project itself, without data and results."""
    for name in ("params.yaml", "dvc.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("dsa", "stages", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def dense_model() -> Qwen2ForCausalLM:
    return small_model()


def corpus_model(**changes) -> Qwen2ForCausalLM:
    """A random Qwen2 with the vocabulary of the cpu profile's tokenizer and little else."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        **changes,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["native", "x86_64_v3", "x86_64_v2"])
def march(request, monkeypatch) -> str:
    """CPU kernels for this processor, for AVX2, and for the four lanes that stand in for NEON."""
    if request.param != "native":
        flags = (
            Path("/proc/cpuinfo").read_text(encoding="utf-8")
            if platform.machine() == "x86_64" and os.name == "posix"
            else ""
        )
        if ("avx2" if request.param == "x86_64_v3" else "sse4_2") not in flags:
            pytest.skip(f"this processor does not run {request.param}")
    monkeypatch.setattr(build, "MARCH", request.param)
    return request.param


def error_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square error relative to the expected tensor's."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist, which else begins with the files that have most tests


def pytest_collection_modifyitems(items):
    """Files with slow tests first: where processes share the files, none is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
