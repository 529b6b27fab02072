"""Programs as files for other runtimes: .pt2 archives of torch.export."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lowra.compiler.capture import Inputs, dynamic_axes
from lowra.compiler.errors import OutputError
from lowra.runtime.session import program_of


def export_program(
    model: nn.Module, path: str | Path, *, overwrite: bool = False,
    example: Inputs | tuple[Tensor, ...] | None = None,
) -> Path:  # fmt: skip
    """Write the compressed program of `model` as a torch.export archive.

    `torch.export.load(path).module()` runs it; it needs `import lowra` for the ops and nothing of
    transformers. `example` as for a Session. Raises OutputError when the file exists, is no .pt2 or
    cannot be written; CaptureError when the model has no graph.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise OutputError(f"{target}: only .pt2 archives can be written; end the name in .pt2")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; choose another name, or overwrite it")
    program = program_of(model, example)
    dynamic = tuple(dynamic_axes(tensor) for tensor in program.example)
    with torch.no_grad():
        exported = torch.export.export(
            program.module(), program.example, dynamic_shapes=dynamic, strict=False
        )
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(exported, temporary)
        temporary.replace(target)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target
