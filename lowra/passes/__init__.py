"""One pass per file; PASSES is the whole list, by name.

What passes share lies in `rounding`, `budget` and `tuning`.
"""

from __future__ import annotations

from lowra.compiler.pipeline import Pass
from lowra.passes.assign_precision import AssignPrecision
from lowra.passes.choose_layouts import ChooseLayouts
from lowra.passes.collect_statistics import CollectStatistics
from lowra.passes.compare_uniform import CompareUniform
from lowra.passes.correct_weights import CorrectWeights
from lowra.passes.fit_codebooks import FitCodebooks
from lowra.passes.initialize_adapters import InitializeAdapters
from lowra.passes.measure_sensitivity import MeasureSensitivity
from lowra.passes.normalize_linears import NormalizeLinears
from lowra.passes.quantize_adapters import QuantizeAdapters
from lowra.passes.quantize_weights import QuantizeWeights
from lowra.passes.replay_precision import ReplayPrecision
from lowra.passes.rewrite_linears import RewriteLinears
from lowra.passes.rotate_inputs import RotateInputs
from lowra.passes.tune_adapters import TuneAdapters
from lowra.passes.tune_blocks import TuneBlocks
from lowra.passes.tune_model import TuneModel

PASSES: tuple[type[Pass], ...] = (
    NormalizeLinears,
    RotateInputs,
    CollectStatistics,
    MeasureSensitivity,
    FitCodebooks,
    ChooseLayouts,
    AssignPrecision,
    ReplayPrecision,
    CompareUniform,
    QuantizeWeights,
    TuneBlocks,
    TuneModel,
    CorrectWeights,
    InitializeAdapters,
    TuneAdapters,
    QuantizeAdapters,
    RewriteLinears,
)

__all__ = ["PASSES", *(kind.__name__ for kind in PASSES)]
