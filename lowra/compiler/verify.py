"""What must hold of a program between passes, as a table of checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx

from lowra.compiler.correction import Correction
from lowra.compiler.errors import PipelineError
from lowra.compiler.facts import Adapter, Codebooks, Packed, Precision
from lowra.compiler.program import Program


def _names_known(program: Program) -> Iterator[str]:
    if program.graph is None:
        return
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target not in program.tensors:
            yield f"%{node.name} reads {node.target}, which the program does not hold"


def _sites_distinct(program: Program) -> Iterator[str]:
    seen: set[str] = set()
    for site in program.sites:
        if site.name in seen:
            yield f"site {site.name} stands twice"
        seen.add(site.name)
    for name in program.facts:
        if name not in seen:
            yield f"facts on {name}, which is no site"


def _site_nodes_exist(program: Program) -> Iterator[str]:
    if program.graph is None:
        return
    nodes = {node.name: node for node in program.graph.nodes}
    for site in program.sites:
        for name in site.nodes:
            if name not in nodes:
                yield f"site {site.name} names node %{name}, which is gone"
            elif not _is_linear(nodes[name]):
                yield f"site {site.name} names node %{name}, which is no linear"


def _is_linear(node: fx.Node) -> bool:
    target = str(node.target)
    return target.startswith(("aten.linear", "lowra.quantized_linear"))


def _facts_fit(program: Program) -> Iterator[str]:
    for site in program.sites:
        shapes = _fact_shapes(program, site.name)
        for what, got, want in shapes(site.n, site.k):
            if got != want:
                yield f"{what} of {site.name} is {got}, not {want}"


def _fact_shapes(
    program: Program, name: str
) -> Callable[[int, int], Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    def rows(n: int, k: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        if books := program.find(name, Codebooks):
            yield "expected loss", tuple(books.loss.shape), (n, len(books.widths))
        if precision := program.find(name, Precision):
            yield "precision", tuple(precision.row_widths.shape), (n,)
        if packed := program.find(name, Packed):
            yield "packed weight", (packed.weight.n, packed.weight.k), (n, k)
        if correction := program.find(name, Correction):
            yield "correction", (correction.b.k, correction.a.k), (n, k)
        if adapter := program.find(name, Adapter):
            yield "lora_a", tuple(adapter.lora_a.shape), (adapter.rank, k)
            yield "lora_b", tuple(adapter.lora_b.shape), (n, adapter.rank)

    return rows


CHECKS: tuple[Callable[[Program], Iterator[str]], ...] = (
    _names_known,
    _sites_distinct,
    _site_nodes_exist,
    _facts_fit,
)


def verify(program: Program) -> None:
    """Raise PipelineError with every broken rule."""
    if program.graph is not None:
        program.graph.lint()
    broken = [message for check in CHECKS for message in check(program)]
    if broken:
        raise PipelineError("the program does not hold together: " + "; ".join(broken))
