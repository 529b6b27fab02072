"""fit-codebooks: levels, scales and expected loss of every row at every candidate width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.compact import PLAIN, Compact, round_levels, round_scales, span_of
from lowra.compiler.errors import RecipeError, WeightError
from lowra.compiler.facts import Codebooks, LayoutFits, Statistics
from lowra.compiler.layout import Layout
from lowra.compiler.packing import FORMATS, trellis_runs
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import NO_SCALES, ROW_SCALES
from lowra.passes.rounding.feedback import feedback_codes, nearest_codes, scale_index
from lowra.passes.rounding.lloyd import Fit, fit_rows_globally, fit_shared, gaussian_levels
from lowra.passes.rounding.moments import InputMoments, MomentsReader, output_error
from lowra.passes.rounding.paper_mappings import block_absmax, learn_mapping
from lowra.passes.rounding.quantizer import row_tables, rows_of
from lowra.passes.rounding.refine import Rounded
from lowra.passes.rounding.stored_books import books_from, flat_books
from lowra.passes.rounding.trellis_fit import fit_trellis

SAMPLED_ROWS = 48
"""Rows per site whose error feedback is measured to correct the expected loss."""


@dataclass(frozen=True)
class FitCodebooks(Pass):
    """Fit codebooks by weighted Lloyd for each of `widths`.

    group: 0 puts the scale into a codebook per row, -1 is one scale per row, else columns per
    scale. shared: the rows of a site share one codebook per width (needs scales).
    rule "default": Lloyd to convergence, each column weighted by its conditional input variance
    (what a rounding error costs under error feedback), codebooks and group scales refit in turn.
    rule "paper": LowRA (ICML 2025, section 5): absmax scales, start at NormalFloat, weight absmax,
    2 iterations, blind to inputs; `threshold_average` says what its thresholds are averaged over
    (see `learn_mapping`).
    trellis: rows of 1, 2 and 3 bits are trellis codes (lowra.compiler.trellis), over shared
    codebooks; their group scales are those of plain rounding, not refit.
    scale_bits, codebook_bits: in what scales (16, 8, 4) and levels (16, 8) are stored; both are
    rounded to it here, so that every later choice sees what the file will hold.
    layouts: fit each of these layouts (lowra.compiler.layout) instead, for choose-layouts to pick
    one per site, and leave LayoutFits; until it does, the first stands. A site that has a Layout
    already, from a plan, is fitted in that one alone.
    `loss` is the expected rise of the model's loss where sensitivities are known, else the share of
    the site's output energy that is lost ("paper": squared weight error, as its section 6 counts).
    """

    name: ClassVar[str] = "fit-codebooks"
    reads: ClassVar = (Rotation, Statistics)
    writes: ClassVar = (Codebooks,)
    widths: tuple[float, ...] = (1, 2, 3, 4)
    group: int = ROW_SCALES
    shared: bool = True
    rule: str = "default"
    threshold_average: str = "iterations"
    scale_bits: int = 16
    codebook_bits: int = 16
    trellis: bool = False
    layouts: tuple[str, ...] = ()

    def run(self, program: Program) -> Program:
        if self.group == NO_SCALES and (self.shared or self.rule == "paper"):
            raise RecipeError("group=0 stores no scales: it needs shared=false and rule=default")
        if self.rule == "paper" and self._compact != PLAIN:
            raise RecipeError("rule=paper stores scales and codebooks in 16 bits")
        if self.rule == "paper" and self.layouts:
            raise RecipeError("rule=paper has one layout: leave layouts out")
        if self.trellis and (self.rule == "paper" or not self.shared):
            raise RecipeError("trellis codes need shared codebooks and rule=default")
        facts: dict[str, list[object]] = {}
        moments = MomentsReader(program)
        with stage("codebooks", len(program.sites)) as bar:
            for site in program.sites:
                facts[site.name] = self._site(program, site, moments)
                bar.advance()
        return program.with_facts(facts)

    def _site(self, program: Program, site: Site, moments: MomentsReader) -> list[object]:
        """The codebooks of a site, and where several layouts were fitted, where they are kept."""
        planned = program.find(site.name, Layout)
        if planned is not None:
            return [self._in(planned)._kept(program, site, moments)]
        if not self.layouts:
            return [self._kept(program, site, moments)]
        steps = {layout: self._in(layout) for layout in map(Layout.parse, self.layouts)}
        books = [step._kept(program, site, moments) for step in steps.values()]
        files = {layout: program.spill.path(*step._key(program, site))
                 for layout, step in steps.items()}  # fmt: skip
        return [books[0], LayoutFits(self.widths, files)]

    def _in(self, layout: Layout) -> FitCodebooks:
        """This pass for one layout."""
        return replace(
            self, layouts=(), group=layout.group, shared=layout.shared,
            scale_bits=layout.compact.scale_bits, codebook_bits=layout.compact.codebook_bits,
            trellis=layout.trellis,
        )  # fmt: skip

    def _kept(self, program: Program, site: Site, moments: MomentsReader) -> Codebooks:
        """The fit of a site, from the spill folder where an earlier compile left it."""
        stored = program.spill.tensors(
            self._key(program, site), lambda: flat_books(self._fit(program, site, moments))
        )
        return books_from(stored, self.widths, self._layout, absmax=self.rule == "paper")

    def _key(self, program: Program, site: Site) -> tuple[str, ...]:
        """What the fit of a site depends on."""
        statistics = program.fact(site.name, Statistics)
        sources = (str(s and s.path.name) for s in (statistics.gram, statistics.sensitivity))
        rotation = str(program.fact(site.name, Rotation))
        return (repr(self), program.fingerprint, rotation, *sources, site.name)

    @property
    def _layout(self) -> Layout:
        shared = self.shared and self.rule != "paper"
        return Layout(self.group, shared, self._compact, self.trellis)

    @property
    def _compact(self) -> Compact:
        return Compact(self.scale_bits, self.codebook_bits)

    def _fit(self, program: Program, site: Site, reader: MomentsReader) -> Codebooks:
        rotation = program.fact(site.name, Rotation)
        weight = rotate(program.weight(site), rotation)
        if self.rule == "paper":
            return self._paper(weight)
        moments = reader.read(site)
        books = self.fitted(weight, moments.factor.conditional_variance(), site)
        ratio = _measured_over_expected(weight, moments, books)
        cost = row_weight(program.fact(site.name, Statistics), weight, moments.gram)
        return replace(books, loss=books.loss * ratio * cost)

    def fitted(self, weight: Tensor, variance: Tensor, site: Site) -> Codebooks:
        """Codebooks of float32 [n, k], given with the weight of each column [k].

        The loss is the weighted squared error of each row, rounded on its own.
        """
        levels: dict[float, Tensor] = {}
        scales: dict[float, Tensor] = {}
        losses: list[Tensor] = []
        start = self._first_scales(weight)
        values = _normalized(weight, variance, start, self.group)
        fits = self._lloyd(*values)
        for width, first in zip(self.widths, fits, strict=True):
            if self._on_trellis(width):
                first = fit_trellis(*values, first)
            fit, scale = self._with_scales(first, weight, variance, start, self._on_trellis(width))
            levels[width] = round_levels(_half(fit.levels, site), self._compact)
            scales[width] = _half(scale, site)
            losses.append(fit.loss)
        span = None
        if self.scale_bits < 16 and self.group == ROW_SCALES:
            span = span_of(torch.cat([*scales.values()]))
        scales = {b: round_scales(scale, self._compact, span) for b, scale in scales.items()}
        return Codebooks(
            self.widths, levels, None if self.group == NO_SCALES else scales,
            torch.stack(losses, dim=1), self.group, self.shared, compact=self._compact, span=span,
            trellis=self.trellis,
        )  # fmt: skip

    def _on_trellis(self, width: float) -> bool:
        return FORMATS[self._layout.width_id(width)].trellis

    def _first_scales(self, weight: Tensor) -> Tensor:
        """float32 [n, groups]: root mean square of the group; ones where nothing is scaled."""
        if self.group in (NO_SCALES, ROW_SCALES):
            return torch.ones(weight.shape[0], 1)
        index = scale_index(weight.shape[1], self.group)
        count = torch.bincount(index).float()
        square = torch.zeros(weight.shape[0], len(count)).index_add_(1, index, weight**2)
        return (square / count).sqrt().clamp_min(1e-12)

    def _lloyd(self, values: Tensor, weights: Tensor) -> list[Fit]:
        """A fit per width, from the levels of a normal distribution of the row's spread."""
        widths = [width + self._on_trellis(width) for width in self.widths]
        starts = [gaussian_levels(width) for width in widths]
        if self.shared:
            return fit_shared(values, weights, starts)
        mass = weights.double().expand_as(values).sum(1, keepdim=True).clamp_min(1e-300)
        energy = (values.double() ** 2 * weights).sum(1, keepdim=True)
        return fit_rows_globally(
            values, weights, [start * (energy / mass).sqrt() for start in starts]
        )

    def _with_scales(
        self, fit: Fit, weight: Tensor, variance: Tensor, scales: Tensor, on_trellis: bool
    ) -> tuple[Fit, Tensor]:
        """A fit of `weight` over `scales`, and the scales to store with it."""
        if self.group in (NO_SCALES, ROW_SCALES):
            return fit, fit.scale.float().unsqueeze(1)
        scales = scales * fit.scale.float().unsqueeze(1)
        if on_trellis:
            return fit, scales
        return self._refit_groups(weight, variance, fit, scales)

    def _refit_groups(
        self, weight: Tensor, variance: Tensor, fit: Fit, scales: Tensor
    ) -> tuple[Fit, Tensor]:
        """Alternate group scales (closed form) and codebooks twice; keep only what lowers loss."""
        best = fit, scales
        index = scale_index(weight.shape[1], self.group)
        for _ in range(2):
            levels = best[0].levels.float().expand(weight.shape[0], -1)
            middle = ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous()
            normal = weight / best[1][:, index]
            value = levels.gather(1, torch.searchsorted(middle, normal))
            above = torch.zeros_like(scales).index_add_(1, index, variance * weight * value)
            below = torch.zeros_like(scales).index_add_(1, index, variance * value**2)
            new = torch.where(below > 0, above / below.clamp_min(1e-30), best[1]).clamp_min(1e-12)
            values = _normalized(weight, variance, new, self.group)
            fit = (fit_shared if self.shared else fit_rows_globally)(*values, [best[0].levels])[0]
            if float(fit.loss.sum()) >= float(best[0].loss.sum()):
                break
            best = fit, new * fit.scale.float().unsqueeze(1)
        return best

    def _paper(self, weight: Tensor) -> Codebooks:
        return paper_codebooks(weight, self.widths, self.group, self.threshold_average)


def paper_codebooks(
    weight: Tensor, widths: tuple[float, ...], group: int, threshold_average: str
) -> Codebooks:
    """LowRA's mappings, thresholds and absmax scales of float32 [n, k], and each row's MSE."""
    scales = block_absmax(weight, group)
    absmax = torch.where(scales == 0, 1.0, scales)[:, scale_index(weight.shape[1], group)]
    stored = scales.half().float()
    levels: dict[float, Tensor] = {}
    thresholds: dict[float, Tensor] = {}
    losses: list[Tensor] = []
    for width in widths:
        mapping = learn_mapping(weight / absmax, absmax, width, threshold_average)
        levels[width] = mapping.levels.half().float()
        thresholds[width] = mapping.thresholds.float().contiguous()
        codes = nearest_codes(weight, levels[width], stored, group, thresholds[width])
        state = Rounded(codes, levels[width], stored, group)
        losses.append(((weight - state.values()).double() ** 2).mean(1))
    return Codebooks(
        widths, levels, dict.fromkeys(widths, stored), torch.stack(losses, dim=1), group,
        shared=False, absmax=True, thresholds=thresholds,
    )  # fmt: skip


def row_weight(statistics: Statistics, weight: Tensor, gram: Tensor) -> Tensor:
    """What a unit of output error of each row costs: float64 [n, 1].

    Half the row's sensitivity, in nats per token; without one, the same for all rows of the site,
    so that a site counts by the share of its output energy that is lost.
    """
    if statistics.sensitivity is not None:
        return statistics.sensitivity.load().double().unsqueeze(1) / 2
    energy = output_error(weight, gram) or 1.0
    return torch.full((weight.shape[0], 1), 1 / energy, dtype=torch.float64)


def _measured_over_expected(weight: Tensor, moments: InputMoments, books: Codebooks) -> Tensor:
    """Per width, the output error of a sample of rows after error feedback over the expected one.

    Feedback pushes weights outwards, which costs little at 4 bits and twice the expected loss at
    1 bit. The sampled rows run once for all widths, in one sweep over the columns.
    """
    n, count = weight.shape[0], len(books.widths)
    rows = torch.linspace(0, n - 1, min(n, SAMPLED_ROWS)).round().long().unique()
    ids = torch.tensor(books.ids, dtype=torch.uint8).repeat_interleave(len(rows))
    every = rows_of(books, rows.repeat(count))
    target = weight[rows].repeat(count, 1)
    tables, scales = row_tables(every, ids)
    codes = feedback_codes(target, moments.factor, tables, scales, books.group, trellis_runs(ids))
    value = tables.gather(1, codes)
    if scales is not None:
        value = value * scales[:, scale_index(weight.shape[1], books.group)]
    error = target - value
    measured = ((error @ moments.gram) * error).sum(1).view(count, -1).sum(1).double()
    expected = books.loss[rows].sum(0)
    return torch.where(expected > 0, measured / expected.clamp_min(1e-300), 1.0)


def _normalized(
    weight: Tensor, variance: Tensor, scales: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """Values w / s, and their weights variance * s^2, so that losses are those of w."""
    if group in (NO_SCALES, ROW_SCALES):
        return weight, variance.unsqueeze(0)
    expanded = scales[:, scale_index(weight.shape[1], group)]
    return weight / expanded, variance * expanded**2


def _half(values: Tensor, site: Site) -> Tensor:
    """Rounded to what float16 stores, as float32. Raises WeightError beyond its range."""
    rounded = values.to(torch.float16).float()
    if not bool(torch.isfinite(rounded).all()):
        raise WeightError(
            f"{site.name}: a codebook value of {float(values.abs().max()):.3g} exceeds float16; "
            "leave this weight out with ignore="
        )
    return rounded
