"""VeRA adapters as PEFT saves them (Kopiczko et al., arXiv 2310.11454).

    y = W x + lambda_b * B (lambda_d * A x)

with one random pair A [r, k'], B [n', r] for all layers, of which each takes the first k columns
and n rows, and two vectors of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.compiler.adapter_delta import AdapterDelta, Basis, Shared, SiteDelta
from lowra.compiler.adapter_pages import DIAGONAL, OUT, A, B, dense_run
from lowra.compiler.errors import AdapterError

_VECTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.vera_lambda_(?P<role>[bd])")
_PROJECTION = re.compile(r"(?:base_model\.)?vera_(?P<role>[AB])")


def require_vera(config: Mapping[str, Any], source: str) -> None:
    """Raise AdapterError for a VeRA adapter that its file does not hold whole."""
    if not config.get("save_projection", True):
        raise AdapterError(
            f"{source} was saved with save_projection=False: its A and B come from torch's random "
            "numbers, which differ between versions and devices; save it with save_projection=True"
        )
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise AdapterError(f"{source} trains more than VeRA's vectors: use it through peft")


def vera_shapes(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, tuple[int, int]]:
    """(n, 0) of every module by the shapes of the file's tensors: VeRA does not say its k."""
    found: dict[str, tuple[int, int]] = {}
    for key, shape in shapes.items():
        match = _VECTOR.fullmatch(key)
        if match is None and not _PROJECTION.fullmatch(key):
            raise AdapterError(f"{source} holds {key}, which is no part of VeRA: save it again")
        if match and match["role"] == "b":
            found[match["module"]] = (shape[0], 0)
    return found


def read_vera(file: Path, inputs: Mapping[str, int]) -> AdapterDelta:
    """The adapter in a safetensors file; `inputs` are the k of the model's modules."""
    projections, vectors = _read(file)
    if set(projections) != {"A", "B"}:
        raise AdapterError(f"{file} lacks VeRA's projections vera_A and vera_B: save it again")
    a, b = projections["A"], projections["B"].T.contiguous()
    basis = Basis({"A": (dense_run(a),), "B": (dense_run(b),)})
    sites: dict[str, SiteDelta] = {}
    for name, found in sorted(vectors.items()):
        if set(found) != {"b", "d"} or found["d"].shape != (a.shape[0],):
            raise AdapterError(
                f"{file}: {name} lacks vera_lambda_b or vera_lambda_d, or they do not fit a rank "
                f"of {a.shape[0]}: save it again"
            )
        parts = {
            A: Shared(basis, "A"),
            B: Shared(basis, "B"),
            DIAGONAL: (dense_run(found["d"][None]),),
            OUT: (dense_run(found["b"][None]),),
        }
        sites[name] = SiteDelta(name, found["b"].shape[0], inputs[name], 1.0, parts)
    return AdapterDelta(sites, "vera")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """vera_A and vera_B, and lambda_b and lambda_d by module; finite."""
    projections, vectors = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged ({error}); fetch or save it again") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterError(f"{file}: {key} is {tensor.dtype} or holds NaN or infinity")
        if match := _VECTOR.fullmatch(key):
            vectors.setdefault(match["module"], {})[match["role"]] = tensor
        elif match := _PROJECTION.fullmatch(key):
            projections[match["role"]] = tensor
    return projections, vectors
