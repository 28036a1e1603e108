"""What a reader has to know of a machine to judge a figure: names, versions, clocks, power."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from course_lib.runtime.tile import HAS_TRITON, triton

__all__ = ["environment", "gpu_state"]

# Field of nvidia-smi → key of ours.
_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watt",
    "temperature.gpu": "celsius",
}
_LIMITS = {
    "clocks.max.sm": "max_sm_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "power.limit": "max_watt",
}


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(named, platform.processor() or platform.machine())


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions and date; for a GPU also driver, limits, and its state at this moment."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "device": cpu_name(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        driver = _nvidia_smi(device, ["driver_version"])
        facts |= {"driver": driver["driver_version"]} if driver else {}
        facts |= _numbers(_nvidia_smi(device, list(_LIMITS)), _LIMITS)
        facts["before"] = gpu_state(device)
    return facts


def gpu_state(device: torch.device) -> dict[str, float]:
    """Clocks in MHz, power in watt and temperature right now, as far as they can be read."""
    if device.type != "cuda":
        return {}
    return _numbers(_nvidia_smi(device, list(_STATE)), _STATE)


def _nvidia_smi(device: torch.device, fields: list[str]) -> dict[str, str]:
    """Fields of one GPU as nvidia-smi prints them; nothing where it does not answer."""
    # CUDA_VISIBLE_DEVICES renumbers what torch sees; nvidia-smi knows GPUs by their UUID.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None else str(device.index or 0)
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def _numbers(answers: dict[str, str], keys: dict[str, str]) -> dict[str, float]:
    """What is a number, under our keys. A field that a GPU lacks reads "[N/A]"."""
    found = {}
    for field, key in keys.items():
        try:
            found[key] = float(answers[field])
        except (KeyError, ValueError):
            continue
    return found
