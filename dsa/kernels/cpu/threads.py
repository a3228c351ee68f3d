"""Threads for the compiled kernels: ctypes lets go of the GIL, so a pool of Python's own is enough."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch


def each(work: Callable, jobs: Iterable[tuple]) -> list:
    """[work(*job) for job in jobs] on as many threads as PyTorch uses.

    Jobs are taken in order, so the longest should come first. What they compute must not depend on the number of
    threads: cut the work by its shape alone.
    """
    jobs, threads = list(jobs), torch.get_num_threads()
    if threads == 1 or len(jobs) < 2:
        return [work(*job) for job in jobs]
    return list(_pool(os.getpid(), threads).map(lambda job: work(*job), jobs))


def shares(work: Callable[[int, int], object], count: int, least: int) -> list:
    """[work(start, stop), ...] over consecutive parts of range(count), one a thread, but none for less than `least`."""
    parts = max(1, min(torch.get_num_threads(), count // least))
    if parts == 1:
        return [work(0, count)]
    return each(work, [(count * i // parts, count * (i + 1) // parts) for i in range(parts)])


@lru_cache(maxsize=1)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """One for the process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(threads, "dsa-kernel")
