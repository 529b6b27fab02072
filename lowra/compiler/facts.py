"""Facts: what passes learn about a site. Frozen, typed, held beside the graph.

`lowra.compiler.rotation.Rotation` is a fact too, and so is `lowra.compiler.layout.Layout`, where
layouts were chosen. Letters: n output features, k input features, r rank, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowra.compiler.compact import PLAIN, Compact
from lowra.compiler.layout import Layout
from lowra.compiler.packing import width_of
from lowra.compiler.storage import PackedWeight

if TYPE_CHECKING:
    from pathlib import Path

    from lowra.compiler.spill import StoredTensor


@dataclass(frozen=True)
class Statistics:
    """Second moments of a site's input x [k]: gram = mean of x x' over calibration tokens.

    `gram` is float32 [k, k] in original input coordinates, kept on disk, or [k] where only its
    diagonal was collected; None means data-free (the identity is used). Sites that share an input
    share the gram. `sensitivity` is float32 [n]: per output row, the mean over tokens of the
    squared gradient of the model's loss (in nats per token); None where there is no such loss.
    """

    gram: StoredTensor | None
    tokens: int = 0
    sensitivity: StoredTensor | None = None

    def load(self, k: int) -> Tensor:
        """float32 [k, k]."""
        if self.gram is None:
            return torch.eye(k)
        gram = self.gram.load()
        return torch.diag(gram) if gram.dim() == 1 else gram


@dataclass(frozen=True)
class TokenWeights:
    """How much the model's loss minds an error at each calibration token, per group of rows.

    A site's rows fall into `groups` of consecutive ones
    (lowra.passes.rounding.guidance.row_groups). `weights` is float32 [groups, tokens], kept on
    disk, of mean one in each group, the tokens in the order in which the calibration batches
    flatten. `effective` is the least of the groups' effective sample sizes (sum w)^2 / sum w^2: a
    Gram matrix under such weights is as noisy as one of so many tokens.
    """

    weights: StoredTensor
    groups: int
    effective: float


@dataclass(frozen=True)
class Prefix:
    """A site's input behind the quantized prefix: x^ where the original model has x.

    `gram` is the mean of x^ x^', `drift` of (x - x^) x^', over calibration tokens; both float32
    [k, k] in original input coordinates, kept on disk. The weight that comes closest to W x when
    it is given x^ is W + W drift gram^-1; the site was quantized for W + share W drift gram^-1.
    """

    gram: StoredTensor
    drift: StoredTensor
    share: float


@dataclass(frozen=True)
class RotationTrial:
    """What the input of a site loses in either coordinates, where a rotation was left to measure.

    losses: by rotation block (1 is none), the share of the output energy that a sample of rows of
    all sites on this input loses at 2 bits, rows weighted as in Codebooks.
    """

    losses: Mapping[int, float]

    @property
    def best(self) -> int:
        """The block that loses least; of equal ones the smallest, which costs least to run."""
        return min(self.losses, key=lambda block: (self.losses[block], block))


@dataclass(frozen=True)
class Codebooks:
    """Levels, scales and expected loss of every row at every candidate width.

    levels[b]: float32 [n, 2^b] per row, or [2^b] where `shared`; 3 values for b = 1.6, twice as
        many for trellis codes; ascending.
    scales[b]: float32 [n, groups] or None where the levels carry the scale.
    absmax: scales are the largest magnitude of their group, and follow the weight (QLoRA, LowRA).
    thresholds[b]: float32 [n, 2^b - 1], ascending: plain rounding sends values between two of them
        to one level. None for the middles between levels. Not stored: codes and levels suffice.
    compact: in how many bits scales and levels are stored; both are rounded to it already.
    span: float16 [2], the grid of compact scales per row, the same at every width.
    trellis: rows of 1, 2 and 3 bits are trellis codes.
    loss: float64 [n, len(widths)], expected cost of rounding the row (see fit-codebooks).
    """

    widths: tuple[float, ...]
    levels: Mapping[float, Tensor]
    scales: Mapping[float, Tensor] | None
    loss: Tensor
    group: int
    shared: bool
    absmax: bool = False
    thresholds: Mapping[float, Tensor] | None = None
    compact: Compact = PLAIN
    span: Tensor | None = None
    trellis: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.group, self.shared, self.compact, self.trellis)

    @property
    def ids(self) -> tuple[int, ...]:
        """The width ids of rows of `widths`."""
        return tuple(map(self.layout.width_id, self.widths))


@dataclass(frozen=True)
class LayoutFits:
    """Codebooks of a site in every layout that it may be stored in, kept on disk.

    choose-layouts makes one of them the site's Codebooks (lowra.passes.rounding.stored_books reads
    them).
    """

    widths: tuple[float, ...]
    files: Mapping[Layout, Path]


@dataclass(frozen=True)
class Precision:
    """Width of each row, by its id (lowra.compiler.packing.FORMATS): uint8 [n]."""

    row_widths: Tensor

    def histogram(self) -> dict[float, int]:
        """Rows per width, narrowest first."""
        ids, counts = self.row_widths.unique(return_counts=True)
        rows = {width_of(int(id)): int(c) for id, c in zip(ids, counts, strict=True)}
        return dict(sorted(rows.items()))


@dataclass(frozen=True)
class Proof:
    """How good an assignment is as a whole: its bits, and its loss in the units of Codebooks.

    bound: no assignment within the budget loses less; None where nothing was proven.
    price: the expected loss that one more bit of budget would save.
    """

    loss: float
    bits: int
    budget: int
    bound: float | None = None
    price: float | None = None

    @property
    def gap(self) -> float | None:
        """The part of the loss that a perfect assignment might save."""
        if self.bound is None:
            return None
        return (self.loss - self.bound) / self.loss if self.loss else 0.0


@dataclass(frozen=True)
class Comparison:
    """How far two plans take the model on held-out tokens: the planner's, and `width` for all rows.

    In nats per token of KL from the original model, or, for a model without next-token logits, in
    relative squared error of its output. The plan with the smaller number was kept.
    """

    width: float
    mixed: float
    uniform: float


@dataclass(frozen=True)
class Assigned:
    """The expected loss of a site at its widths, and the proof and comparison all sites share."""

    loss: float
    proof: Proof
    comparison: Comparison | None = None


@dataclass(frozen=True)
class AdapterRank:
    """The LoRA rank that the planner chose for a site; 0 for no adapter."""

    rank: int


@dataclass(frozen=True)
class Packed:
    """The stored weight, its relative output error tr(E G E') / tr(W G W'), and tr(W G W')."""

    weight: PackedWeight
    error: float
    energy: float


@dataclass(frozen=True)
class BlockTuning:
    """The held-out error of a site's block before and after tuning, relative to the energy of the
    block's output."""

    block: str
    before: float
    after: float


@dataclass(frozen=True)
class ModelTuning:
    """The held-out KL(original || model) before and after tuning, in nats per token."""

    before: float
    after: float


@dataclass(frozen=True)
class AdapterTuning:
    """The held-out KL(original || model with its adapter) before and after the adapter's tuning, in
    nats per token."""

    before: float
    after: float


@dataclass(frozen=True)
class Adapter:
    """LoRA factors in original input coordinates: A [r, k], B [n, r]; y += scaling * B A x.

    `error` is the relative output error of base plus adapter.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    error: float

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]


Fact = object
"""Any of the classes above, Rotation, or Layout; a site holds at most one of each."""
