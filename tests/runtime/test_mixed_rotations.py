"""A model of rotated and unrotated layers runs, reports, saves and loads as one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch

import lowra
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import SMALL, Case, Stack, compile_case, output, stack


def half_binary() -> Stack:
    """`stack` with a middle layer of two values and heavy tails in the others."""
    model, generator = stack(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.middle.weight.copy_(0.1 * torch.sign(model.middle.weight))
        for layer in (model.first, model.last):
            layer.weight.copy_(0.03 * torch.randn(layer.weight.shape, generator=generator) ** 3)
    return model


@functools.cache
def mixed() -> Case:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    return compile_case(half_binary, bit_budget=3.5, calibration=[x], **SMALL)


def test_the_report_names_the_block_of_each_site_and_what_the_other_would_have_lost() -> None:
    report = cast("Any", mixed().compiled).lowra.report
    sites = {site["name"]: site for site in report["sites"]}
    assert {name: site["rotation"] for name, site in sites.items()} == {
        "first": 64, "middle": 1, "last": 32,
    }  # fmt: skip
    assert sites["middle"]["rotation_losses"]["1"] < sites["middle"]["rotation_losses"]["64"]
    assert sites["last"]["rotation_losses"]["32"] < sites["last"]["rotation_losses"]["1"]
    assert (report["totals"]["inputs"], report["totals"]["rotated_inputs"]) == (3, 2)


def test_layers_and_graph_carry_the_rotations_and_agree() -> None:
    case = mixed()
    blocks = {n: layer.rotation.block for n, layer in quantized_linears(case.compiled).items()}
    assert blocks == {"first": 64, "middle": 1, "last": 32}
    x = next(iter(case.inputs.values()))
    found = lowra.Session(case.compiled)(x)
    torch.testing.assert_close(found, output(case.compiled, case.inputs), rtol=0, atol=1e-5)


def test_it_comes_back_from_a_folder_equal(tmp_path: Path) -> None:
    case = mixed()
    lowra.save(case.compiled, tmp_path / "out")
    loaded = lowra.load(tmp_path / "out", case.skeleton)
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_a_compile_without_a_choice_reports_none() -> None:
    case = compile_case(half_binary, bit_budget=3.5, rotation=True, **SMALL)
    sites = cast("Any", case.compiled).lowra.report["sites"]
    assert [site["rotation_losses"] for site in sites] == [None] * 3
    assert [site["rotation"] for site in sites] == [64, 64, 32]
