"""Running calibration data through a program's graph, and what is summed on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lowra.compiler.errors import CalibrationError
from lowra.compiler.program import Program, Site

Values = dict[str, Any]


class Moments:
    """Running sum of x y' in float32 (y is x where not given), and the number of rows seen."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.rows = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the rows of x [..., k] (and of y)."""
        rows, others = (None if z is None else z.detach().reshape(-1, z.shape[-1]) for z in (x, y))
        self._add(torch.ops.lowra.moments(rows, others), x[..., 0].numel())

    def add_weighted(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add the rows of x and y [..., k], each times its weight (float32 [rows], 0 or more)."""
        root = weights.sqrt().unsqueeze(1)  # on both sides, so that x x' stays symmetric
        rows, others = (z.detach().reshape(-1, z.shape[-1]).float() * root for z in (x, y))
        self._add(rows.T @ others, len(rows))

    def _add(self, product: Tensor, count: int) -> None:
        self.total = product if self.total is None else self.total.add_(product)
        self.rows += count

    def join(self, other: Moments) -> None:
        assert other.total is not None
        self.total = other.total.clone() if self.total is None else self.total.add_(other.total)
        self.rows += other.rows

    def take_mean(self, site: Site) -> Tensor:
        """The mean float32 [k, k] (or [k]), given away.

        Raises CalibrationError when it is not finite."""
        assert self.total is not None
        mean, self.total = self.total / self.rows, None
        if not bool(torch.isfinite(mean).all()):
            raise CalibrationError(
                f"the input of {site.name} is not finite on the calibration data; "
                "run the model in bfloat16 or float32, or check the data"
            )
        return mean


class Squares(Moments):
    """The diagonal of the running sum alone: of x^2, in float32 [k]."""

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add the rows of x [..., k] (times those of y)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        others = rows if y is None else y.detach().reshape(-1, y.shape[-1]).float()
        self._add((rows * others).sum(0), len(rows))


class Runner:
    """Runs nodes of a program's graph one by one over a dictionary of values."""

    def __init__(self, program: Program) -> None:
        assert program.graph is not None
        self.placeholders = list(program.graph.find_nodes(op="placeholder"))
        self.tensors: Mapping[str, Tensor] = program.tensors

    @torch.no_grad()
    def run(
        self,
        nodes: Sequence[fx.Node],
        values: Values,
        watch: Mapping[str, Callable[[Tensor], None]],
    ) -> None:
        """Compute `nodes` into `values`; what only they read is dropped again."""
        remaining = {node: len(node.users) for node in nodes}
        inside = set(nodes)
        for node in nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs), lambda n: self._value(n, values)
                )
                values[node.name] = node.target(*args, **kwargs)  # pyright: ignore
            if node.name in watch:
                watch[node.name](values[node.name])
            for source in node.all_input_nodes:
                if source in inside:
                    remaining[source] -= 1
                    if remaining[source] == 0:
                        values.pop(source.name, None)

    def _value(self, node: fx.Node, values: Values) -> Any:
        return self.tensors[str(node.target)] if node.op == "get_attr" else values[node.name]
