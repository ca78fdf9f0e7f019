"""What the machine has: which device to use, and how to keep all of its cores busy."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import parent_process
from typing import Any

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from tqdm import tqdm

from common.console import UserError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` prefers CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in available.items() if there), "cpu")
    if name != "cpu" and not available.get(name, False):
        usable = ", ".join(["cpu", *(kind for kind, there in available.items() if there)])
        raise UserError(f"--device {name}: not on this machine, which has {usable}")
    return torch.device(name)


def prepare_torch(threads: int) -> None:
    """Set up this process for fast training on so many threads."""
    keep_freed_memory()
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Ask the C library (glibc) to keep freed memory for reuse instead of giving it back.

    A training step frees and asks again for the same few megabytes. Without this, each step
    pays for fresh pages from the kernel: up to a quarter of its time, on some machines nothing
    (benchmarks/speed.py measures it). Does nothing where the C library is another.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # numbers from glibc's malloc.h
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 30)
        ctypes.CDLL(None).mallopt(m_trim_threshold, (1 << 31) - 1)


def progress_bar(total: int, name: str) -> tqdm:
    """Return a bar that vanishes when all is done; one that shows nothing within `side_by_side`."""
    disable = True if parent_process() is not None else None
    return tqdm(total=total, desc=name, leave=False, disable=disable)


def side_by_side(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], device: torch.device, name: str
) -> Iterator[Any]:
    """Call `function(*job)` for each job, in parallel processes where cores allow.

    Each process gets its share of the cores as threads. On a GPU, and within such a process, the
    jobs go one by one.

    Yields:
        the results, in the order of the jobs, as soon as they are there.
    """
    if parent_process() is not None:
        yield from (function(*job) for job in jobs)
        return
    workers = min(len(jobs), joblib.cpu_count()) if device.type == "cpu" else 1
    threads = joblib.cpu_count() // workers
    if workers == 1:
        results = (_call_with_threads(threads, function, job) for job in jobs)
    else:
        results = joblib.Parallel(workers, return_as="generator")(
            joblib.delayed(_call_with_threads)(threads, function, job) for job in jobs
        )
    disable = True if len(jobs) == 1 else None  # one job alone shows its own progress
    try:
        yield from tqdm(results, total=len(jobs), desc=name, leave=False, disable=disable)
    except KeyboardInterrupt:
        if workers > 1:
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
        raise


def _call_with_threads(threads: int, function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    prepare_torch(threads)
    return function(*job)
