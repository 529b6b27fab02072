"""The passes that a recipe stands for, in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowra.compiler.pipeline import Pass
from lowra.passes import (
    AssignPrecision,
    ChooseLayouts,
    CollectStatistics,
    CompareUniform,
    CorrectWeights,
    FitCodebooks,
    InitializeAdapters,
    MeasureSensitivity,
    NormalizeLinears,
    QuantizeWeights,
    ReplayPrecision,
    RewriteLinears,
    RotateInputs,
    TuneAdapters,
    TuneBlocks,
    TuneModel,
)
from lowra.passes.rounding.paper_mappings import AVERAGES
from lowra.recipe_checks import RANKS

if TYPE_CHECKING:
    from lowra.recipe import Recipe


def passes_of(recipe: Recipe, replay: bool = False) -> tuple[Pass, ...]:
    """The pipeline of a recipe; `replay`: with the widths of an earlier plan."""
    return (
        NormalizeLinears(include=recipe.include, ignore=recipe.ignore),
        CollectStatistics(gram=recipe.statistics),
        *(() if recipe.is_paper else (MeasureSensitivity(groups=recipe.guided),)),
        rotation_of(recipe),
        _codebooks(recipe),
        *_precision(recipe, replay),
        QuantizeWeights(feedback=not recipe.is_paper, prefix=recipe.prefix),
        *tuning_of(recipe),
        *_additions(recipe),
        RewriteLinears(),
    )


def rotation_of(recipe: Recipe) -> RotateInputs:
    """The rotate-inputs pass of a recipe."""
    if recipe.rotation is None and not recipe.is_paper:
        tried = recipe.layout
        return RotateInputs(
            seed=recipe.seed, rule="measured", group=tried.group, shared=tried.shared
        )
    return RotateInputs(seed=recipe.seed, rule="always" if recipe.rotation else "never")


def _codebooks(recipe: Recipe) -> FitCodebooks:
    layout, layouts = recipe.layout, recipe.candidate_layouts
    return FitCodebooks(
        widths=recipe.candidate_widths,
        group=layout.group,
        shared=layout.shared,
        rule="paper" if recipe.is_paper else "default",
        threshold_average=recipe.threshold_average or AVERAGES[0],
        scale_bits=layout.compact.scale_bits,
        codebook_bits=layout.compact.codebook_bits,
        trellis=layout.trellis,
        layouts=tuple(map(str, layouts)) if len(layouts) > 1 else (),
    )


def assignment_of(recipe: Recipe) -> AssignPrecision:
    """The assign-precision pass of a recipe."""
    return AssignPrecision(
        budget=float(recipe.bit_budget),
        rule="paper" if recipe.is_paper else "default",
        unit=recipe.unit,
        pins=tuple(f"{pattern}={width}" for pattern, width in recipe.pins.items()),
        adapter_rank=recipe.fixed_rank if recipe.count_adapters else 0,
        ranks=RANKS if recipe.rank == "auto" else (),
        correction_rank=recipe.correction_rank,
        correction_bits=recipe.correction_bits,
    )


def _precision(recipe: Recipe, replay: bool) -> tuple[Pass, ...]:
    """What decides widths: an earlier plan, the paper, or a plan held against uniform ones."""
    rank = recipe.fixed_rank if recipe.count_adapters else 0
    counted = (rank, recipe.correction_rank, recipe.correction_bits)
    if replay:
        budget = 0.0 if recipe.is_paper else float(recipe.bit_budget)
        return (ReplayPrecision(budget, *counted),)
    steps: list[Pass] = [assignment_of(recipe)]
    if len(recipe.candidate_layouts) > 1:
        steps.insert(0, _layouts(recipe))
    if not (recipe.is_paper or recipe.pins or recipe.rank == "auto"):
        steps.append(CompareUniform(float(recipe.bit_budget), *counted))
    return tuple(steps)


def _layouts(recipe: Recipe) -> ChooseLayouts:
    step = assignment_of(recipe)
    return ChooseLayouts(
        budget=step.budget,
        unit=step.unit,
        pins=step.pins,
        adapter_rank=step.adapter_rank,
        correction_rank=step.correction_rank,
        correction_bits=step.correction_bits,
    )


def tuning_of(recipe: Recipe) -> tuple[Pass, ...]:
    """The tuning passes of a recipe, if any."""
    tokens, seed = recipe.tune_batch_tokens, recipe.seed
    blocks = TuneBlocks(steps=recipe.tune_steps, batch_tokens=tokens, seed=seed)
    model = TuneModel(steps=recipe.tune_model_steps, batch_tokens=tokens, seed=seed)
    return {"none": (), "blocks": (blocks,), "full": (blocks, model)}[recipe.tune]


def _additions(recipe: Recipe) -> tuple[Pass, ...]:
    """What stands beside the packed weights: a correction, an adapter."""
    steps: list[Pass] = []
    if recipe.correction_rank:
        steps.append(CorrectWeights(rank=recipe.correction_rank, bits=recipe.correction_bits))
    init = recipe.init or ("loftq" if recipe.is_paper else "closed-form")
    if recipe.largest_rank:
        steps.append(
            InitializeAdapters(
                rank=recipe.usual_rank,
                alpha=_alpha(recipe),
                rule=init,
                seed=recipe.seed,
                relearn=recipe.loftq_mappings == "relearned",
                threshold_average=recipe.threshold_average or AVERAGES[0],
                targets=recipe.targets,
                ranks=tuple(f"{pattern}={rank}" for pattern, rank in recipe.rank_pattern.items()),
                rslora=recipe.rslora,
            )
        )
        if recipe.tune == "full" and init != "zero":
            tokens, seed = recipe.tune_batch_tokens, recipe.seed
            steps.append(TuneAdapters(recipe.tune_model_steps, tokens, seed=seed))
    return tuple(steps)


def _alpha(recipe: Recipe) -> float:
    """The alpha of all sites; 0 where each has its own rank for alpha."""
    if recipe.alpha is not None:
        return float(recipe.alpha)
    own = recipe.rank_pattern or (recipe.rslora and recipe.rank == "auto")
    return 0.0 if own else float(recipe.largest_rank)
