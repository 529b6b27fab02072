"""Runs nodes of a program's graph, other linears in place of some, with or without autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation, rotate_activations

Values = dict[str, Any]
Product = Callable[[Tensor, Tensor | None], Tensor]
"""Rotated activations [..., k] and a bias or None -> [..., n]."""
Linears = Mapping[str, tuple[Product, Rotation]]
"""By linear node: what is computed in its place, and the rotation of its input."""


def product(weight: Tensor) -> Product:
    """The product with a weight [n, k] in rotated coordinates."""
    return lambda x, bias: functional.linear(x, weight, bias)


class BlockRunner:
    """Runs consecutive nodes over a dictionary of values by node name.

    Values that no later node of the whole graph reads are dropped.
    """

    def __init__(self, program: Program) -> None:
        assert program.graph is not None
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.placeholders = [n.name for n in program.graph.find_nodes(op="placeholder")]
        self.tensors = {name: tensor.detach() for name, tensor in program.tensors.items()}
        self._position = {name: index for index, name in enumerate(self.nodes)}

    def inputs(self, batch: Sequence[Tensor]) -> Values:
        """The values that a run starts from."""
        return dict(zip(self.placeholders, batch, strict=True))

    def run(
        self,
        names: Sequence[str],
        values: Values,
        linears: Linears | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Values:
        """The values alive behind the nodes `names`, from those alive before them.

        `tensors` stand in for the program's own of the same name.
        """  # fmt: skip
        values, rotated = dict(values), {}
        linears, tensors = linears or {}, tensors or {}
        for name in names:
            node = self.nodes[name]
            if node.op == "call_function":
                values[name] = self._call(node, values, linears, tensors, rotated)
            if node.op == "output":
                continue
            here = self._position[name]
            for source in node.all_input_nodes:
                if max(self._position[user.name] for user in source.users) <= here:
                    values.pop(source.name, None)
        return values

    def _call(
        self, node: fx.Node, values: Values, linears: Linears, tensors: Mapping[str, Tensor],
        rotated: dict[tuple[str, Rotation], Tensor],
    ) -> Any:  # fmt: skip
        def value(source: fx.Node) -> Any:
            if source.op != "get_attr":
                return values[source.name]
            target = str(source.target)
            return tensors.get(target, self.tensors.get(target))

        if node.name not in linears:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            return node.target(*args, **kwargs)  # pyright: ignore
        multiply, rotation = linears[node.name]
        source: Any = node.args[0]
        key = (source.name, rotation)
        if key not in rotated:
            rotated[key] = rotate_activations(values[source.name], rotation)
        bias: Any = node.args[2] if len(node.args) > 2 else None
        return multiply(rotated[key], None if bias is None else value(bias))


@torch.no_grad()
def run_frozen(
    runner: BlockRunner, names: Sequence[str], kept: list[Values], linears: Linears | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> list[Values]:  # fmt: skip
    """Every batch's values behind the nodes `names`."""
    return [runner.run(names, values, linears, tensors) for values in kept]
