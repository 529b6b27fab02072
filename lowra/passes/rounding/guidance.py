"""Moments of a site's input in which a token counts by how much the loss minds an error there.

GuidedQuant (arXiv 2505.07004): the rows of a site fall into groups J, and
H_J = mean over tokens t of w_t x_t x_t', with w_t = mean over j in J of g_tj^2 (raised to a power
that measure-sensitivity is given), is the metric in which the rows of J are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from lowra.compiler.dataflow import dataflow, inputs_of, live_after
from lowra.compiler.facts import TokenWeights
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate_gram
from lowra.compiler.spill import StoredTensor, write_tensors
from lowra.passes.rounding.activations import Moments, Runner, Values
from lowra.passes.rounding.moments import InputMoments, moments_behind, moments_of

Guides = Sequence[Callable[[], InputMoments]]
"""The metric of each group of rows, read when its turn comes: one is in memory at a time."""


def row_groups(n: int, groups: int) -> list[slice]:
    """`n` rows as at most `groups` runs of consecutive ones, none empty, as equal as they can be.

    Rows keep their order: in attention that makes groups of neighbouring heads.
    """
    count = min(n, groups)
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


@dataclass
class GuidedMoments:
    """Per group of rows, the weighted sums over batches that arrive in calibration order."""

    site: Site
    weights: Tensor
    """float32 [groups, tokens]."""
    grams: list[Moments] = field(default_factory=list[Moments])
    drifts: list[Moments] = field(default_factory=list[Moments])
    seen: int = 0

    def add(self, x: Tensor, lag: Tensor | None = None) -> None:
        """The next tokens' inputs x [..., k], and x of the original model less this one."""
        count = x[..., 0].numel()
        weights = self.weights[:, self.seen : self.seen + count]
        self.grams = self.grams or [Moments() for _ in weights]
        for gram, weight in zip(self.grams, weights, strict=True):
            gram.add_weighted(x, x, weight)
        if lag is not None:
            self.drifts = self.drifts or [Moments() for _ in weights]
            for drift, weight in zip(self.drifts, weights, strict=True):
                drift.add_weighted(lag, x, weight)
        self.seen += count

    def take(self) -> dict[str, Tensor]:
        """float32 [k, k] each: `site/gram.i` of group i, and `site/drift.i` where given."""
        parts = {"gram": self.grams, "drift": self.drifts}
        return {
            _key(self.site, role, index): moments.take_mean(self.site)
            for role, found in parts.items()
            for index, moments in enumerate(found)
        }


def _key(site: Site, role: str, index: int) -> str:
    return f"{site.name}/{role}.{index}"


def guided_moments(program: Program, sites: Sequence[Site]) -> list[GuidedMoments]:
    """Empty sums for the sites that have token weights."""
    facts = [(site, program.find(site.name, TokenWeights)) for site in sites]
    return [GuidedMoments(site, fact.weights.load()) for site, fact in facts if fact]


def guides_behind(program: Program, site: Site, source: StoredTensor, share: float) -> Guides:
    """The metrics of a site's groups behind a quantized prefix, from the file of its moments
    (`PrefixStream.moments`); none without token weights."""
    fact = program.find(site.name, TokenWeights)
    rotation = program.fact(site.name, Rotation)

    def read(index: int) -> InputMoments:
        gram, drift = (
            StoredTensor(source.path, _key(site, role, index)).load() for role in ("gram", "drift")
        )
        return moments_behind(gram, share * drift, rotation)

    return [] if fact is None else [partial(read, i) for i in range(fact.groups)]


def guides_alone(program: Program, sites: Sequence[Site]) -> dict[str, Guides]:
    """The metrics of the groups of each site that has token weights, for the original inputs.

    What the spill folder lacks is collected in one run of the original model, between two inputs
    of which only what later nodes read is kept.
    """
    facts = {s: fact for s in sites if (fact := program.find(s.name, TokenWeights))}
    paths = {
        site: program.spill.path("guided", fact.weights.path.name, site.name)
        for site, fact in facts.items()
    }
    missing = [site for site, path in paths.items() if not path.exists()]
    if missing:
        _collect(program, missing, lambda found: write_tensors(found.take(), paths[found.site]))

    def read(site: Site, index: int) -> InputMoments:
        gram = StoredTensor(paths[site], _key(site, "gram", index)).load()
        return moments_of(rotate_gram(gram, program.fact(site.name, Rotation)))

    return {
        site.name: [partial(read, site, i) for i in range(fact.groups)]
        for site, fact in facts.items()
    }


def _collect(
    program: Program, sites: Sequence[Site], done: Callable[[GuidedMoments], None]
) -> None:
    """Run the calibration batches from input to input, and give away each site's sums."""
    assert program.graph is not None
    nodes = list(program.graph.nodes)
    position = {node.name: index for index, node in enumerate(nodes)}
    live = live_after(dataflow(program.graph))
    stops: dict[int, list[Site]] = {}
    for site in sites:
        stops.setdefault(position[inputs_of(program, site)[0]], []).append(site)
    runner = Runner(program)
    kept: list[Values] = [
        {node.name: tensor for node, tensor in zip(runner.placeholders, batch, strict=True)}
        for batch in program.calibration
    ]
    at = 0
    with stage("guided statistics", len(stops)) as bar:
        for end in sorted(stops):
            sums = guided_moments(program, stops[end])
            for index, values in enumerate(kept):
                runner.run(nodes[at : end + 1], values, {})
                for found in sums:
                    found.add(values[nodes[end].name])
                kept[index] = _only(live[end], values)
            for found in sums:
                done(found)
            at = end + 1
            bar.advance()


def _only(names: set[str], values: Mapping[str, Tensor]) -> Values:
    return {name: value for name, value in values.items() if name in names}
