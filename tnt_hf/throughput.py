"""How fast a model runs, and on what."""

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


REPORTED_PACKAGES = ("torch", "torchvision", "transformers", "datasets", "accelerate", "tnt-hf")


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name of the device, number of CPU threads that PyTorch uses, and versions: what a measurement must state."""
    return {
        "device": _device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | _package_versions(),
    }


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """Result and seconds of a call, with the device's queue empty before and after."""
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({[*names, platform.processor(), platform.machine()][0]})"


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


__all__ = ["device_facts", "timed"]
