"""The machine that figures were measured on, and where they are kept: results/<benchmark>.json."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
UNITS = ("avx512_bf16", "amx_bf16", "amx_tile")
"""Processor flags that decide how fast bf16 is."""
PACKAGES = ("polyclinic", "flwr", "ray", "torch", "numpy", "pydicom")


def describe() -> dict[str, Any]:
    """Processor, memory, versions, date, and how busy the machine was (processes ready to run, last minute)."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "units": [unit for unit in UNITS if unit in cpu.get("flags", "").split()],
        "memory_gb": round(memory / 1e9),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }


def keep(path: Path, machine: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write a benchmark's figures with the machine's description, and print them."""
    text = json.dumps({"machine": machine, **figures}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(text)
