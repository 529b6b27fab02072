"""Where benchmark results go: committed JSON with device, date and versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import lowra

FOLDER = Path(__file__).parent / "results"


def write_results(name: str, data: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json`, whole or not at all."""
    document = {"benchmark": name, "environment": environment(), **data}
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)
    return path


def environment() -> dict[str, Any]:
    """Device, date and versions of a measurement."""
    import transformers

    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lowra": lowra.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
