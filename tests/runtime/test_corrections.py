"""Corrected layers: both views compute W^ + C, files hold it, and its bits are in the budget."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import lowra
from lowra.compiler.correction import FACTORS
from lowra.compiler.errors import BudgetError, CheckpointError
from lowra.compiler.storage import ROLES
from lowra.runtime.manifest import MANIFEST, manifest_checksum
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear
from tests import models
from tests.runtime.compiled_models import EIGHT, STACK, Case, compile_case, output, stack
from tests.runtime.test_checkpoint import bits_on_disk, tensors_of

CORRECTED: dict[str, Any] = {**STACK, "bit_budget": 5.0, "correction_rank": 2}


@functools.cache
def corrected_stack() -> Case:
    return compile_case(stack, **CORRECTED)


@functools.cache
def corrected_head() -> Case:
    """A llama whose tied head and embedding are compressed and corrected."""
    build = functools.partial(models.tiny_llama, tied=True, layers=1)
    return compile_case(build, **{**EIGHT, "bit_budget": 14}, include=("lm_head",),
                        correction_rank=3)  # fmt: skip


def layers_of(case: Case) -> dict[str, QuantizedLinear]:
    return quantized_linears(case.compiled)


def test_a_layer_computes_base_plus_correction_plus_adapter() -> None:
    for layer in layers_of(corrected_stack()).values():
        x = torch.randn(5, layer.in_features)
        correction = layer.correction
        assert correction is not None and correction.rank == 2
        weight = layer.stored().dequantize() + correction.product()
        torch.testing.assert_close(layer.weight, weight)
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        with torch.no_grad():
            adapter = layer.scaling * cast("Any", layer.lora_B) @ layer.lora_A
            want = x @ (weight + adapter).T + bias
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
            layer.adapter_enabled = False
            want = x @ weight.T + bias
            torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
            layer.adapter_enabled = True


@pytest.mark.parametrize("make", [corrected_stack, corrected_head], ids=["stack", "tied head"])
def test_the_views_agree_and_a_checkpoint_and_an_archive_answer_the_same(
    make: Any, tmp_path: Path
) -> None:
    case = make()
    want = output(case.compiled, case.inputs)
    torch.testing.assert_close(
        lowra.Session(case.compiled)(*case.inputs.values()), want, rtol=0, atol=1e-4
    )
    folder = lowra.save(case.compiled, tmp_path / "saved")
    loaded = lowra.load(folder, case.skeleton)
    assert torch.equal(output(loaded, case.inputs), want)
    archive = lowra.export(case.compiled, tmp_path / "model.pt2")
    module: Any = torch.export.load(archive).module()
    torch.testing.assert_close(module(*case.inputs.values()), want, rtol=0, atol=1e-4)


def test_the_session_of_a_loaded_model_computes_the_correction_too(tmp_path: Path) -> None:
    case = corrected_head()
    folder = lowra.save(case.compiled, tmp_path / "saved")
    want = output(case.compiled, case.inputs)
    torch.testing.assert_close(lowra.Session(folder)(**case.inputs), want, rtol=0, atol=1e-4)


def test_a_tied_embedding_looks_up_corrected_rows() -> None:
    model = cast("Any", corrected_head().compiled)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, QuantizedEmbedding) and embedding.correction is not None
    ids = torch.arange(7)
    torch.testing.assert_close(embedding(ids), head.weight[ids], rtol=1e-6, atol=1e-6)
    assert embedding.correction_A.codes is head.correction_A.codes


@pytest.mark.parametrize("make", [corrected_stack, corrected_head], ids=["stack", "tied head"])
def test_bits_on_disk_are_those_of_the_report_and_within_the_budget(
    make: Any, tmp_path: Path
) -> None:
    case = make()
    folder = lowra.save(case.compiled, tmp_path / "saved")
    report = cast("Any", case.compiled).lowra.report
    totals = report["totals"]
    assert (
        bits_on_disk(folder)
        == 8 * totals["bytes"]
        == 8 * sum(site["bytes"] for site in report["sites"])
    )
    assert totals["stored_bits"] <= cast("Any", case.compiled).lowra.recipe["bit_budget"]
    factors = {
        name: tensor
        for name, tensor in tensors_of(folder, "model*.safetensors").items()
        if name.rpartition(".")[2] in ROLES and any(f".{f}." in f".{name}" for f in FACTORS)
    }
    bits = 8 * sum(t.numel() * t.element_size() for t in factors.values())
    assert bits == round(totals["correction_bits"] * totals["weights"]) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_the_lowest_budget_that_a_plan_names_can_be_met(bits: int) -> None:
    options = {**CORRECTED, "correction_bits": bits}
    example = (torch.randn(2, 8, 64),)
    low = lowra.plan(stack(), example=example, **options).lowest_bits
    assert low > lowra.plan(stack(), example=example, **STACK).lowest_bits
    done = cast("Any", compile_case(stack, **{**options, "bit_budget": low}).compiled)
    assert done.lowra.report["totals"]["stored_bits"] <= low
    with pytest.raises(BudgetError, match="out of reach"):
        lowra.plan(stack(), example=example, **{**options, "bit_budget": low - 0.01})


def test_the_correction_is_frozen_and_lowers_every_error() -> None:
    case = corrected_stack()
    names = {name for name, p in case.compiled.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    x = torch.randn(2, 3, 64)
    model = cast("Any", case.compiled)
    model(x).square().sum().backward()
    for layer in layers_of(case).values():
        assert layer.lora_A is not None and bool(cast("Any", layer.lora_A.grad).any())
    model.zero_grad()
    for site in model.lowra.report["sites"]:
        assert site["correction_rank"] == 2
        assert 0 <= site["error_with_adapter"] < site["error"] < 1


def test_gradients_of_inputs_pass_through_the_correction() -> None:
    layer = next(iter(layers_of(corrected_stack()).values()))
    layer.adapter_enabled = False
    x = torch.randn(3, layer.in_features, requires_grad=True)
    grad = torch.randn(3, layer.out_features)
    layer(x).backward(grad)
    layer.adapter_enabled = True
    torch.testing.assert_close(x.grad, grad @ layer.weight, rtol=1e-4, atol=1e-4)


def test_a_cast_keeps_the_stored_tensors_of_the_correction() -> None:
    model = compile_case(stack, **CORRECTED).compiled.to(torch.bfloat16)
    for layer in quantized_linears(model).values():
        for name in FACTORS:
            factor = cast("Any", getattr(layer, name))
            assert factor.codebooks.dtype == factor.scales.dtype == torch.float16
            assert factor.dtype == torch.bfloat16
        assert layer(torch.randn(2, layer.in_features).bfloat16()).dtype == torch.bfloat16


def test_an_entry_that_does_not_fit_its_tensors_is_refused(tmp_path: Path) -> None:
    folder = lowra.save(corrected_stack().compiled, tmp_path / "saved")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sites"]["first"]["correction"]["rank"] = 3
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        lowra.load(folder, stack())
