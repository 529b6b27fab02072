"""Tuning by blocks: judged on data it has not seen, stored as before, found again after a crash."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowra.compiler.blocks import find_blocks
from lowra.compiler.errors import CalibrationError, CaptureError
from lowra.compiler.facts import BlockTuning, Packed
from lowra.compiler.packing import levels_of
from lowra.compiler.program import Program
from lowra.passes import TuneBlocks, tune_blocks
from lowra.passes.tune_blocks import frozen_block
from lowra.passes.tuning import block_training
from lowra.passes.tuning.batches import held_out, split_batches
from lowra.passes.tuning.block_runner import BlockRunner
from tests.compiler.captured import normalized
from tests.passes.tuned_programs import data, quantized, same, tuned

ONE = (tuple(tensor[:1] for tensor in data("llama", 1)[0]),)
STEP = TuneBlocks(steps=24, batch_tokens=64, rate=0.1, fine_rate=0.005)


@functools.cache
def made(name: str) -> Program:
    """A tiny model in plain codes, or "llama on a trellis"."""
    kind, *trellis = name.split(" on a ")
    return quantized(kind, trellis=True) if trellis else quantized(kind)


@functools.cache
def finished(name: str) -> Program:
    return tuned(made(name), STEP)


def outcomes(program: Program) -> dict[str, BlockTuning]:
    return {f.block: f for s in program.sites for f in [program.fact(s.name, BlockTuning)]}


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama on a trellis"])
def test_the_held_out_error_of_no_block_rises_and_that_of_the_first_falls(name: str) -> None:
    found = list(outcomes(finished(name)).values())
    assert all(block.after <= block.before for block in found)
    assert found[0].after < found[0].before


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama on a trellis"])
def test_the_errors_reported_are_those_of_the_program_that_came_out(name: str) -> None:
    program = finished(name)
    runner = BlockRunner(made(name))
    batches = split_batches(program, STEP.batch_tokens)
    names = list(runner.nodes)
    blocks = find_blocks(program)
    for block in blocks:
        errors: list[float] = []
        for batch in batches[-held_out(len(batches)) :]:
            until = names[: names.index(block.nodes[-1]) + 1]
            linears: dict[str, Any] = {}
            for earlier in blocks[: blocks.index(block) + 1]:
                linears |= frozen_block(program, earlier)[0]
            changed = {n: program.tensors[n].detach() for n in program.replaced}
            got = runner.run(until, runner.inputs(batch), linears, changed)[block.exit]
            want = runner.run(until, runner.inputs(batch))[block.exit]
            ratio = (got - want).square().sum(-1) / want.square().sum(-1)
            errors.append(float(ratio.mean()))
        expected = outcomes(program)[block.name].after
        assert sum(errors) / len(errors) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama on a trellis"])
def test_widths_and_bits_stay_and_levels_still_ascend(name: str) -> None:
    before, after = made(name), finished(name)
    for site in after.sites:
        old, new = (p.fact(site.name, Packed).weight for p in (before, after))
        assert torch.equal(old.row_widths, new.row_widths)
        assert old.stored_bits() == new.stored_bits()
        start = 0
        for id, _ in new.panels:
            levels = new.codebooks[start : start + levels_of(id)].float()
            assert bool((levels.diff() >= 0).all())
            start += levels_of(id)


def test_some_codes_and_some_norms_have_changed_and_nothing_was_written_in_place() -> None:
    before, after = quantized("llama"), finished("llama")
    codes = [p.fact(before.sites[0].name, Packed).weight.codes for p in (before, after)]
    assert not torch.equal(*codes)
    assert "model.layers.0.input_layernorm.weight" in after.replaced
    assert "model.norm.weight" not in after.replaced
    for name in after.replaced:
        assert torch.equal(before.tensors[name], normalized("llama")[1].tensors[name])
        assert after.tensors[name].dtype == before.tensors[name].dtype


def test_two_runs_store_the_same_bytes() -> None:
    assert same(finished("llama"), tuned(quantized("llama"), STEP))


def test_an_interrupted_run_goes_on_at_the_block_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = block_training.train_block

    def stops_at_the_second(task: Any, *options: Any) -> Any:
        if trained:
            raise KeyboardInterrupt
        return counted(task, *options)

    def counted(task: Any, *options: Any) -> Any:
        trained.append(task.block.name)
        return train(task, *options)

    monkeypatch.setattr(tune_blocks, "train_block", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        tuned(quantized("llama"), STEP, tmp_path)
    monkeypatch.setattr(tune_blocks, "train_block", counted)
    resumed = tuned(quantized("llama"), STEP, tmp_path)
    assert trained == ["model.layers.0", "model.layers.1"]
    assert same(resumed, finished("llama"))
    monkeypatch.setattr(BlockRunner, "run", None)
    assert same(tuned(quantized("llama"), STEP, tmp_path), resumed)


def test_a_block_that_training_makes_worse_stays_as_it_was() -> None:
    wild = replace(STEP, rate=30.0, fine_rate=3.0)
    program = tuned(quantized("mlp"), wild)
    assert same(replace(program, replaced={}), quantized("mlp"))
    assert all(block.after == block.before for block in outcomes(program).values())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"calibration": ()}, CalibrationError, "needs calibration data"),
        ({"calibration": ONE}, CalibrationError, "is one window: give more"),
        ({"graph": None}, CaptureError, "needs the traced graph"),
        ({"sites": quantized("llama").sites[:3] + quantized("llama").sites[:1]}, CaptureError,
         "one activation joins"),
    ],
    ids=["data-free", "one window", "no graph", "no blocks"],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_before_any_work(
    change: dict[str, Any], error: type[Exception], match: str
) -> None:
    program = replace(quantized("llama"), **change)
    with pytest.raises(error, match=match):
        STEP.run(program)


def test_a_few_windows_are_split_finely_enough_to_hold_one_out() -> None:
    few = replace(quantized("llama"), calibration=data("llama", 1))
    assert [batch[0].shape for batch in split_batches(few, 1024)] == [(1, 16)] * 4
    many = split_batches(quantized("llama"), 48)
    assert [batch[0].shape[0] for batch in many] == [3, 1] * 8
