"""Every site gets the largest rotation its input allows, or none."""

from __future__ import annotations

from lowra.compiler.dataflow import siblings
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.rotation import Rotation
from lowra.passes import RotateInputs
from tests.compiler.captured import normalized


def test_block_is_the_largest_power_of_two_that_divides_k() -> None:
    _, program = normalized("llama")
    done = run_pipeline(program, (RotateInputs(seed=7),))
    for site in done.sites:
        assert done.fact(site.name, Rotation) == Rotation(7, {64: 64, 96: 32}[site.k])


def test_siblings_rotate_alike() -> None:
    _, program = normalized("t5")
    done = run_pipeline(program, (RotateInputs(),))
    for group in siblings(done):
        assert len({done.fact(site.name, Rotation) for site in group}) == 1


def test_odd_inputs_and_a_disabled_pass_mean_no_rotation() -> None:
    _, program = normalized("mlp")
    for step in (RotateInputs(), RotateInputs(enabled=False)):
        done = run_pipeline(program, (step,))
        assert not any(done.fact(site.name, Rotation).active for site in done.sites)
    _, program = normalized("llama")
    done = run_pipeline(program, (RotateInputs(seed=3, enabled=False),))
    assert {done.fact(site.name, Rotation).block for site in done.sites} == {1}
