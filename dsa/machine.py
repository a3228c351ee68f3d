"""What this machine can do, where it decides how the work is done and not what comes out."""

import os

import torch


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def supports_bf16() -> bool:
    """Whether bfloat16 matrix products are fast here; on a CPU without them autocast would only cost precision."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # In this order: builds for other processors have no mkldnn to ask
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
