"""Time and memory of a call."""

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Result and seconds of a call, with the device's queue empty before and after."""
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return result, time.perf_counter() - start


def timed_in_turns(
    calls: Sequence[Callable[[], Any]], device: torch.device, num_rounds: int, repeats: int = 1, pause: float = 0.0
) -> list[list[float]]:
    """
    Seconds of each call in each round, the median of `repeats` runs one after another.

    Every round starts with another call, so that a load on the machine falls on all of them alike, and one more round,
    in which they warm up, comes first and is dropped. Calls of other libraries than PyTorch need a `pause`, the
    seconds in which the CPU threads of the call before fall asleep; an untimed run then wakes their own.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for start in range(num_rounds + 1):
        for index in ((start + offset) % len(calls) for offset in range(len(calls))):
            if pause > 0:
                time.sleep(pause)
                calls[index]()
            seconds[index].append(median(timed(calls[index], device)[1] for _ in range(repeats)))
    return [of_call[1:] for of_call in seconds]


def peak_memory(function: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """
    Result of a call, and the bytes by which the memory in use rose above what it was before.

    On the CPU this is the resident memory of the process, which Linux alone can tell; None elsewhere. Unused memory is
    given back first, but not that of arenas such as ONNX Runtime's, so measure a session at its first run.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = function()
        return result, torch.cuda.max_memory_allocated(device) - before
    clear_peak, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if device.type != "cpu" or not clear_peak.exists():
        return function(), None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    clear_peak.write_text("5")
    before = _status_bytes(status, "VmRSS")
    result = function()
    return result, max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


__all__ = [
    "peak_memory",
    "timed",
    "timed_in_turns",
]
