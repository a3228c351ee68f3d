"""C kernels, compiled on first use by the clang inside the `ziglang` wheel: no compiler on the machine is needed.

A library is kept in ~/.cache/dsa/kernels (or DSA_KERNEL_CACHE) under a hash of all that it depends on.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
MARCH = "native"  # tests set x86_64_v3 (AVX2) and x86_64_v2, whose four lanes stand in for NEON
PROCESSORS = ("x86_64", "aarch64", "arm64")
# No libc: neither its headers nor its stubs, which zig would first have to build (3.7 s, not 0.3). The few calls that
# clang leaves (memcpy, memset) are found in the running process.
FLAGS = ["-std=c11", "-O3", "-shared", "-fPIC", "-nostdlib", "-nostdlibinc", "-ffreestanding"]
FLAGS += ["-ffp-contract=on", "-fno-math-errno", "-g0", "-s", "-Wall"]
if sys.platform == "darwin":
    FLAGS += ["-Wl,-undefined,dynamic_lookup"]


class BuildError(RuntimeError):
    """Why a kernel cannot be had on this machine, in one line."""


def library(source: str, march: str | None = None, **defines: int) -> ctypes.CDLL:
    """The kernels of `source`, a file beside this one, compiled for one shape.

    Args:
        march: the instruction set by zig's name; `MARCH` by default.
        defines: macros of the compilation.

    Raises:
        BuildError: no compiler, no place for the library, an unknown processor.
    """
    return _load(source, march or MARCH, tuple(sorted(defines.items())))


def obstacle(source: str, **defines: int) -> str | None:
    """Why `library` fails; None where it does not. Compiles, if nobody has yet."""
    return _obstacle(source, MARCH, tuple(sorted(defines.items())))


def call(function, *args) -> int:
    """Call a kernel: a tensor is the pointer to its first element, None a null pointer, an int an int64_t and a float a
    float. The kernel runs without the GIL. Returns its int, if it has one."""
    return function(*(_c_value(x) for x in args))


def _c_value(x):
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, int):
        return ctypes.c_int64(x)
    return None if x is None else ctypes.c_float(x)


@cache
def _obstacle(source: str, march: str, defines: tuple) -> str | None:
    try:
        _load(source, march, defines)
    except BuildError as error:
        return str(error)
    return None


@cache
def _load(source: str, march: str, defines: tuple) -> ctypes.CDLL:
    if sys.platform not in ("linux", "darwin") or platform.machine() not in PROCESSORS:
        raise BuildError(f"no CPU kernels for {platform.machine()} on {sys.platform}")
    try:
        compiler = version("ziglang")
    except PackageNotFoundError:
        raise BuildError("the ziglang wheel, which holds the compiler, is not installed") from None
    if not (HERE / source).exists():
        raise BuildError(f"the C source {source} is not there: this is the code of an exported model")
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in defines)]
    if march != "native":  # which is what no flag means
        flags.append(f"-march={march}")
    code = [path.read_bytes() for path in (HERE / source, *sorted(HERE.glob("*.h")))]
    parts = [*code, *(text.encode() for text in (*flags, _processor(), compiler))]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    path = _folder() / f"{Path(source).stem}-{key}.so"
    try:
        if not path.exists():
            _compile(source, flags, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path.parent}: {error}") from error


def _compile(source: str, flags: list[str], path: Path) -> None:
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:  # renamed when whole: two processes may both be first
        made = Path(work, "made.so")
        caches = {f"ZIG_{name}_CACHE_DIR": os.path.join(work, "zig") for name in ("LOCAL", "GLOBAL")}
        command = [sys.executable, "-m", "ziglang", "cc", *flags, str(HERE / source), "-o", str(made)]
        run = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
        if run.stderr:
            logger.warning("%s\n%s", " ".join(command), run.stderr)
        if run.returncode:
            raise BuildError(f"{source} does not compile: {(run.stderr.strip() or 'no message').splitlines()[0]}")
        made.replace(path)
    logger.info("%s compiled in %.1f s: %s", source, time.perf_counter() - start, path)


def _folder() -> Path:
    return Path(os.environ.get("DSA_KERNEL_CACHE") or Path.home() / ".cache" / "dsa" / "kernels")


@lru_cache
def _processor() -> str:
    """What "native" means here: a home on a shared disk is read by other machines too."""
    if sys.platform != "linux":
        return f"{platform.machine()} {platform.node()}"
    kinds = ("model name", "flags", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kinds)))
