"""collect-statistics: the Gram matrix of every site's input, streamed layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from lowra.compiler.dataflow import dataflow, inputs_of, live_after, segments, siblings
from lowra.compiler.errors import CalibrationError
from lowra.compiler.facts import Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.spill import StoredTensor, write_tensors

Batch = tuple[Tensor, ...]
Values = dict[str, Any]


@dataclass(frozen=True)
class CollectStatistics(Pass):
    """Gram = mean over calibration tokens of x x', per distinct linear input.

    With a graph, the calibration batches run through one segment of it (about one layer) at a
    time, and only what the next segment reads is kept, so memory is bounded by the activations of
    one cut and the Gram matrices of one segment. Without a graph, the model runs whole with hooks.
    Gram matrices go to the program's spill folder as float32. Without calibration the sites are
    marked data-free. Raises CalibrationError when an activation is not finite.
    """

    name: ClassVar[str] = "collect-statistics"
    writes: ClassVar = (Statistics,)

    def run(self, program: Program) -> Program:
        if not program.calibration:
            return program.with_facts({site.name: [Statistics(None)] for site in program.sites})
        groups = siblings(program)
        key = (self.name, program.fingerprint, _fingerprint(program.calibration))
        stored = {
            group: StoredTensor(program.spill.path(*key, group[0].name), "gram") for group in groups
        }
        missing = [group for group in groups if not stored[group].path.exists()]
        if missing and program.graph is None:
            _collect_with_hooks(program, missing, stored)
        elif missing:
            _collect_by_segment(program, missing, stored)
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


class _Moments:
    """Running sum of x x' in float32, and the number of rows seen."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        with _exact_product(x.dtype):
            product = rows.T @ rows
        self.total = product if self.total is None else self.total.add_(product)
        self.rows += rows.shape[0]

    def join(self, other: _Moments) -> None:
        assert other.total is not None
        self.total = other.total.clone() if self.total is None else self.total.add_(other.total)
        self.rows += other.rows

    def write(self, target: StoredTensor, group: Sequence[Site]) -> None:
        assert self.total is not None
        gram, self.total = self.total / self.rows, None
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError(
                f"the input of {group[0].name} is not finite on the calibration data; "
                "run the model in bfloat16 or float32, or check the data"
            )
        write_tensors({target.key: gram}, target.path)


@contextmanager
def _exact_product(dtype: torch.dtype) -> Generator[None, None, None]:
    """Let float32 products of bfloat16 values run on bfloat16 units: exact, sums in float32."""
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _collect_by_segment(
    program: Program,
    groups: Sequence[tuple[Site, ...]],
    stored: Mapping[tuple[Site, ...], StoredTensor],
) -> None:
    assert program.graph is not None
    nodes = {node.name: node for node in program.graph.nodes}
    wanted = {group: set(inputs_of(program, group[0])) for group in groups}
    inputs = set().union(*wanted.values())
    totals = {group: _Moments() for group in groups}
    parts = segments(program.graph, list(inputs))
    last_mark = max(i for i, part in enumerate(parts) if any(name in inputs for name in part))
    parts = parts[: last_mark + 1]
    live = live_after(dataflow(program.graph))
    position = {name: index for index, name in enumerate(nodes)}
    runner = _Runner(program)
    kept: list[Values] = [
        {node.name: tensor for node, tensor in zip(runner.placeholders, batch, strict=True)}
        for batch in program.calibration
    ]
    done: set[str] = set()
    with stage("statistics", len(parts) * len(kept)) as bar:
        for part in parts:
            moments = {name: _Moments() for name in part if name in inputs}
            keep = live[position[part[-1]]]
            for index, values in enumerate(kept):
                runner.run([nodes[name] for name in part], values, moments)
                kept[index] = {name: v for name, v in values.items() if name in keep}
                bar.advance()
            for group, names in wanted.items():
                for name in names & set(moments):
                    totals[group].join(moments[name])
                if names and names <= done | set(moments):
                    totals[group].write(stored[group], group)
                    names.clear()
            done |= set(moments)


class _Runner:
    """Runs nodes of a program's graph one by one over a dictionary of values."""

    def __init__(self, program: Program) -> None:
        assert program.graph is not None
        self.placeholders = list(program.graph.find_nodes(op="placeholder"))
        self.tensors = program.tensors

    @torch.no_grad()
    def run(
        self, nodes: Sequence[fx.Node], values: Values, moments: Mapping[str, _Moments]
    ) -> None:
        remaining = {node: len(node.users) for node in nodes}
        inside = set(nodes)
        for node in nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs), lambda n: self._value(n, values)
                )
                values[node.name] = node.target(*args, **kwargs)  # pyright: ignore
            if node.name in moments:
                moments[node.name].add(values[node.name])
            for source in node.all_input_nodes:
                if source in inside:
                    remaining[source] -= 1
                    if remaining[source] == 0:
                        values.pop(source.name, None)

    def _value(self, node: fx.Node, values: Values) -> Any:
        return self.tensors[str(node.target)] if node.op == "get_attr" else values[node.name]


def _collect_with_hooks(
    program: Program,
    groups: Sequence[tuple[Site, ...]],
    stored: Mapping[tuple[Site, ...], StoredTensor],
) -> None:
    assert program.source is not None
    moments = {group: _Moments() for group in groups}
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
        moment.write(stored[group], group)


def _call(program: Program, batch: Batch) -> None:
    assert program.source is not None
    if program.inputs and not program.inputs[0].startswith("input_0"):
        program.source(**dict(zip(program.inputs, batch, strict=True)))
    else:
        program.source(*batch)


def _hook(moments: _Moments) -> Any:
    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return before
