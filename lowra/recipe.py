"""Recipe: everything a user decides about a compile, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowra.compiler.compact import Compact
from lowra.compiler.errors import RecipeError, nearest
from lowra.compiler.layout import Layout
from lowra.compiler.packing import TERNARY
from lowra.compiler.pipeline import Pass
from lowra.passes import AssignPrecision, TuneBlocks, TuneModel
from lowra.passes.budget.adapter_ranks import rank_of
from lowra.recipe_checks import RANKS, check_together, check_values, patterns
from lowra.recipe_pipeline import assignment_of, passes_of
from lowra.runtime.training import ADAPTERS

PREFIX = 0.3
"""Share of the quantized prefix's error that a site makes up for (decision 10)."""
TERNARY_BELOW = 2.6
"""Budget from which ternary rows save the default nothing worth their fitting (decision 8)."""
AUTO_LAYOUTS = (
    "row8-shared16-trellis", "128x4-shared16-trellis", "64x4-shared16-trellis",
)  # fmt: skip
"""What layouts="auto" offers, the default's first (decision 13)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to compress a model.

    bit_budget: bits per compressed weight, a hard cap. Stored bits (codes, padding, codebooks,
        scales, width tags) in preset "default"; code bits alone in "lowra", as the paper counts.
    preset: "default", the best we know, or "lowra", the paper to the letter (data-free, absmax
        blocks of 64, 2 Lloyd iterations, widths 1, 2, 4, two-level program, LoftQ).
    widths: candidate widths out of 1, 1.6 (three levels), 2, 3, 4 and 8; by default 1 to 4 (with
        1.6 where the budget is low, 8 where it has room), or the paper's.
    unit: "row" for a width per output row, "layer" for one per site, "siblings"
        for one for all sites that read one input (q/k/v, gate/up), as fused kernels want.
    rotation: input-side randomised Hadamard transform: true everywhere, false nowhere; by default
        where it lowers the error that is measured (preset "lowra": nowhere).
    group: columns per scale, -1 one scale per row, 0 none. shared_codebooks: one codebook per site
        and width instead of one per row.
    scale_bits, codebook_bits: what a scale (16, 8 or 4) and a codebook value (16 or 8) take in the
        file; by default 8 and 16.
    trellis: rows of 1, 2 and 3 bits are trellis codes: what a row stores names one of twice as many
        levels together with the rows before it (lowra/compiler/trellis.py). By default wherever
        codebooks are shared (preset "lowra": nowhere).
    layouts: in place of those five fields, layouts as texts such as "64x4-shared16" (see
        lowra/compiler/layout.py), of which the planner chooses one per site; "auto": a short list.
    rank, alpha: LoRA rank (0 for no adapter) and alpha; init: "closed-form", "two-sided"
        (rows weighted by sensitivity), "alternate" (the base quantized anew in turn), "loftq" or
        "zero". rank "auto" chooses 0, 4, 8, 16 or 32 per site, paid from the budget in competition
        with row widths (see lowra/passes/budget/rank_options.py).
    targets: patterns of the weights that get an adapter, by default all. rank_pattern: {pattern:
        rank} for the sites that match; of several, the first wins. rslora: the adapter's output is
        scaled by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) in place of alpha / rank.
        lora_dropout: share of the adapter's inputs that training drops, as in PEFT.
    train: what trains unless a training run says otherwise, out of "adapters", "norms", "codebooks"
        and "scales" (`lowra.prepare_training`).
    correction_rank, correction_bits: a frozen low-rank correction beside every packed weight, its
        factors at 4 or 8 bits per value; counted in stored bits. Rank 0 for none.
    threshold_average: (preset "lowra") what the paper's thresholds are averaged over, which its
        text leaves open: "iterations" (the default), "channels" or "none".
    loftq_mappings: (preset "lowra") its mappings and thresholds are "kept" over LoftQ's
        alternations (the default) or "relearned" in each.
    count_adapters: LoRA factors, at 16 bit, count towards the budget.
    include, ignore: patterns (globs, or regular expressions after `re:`) of weights compressed
        although skipped by default (the head), or left alone. pins: {pattern: width}.
    tune: "none"; "blocks", learned rounding of plain codes, with levels, scales and norms, block by
        block; or "full", and then end to end: codebooks, scales and norms, and behind them the
        adapter on the frozen base (but for init="zero"). Minutes where the rest takes seconds;
        needs calibration.
    tune_steps: steps per block, tune_model_steps: steps end to end; tune_batch_tokens: tokens of
        each step.
    guided: 1, 2 or 4 groups of rows per site, each quantized in the metric in which a calibration
        token counts by the loss's gradient at the group's outputs (GuidedQuant); 0 for the plain
        metric. For traced causal language models.
    statistics: "full", or "diagonal": only the mean squares of inputs are kept, for very wide ones.
    calibration_tokens, context: how much text, in windows of what length.
    seed: of everything that is drawn.

    Raises RecipeError for a value out of range, BudgetError for an impossible budget.
    """

    bit_budget: float
    preset: str = "default"
    widths: tuple[float, ...] | None = None
    unit: str = "row"
    rotation: bool | None = None
    group: int | None = None
    shared_codebooks: bool | None = None
    scale_bits: int | None = None
    codebook_bits: int | None = None
    layouts: str | tuple[str, ...] | None = None
    trellis: bool | None = None
    rank: int | str = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    rslora: bool = False
    lora_dropout: float = 0.0
    train: tuple[str, ...] = ADAPTERS
    init: str | None = None
    threshold_average: str | None = None
    loftq_mappings: str | None = None
    count_adapters: bool = False
    correction_rank: int = 0
    correction_bits: int = 4
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    pins: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    guided: int = 0
    statistics: str = "full"
    tune: str = "none"
    tune_steps: int = TuneBlocks.steps
    tune_model_steps: int = TuneModel.steps
    tune_batch_tokens: int = TuneBlocks.batch_tokens
    calibration_tokens: int = 16384
    context: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_values(self)
        settled: dict[str, Any] = {
            name: patterns(name, getattr(self, name))
            for name in ("include", "ignore", "targets", "train")
        }
        if self.layouts not in (None, "auto"):
            settled["layouts"] = tuple(dict.fromkeys(patterns("layouts", self.layouts)))
        if self.widths is not None:
            settled["widths"] = tuple(sorted(set(self.widths)))
        if self.rank == "auto":
            settled["count_adapters"] = True
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        check_together(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from JSON-like data. Raises RecipeError for an unknown key."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise RecipeError(f"a recipe has no field {key!r}; {nearest(key, sorted(known))}")
        if "bit_budget" not in data:
            raise RecipeError("a recipe needs bit_budget, bits per compressed weight")
        values = dict(data)
        for name in ("widths", "include", "ignore", "targets", "layouts", "train"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @property
    def is_paper(self) -> bool:
        return self.preset == "lowra"

    @property
    def candidate_widths(self) -> tuple[float, ...]:
        """Widths the planner may choose from, pinned ones included.

        The paper drops 1 bit from 2.0 bits up (footnote 4); the default adds 1.6 bits
        below 2.6 and 8 bits above 4.1.
        """
        if self.widths is not None:
            base = self.widths
        elif self.is_paper:
            base = (2, 4) if self.bit_budget >= 2 else (1, 2, 4)
        else:
            base = (1, 2, 3, 4, *((8,) if self.bit_budget > 4.1 else ()))
            base = (*base, *((TERNARY,) if self.bit_budget < TERNARY_BELOW else ()))
        return tuple(sorted({*base, *self.pins.values()}))

    @property
    def layout(self) -> Layout:
        """How scales and codebooks are stored; where layouts are chosen, the first candidate."""
        if self.layouts is not None:
            return self.candidate_layouts[0]
        group, shared = (64, False) if self.is_paper else (-1, True)
        group = group if self.group is None else self.group
        shared = shared if self.shared_codebooks is None else self.shared_codebooks
        scales = 16 if self.is_paper or group == 0 else 8
        compact = Compact(self.scale_bits or scales, self.codebook_bits or 16)
        shared = shared and group != 0
        trellis = shared and not self.is_paper if self.trellis is None else self.trellis
        return Layout(group, shared, compact, trellis)

    @property
    def candidate_layouts(self) -> tuple[Layout, ...]:
        """Layouts that the planner may choose from; one where there is nothing to choose."""
        if self.layouts is None:
            return (self.layout,)
        texts = AUTO_LAYOUTS if self.layouts == "auto" else self.layouts
        return tuple(map(Layout.parse, texts))

    @property
    def fixed_rank(self) -> int:
        """The rank of every site; 0 where the planner chooses."""
        return self.rank if isinstance(self.rank, int) else 0

    @property
    def largest_rank(self) -> int:
        """The largest rank that a site can get."""
        return max(self.usual_rank, *self.rank_pattern.values(), 0)

    def rank_of(self, site: str) -> int:
        """The rank that the recipe asks for at a site, by the site's name."""
        return rank_of(site, self.usual_rank, self.targets, tuple(self.rank_pattern.items()))

    @property
    def usual_rank(self) -> int:
        """The rank of sites that no pattern names; the largest where the planner chooses."""
        return self.rank if isinstance(self.rank, int) else max(RANKS)

    @property
    def prefix(self) -> float:
        """The share of the quantized prefix's error that sites make up for; none where that would
        need the full Gram matrices that the recipe does without."""
        return 0.0 if self.is_paper or self.statistics == "diagonal" else PREFIX

    @property
    def data_free(self) -> bool:
        """True when the recipe looks at no activations."""
        return self.is_paper

    def passes(self, replay: bool = False) -> tuple[Pass, ...]:
        """The pipeline this recipe stands for; `replay`: with the widths of an earlier plan."""
        return passes_of(self, replay)

    def assignment(self) -> AssignPrecision:
        """The assign-precision pass of this recipe."""
        return assignment_of(self)
