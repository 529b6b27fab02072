"""Guided quantization: weights, Gram matrices and metrics per group of rows are what they claim."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowra.compiler.errors import CalibrationError, RecipeError
from lowra.compiler.facts import Codebooks, Packed, Precision, Prefix, TokenWeights
from lowra.compiler.packing import trellis_runs
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.printer import fact_lines
from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.spill import Spill, StoredTensor
from lowra.passes import (
    CollectStatistics,
    FitCodebooks,
    MeasureSensitivity,
    QuantizeWeights,
    RotateInputs,
    measure_sensitivity,
)
from lowra.passes.rounding import guidance, prefix
from lowra.passes.rounding.guidance import guides_alone, row_groups
from lowra.passes.rounding.moments import moments_of
from lowra.passes.rounding.quantizer import quantize, quantize_guided, whole_groups
from tests.compiler.captured import captured, normalized
from tests.models import tokens
from tests.passes.site_programs import CyclicWidths, compiled, correlated_gram, output_loss

SIZES = ((8, 24), (4, 9), (8, 24))
"""Batches [windows, length] of calibration."""

GUIDED = MeasureSensitivity(groups=2)
DECIDE = (RotateInputs(), CollectStatistics(), GUIDED, FitCodebooks((1, 2)), CyclicWidths())


def data() -> tuple[tuple[Tensor, ...], ...]:
    model = captured("llama")[0]
    return tuple(tuple(tokens(model, *size, seed=i).values()) for i, size in enumerate(SIZES))


def decided(measure: MeasureSensitivity = GUIDED, folder: Path | None = None) -> Program:
    program = replace(normalized("llama")[1], calibration=data(), spill=Spill(folder))
    return run_pipeline(program, (*DECIDE[:2], measure, *DECIDE[3:]))


llama = functools.cache(decided)


@functools.cache
def quantized(share: float, groups: int) -> Program:
    program = llama() if groups else decided(MeasureSensitivity())
    return run_pipeline(program, (QuantizeWeights(prefix=share),))


def seen(model: nn.Module, program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Float64 inputs [tokens, k] of every site, and gradients [tokens, n] of the summed loss."""
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in program.sites}
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in program.sites}

    def keep(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs[name].append(args[0].detach().double().flatten(0, -2))
        outputs[name].append(output)

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: keep(name, args, output)
        )
        for name in inputs
    ]
    with torch.enable_grad():
        for ids, _ in program.calibration:
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    grads = {n: [y.grad.flatten(0, -2) for y in found if y.grad is not None]
             for n, found in outputs.items()}  # fmt: skip
    return (
        {name: torch.cat(parts) for name, parts in inputs.items()},
        {name: torch.cat(parts).double() for name, parts in grads.items()},
    )


@functools.cache
def seen_in_original() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return seen(captured("llama")[0], llama())


def weights_by_hand(grad: Tensor, groups: int, power: float) -> Tensor:
    """[groups, tokens] from gradients [tokens, n]."""
    parts = grad.square().tensor_split(groups, dim=1)
    raised = torch.stack([part.mean(1) for part in parts]) ** power
    return raised / raised.mean(1, keepdim=True)


def assert_alike(got: Tensor, want: Tensor) -> None:
    """Equal to half a percent of the largest entry; inputs of a tiny model are tiny."""
    size = float(want.abs().max())
    torch.testing.assert_close(got.double() / size, want / size, rtol=0, atol=5e-3)


def weights_of(program: Program, site: str) -> Tensor:
    return program.fact(site, TokenWeights).weights.load()


@pytest.mark.parametrize(("groups", "power"), [(2, 0.5), (1, 1.0), (4, 0.25)])
def test_a_token_weighs_what_the_gradients_of_its_rows_say(groups: int, power: float) -> None:
    program = decided(MeasureSensitivity(groups=groups, power=power))
    _, grads = seen_in_original()
    for site in program.sites:
        want = weights_by_hand(grads[site.name], groups, power)
        got = weights_of(program, site.name)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-3)
        effective = (want.sum(1) ** 2 / want.square().sum(1)).min()
        fact = program.fact(site.name, TokenWeights)
        assert fact.effective == pytest.approx(float(effective), rel=1e-2)


def test_a_higher_power_leaves_fewer_effective_tokens() -> None:
    square, root = (decided(MeasureSensitivity(groups=1, power=p)) for p in (1.0, 0.5))
    for site in root.sites:
        few, more = (p.fact(site.name, TokenWeights).effective for p in (square, root))
        assert few < more < sum(b * t for b, t in SIZES)


def test_the_original_metric_of_a_group_is_its_weighted_gram_matrix() -> None:
    program = llama()
    inputs, grads = seen_in_original()
    found = guides_alone(program, program.sites)
    for site in program.sites:
        x, weights = inputs[site.name], weights_by_hand(grads[site.name], 2, 0.5)
        rotation = program.fact(site.name, Rotation)
        assert len(found[site.name]) == 2
        for weight, read in zip(weights, found[site.name], strict=True):
            turned = rotate(x.float(), rotation).double()
            want = (turned * weight.unsqueeze(1)).T @ turned / len(x)
            moments = read()
            plain = moments.gram - torch.eye(site.k) * moments.factor.damping
            assert_alike(plain, want)


def test_behind_a_prefix_both_moments_of_a_group_are_weighted() -> None:
    program = quantized(0.3, 2)
    inputs, grads = seen_in_original()
    name = next(s.name for s in program.sites if s.name.endswith("1.mlp.down_proj"))
    model = copy.deepcopy(captured("llama")[0])
    for site in program.sites:  # all but this one run before it
        if site.name != name:
            weight = program.fact(site.name, Packed).weight.dequantize()
            model.get_submodule(site.name).weight.data.copy_(weight)
    behind = seen(model, program)[0][name]
    weights = weights_by_hand(grads[name], 2, 0.5).unsqueeze(2)
    path = program.fact(name, Prefix).gram.path
    for index in range(2):
        gram, drift = (
            StoredTensor(path, f"{name}/{role}.{index}").load() for role in ("gram", "drift")
        )
        assert_alike(gram, (behind * weights[index]).T @ behind / len(behind))
        lag = inputs[name] - behind
        assert_alike(drift, (lag * weights[index]).T @ behind / len(behind))
        assert float(drift.abs().max()) > 0.01 * float(gram.abs().max())


def guided_loss(program: Program) -> float:
    """Sum over sites and groups of tr(E H E') in the guided metric, over that of the weights."""
    inputs, grads = seen_in_original()
    share = 0.0
    for site in program.sites:
        weight = program.weight(site)
        error = weight - program.fact(site.name, Packed).weight.dequantize()
        lost = energy = 0.0
        groups = row_groups(site.n, 2)
        for rows, w in zip(groups, weights_by_hand(grads[site.name], 2, 0.5), strict=True):
            gram = (inputs[site.name] * w.unsqueeze(1)).T @ inputs[site.name]
            lost += output_loss(error[rows], gram)
            energy += output_loss(weight[rows], gram)
        share += lost / energy
    return share


def test_each_group_loses_less_in_its_own_metric_than_the_plain_one_leaves() -> None:
    own, plain = quantized(0.0, 2), quantized(0.0, 0)
    assert guided_loss(own) < 0.995 * guided_loss(plain)
    first = own.sites[0].name  # and the other way round: the plain metric is not free
    assert sum(own.fact(s.name, Packed).error for s in own.sites) > sum(
        plain.fact(s.name, Packed).error for s in plain.sites
    )
    assert own.fact(first, Packed).weight.stored_bits() == (
        plain.fact(first, Packed).weight.stored_bits()
    )


@pytest.mark.parametrize(
    "fit",
    [FitCodebooks((1, 1.6, 2, 3)), FitCodebooks((1, 4), shared=False, scale_bits=8),
     FitCodebooks((2, 3), group=0, shared=False), FitCodebooks((1, 2), group=32, scale_bits=4),
     FitCodebooks((2, 4), trellis=True), FitCodebooks((2,), trellis=True)],
    ids=str,
)  # fmt: skip
def test_groups_with_one_metric_come_out_as_the_rows_together(fit: FitCodebooks) -> None:
    program = compiled((fit, CyclicWidths()), True)
    site = program.sites[0]
    books, widths = (program.fact(site.name, kind) for kind in (Codebooks, Precision))
    assert isinstance(books, Codebooks) and isinstance(widths, Precision)
    rotation = program.fact(site.name, Rotation)
    moments = moments_of(correlated_gram(site.k, 1))
    weight = rotate(program.weight(site), rotation)
    args = (books, widths.row_widths, rotation, 2)
    whole = quantize(weight, moments, *args)
    parts = quantize_guided(weight, [lambda: moments] * 3, *args)
    assert torch.equal(whole.row_widths, parts.row_widths)
    assert whole.stored_bits() == parts.stored_bits()
    one, two = (moments.loss(weight - rotate(p.dequantize(), rotation)) for p in (whole, parts))
    assert two == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [5, 64, 192, 300])
def test_no_run_of_trellis_codes_is_cut_in_two(rows: int, groups: int) -> None:
    widths = torch.full((rows,), 12, dtype=torch.uint8)
    widths[::7] = 4
    found = whole_groups(widths, groups)
    assert {*found} <= {*range(groups)} and all(len(part) for part in found.values())
    assert torch.cat([*found.values()]).sort()[0].tolist() == [*range(rows)]
    runs = trellis_runs(widths)
    assert runs is not None
    kept = [{*runs[part].tolist()} - {-1} for part in found.values()]
    assert sum(map(len, kept)) == len(set().union(*kept))
    for index, part in enumerate(row_groups(rows, groups)):
        alone = torch.arange(rows)[part][widths[part] == 4].tolist()
        assert not alone or {*alone} <= {*found[index].tolist()}


@given(st.integers(1, 40), st.integers(1, 8))
def test_row_groups_are_runs_that_cover_every_row_once(n: int, groups: int) -> None:
    found = [list(range(n))[rows] for rows in row_groups(n, groups)]
    assert [row for rows in found for row in rows] == list(range(n))
    assert len(found) == min(n, groups) and min(map(len, found)) >= 1
    assert max(map(len, found)) - min(map(len, found)) <= 1


# --- repeats, resumes, says ---------------------------------------------------------------------


def bytes_of(program: Program) -> dict[str, bytes]:
    return {
        f"{site.name}.{role}": tensor.numpy().tobytes()
        for site in program.sites
        for role, tensor in program.fact(site.name, Packed).weight.tensors().items()
    }


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("measured again")


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_second_run_gives_the_same_bytes_and_measures_nothing(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = (QuantizeWeights(prefix=share),)
    first = run_pipeline(decided(folder=tmp_path), step)
    assert bytes_of(first) == bytes_of(quantized(share, 2))
    monkeypatch.setattr(measure_sensitivity, "_mean_squares", refuse)
    monkeypatch.setattr(guidance, "_collect", refuse)
    monkeypatch.setattr(prefix.Runner, "run", refuse)
    again = run_pipeline(decided(folder=tmp_path), step)
    assert bytes_of(first) == bytes_of(again)


@pytest.mark.parametrize("other", [{"groups": 1}, {"power": 1.0}, {"groups": 0}], ids=str)
def test_other_weights_are_not_taken_from_the_same_folder(
    other: Mapping[str, Any], tmp_path: Path
) -> None:
    step = (QuantizeWeights(prefix=0.3),)
    run_pipeline(decided(folder=tmp_path), step)
    changed = run_pipeline(decided(replace(GUIDED, **other), tmp_path), step)
    assert bytes_of(changed) != bytes_of(quantized(0.3, 2))
    if not other.get("groups", 1):
        assert bytes_of(changed) == bytes_of(quantized(0.3, 0))


def test_weights_of_few_effective_tokens_are_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    program = decided()
    assert "fewer than 10 effective tokens per input" in caplog.text
    assert "more calibration_tokens would help" in caplog.text
    lines = list(fact_lines(program, program.sites[0]))
    assert any(line.startswith("token weights: groups=2, as good as") for line in lines)


def test_a_token_without_a_gradient_weighs_nothing_and_a_group_without_any_is_plain() -> None:
    squares = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 9.0, 1.0, 1.0]])
    found = measure_sensitivity._normalized({"a": squares}, 0.5)["a/tokens"]
    want = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0] * 4, [2 / 3, 2.0, 2 / 3, 2 / 3]])
    torch.testing.assert_close(found, want)
    assert measure_sensitivity._effective(found) == pytest.approx(1.0)
    with pytest.raises(CalibrationError, match="gradient at a is not finite"):
        measure_sensitivity._normalized({"a": squares * torch.inf}, 0.5)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bert", "mlp"])
def test_a_program_without_a_next_token_loss_is_refused_before_anything_runs(name: str) -> None:
    model, program = normalized(name)
    batch = tuple(tokens(model, 2, 9).values())
    program = replace(program, calibration=(batch,), spill=Spill())
    with pytest.raises(CalibrationError, match="no traced causal language model: use guided=0"):
        run_pipeline(program, (_Never(), GUIDED))


def test_a_data_free_program_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no calibration data: use guided=0"):
        run_pipeline(normalized("llama")[1], (_Never(), GUIDED))


@pytest.mark.parametrize("options", [{"groups": -1}, {"groups": 1, "power": 0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    program = replace(normalized("llama")[1], calibration=data())
    with pytest.raises(RecipeError, match="0 or more groups of rows, and a positive power"):
        run_pipeline(program, (_Never(), MeasureSensitivity(**options)))


class _Never(CollectStatistics):
    def run(self, program: Program) -> Program:
        raise AssertionError("long work began")
