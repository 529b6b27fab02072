"""report: numbers that add up, and hold against a count of one's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import lowra
from lowra.compiler.storage import ROLES
from lowra.runtime.module_view import quantized_linears
from tests import models
from tests.runtime.compiled_models import (
    STACK,
    compile_case,
    compiled_stack,
    end_to_end,
    low_llama,
    stack,
)


def report_of(case: Any) -> dict[str, Any]:
    return case.compiled.lowra.report


@pytest.mark.parametrize("case", [compiled_stack, low_llama], ids=["stack", "llama"])
def test_the_totals_are_the_sums_of_the_rows(case: Any) -> None:
    report = report_of(case())
    totals, sites = report["totals"], report["sites"]
    weights = [n * k for n, k in (site["shape"] for site in sites)]
    assert totals["sites"] == len(sites)
    assert totals["weights"] == sum(weights)
    assert totals["bytes"] == sum(site["bytes"] for site in sites)
    assert totals["stored_bits"] == pytest.approx(8 * totals["bytes"] / totals["weights"])
    code = sum(site["code_bits"] * count for site, count in zip(sites, weights, strict=True))
    assert totals["code_bits"] == pytest.approx(code / totals["weights"])
    rows: dict[str, int] = {}
    for site in sites:
        assert sum(site["rows"].values()) == site["shape"][0]
        for width, count in site["rows"].items():
            rows[width] = rows.get(width, 0) + count
    assert totals["rows"] == rows


def test_the_totals_are_those_of_the_layers_buffers() -> None:
    case = compiled_stack()
    layers = quantized_linears(case.compiled)
    for site in report_of(case)["sites"]:
        held = layers[site["name"]].state_dict()
        buffers = [held[role] for role in ROLES if role in held]
        assert site["bytes"] == sum(b.numel() * b.element_size() for b in buffers)
        assert site["stored_bits"] == 8 * site["bytes"] / (site["shape"][0] * site["shape"][1])


def test_code_bits_are_the_widths_of_the_rows() -> None:
    for site in report_of(compiled_stack())["sites"]:
        bits = sum(float(width) * rows for width, rows in site["rows"].items())
        assert site["code_bits"] == pytest.approx(bits / site["shape"][0])


def test_adapter_bits_are_counted_at_16_bit() -> None:
    case = compiled_stack()
    factors = sum(
        layer.lora_A.numel() + layer.lora_B.numel()
        for layer in quantized_linears(case.compiled).values()
        if layer.lora_A is not None and layer.lora_B is not None
    )
    totals = report_of(case)["totals"]
    assert totals["adapter_bits"] == pytest.approx(16 * factors / totals["weights"])


def test_stored_bits_are_within_the_budget_and_above_the_code_bits() -> None:
    for case, budget in ((compiled_stack(), STACK["bit_budget"]), (low_llama(), 3)):
        totals = report_of(case)["totals"]
        assert totals["code_bits"] < totals["stored_bits"] <= budget


def test_an_adapter_lowers_the_error_of_every_site() -> None:
    for site in report_of(low_llama())["sites"]:
        assert 0 <= site["error_with_adapter"] < site["error"] < 1
        assert site["rank"] == 4


def test_without_an_adapter_there_is_no_error_with_one() -> None:
    report = report_of(compile_case(stack, bit_budget=6, rank=0))
    assert {(s["rank"], s["error_with_adapter"]) for s in report["sites"]} == {(0, None)}
    assert report["totals"]["adapter_bits"] == 0


def test_the_error_of_a_site_is_its_relative_output_error() -> None:
    """For the first layer the calibration inputs are known: the example itself."""
    case = compiled_stack()
    dense, compiled = (m.get_submodule("first") for m in (case.dense, case.compiled))
    x = case.inputs["x"].reshape(-1, 64).double()
    weight = dense.weight.detach().double()
    base = x @ (weight - compiled.stored().dequantize().double()).T  # pyright: ignore
    expected = float(base.square().sum() / (x @ weight.T).square().sum())
    assert report_of(case)["sites"][0]["error"] == pytest.approx(expected, rel=1e-3)


def test_the_report_names_calibration_pipeline_capture_and_machine() -> None:
    report = report_of(low_llama())
    assert report["calibration_tokens"] == 224  # one window of eight is held out
    assert report["pipeline"].startswith("normalize-linears")
    assert report["pipeline"].endswith("rewrite-linears")
    assert report["capture"] == "torch.export"
    assert report["machine"]["torch"] == torch.__version__


def test_the_report_times_every_pass() -> None:
    report = report_of(low_llama())
    names = {word.partition("{")[0] for word in report["pipeline"].split() if "=" not in word}
    assert names - {"normalize-linears"} <= set(report["seconds"])
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["seconds"]["total"] >= report["seconds"]["capture"]


def test_the_report_is_json() -> None:
    report = report_of(low_llama())
    assert json.loads(json.dumps(report)) == report


def test_a_data_free_compile_says_so() -> None:
    case = compile_case(stack, bit_budget=2, preset="lowra", rank=2)
    report = report_of(case)
    assert report["calibration_tokens"] == 0
    assert report["totals"]["code_bits"] <= 2
    assert report["totals"]["stored_bits"] > 2


def test_a_compile_without_a_graph_says_why() -> None:
    report = lowra.compile(stack(), bit_budget=6, rank=2).lowra.report
    assert report["capture"] == "no example inputs to trace with"
    assert report["calibration_tokens"] == 0


def test_what_is_skipped_is_listed_with_its_shape_and_reason() -> None:
    """The experts of Mixtral are one tensor of three axes, which is no linear."""
    skipped = {s["name"]: s for s in report_of(end_to_end("tiny_mixtral"))["skipped"]}
    for layer in (0, 1):
        experts = skipped[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        assert experts["shape"] == [4, 192, 64]
        assert "3 axes (experts, convolution)" in experts["reason"]
        assert skipped[f"model.layers.{layer}.mlp.gate.weight"]["reason"] == "not held by a Linear"
    assert skipped["lm_head.weight"]["shape"] == [models.VOCAB, 64]
    assert len(skipped) == 8


def test_compressed_and_skipped_are_all_the_matrices_there_are() -> None:
    for name in ("tiny_mixtral", "tiny_gpt2", "tiny_t5"):
        case = end_to_end(name)
        report = report_of(case)
        names = {s.weight for s in case.compiled.lowra.sites}  # pyright: ignore
        names |= {s["name"] for s in report["skipped"]}
        matrices = {n for n, p in case.dense.named_parameters() if p.dim() >= 2}
        assert names == matrices
