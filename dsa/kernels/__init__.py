"""Kernels: what computes the equations of dsa/reference.py fast, and the choice of what runs.

Nothing that a platform may lack is imported until a kernel is asked for: the package works where Triton is not
installed.

    triton/     for CUDA
    cpu/        in C, compiled on first use
    check.py    the first use on a device compares every kernel with the reference
"""

import importlib.util
import logging
import os
from functools import lru_cache

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "gather", "triton", "cpu")
NAMES = {"gather": "PyTorch", "triton": "Triton kernels", "cpu": "CPU kernels"}  # in the log
VARIABLE = "DSA_BACKEND"  # "triton", "cpu" or "gather": what the machine shall use where the caller names no backend
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache
def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the attention kernels cannot run on such tensors; None if they can.

    CPU tensors need Triton's interpreter, for tests: TRITON_INTERPRET=1 before Triton's first import.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if head_dim not in HEAD_DIMS:
        return f"head size {head_dim} is not one of {HEAD_DIMS}"
    if dtype not in DTYPES:
        return f"{dtype} is not one of {DTYPES}"
    if interpreted():
        return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return (
            f"the kernels run on CUDA, not on {device.type}, unless TRITON_INTERPRET=1 was set before Triton's import"
        )
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter. It decides when a function is decorated, so its own library tells
    what was set at its first import, which is usually some other package's doing."""
    from triton.language import standard
    from triton.runtime import JITFunction

    return not isinstance(standard.sum, JITFunction)


def chosen(tensor: torch.Tensor, head_dim: int, operation: str | None = None, cpu: tuple | None = None) -> str:
    """The backend for `tensor` where the caller names none: "triton" on CUDA and "cpu" on a CPU, if their kernels can
    run, else "gather".

    DSA_BACKEND overrides it. The choice is logged once for each operation that is named, and each kind of device.

    Args:
        cpu: the module of dsa/kernels/cpu that has the operation, if one has, and what it is compiled for, the
            arguments of its `obstacle`.

    Raises:
        ValueError: DSA_BACKEND asks for the impossible or is no backend.
        RuntimeError: the kernels turn out to be wrong on this device.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, "triton", "gather", "cpu"):
        raise ValueError(f"{VARIABLE}: {wanted!r} is neither triton nor gather nor cpu")
    choice, reason = "gather", None
    if wanted == "triton":
        require(tensor, head_dim)
        choice = "triton"
    elif wanted == "cpu" and cpu is not None:
        require_cpu(tensor, cpu)
        choice = "cpu"
    elif wanted is None and tensor.is_cuda and not obstacle(tensor.device, tensor.dtype, head_dim):
        choice = "triton"
    elif wanted is None and tensor.device.type == "cpu" and cpu is not None:
        module, *shape = cpu
        reason = module.obstacle(*shape)
        choice = "gather" if reason else "cpu"
    if operation:
        log_choice(operation, NAMES[choice], tensor.device.type, reason)
    if choice != "gather":
        from dsa.kernels import check

        if choice == "triton":
            check.verify(tensor.device, tensor.dtype, head_dim)
        else:
            check.verify_cpu(*cpu)
    return choice


@lru_cache
def log_choice(operation: str, choice: str, device: str, reason: str | None = None) -> None:
    """Say once what runs: a silent fall-back is a bug that costs days."""
    logger.info("%s: %s on %s%s", operation, choice, device, f", as {reason}" if reason else "")


def require(tensor: torch.Tensor, head_dim: int) -> None:
    """Raise ValueError, with the reason, where the kernels cannot run on `tensor`."""
    reason = obstacle(tensor.device, tensor.dtype, head_dim)
    if reason:
        raise ValueError(f'backend "triton" cannot run: {reason}')


def require_cpu(tensor: torch.Tensor, cpu: tuple | None) -> None:
    """Raise ValueError, with the reason, where the CPU kernel `cpu` (see `chosen`; None: there is none) cannot run."""
    if tensor.device.type != "cpu":
        reason = f"the tensors are on {tensor.device.type}"
    else:
        reason = cpu[0].obstacle(*cpu[1:]) if cpu else "it has no kernel for this"
    if reason:
        raise ValueError(f'backend "cpu" cannot run: {reason}')
