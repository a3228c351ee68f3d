"""The cases of each part, by name, in order of worth; and what the machine is. In a process of its own."""

import subprocess
from collections.abc import Callable

import numpy
import torch
import transformers
import triton
from transformers import cache_utils, configuration_utils, masking_utils

from benchmarks.gpu import costs, right
from dsa.kernels import check

Cases = dict[str, Callable[[], dict]]


def accept_older_transformers() -> None:
    """transformers 5.17 called the layers that have an indexer by another name."""
    new, old = "indexed_attention", "deepseek_sparse_attention"
    if new in configuration_utils.ALLOWED_LAYER_TYPES:
        return
    for name in ("ALLOWED_ATTN_LAYER_TYPES", "ALLOWED_LAYER_TYPES"):
        setattr(configuration_utils, name, (*getattr(configuration_utils, name), new))
    mappings = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING
    for types in (*mappings, masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING):
        types[new] = types[old]


def of_part(part: str, rehearse: bool) -> Cases:
    accept_older_transformers()
    # The comparison on first use is a case of its own; elsewhere its compiling would be timed, and the interpreter
    # takes longer for it than for all else.
    if rehearse or not part.startswith("right_"):
        check.verify = lambda *args: None
    if part.startswith("right_"):
        dtype = getattr(torch, part.removeprefix("right_"))
        return {} if rehearse and dtype == torch.bfloat16 else right.cases(dtype, rehearse)  # not in the interpreter
    return {"lengths": costs.lengths, "steps": costs.steps, "compiled": costs.compiled}[part](rehearse)


def nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, encoding="utf-8").stdout.split("\n")[0] or None
    except OSError:
        return None


def machine(rehearse: bool) -> dict | None:
    """None where there is no device to measure."""
    found = {"device": "rehearsal"}
    if not rehearse:
        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory
        driver = nvidia_driver()
        found = {"device": torch.cuda.get_device_name(), "gb": round(memory / 2**30, 1), "driver": driver}
    modules = torch, triton, transformers, numpy
    return found | {"versions": {m.__name__: m.__version__ for m in modules} | {"cuda": torch.version.cuda}}


def usable() -> bool:
    """Whether the device still takes work: after a kernel's illegal access it does not, until the process ends."""
    try:
        torch.ones(1, device=costs.DEVICE).sum().item()
    except RuntimeError:
        return False
    return True
