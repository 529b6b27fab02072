"""Every choice of storage comes back from its file, which holds the bits that are reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowra
from lowra.runtime.modules import QuantizedLinear
from tests.runtime.compiled_models import compile_case, output, stack
from tests.runtime.test_checkpoint import bits_on_disk

CHOICES: dict[str, dict[str, Any]] = {
    "ternary": {"widths": (1.6,)},
    "scales per row, 8 bits": {"scale_bits": 8},
    "scales per row, 4 bits": {"scale_bits": 4},
    "scales per row, 16 bits": {"scale_bits": 16},
    "scales per group, 8 bits": {"group": 32, "scale_bits": 8},
    "scales per group, 4 bits": {"group": 32, "scale_bits": 4},
    "no scales, codebooks per row in 8 bits": {
        "group": 0, "shared_codebooks": False, "codebook_bits": 8, "bit_budget": 4,
    },
    "shared codebooks in 8 bits": {"codebook_bits": 8},
    "everything small": {"group": 32, "scale_bits": 4, "codebook_bits": 8, "widths": (1, 1.6, 3)},
    "a correction beside": {"bit_budget": 6, "correction_rank": 2, "scale_bits": 4},
    "ternary among others": {"bit_budget": 2.6, "widths": (1, 1.6, 3)},
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_a_saved_model_computes_the_same_and_takes_the_reported_bits(
    choice: str, tmp_path: Path
) -> None:
    options = {"bit_budget": 3.2, "rank": 4} | CHOICES[choice]
    case = compile_case(stack, **options)
    folder = lowra.save(case.compiled, tmp_path / "model")
    again = lowra.load(folder, stack())
    assert torch.equal(output(again, case.inputs), output(case.compiled, case.inputs))
    totals = case.compiled.lowra.report["totals"]  # pyright: ignore[reportAttributeAccessIssue]
    assert bits_on_disk(folder) == 8 * totals["bytes"]
    assert bits_on_disk(folder) <= options["bit_budget"] * totals["weights"]
    assert "1.6" in totals["rows"] or "ternary" not in choice


@pytest.mark.parametrize("scale_bits", [4, 8])
def test_trained_scales_are_encoded_anew_when_saved(scale_bits: int, tmp_path: Path) -> None:
    case = compile_case(stack, bit_budget=3.2, rank=0, scale_bits=scale_bits)
    layer = case.compiled.get_submodule("middle")
    assert isinstance(layer, QuantizedLinear) and layer.scales is not None
    before = layer.state_dict()
    assert before["scales"].dtype == torch.uint8 and before["scale_reach"].numel() == 2
    assert torch.equal(layer.state_dict()["scales"], before["scales"])
    layer.scales = layer.scales * torch.linspace(1, 2, layer.n)
    layer.scales = layer.scales.half()
    again = lowra.load(lowra.save(case.compiled, tmp_path / "model"), stack())
    loaded = again.get_submodule("middle")
    assert isinstance(loaded, QuantizedLinear) and loaded.scales is not None
    ratio = loaded.scales.float() / layer.scales.float()
    assert float((ratio - 1).abs().max()) < (0.1 if scale_bits == 4 else 0.01)
    assert float((ratio - 1).abs().max()) > 0
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.state_dict()["scales"], layer.state_dict()["scales"])
