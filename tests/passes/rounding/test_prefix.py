"""Quantizing behind a quantized prefix: its moments and targets are right, and it pays."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from lowra.compiler.facts import Adapter, Packed, Prefix, Statistics
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation, rotate, unrotate
from lowra.compiler.spill import Spill
from lowra.passes import (
    CollectStatistics,
    FitCodebooks,
    InitializeAdapters,
    QuantizeWeights,
    RotateInputs,
)
from lowra.passes.rounding import prefix
from lowra.passes.rounding.moments import moments_behind, moments_of_prefix
from lowra.passes.rounding.prefix import prefix_order
from tests.compiler.captured import normalized
from tests.models import tokens
from tests.passes.chain import X, chain, random
from tests.passes.site_programs import CyclicWidths

DECIDE = (RotateInputs(), CollectStatistics(), FitCodebooks((2,)), CyclicWidths())


def decided(folder: Path | None = None) -> Program:
    program = replace(chain()[1], calibration=((X[:150],), (X[150:],)), spill=Spill(folder))
    return run_pipeline(program, DECIDE)


def weights_of(program: Program) -> dict[str, Tensor]:
    return {s.name: program.fact(s.name, Packed).weight.dequantize() for s in program.sites}


def test_moments_are_those_of_a_model_with_the_quantized_prefix() -> None:
    model, _ = chain()
    program = run_pipeline(decided(), (QuantizeWeights(prefix=1.0),))
    weights = weights_of(program)
    with torch.no_grad():
        x = (torch.relu(model.left(X)) * model.right(X)).double()
        right = nn.functional.linear(X, weights["right"], model.right.bias)
        behind = (torch.relu(X @ weights["left"].T) * right).double()
    fact = program.fact("last", Prefix)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(fact.gram.load().double(), behind.T @ behind / 400)
    close(fact.drift.load().double(), (x - behind).T @ behind / 400)
    first = program.fact("left", Prefix)
    close(first.gram.load(), program.fact("left", Statistics).load(64))
    assert not first.drift.load().any()


@pytest.mark.parametrize("block", [1, 16])
def test_target_is_the_least_squares_weight_behind_the_prefix(block: int) -> None:
    rotation = Rotation(3, block)
    x, w = random(500, 48, seed=1).double(), random(20, 48, seed=2)
    behind = x + random(500, 48, seed=3).double() / 3
    gram, drift = behind.T @ behind / 500, (x - behind).T @ behind / 500
    moments = moments_behind(gram.float(), drift.float(), rotation)
    got = unrotate(moments.target(rotate(w, rotation)), rotation)
    # ridge regression of the missing part W (x - x^) on x^
    missing = w.double() @ drift
    damped = gram + torch.eye(48).double() * moments.factor.damping
    torch.testing.assert_close(got, (w + missing @ damped.inverse()).float(), rtol=1e-4, atol=1e-5)


def output_error(program: Program) -> float:
    model, _ = chain()
    weights = weights_of(program)
    with torch.no_grad():
        left = torch.relu(X @ weights["left"].T)
        right = nn.functional.linear(X, weights["right"], model.right.bias)
        y = nn.functional.linear(left * right, weights["last"], model.last.bias)
        return float(((y - model(X)) ** 2).mean() / (model(X) ** 2).mean())


def test_it_lowers_the_error_of_the_whole_model() -> None:
    with_it, without = (
        output_error(run_pipeline(decided(), (QuantizeWeights(prefix=on),))) for on in (1.0, 0.0)
    )
    assert with_it < without


def test_an_adapter_behind_a_prefix_repairs_what_the_base_was_quantized_for() -> None:
    """Its error is measured in the metric of its base, and falls with the rank."""
    program = run_pipeline(decided(), (QuantizeWeights(prefix=0.3),))
    small, large = (
        run_pipeline(program, (InitializeAdapters(rank=rank, alpha=rank),)) for rank in (2, 8)
    )
    for site in program.sites:
        base = program.fact(site.name, Packed).error
        errors = [base, *(p.fact(site.name, Adapter).error for p in (small, large))]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * base


def test_base_and_a_full_adapter_stand_for_the_weight_behind_the_prefix() -> None:
    """Not for the original weight: that would undo what the base makes up for."""
    steps = (QuantizeWeights(prefix=1.0), InitializeAdapters(rank=32, alpha=32))
    program = run_pipeline(decided(), steps)
    site = program.site("last")
    adapter, rotation = program.fact(site.name, Adapter), program.fact(site.name, Rotation)
    whole = program.fact(site.name, Packed).weight.dequantize() + adapter.lora_b @ adapter.lora_a
    original = program.weight(site)
    moments = moments_of_prefix(program.fact(site.name, Prefix), rotation)
    wanted = unrotate(moments.target(rotate(original, rotation)), rotation)
    assert (whole - wanted).norm() < 0.02 * (original - wanted).norm()


def refuse(*_: object) -> NoReturn:
    raise AssertionError("the model ran again")


def test_a_finished_walk_runs_no_model_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = (QuantizeWeights(prefix=1.0),)
    first = run_pipeline(decided(tmp_path), step)
    monkeypatch.setattr(prefix.Runner, "run", refuse)
    again = run_pipeline(decided(tmp_path), step)
    for site in first.sites:
        one, two = (p.fact(site.name, Packed) for p in (first, again))
        assert (one.error, one.energy) == (two.error, two.energy)
        for role, tensor in one.weight.tensors().items():
            assert torch.equal(tensor, two.weight.tensors()[role])


def test_an_interrupted_walk_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = (QuantizeWeights(prefix=1.0),)
    whole = weights_of(run_pipeline(decided(), step))
    moments = prefix.PrefixStream.moments
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(self: prefix.PrefixStream, site: object) -> dict[str, Tensor]:
            if getattr(site, "name", "") == "last":
                raise KeyboardInterrupt
            return moments(self, site)  # pyright: ignore

        patch.setattr(prefix.PrefixStream, "moments", stop)
        run_pipeline(decided(tmp_path), step)
    resumed = weights_of(run_pipeline(decided(tmp_path), step))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_order_follows_the_graph_and_leaves_out_what_has_no_single_place() -> None:
    model, program = normalized("llama")
    batch = tuple(tokens(model, 2, 8, seed=1).values())
    order, others = prefix_order(replace(program, calibration=(batch,)))
    names = [site.name.rpartition("layers.")[2] for group in order for site in group]
    assert names[:3] == ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"]
    assert names[3:7] == ["0.self_attn.o_proj", "0.mlp.gate_proj", "0.mlp.up_proj",
                          "0.mlp.down_proj"]  # fmt: skip
    assert names[7].startswith("1.") and not others
    assert prefix_order(program) == ([], list(program.sites))  # nothing to calibrate with
