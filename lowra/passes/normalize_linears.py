"""normalize-linears: find the sites, give every linear-like node one form, say what is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lowra.compiler.errors import CaptureError, WeightError
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site, Skipped, Weight, select

aten = torch.ops.aten
EMBEDDING = "aten.embedding.default"
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)


@dataclass(frozen=True)
class NormalizeLinears(Pass):
    """Every product with a 2-D weight becomes `aten.linear(x, weight [n, k], bias)`.

    addmm(b, x, w [k, n])  ->  linear(x, w', b)        (Conv1D)
    mm(x, t(w))            ->  linear(x, w)
    matmul(x, w [k, n])    ->  linear(x, w')

    `include` names weights compressed although they are skipped by default (the output head,
    embeddings tied to it); `ignore` names weights to leave alone. Raises PatternError for a
    pattern that matches nothing, WeightError for NaN or infinity, CaptureError when no linear
    is left.
    """

    name: ClassVar[str] = "normalize-linears"
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def run(self, program: Program) -> Program:
        included = _selected(program, self.include, "include")
        ignored = _selected(program, self.ignore, "ignore")
        uses = _linear_uses(program)
        sites: list[Site] = []
        skipped: list[Skipped] = []
        for weight in program.weights:
            reason = _refusal(program, weight, uses, included, ignored)
            if reason:
                skipped.append(Skipped(weight.name, weight.shape, reason))
            else:
                sites.append(_site(program, weight, uses))
        if not sites:
            raise CaptureError(_nothing_left(skipped))
        for site in sites:
            _check_finite(site, program.tensors[site.weight])
        return _canonical(replace(program, sites=tuple(sites), skipped=tuple(skipped)))


def site_name(weight: Weight) -> str:
    """The name users know a weight by: its first linear module, else its qualified name."""
    modules = weight.modules("linear", "conv1d")
    return modules[0] if modules else weight.name.removesuffix(".weight")


def _selected(program: Program, patterns: tuple[str, ...], option: str) -> set[str]:
    """Site names of the weights that a pattern matches, by that name or by the weight's own: a
    skipped weight is listed under that."""
    names = {name: site_name(weight) for weight in program.weights for name in _names(weight)}
    return {names[found] for found in select(names, patterns, option)}


def _names(weight: Weight) -> tuple[str, str]:
    return site_name(weight), weight.name


def _nothing_left(skipped: list[Skipped]) -> str:
    reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3])
    return "the model has no linear weights to compress" + (f" ({reasons})" if reasons else "")


def _refusal(
    program: Program, weight: Weight, uses: dict[str, list[fx.Node]],
    included: set[str], ignored: set[str],
) -> str:  # fmt: skip
    """Why a weight is not compressed; empty when it is."""
    name = site_name(weight)
    if len(weight.shape) != 2:
        return f"a tensor of {len(weight.shape)} axes (experts, convolution), not one linear"
    if name in ignored:
        return "ignored by the recipe"
    if weight.head and name not in included:
        return "output head, kept in 16 bit; include it to compress it"
    if not weight.modules("linear", "conv1d"):
        kinds = {kind for _, kind in weight.owners}
        return "embedding, kept in 16 bit" if kinds == {"embedding"} else "not held by a Linear"
    if weight.modules("other"):
        return f"also held by {weight.modules('other')[0]}, which is no Linear or Conv1D"
    if weight.modules("embedding") and name not in included:
        return "tied to an embedding, kept in 16 bit; include it to compress it"
    if program.graph is not None and weight.name not in uses:
        return "no linear of the traced graph reads it"
    return _other_reader(program, weight, uses)


def _other_reader(program: Program, weight: Weight, uses: dict[str, list[fx.Node]]) -> str:
    """Who reads the weight in another way than as the linear of its module; empty for nobody."""
    if program.graph is None:
        return ""
    stored = "kn" if weight.modules("conv1d") else "nk"
    linear = set(uses[weight.name])
    for node in linear:
        form = _linear_form(node)
        if form is not None and form.stored != stored:
            return f"also multiplied from the other side, by %{node.name}"
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == weight.name:
            through = {u for t in node.users if t.target in TRANSPOSES for u in t.users}
            readers = {u for u in node.users if u.target not in TRANSPOSES} | through
            odd = sorted(r.name for r in readers - linear if str(r.target) != EMBEDDING)
            if odd:
                return f"also read by %{odd[0]}, which is no linear"
    return ""


def _site(program: Program, weight: Weight, uses: dict[str, list[fx.Node]]) -> Site:
    transposed = bool(weight.modules("conv1d"))
    n, k = reversed(weight.shape) if transposed else weight.shape
    return Site(
        name=site_name(weight), weight=weight.name, n=n, k=k, transposed=transposed,
        dtype=program.tensors[weight.name].dtype,
        modules=weight.modules("linear", "conv1d"), embeddings=weight.modules("embedding"),
        nodes=tuple(node.name for node in uses.get(weight.name, [])),
    )  # fmt: skip


def _check_finite(site: Site, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise WeightError(f"{site.name}: weight is {weight.dtype}, not a float; already quantized?")
    if weight.is_meta:  # planned from shapes; a compile checks the values
        return
    weight = weight.detach()
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return
    where = (~finite).nonzero()[0].tolist()
    value = float(weight[tuple(where)])
    raise WeightError(
        f"{site.name}: weight{where} is {value}; {int((~finite).sum())} values are not finite. "
        "Repair the model, or leave this weight out with ignore="
    )


def _linear_uses(program: Program) -> dict[str, list[fx.Node]]:
    """Weight name -> the linear-like nodes that multiply by it."""
    uses: dict[str, list[fx.Node]] = {}
    if program.graph is None:
        return uses
    for node in program.graph.nodes:
        if (form := _linear_form(node)) is not None:
            uses.setdefault(str(form.weight.target), []).append(node)
    return uses


@dataclass(frozen=True)
class _Form:
    """x @ weight' + bias as found in the graph; `stored` is the weight's layout, nk or kn."""

    x: Any
    weight: fx.Node
    bias: Any
    stored: str


def _linear_form(node: fx.Node) -> _Form | None:
    if node.op != "call_function":
        return None
    args: tuple[Any, ...] = node.args
    if node.target is aten.linear.default:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        return _Form(x, weight, bias, "nk") if _is_parameter(weight) else None
    if node.target is aten.addmm.default and not node.kwargs:
        return _product_form(args[1], args[2], args[0])
    if node.target in (aten.mm.default, aten.matmul.default):
        return _product_form(args[0], args[1], None)
    return None


def _product_form(x: Any, weight: Any, bias: Any) -> _Form | None:
    """x @ weight, or x @ t(weight), where weight is a parameter."""
    if _is_parameter(weight):
        return _Form(x, weight, bias, "kn")
    if isinstance(weight, fx.Node) and weight.target in TRANSPOSES:
        inner: Any = weight.args[0]
        return _Form(x, inner, bias, "nk") if _is_parameter(inner) else None
    return None


def _is_parameter(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _canonical(program: Program) -> Program:
    """Rewrite the linear-like nodes of all sites into aten.linear with an [n, k] weight."""
    if program.graph is None:
        return program
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    site_nodes = {name: site for site in program.sites for name in site.nodes}
    for node in program.graph.nodes:
        form = _linear_form(node) if node.name in site_nodes else None
        if form is None or node.target is aten.linear.default:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            continue
        mapping[node] = _as_linear(graph, node, form, mapping)
    dead = _unused_transposes(graph)
    for node in dead:
        graph.erase_node(node)
    return replace(program, graph=graph)


def _as_linear(
    graph: fx.Graph, node: fx.Node, form: _Form, mapping: dict[fx.Node, fx.Node]
) -> fx.Node:
    weight: fx.Node = mapping[form.weight]
    if form.stored == "kn":
        weight = graph.call_function(aten.t.default, (weight,))
        weight.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    args: tuple[Any, ...] = (mapping[form.x], weight)
    if form.bias is not None:
        args = (*args, mapping[form.bias])
    linear = graph.create_node("call_function", aten.linear.default, args, name=node.name)
    linear.meta = dict(node.meta)
    return linear


def _unused_transposes(graph: fx.Graph) -> Iterator[fx.Node]:
    return iter([n for n in reversed(graph.nodes) if n.target in TRANSPOSES and not n.users])
