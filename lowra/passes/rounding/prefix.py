"""What a site's input becomes once everything before it is quantized."""

from __future__ import annotations

from torch import Tensor

from lowra.compiler.dataflow import dataflow, inputs_of, live_after, siblings
from lowra.compiler.program import Program, Site
from lowra.compiler.storage import PackedWeight
from lowra.passes.rounding.activations import Moments, Runner, Values
from lowra.passes.rounding.guidance import guided_moments


def prefix_order(program: Program) -> tuple[list[tuple[Site, ...]], list[Site]]:
    """Groups of sites on one input, in the order in which a run meets them; and the other sites.

    Those read several inputs, or are tied to an embedding that runs before everything.
    """
    if program.graph is None or not program.calibration:
        return [], list(program.sites)
    position = {node.name: index for index, node in enumerate(program.graph.nodes)}
    met: dict[int, tuple[Site, ...]] = {}
    others: list[Site] = []
    for group in siblings(program):
        inputs = inputs_of(program, group[0])
        if len(inputs) == 1 and not any(site.embeddings for site in group):
            met[position[inputs[0]]] = group
        else:
            others.extend(group)
    return [met[at] for at in sorted(met)], others


class PrefixStream:
    """The calibration data on its way through two models at once: the original one, and one in
    which `replace` puts quantized weights, site by site.

    Between two stops only what later nodes read is kept, so memory is bounded by two cuts of the
    activations.
    """

    def __init__(self, program: Program) -> None:
        assert program.graph is not None
        self.program = program
        self.nodes = list(program.graph.nodes)
        self.position = {node.name: index for index, node in enumerate(self.nodes)}
        self.live = live_after(dataflow(program.graph))
        self.original, self.quantized = Runner(program), Runner(program)
        self.weights = dict(program.tensors)
        self.quantized.tensors = self.weights
        self.inputs = {site.name: inputs_of(program, site)[:1] for site in program.sites}
        start: list[Values] = [
            {node.name: t for node, t in zip(self.original.placeholders, batch, strict=True)}
            for batch in program.calibration
        ]
        self.values: list[tuple[Values, Values]] = [(batch, dict(batch)) for batch in start]
        self.at = 0

    def moments(self, site: Site) -> dict[str, Tensor]:
        """Run both models on to the input of `site`, which is x in the original and x^ in the
        quantized one: `gram`, the mean of x^ x^', and `drift`, of (x - x^) x^', float32 [k, k].

        Beside them, for every site on this input that has token weights, both under those
        (lowra.passes.rounding.guidance)."""
        (stop,) = self.inputs[site.name]
        readers = [s for s in self.program.sites if self.inputs[s.name] == (stop,)]
        guided = guided_moments(self.program, readers)
        end = self.position[stop]
        part, keep = self.nodes[self.at : end + 1], self.live[end]
        gram, drift = Moments(), Moments()
        for index, (original, quantized) in enumerate(self.values):
            self.original.run(part, original, {})
            self.quantized.run(part, quantized, {})
            x = quantized[stop]
            lag = original[stop] - x
            gram.add(x)
            drift.add(lag, x)
            for sums in guided:
                sums.add(x, lag)
            self.values[index] = (_only(keep, original), _only(keep, quantized))
        self.at = end + 1
        found = {"gram": gram.take_mean(site), "drift": drift.take_mean(site)}
        for sums in guided:
            found |= sums.take()
        return found

    def replace(self, site: Site, packed: PackedWeight) -> None:
        """From here on the quantized model has this weight at a site."""
        weight = packed.dequantize(site.dtype)
        self.weights[site.weight] = weight.T if site.transposed else weight


def _only(names: set[str], values: Values) -> Values:
    return {name: value for name, value in values.items() if name in names}
