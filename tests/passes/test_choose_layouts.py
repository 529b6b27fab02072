"""Layouts are chosen with the widths, and no single layout for all sites would lose less."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.facts import Assigned, Codebooks, LayoutFits, Packed, Precision
from lowra.compiler.layout import Layout
from lowra.compiler.packing import levels_of, width_id
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program, Site
from lowra.compiler.spill import Spill, write_tensors
from lowra.passes import (
    AssignPrecision,
    ChooseLayouts,
    CollectStatistics,
    CompareUniform,
    FitCodebooks,
    QuantizeWeights,
    RewriteLinears,
    RotateInputs,
    choose_layouts,
)
from lowra.passes.rounding.stored_books import flat_books, in_layouts
from tests.golden_text import GoldenFile
from tests.passes.chain import X, chain
from tests.passes.site_programs import compiled, site_program, two_sites

TEXTS = ("row8-shared16", "32x4-shared16", "none-own8")
LAYOUTS = tuple(map(Layout.parse, TEXTS))
WIDTHS = (1, 2, 3, 4)
FIT = FitCodebooks(WIDTHS, layouts=TEXTS)


def books_in(site: Site, layout: Layout, loss: torch.Tensor) -> Codebooks:
    """Codebooks that say what rows lose, of the shapes of a layout."""
    rows = () if layout.shared else (site.n,)
    levels = {b: torch.linspace(-1, 1, levels_of(width_id(b))).expand(*rows, -1).clone()
              for b in WIDTHS}  # fmt: skip
    groups = 1 if layout.group < 0 else -(-site.k // layout.group) if layout.group else 0
    scales = {b: torch.ones(site.n, groups) for b in WIDTHS} if groups else None
    return Codebooks(WIDTHS, levels, scales, loss, layout.group, layout.shared,
                     compact=layout.compact)  # fmt: skip


def fitted(seed: int) -> Program:
    """The two sites in three layouts of random losses, each better at some rows."""
    random = np.random.default_rng(seed)
    program = site_program(two_sites()[0])
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        loud = np.exp(random.normal(0, 2, (site.n, 1)))
        files = {}
        for layout, text in zip(LAYOUTS, TEXTS, strict=True):
            shape = np.array([0.36, 0.12, 0.034, 0.009]) * np.exp(random.normal(0, 0.5))
            rows = np.exp(random.normal(0, 0.1, (site.n, 4)))
            books = books_in(site, layout, torch.from_numpy(loud * shape * rows))
            files[layout] = program.spill.path(site.name, text)
            write_tensors(flat_books(books), files[layout])
        facts[site.name] = [books, LayoutFits(WIDTHS, files)]
    return program.with_facts(facts)


def lost(program: Program, step: AssignPrecision) -> float:
    try:
        return step.least_loss(program)
    except BudgetError:
        return float("inf")


def each_plan(program: Program) -> dict[tuple[Layout, ...], Program]:
    """The program in every mix of layouts."""
    names = [site.name for site in program.sites]
    return {
        mix: in_layouts(program, dict(zip(names, mix, strict=True)))
        for mix in itertools.product(LAYOUTS, repeat=len(names))
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000), st.floats(2.6, 6.5), st.sampled_from(["row", "layer"]),
    st.sampled_from([(), ("up=3",), ("down=1", "up=4")]), st.sampled_from([0, 1]),
)  # fmt: skip
def test_no_mix_of_layouts_loses_less_within_the_budget(
    seed: int, budget: float, unit: str, pins: tuple[str, ...], rank: int
) -> None:
    """Exhaustively: two sites in three layouts, and all their widths by the knapsack."""
    program = fitted(seed)
    options: dict[str, Any] = {"unit": unit, "pins": pins, "adapter_rank": rank}
    step = AssignPrecision(budget, **options)
    losses = {mix: lost(plan, step) for mix, plan in each_plan(program).items()}
    best = min(losses.values())
    if np.isinf(best):
        with pytest.raises(BudgetError, match="out of reach"):
            run_pipeline(program, (ChooseLayouts(budget, **options), step))
        return
    done = run_pipeline(program, (ChooseLayouts(budget, **options), step))
    found = done.fact("up", Assigned).proof.loss
    assert found <= best * (1 + 1e-9)
    assert np.isclose(found, losses[tuple(done.fact(s.name, Layout) for s in done.sites)])


def test_the_smallest_budget_that_any_mix_can_meet_is_met() -> None:
    program = fitted(3)
    narrow = (1.0,)
    least = sum(
        min(site.n * one.row_bits(site.k, 1) + one.site_bits(site.n, site.k, narrow)
            for one in LAYOUTS)
        for site in program.sites
    )  # fmt: skip
    budget = (least + 0.5) / sum(site.weights for site in program.sites)
    done = run_pipeline(program, (ChooseLayouts(budget), AssignPrecision(budget)))
    assert {w for s in done.sites for w in done.fact(s.name, Precision).histogram()} == {1}


@pytest.mark.parametrize("looks", [0, 1])
def test_no_single_layout_loses_less_however_few_plans_are_looked_at(
    looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_layouts, "LOOKS", looks)
    for seed, budget in itertools.product(range(6), (3.0, 3.7)):
        program, step = fitted(seed), AssignPrecision(budget)
        done = run_pipeline(program, (ChooseLayouts(budget), step))
        uniform = [in_layouts(program, dict.fromkeys(("up", "down"), one)) for one in LAYOUTS]
        least = min(lost(plan, step) for plan in uniform)
        assert done.fact("up", Assigned).proof.loss <= least * (1 + 1e-9)


def test_of_equal_layouts_the_one_that_stores_less_stays() -> None:
    program = fitted(0)
    losses = {s.name: program.fact(s.name, Codebooks).loss for s in program.sites}
    for site in program.sites:
        for layout, path in program.fact(site.name, LayoutFits).files.items():
            write_tensors(flat_books(books_in(site, layout, losses[site.name])), path)
    done = run_pipeline(program, (ChooseLayouts(3.5),))
    smallest = min(LAYOUTS, key=lambda one: one.row_bits(48, 1))
    assert done.fact("up", Layout) == smallest


@pytest.mark.parametrize("budget", [3.3, 4.2, 5.5])
def test_what_is_packed_in_the_chosen_layouts_holds_the_budget(budget: float) -> None:
    program = compiled((FIT, ChooseLayouts(budget), AssignPrecision(budget), QuantizeWeights()))
    stored = 0
    for site in program.sites:
        weight, layout = program.fact(site.name, Packed).weight, program.fact(site.name, Layout)
        stored += weight.stored_bits()
        assert weight.group == layout.group and weight.compact.codebook_bits in (8, 16)
        assert program.fact(site.name, Codebooks).layout == layout
    assert stored <= budget * sum(site.weights for site in program.sites)


def test_a_fit_among_layouts_is_the_fit_alone() -> None:
    together = compiled((FIT,))
    for text, layout in zip(TEXTS, LAYOUTS, strict=True):
        alone = FitCodebooks(
            WIDTHS, layout.group, layout.shared, scale_bits=layout.compact.scale_bits,
            codebook_bits=layout.compact.codebook_bits,
        )  # fmt: skip
        wanted = compiled((alone,))
        placed = in_layouts(together, dict.fromkeys(("up", "down"), layout))
        for name in ("up", "down"):
            got, want = placed.fact(name, Codebooks), wanted.fact(name, Codebooks)
            assert got.layout == want.layout, text
            assert torch.equal(got.loss, want.loss)
            assert all(torch.equal(got.levels[b], want.levels[b]) for b in WIDTHS)


def test_a_site_with_a_planned_layout_is_fitted_in_it_alone() -> None:
    program = site_program(two_sites()[0])
    program = program.with_facts({s.name: [LAYOUTS[1]] for s in program.sites})
    done = run_pipeline(program, (FIT,))
    assert all(done.fact(s.name, Codebooks).layout == LAYOUTS[1] for s in done.sites)
    assert done.find("up", LayoutFits) is None


def test_the_papers_rule_has_one_layout() -> None:
    with pytest.raises(RecipeError, match="rule=paper has one layout"):
        run_pipeline(site_program(two_sites()[0]),
                     (FitCodebooks(WIDTHS, 32, False, "paper", layouts=TEXTS),))  # fmt: skip


def graph_program() -> Program:
    return replace(chain()[1], calibration=((X[:300],),), held_out=((X[300:],),), spill=Spill())


def test_siblings_share_a_layout_and_a_width() -> None:
    fit = (RotateInputs(), CollectStatistics(), FIT)
    steps = (ChooseLayouts(4.0, unit="siblings"), AssignPrecision(4.0, unit="siblings"))
    done = run_pipeline(graph_program(), (*fit, *steps))
    assert done.fact("left", Layout) == done.fact("right", Layout)
    widths = {tuple(done.fact(n, Precision).histogram()) for n in ("left", "right")}
    assert len(widths) == 1


def test_a_plan_of_chosen_layouts_is_held_against_one_width_in_one_layout() -> None:
    fit = (RotateInputs(), CollectStatistics(), FIT)
    program = run_pipeline(graph_program(), (*fit, ChooseLayouts(3.4), AssignPrecision(3.4)))
    mixed = {s.name: program.fact(s.name, Precision).row_widths for s in program.sites}
    narrow = program.with_facts(
        {name: [Precision(torch.ones_like(widths))] for name, widths in mixed.items()}
    )
    done = run_pipeline(narrow, (CompareUniform(3.4),))
    found = done.fact("last", Assigned).comparison
    assert found is not None and found.uniform < found.mixed and found.width > 1
    kept = {done.fact(s.name, Layout) for s in done.sites}
    assert len(kept) == 1
    assert all(done.fact(s.name, Codebooks).layout in kept for s in done.sites)


def test_a_program_of_chosen_layouts(golden: GoldenFile) -> None:
    """Half of the columns of two sites are loud and read quiet inputs: a scale per half row pays
    there, and not at the last site."""
    loud = torch.where(torch.arange(64) < 32, 8.0, 1.0)
    program, x = graph_program(), X / loud
    tensors = {name: tensor * loud if name in ("left.weight", "right.weight") else tensor
               for name, tensor in program.tensors.items()}  # fmt: skip
    program = replace(program, tensors=tensors, calibration=((x[:300],),))
    fit = (RotateInputs(rule="never"), CollectStatistics(), FIT)
    steps = (ChooseLayouts(3.9), AssignPrecision(3.9), QuantizeWeights(), RewriteLinears())
    done = run_pipeline(program, (*fit, *steps))
    assert [str(done.fact(n, Layout)) for n in ("left", "last")] == [TEXTS[1], TEXTS[0]]
    golden.check(print_program(done))
    wanted, found = program.module()(x), done.module()(x)
    lost = (found - wanted).detach().square().sum() / wanted.detach().square().sum()
    assert float(lost) < 0.05
