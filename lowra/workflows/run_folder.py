"""The work folder of a fine-tuning run.

It holds the checkpoints of Trainer, `finetune.json` (what the run is, so that only the same run
resumes), `report.json` and `loss.svg`.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lowra.compiler.errors import OutputError, RecipeError
from lowra.runtime.training import STATE, check_mark

RUN, CHECKPOINTS, REPORT, CURVE = "finetune.json", "checkpoints", "report.json", "loss.svg"


def begin(folder: Path, run: dict[str, Any], model: nn.Module, restart: bool) -> bool:
    """Make or check the work folder; whether it holds this run already."""
    file, checkpoints = folder / RUN, folder / CHECKPOINTS
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder to keep checkpoints in")
    if restart and file.is_file():
        shutil.rmtree(checkpoints, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
        file.unlink()
    if file.is_file():
        _check_same(file, run, model)
        return True
    if checkpoints.exists():
        raise OutputError(f"{checkpoints} is not of a run of lowra; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(run, indent=1) + "\n")
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    return False


def _check_same(file: Path, run: dict[str, Any], model: nn.Module) -> None:
    """Raise unless the run in the folder is `run`: same settings, rows, base and start."""
    way_out = "resume with the same ones, restart, or choose another work folder"
    try:
        before = json.loads(file.read_text())
        old, new = before["settings"], json.loads(json.dumps(run["settings"]))
        mark = torch.tensor(before["base"], dtype=torch.uint8)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise OutputError(f"{file} cannot be read ({error}); restart the run") from error
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        said = ", ".join(f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in changed)
        raise RecipeError(f"the run in {file.parent} had other settings ({said}): {way_out}")
    check_mark(model, mark)
    if before["data"] != run["data"]:
        raise RecipeError(f"the run in {file.parent} had other data or tokens: {way_out}")
    if before.get("start") != run["start"]:
        raise RecipeError(
            f"the run in {file.parent} began with other adapters (or another scaling or dropout of "
            "them), norms or embeddings, or under an older lowra: load the model that it began "
            "with anew, restart, or choose another work folder"
        )


def last_checkpoint(folder: Path, below: float = math.inf) -> Path | None:
    """The last whole checkpoint of a step before `below`: Trainer cannot go on at the very last,
    and it writes trainer_state.json behind all the rest."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max((p for p in whole if step_of(p) < below), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def finished(model: nn.Module, folder: Path) -> dict[str, Any]:
    """A run that is done already: its report, and the adapter that it ended with."""
    try:
        report = json.loads((folder / REPORT).read_text())
        state = load_file(folder / CHECKPOINTS / report["checkpoint"] / STATE)
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise OutputError(f"{folder} lacks what its run left ({error}); restart it") from error
    model.load_state_dict(state, strict=False)
    return report
