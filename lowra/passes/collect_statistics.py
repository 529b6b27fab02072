"""collect-statistics: the Gram matrix of every site's input, streamed layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowra.compiler.dataflow import dataflow, inputs_of, live_after, segments, siblings
from lowra.compiler.errors import CalibrationError, RecipeError, nearest
from lowra.compiler.facts import Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.spill import StoredTensor, write_tensors
from lowra.passes.rounding.activations import Moments, Runner, Squares, Values

Batch = tuple[Tensor, ...]

GRAMS: dict[str, type[Moments]] = {"full": Moments, "diagonal": Squares}
"""What is collected of a Gram matrix."""


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Gram = mean over calibration tokens of x x', per distinct linear input.

    With a graph, the calibration batches run through one segment of it (about one layer) at a
    time, and only what the next segment reads is kept, so memory is bounded by the activations of
    one cut and the Gram matrices of one segment. Without a graph, the model runs whole with hooks.
    Gram matrices go to the program's spill folder as float32. Without calibration the sites are
    marked data-free. Raises CalibrationError when an activation is not finite.
    gram: "full", or "diagonal": only E[x_i^2] is collected and stored, k floats in place of k^2,
    for inputs so wide that their Gram matrices are too much. Every later pass then takes the inputs
    for uncorrelated; a rotation turns that metric as it does a full one.
    """

    name: ClassVar[str] = "collect-statistics"
    writes: ClassVar = (Statistics,)
    gram: str = "full"

    def require(self, program: Program) -> None:
        if self.gram not in GRAMS:
            raise RecipeError(f"gram={self.gram!r} is unknown; {nearest(self.gram, GRAMS)}")

    def run(self, program: Program) -> Program:
        if not program.calibration:
            return program.with_facts({site.name: [Statistics(None)] for site in program.sites})
        groups = siblings(program)
        self.require(program)
        kind = GRAMS[self.gram]
        key = (str(self), program.fingerprint, _fingerprint(program.calibration))
        stored = {
            group: StoredTensor(program.spill.path(*key, group[0].name), "gram") for group in groups
        }
        missing = [group for group in groups if not stored[group].path.exists()]
        if missing and program.graph is None:
            _collect_with_hooks(program, missing, stored, kind)
        elif missing:
            _collect_by_segment(program, missing, stored, kind)
        tokens = sum(batch[0][..., 0].numel() if batch[0].is_floating_point()
                     else batch[0].numel() for batch in program.calibration)  # fmt: skip
        return program.with_facts(
            {site.name: [Statistics(stored[group], tokens)] for group in groups for site in group}
        )


def _fingerprint(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(moments: Moments, target: StoredTensor, group: Sequence[Site]) -> None:
    write_tensors({target.key: moments.take_mean(group[0])}, target.path)


def _collect_by_segment(
    program: Program,
    groups: Sequence[tuple[Site, ...]],
    stored: Mapping[tuple[Site, ...], StoredTensor],
    kind: type[Moments],
) -> None:
    assert program.graph is not None
    nodes = {node.name: node for node in program.graph.nodes}
    wanted = {group: set(inputs_of(program, group[0])) for group in groups}
    inputs = set().union(*wanted.values())
    totals = {group: kind() for group in groups}
    parts = segments(program.graph, list(inputs))
    last_mark = max(i for i, part in enumerate(parts) if any(name in inputs for name in part))
    parts = parts[: last_mark + 1]
    live = live_after(dataflow(program.graph))
    position = {name: index for index, name in enumerate(nodes)}
    runner = Runner(program)
    kept: list[Values] = [
        {node.name: tensor for node, tensor in zip(runner.placeholders, batch, strict=True)}
        for batch in program.calibration
    ]
    done: set[str] = set()
    with stage("statistics", len(parts) * len(kept)) as bar:
        for part in parts:
            moments = {name: kind() for name in part if name in inputs}
            watch = {name: moment.add for name, moment in moments.items()}
            keep = live[position[part[-1]]]
            for index, values in enumerate(kept):
                runner.run([nodes[name] for name in part], values, watch)
                kept[index] = {name: v for name, v in values.items() if name in keep}
                bar.advance()
            for group, names in wanted.items():
                for name in names & set(moments):
                    totals[group].join(moments[name])
                if names and names <= done | set(moments):
                    _write(totals[group], stored[group], group)
                    names.clear()
            done |= set(moments)


def _collect_with_hooks(
    program: Program,
    groups: Sequence[tuple[Site, ...]],
    stored: Mapping[tuple[Site, ...], StoredTensor],
    kind: type[Moments],
) -> None:
    assert program.source is not None
    moments = {group: kind() for group in groups}
    modules = dict(program.source.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(_hook(moments[group]))
        for group in groups
        for name in group[0].modules
    ]
    training = program.source.training
    try:
        program.source.eval()
        with stage("statistics", len(program.calibration)) as bar, torch.no_grad():
            for batch in program.calibration:
                _call(program, batch)
                bar.advance()
    finally:
        program.source.train(training)
        for handle in handles:
            handle.remove()
    for group, moment in moments.items():
        if moment.total is None:
            raise CalibrationError(f"{group[0].name} is never called by the model's forward")
        _write(moment, stored[group], group)


def _call(program: Program, batch: Batch) -> None:
    assert program.source is not None
    if program.inputs and not program.inputs[0].startswith("input_0"):
        program.source(**dict(zip(program.inputs, batch, strict=True)))
    else:
        program.source(*batch)


def _hook(moments: Moments) -> Any:
    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return before
