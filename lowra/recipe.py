"""Recipe: everything a user decides about a compile, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowra.compiler.compact import CODEBOOK_BITS, SCALE_BITS, Compact
from lowra.compiler.errors import RecipeError, nearest
from lowra.compiler.packing import TERNARY, WIDTHS
from lowra.compiler.pipeline import Pass
from lowra.passes import (
    AssignPrecision,
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
from lowra.passes.correct_weights import CORRECTION_BITS
from lowra.passes.paper_mappings import AVERAGES
from lowra.recipe_checks import check_budget, check_choice, check_whole, is_positive, patterns

PRESETS = ("default", "lowra")
RANKS = (0, 4, 8, 16, 32)
"""LoRA ranks that rank="auto" chooses from."""

UNITS = ("row", "layer", "siblings")
INITS = ("closed-form", "two-sided", "alternate", "loftq", "zero")
MAPPINGS = ("kept", "relearned")
PREFIX = 0.3
"""Share of the quantized prefix's error that a site makes up for (decision 10)."""
TERNARY_BELOW = 2.6
"""Budget from which ternary rows save the default nothing worth their fitting (decision 8)."""
TUNES = ("none", "blocks", "full")
GUIDED = (0, 1, 2, 4)
"""Groups of rows that each have a metric of their own."""
STATISTICS = ("full", "diagonal")
SIZES = (
    "calibration_tokens", "context", "tune_steps", "tune_model_steps", "tune_batch_tokens",
)  # fmt: skip
"""Fields that are whole numbers of one or more."""


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
    rank, alpha: LoRA rank (0 for no adapter) and alpha; init: "closed-form", "two-sided"
        (rows weighted by sensitivity), "alternate" (the base quantized anew in turn), "loftq" or
        "zero". rank "auto" chooses 0, 4, 8, 16 or 32 per site, paid from the budget in competition
        with row widths (see lowra/passes/rank_options.py).
    correction_rank, correction_bits: a frozen low-rank correction beside every packed weight, its
        factors at 4 or 8 bits per value; counted in stored bits. Rank 0 for none.
    threshold_average: (preset "lowra") what the paper's thresholds are averaged over, which its
        text leaves open: "iterations" (the default), "channels" or "none".
    loftq_mappings: (preset "lowra") its mappings and thresholds are "kept" over LoftQ's
        alternations (the default) or "relearned" in each.
    count_adapters: LoRA factors, at 16 bit, count towards the budget.
    include, ignore: patterns (globs, or regular expressions after `re:`) of weights compressed
        although skipped by default (the head), or left alone. pins: {pattern: width}.
    tune: "none"; "blocks", learned rounding of the codes, block by block; or "full", and then
        end to end: codebooks, scales and norms, and behind them the adapter on the frozen base
        (but for init="zero"). Minutes where the rest takes seconds; needs calibration.
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
    rank: int | str = 16
    alpha: float | None = None
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
        check_budget(self.bit_budget)
        check_choice("preset", self.preset, PRESETS)
        check_choice("unit", self.unit, UNITS)
        for name, choices in (
            ("init", INITS), ("threshold_average", AVERAGES), ("loftq_mappings", MAPPINGS),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), choices)
        check_choice("tune", self.tune, TUNES)
        check_choice("statistics", self.statistics, STATISTICS)
        self._check_auto_rank()
        for name in ("rank", "correction_rank", "seed", *SIZES):
            if (name, self.rank) != ("rank", "auto"):
                check_whole(name, getattr(self, name), 1 if name in SIZES else 0)
        for name in ("include", "ignore"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        self._check_types()
        self._check_widths()
        self._check_layout()
        self._check_tuning()
        self._check_guided()
        bits = self.correction_bits
        if type(bits) is not int or bits not in CORRECTION_BITS:
            raise RecipeError(f"correction_bits={bits!r} must be 4 or 8")

    def _check_auto_rank(self) -> None:
        if isinstance(self.rank, str) and self.rank != "auto":
            raise RecipeError(f"rank={self.rank!r} must be a whole number of 0 or more, or 'auto'")
        if self.rank == "auto":
            object.__setattr__(self, "count_adapters", True)

    def _check_types(self) -> None:
        for name in ("rotation", "shared_codebooks", "count_adapters"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise RecipeError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.alpha is not None and not is_positive(self.alpha):
            raise RecipeError(f"alpha={self.alpha!r} must be a positive number")
        if isinstance(self.seed, int) and self.seed >= 1 << 63:
            raise RecipeError(f"seed={self.seed} must be below 2^63")
        if self.widths is not None and not isinstance(self.widths, (tuple, list)):
            raise RecipeError(f"widths={self.widths!r} must be a tuple such as (1, 1.6, 2, 3, 4)")
        if not isinstance(self.pins, Mapping):
            raise RecipeError(f"pins={self.pins!r} must map patterns to widths")
        if not all(isinstance(pattern, str) for pattern in self.pins):
            raise RecipeError(f"pins={self.pins!r}: a pattern is not a string")

    def _check_widths(self) -> None:
        for width in (*(self.widths or ()), *self.pins.values()):
            if (type(width), width) not in [(type(legal), legal) for legal in WIDTHS]:
                raise RecipeError(f"width {width!r} is not one of {', '.join(map(str, WIDTHS))}")
        if self.widths is None:
            return
        object.__setattr__(self, "widths", tuple(sorted(set(self.widths))))
        if not self.widths:
            raise RecipeError("widths is empty; name at least one")

    def _check_layout(self) -> None:
        if self.group is not None and (type(self.group) is not int or self.group < -1):
            raise RecipeError(f"group={self.group!r} must be -1 (per row), 0 (none) or positive")
        for name, legal in (("scale_bits", SCALE_BITS), ("codebook_bits", CODEBOOK_BITS)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value not in legal):
                raise RecipeError(f"{name}={value!r} is not one of {', '.join(map(str, legal))}")
        if self.shared_codebooks and self.group == 0:
            raise RecipeError("shared_codebooks needs scales: use group=-1 or a group size")
        fixed = {
            "unit": self.unit != "row", "pins": bool(self.pins), "group": self.group == 0,
            "shared_codebooks": self.shared_codebooks, "count_adapters": self.count_adapters,
            "correction_rank": self.correction_rank > 0, "tune": self.tune != "none",
            "guided": self.guided != 0, "statistics": self.statistics != "full",
            "widths": TERNARY in (self.widths or ()),
            "scale_bits": self.scale_bits not in (None, 16),
            "codebook_bits": self.codebook_bits not in (None, 16),
        }  # fmt: skip
        for name in ("threshold_average", "loftq_mappings"):
            if not self.is_paper and getattr(self, name) is not None:
                raise RecipeError(f"{name}={getattr(self, name)!r} needs preset='lowra'")
        changed = [name for name, differs in fixed.items() if differs]
        if self.is_paper and changed:
            raise RecipeError(
                f"{changed[0]}={getattr(self, changed[0])!r} is not part of preset 'lowra', "
                "which is the paper to the letter; use preset 'default'"
            )

    def _check_tuning(self) -> None:
        for name, quantizes in self._quantizing_anew().items():
            if quantizes and self.tune != "none":
                raise RecipeError(
                    f"{name}={getattr(self, name)!r} quantizes anew what tune={self.tune!r} has "
                    "tuned; leave one of them out"
                )

    def _check_guided(self) -> None:
        if type(self.guided) is not int or self.guided not in GUIDED:
            raise RecipeError(f"guided={self.guided!r} is not one of {', '.join(map(str, GUIDED))}")
        if not self.guided:
            return
        if self.statistics != "full":
            raise RecipeError(f"guided={self.guided} needs statistics='full'")
        for name, quantizes in self._quantizing_anew().items():
            if quantizes:
                raise RecipeError(
                    f"{name}={getattr(self, name)!r} quantizes anew, in the plain metric, what "
                    f"guided={self.guided} has quantized; leave one of them out"
                )

    def _quantizing_anew(self) -> dict[str, bool]:
        """Options, and whether they quantize what quantize-weights has quantized already."""
        return {
            "correction_rank": self.correction_rank > 0,
            "init": self.init in ("alternate", "loftq"),
        }

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
        for name in ("widths", "include", "ignore"):
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
    def layout(self) -> tuple[int, bool]:
        """Scale group and whether codebooks are shared."""
        group, shared = (64, False) if self.is_paper else (-1, True)
        group = group if self.group is None else self.group
        shared = shared if self.shared_codebooks is None else self.shared_codebooks
        return group, shared and group != 0

    @property
    def compact(self) -> Compact:
        """In how many bits scales and codebook values are stored."""
        scales = 16 if self.is_paper or self.layout[0] == 0 else 8
        return Compact(self.scale_bits or scales, self.codebook_bits or 16)

    @property
    def fixed_rank(self) -> int:
        """The rank of every site; 0 where the planner chooses."""
        return self.rank if isinstance(self.rank, int) else 0

    @property
    def largest_rank(self) -> int:
        """The largest rank that a site can get."""
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
        group, shared = self.layout
        rule = "paper" if self.is_paper else "default"
        init = self.init or ("loftq" if self.is_paper else "closed-form")
        average = self.threshold_average or AVERAGES[0]
        steps: list[Pass] = [
            NormalizeLinears(include=self.include, ignore=self.ignore),
            CollectStatistics(gram=self.statistics),
            *(() if self.is_paper else (MeasureSensitivity(groups=self.guided),)),
            self.rotate_inputs(),
            FitCodebooks(
                widths=self.candidate_widths,
                group=group,
                shared=shared,
                rule=rule,
                threshold_average=average,
                scale_bits=self.compact.scale_bits,
                codebook_bits=self.compact.codebook_bits,
            ),  # fmt: skip
            *self._precision(replay),
            QuantizeWeights(feedback=not self.is_paper, prefix=self.prefix),
            *self.tuning(),
        ]
        if self.correction_rank:
            steps.append(CorrectWeights(rank=self.correction_rank, bits=self.correction_bits))
        if rank := self.largest_rank:
            alpha = float(rank if self.alpha is None else self.alpha)
            relearn = self.loftq_mappings == "relearned"
            steps.append(
                InitializeAdapters(
                    rank=rank, alpha=alpha, rule=init, seed=self.seed, relearn=relearn,
                    threshold_average=average,
                )
            )  # fmt: skip
            if self.tune == "full" and init != "zero":
                tokens, seed = self.tune_batch_tokens, self.seed
                steps.append(TuneAdapters(self.tune_model_steps, tokens, seed=seed))
        return (*steps, RewriteLinears())

    def rotate_inputs(self) -> RotateInputs:
        """The rotate-inputs pass of this recipe."""
        if self.rotation is None and not self.is_paper:
            group, shared = self.layout
            return RotateInputs(seed=self.seed, rule="measured", group=group, shared=shared)
        return RotateInputs(seed=self.seed, rule="always" if self.rotation else "never")

    def tuning(self) -> tuple[Pass, ...]:
        """The tuning passes of this recipe, if any."""
        tokens, seed = self.tune_batch_tokens, self.seed
        blocks = TuneBlocks(steps=self.tune_steps, batch_tokens=tokens, seed=seed)
        model = TuneModel(steps=self.tune_model_steps, batch_tokens=tokens, seed=seed)
        return {"none": (), "blocks": (blocks,), "full": (blocks, model)}[self.tune]

    def assignment(self) -> AssignPrecision:
        """The assign-precision pass of this recipe."""
        return AssignPrecision(
            budget=float(self.bit_budget),
            rule="paper" if self.is_paper else "default",
            unit=self.unit,
            pins=tuple(f"{pattern}={width}" for pattern, width in self.pins.items()),
            adapter_rank=self.fixed_rank if self.count_adapters else 0,
            ranks=RANKS if self.rank == "auto" else (),
            correction_rank=self.correction_rank,
            correction_bits=self.correction_bits,
        )

    def _precision(self, replay: bool) -> tuple[Pass, ...]:
        """What decides widths: an earlier plan, the paper, or a plan held against uniform ones."""
        rank = self.fixed_rank if self.count_adapters else 0
        counted = (rank, self.correction_rank, self.correction_bits)
        if replay:
            budget = 0.0 if self.is_paper else float(self.bit_budget)
            return (ReplayPrecision(budget, *counted),)
        if self.is_paper or self.pins or self.rank == "auto":
            return (self.assignment(),)
        return (self.assignment(), CompareUniform(float(self.bit_budget), *counted))
