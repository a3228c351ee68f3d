"""What every stage needs and no output depends on: the run's cost, a scratch directory that survives a crash."""

import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from stages.params import ParamsError


def device_name() -> str:
    """The accelerator, or the processor, its widest vectors and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU ({model}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


def git_commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@contextmanager
def measured(metrics: dict) -> Iterator[None]:
    """Add `run` to the metrics: seconds, peak memory of the process (GB) and of the accelerator, device."""
    start = time.monotonic()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() != "Darwin" else 2**30)
    metrics["run"] = {
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_gb": round(peak, 2),
        "device": device_name(),
    }
    if torch.cuda.is_available():
        metrics["run"]["peak_device_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)


def forget_peak() -> None:
    """Let `peak_memory` count from here. The process's own needs Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was given back before is no memory of what comes
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_of_process() -> int:
    """The largest resident set so far, in bytes. Not `ru_maxrss`, which a process has from the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_memory() -> int | None:
    """The most memory since `forget_peak`, bytes: of the accelerator, else of the process where that can be told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_of_process() if sys.platform == "linux" else None


def limit_memory() -> int | None:
    """Bytes of memory that are free here, and from now on the most that this process can have more: an allocation
    beyond fails with an error, where else the kernel would end some process. None, and no limit, but on Linux."""
    if sys.platform != "linux":
        return None
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo")}
    free, group = known["MemAvailable"], "/sys/fs/cgroup/memory."
    if limit := [int(line) for line in _lines(group + "max") if line.isdigit()]:
        free = min(free, limit[0] - int(_lines(group + "current")[0]))
    held = next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmData:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY:  # or the user has set it
        resource.setrlimit(resource.RLIMIT_DATA, (held + free, hard))
    return free


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def digest(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of files and directories, without what .dvcignore lists."""
    total = hashlib.blake2b(digest_size=8)
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if "__pycache__" in file.parts:
                continue
            total.update(file.as_posix().encode())
            total.update(hashlib.blake2b(file.read_bytes()).digest())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Of Python, and of each library that pyproject.toml names for the pipeline."""
    groups = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    names = [dependency.split("==")[0] for dependency in groups["pipeline"]]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise SystemExit("DSA_SCRATCH: has to be set to a folder, for there is no home directory") from None


def scratch(stage: str, settings: dict, inputs: Iterable[Path]) -> Path:
    """Where a stage keeps what a rerun goes on from: under DSA_SCRATCH, named after its settings and inputs.

    It is no output of the pipeline, for DVC deletes outputs before a stage runs.
    """
    root = Path(os.environ.get("DSA_SCRATCH") or home() / ".cache" / "dsa" / "scratch")
    name = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
    return root / f"{stage}-{name}-{digest(inputs)}"


@contextmanager
def owned(folder: Path) -> Iterator[Path]:
    """Hold a scratch folder for this run alone, and delete it once all went well.

    The first of the run's processes holds it for all. Raises ParamsError where another run does. The lock stands beside
    the folder and goes with a process that is killed.
    """
    if int(os.environ.get("RANK", 0)):
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(f"{folder}.lock", timeout=0), folder / "owner"
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another run"
        raise ParamsError(
            f"DSA_SCRATCH: {who} is at work in {folder}: wait until it ends, or set another DSA_SCRATCH"
        ) from None
    try:
        folder.mkdir(exist_ok=True)
        owner.write_text(f"process {os.getpid()} on {platform.node()}, started in {Path.cwd()},", encoding="utf-8")
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink()
    finally:
        lock.release()
