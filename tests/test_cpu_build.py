"""CPU kernels are compiled on first use, once, and where they cannot be the reason is said and PyTorch runs."""

import ctypes
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from itertools import chain

import pytest
import torch

from dsa import kernels
from dsa.indexer import IndexScores
from dsa.kernels.cpu import build, select, threads
from dsa.masks import Visibility
from dsa.selector import select_topk
from tests.conftest import ROOT


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded yet."""
    monkeypatch.setenv("DSA_KERNEL_CACHE", str(tmp_path / "kernels"))
    forget()
    yield tmp_path / "kernels"
    forget()


def forget():
    for cached in (build._load, build._obstacle, kernels.log_choice):
        cached.cache_clear()


def test_a_kernel_is_compiled_once_without_a_warning_and_the_user_is_told(cache, caplog):
    with caplog.at_level(logging.INFO, logger=build.__name__):
        for _ in range(2):
            build.library("select.c", H=1, D=16)
            build._load.cache_clear()  # as another process would find it
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "select.c compiled in" in caplog.text
    assert len(list(cache.iterdir())) == 1  # nothing else is left there


@pytest.mark.parametrize("source", sorted(path.name for path in build.HERE.glob("*.c")))
def test_it_compiles_for_arm_without_a_warning(source, tmp_path):
    heads = ["-DH=4", "-DD=64"]
    shape = {"select.c": heads, "warmup.c": heads, "decode.c": ["-DG=7", "-DD=64"]}.get(
        source, ["-DHQ=14", "-DHKV=2", "-DD=64"]
    )
    flags = [*build.FLAGS, "-target", "aarch64-linux-gnu", *shape]
    command = [sys.executable, "-m", "ziglang", "cc", *flags, str(build.HERE / source), "-o", str(tmp_path / "made.so")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_another_source_header_flag_processor_or_compiler_is_another_library(cache, monkeypatch):
    def libraries() -> int:
        build._load.cache_clear()
        build.library("select.c", H=1, D=16)
        return len(list(cache.iterdir()))

    assert libraries() == 1
    monkeypatch.setattr(build, "_processor", lambda: "another")
    assert libraries() == 2
    monkeypatch.setattr(build, "version", lambda name: "another")
    assert libraries() == 3
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DANOTHER"])
    assert libraries() == 4
    folder = cache.parent / "sources"
    folder.mkdir()
    for path in (build.HERE / "select.c", *build.HERE.glob("*.h")):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "HERE", folder)
    assert libraries() == 4
    for i, name in enumerate(("select.c", "vec.h")):
        (folder / name).write_text((folder / name).read_text(encoding="utf-8") + "// another\n", encoding="utf-8")
        assert libraries() == 5 + i


def test_two_processes_may_be_first_at_once(cache):
    command = "from dsa.kernels.cpu import build; print(build.library('select.c', H=2, D=16).dsa_tile_keys())"
    runs = [subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)]
    assert [run.communicate()[0] for run in runs] == [b"96\n"] * 3
    assert len(list(cache.iterdir())) == 1


def unwritable(cache, monkeypatch):
    cache.parent.joinpath("file").touch()  # a folder that root cannot make either
    monkeypatch.setenv("DSA_KERNEL_CACHE", str(cache.parent / "file" / "kernels"))
    return "Not a directory"


def no_compiler(cache, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(build, "version", missing)
    return "ziglang wheel, which holds the compiler, is not installed"


def unknown_processor(cache, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    return "no CPU kernels for riscv64"


def broken_compiler(cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-Werror", "-DH"])
    return "does not compile"


def truncated_library(cache, monkeypatch):
    monkeypatch.setenv("DSA_KERNEL_CACHE", str(cache.parent / "elsewhere"))  # a path that was loaded stays loaded
    build.library("select.c", H=2, D=16)
    monkeypatch.setenv("DSA_KERNEL_CACHE", str(cache))
    cache.mkdir()
    for path in (cache.parent / "elsewhere").iterdir():
        (cache / path.name).touch()
    forget()
    return "file too short"


@pytest.mark.parametrize("fault", [unwritable, no_compiler, unknown_processor, broken_compiler, truncated_library])
def test_where_it_cannot_be_built_pytorch_runs_and_the_log_says_why_once(fault, cache, monkeypatch, caplog):
    reason = fault(cache, monkeypatch)
    index = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 16), torch.randn(1, 9, 2)
    with caplog.at_level(logging.INFO, logger=kernels.__name__), torch.no_grad():
        for _ in range(2):
            assert select_topk(IndexScores(*index, Visibility(9, 9)), 4).shape == (1, 9, 4)
    said = [r.getMessage() for r in caplog.records if r.name == kernels.__name__ and "key selection" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("key selection: PyTorch on cpu, as ") and reason in said[0]
    monkeypatch.setenv("DSA_BACKEND", "cpu")
    with pytest.raises(ValueError, match=f'backend "cpu" cannot run: .*{reason}'):
        select_topk(IndexScores(*index, Visibility(9, 9)), 4)


def test_the_first_use_of_a_shape_is_compared_with_the_reference(cache, monkeypatch):
    from dsa.kernels import check

    index = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 16), torch.randn(1, 9, 2)
    monkeypatch.setitem(check.CPU, select, ("key selection", lambda *shape: 0.5))
    check.verify_cpu.cache_clear()
    with pytest.raises(RuntimeError, match=r"key selection kernel .* is off by 5\.0e-01 .*DSA_BACKEND=gather"):
        select_topk(IndexScores(*index, Visibility(9, 9)), 4)
    monkeypatch.undo()
    assert select_topk(IndexScores(*index, Visibility(9, 9)), 4).shape == (1, 9, 4)


def test_integers_are_64_bit_and_tensors_pointers():
    seen = []
    build.call(lambda *args: seen.extend(args), torch.zeros(3), 2**40, 0.5, None)
    assert [type(x) for x in seen] == [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, type(None)]
    assert seen[1].value == 2**40


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_every_job_once_and_in_order(count, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert threads.each(lambda a, b: a + b, [(i, 1) for i in range(7)]) == list(range(1, 8))
    for total in (1, 5, 12):
        parts = threads.shares(lambda start, stop: list(range(start, stop)), total, least=3)
        assert list(chain(*parts)) == list(range(total)) and len(parts) <= max(1, total // 3)


def test_a_process_that_forked_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads.each(lambda i: i, [(0,), (1,)])
    pool = threads._pool.__wrapped__
    monkeypatch.setattr("os.getpid", lambda: -1)
    before = threads._pool.cache_info().misses
    assert threads.each(lambda i: i, [(0,), (1,)]) == [0, 1]
    assert threads._pool.cache_info().misses == before + 1
    assert isinstance(pool(0, 1), ThreadPoolExecutor)
