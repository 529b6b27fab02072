"""Program -> text: one op per line, facts below it, equal layers folded, nothing that drifts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lowra.compiler.compact import PLAIN
from lowra.compiler.correction import Correction
from lowra.compiler.facts import (
    Adapter,
    AdapterTuning,
    BlockTuning,
    Codebooks,
    ModelTuning,
    Packed,
    Precision,
    Statistics,
    TokenWeights,
)
from lowra.compiler.packed_adapter import PackedSite
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation

DTYPES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "b1",
}  # fmt: skip


def print_program(program: Program) -> str:
    """The program as text; two equal programs print alike on every machine."""
    lines = [f"# {' '.join(program.history) or 'captured'}"]
    lines += _site_lines(program) if program.graph is None else _graph_lines(program)
    lines += [f"skipped {s.name} {list(s.shape)}: {s.reason}" for s in program.skipped]
    return "\n".join([*lines, _totals(program)]) + "\n"


def _site_lines(program: Program) -> Iterator[str]:
    yield f"module tree, no dataflow: {program.warning}"
    for site in program.sites:
        yield f"  {site.name} [{site.n}, {site.k}]"
        yield from (f"    {line}" for line in fact_lines(program, site))


def fact_lines(program: Program, site: Site) -> Iterator[str]:
    """One line per fact of a site."""
    name = site.name
    if (rotation := program.find(name, Rotation)) and rotation.active:
        yield f"rotation: seed={rotation.seed} block={rotation.block}"
    yield from _data_lines(program, name)
    if books := program.find(name, Codebooks):
        kind = "shared" if books.shared else "per row"
        widths = ",".join(map(str, books.widths))
        compact = "" if books.compact == PLAIN else f" {books.compact}"
        yield f"codebooks: widths={widths} {kind} group={books.group}{compact}"
    if precision := program.find(name, Precision):
        yield "precision: " + ", ".join(
            f"{rows} rows at {width}" for width, rows in precision.histogram().items()
        )
    if packed := program.find(name, Packed):
        weight = packed.weight
        bits = weight.stored_bits() / weight.weights
        yield f"packed: {bits:.2f} bits, error {packed.error:.2g}"
    if correction := program.find(name, Correction):
        bits = correction.stored_bits() / site.weights
        width = next(iter(correction.a.rows))
        yield f"correction: rank={correction.rank} at {width} bits a value, {bits:.2f} bits"
    if tuning := program.find(name, BlockTuning):
        yield f"block tuned: error {tuning.before:.2g} to {tuning.after:.2g}"
    if tuning := program.find(name, ModelTuning):
        yield f"model tuned: KL {tuning.before:.2g} to {tuning.after:.2g}"
    yield from _adapter_lines(program, name)


def _adapter_lines(program: Program, name: str) -> Iterator[str]:
    """What is known of a site's adapter."""
    if adapter := program.find(name, Adapter):
        yield f"adapter: rank={adapter.rank} scaling={adapter.scaling:g}"
    if tuning := program.find(name, AdapterTuning):
        yield f"adapter tuned: KL {tuning.before:.2g} to {tuning.after:.2g}"
    if packed := program.find(name, PackedSite):
        bits = packed.stored_bits() / packed.parameters
        yield f"adapter packed: {bits:.2f} bits, A {packed.a.text()}, B {packed.b.text()}"


def _data_lines(program: Program, name: str) -> Iterator[str]:
    """What is known of a site from calibration data."""
    if statistics := program.find(name, Statistics):
        data = "none" if statistics.gram is None else f"{statistics.tokens} tokens"
        yield f"statistics: {data}"
    if guide := program.find(name, TokenWeights):
        yield f"token weights: groups={guide.groups}, as good as {guide.effective:.2g} tokens"


def _totals(program: Program) -> str:
    weights = sum(site.weights for site in program.sites)
    packed = [p.weight for s in program.sites if (p := program.find(s.name, Packed))]
    text = f"sites {len(program.sites)}, weights {weights}"
    if packed and len(packed) == len(program.sites):
        corrections = [c for s in program.sites if (c := program.find(s.name, Correction))]
        stored = sum(p.stored_bits() for p in (*packed, *corrections))
        code = sum(p.code_bits() for p in packed)
        text += f", stored bits {stored / weights:.3f}, code bits {code / weights:.3f}"
    return text


@dataclass
class _Block:
    """Consecutive nodes of one layer: prefix such as `model.layers.3`, or empty."""

    prefix: str
    lines: list[str] = field(default_factory=list[str])

    @property
    def index(self) -> int | None:
        tail = self.prefix.rsplit(".", 1)[-1]
        return int(tail) if tail.isdigit() else None

    def pattern(self) -> str:
        """The text with this layer's own number and the one before it made relative."""
        text = "\n".join(self.lines)
        if self.index is None:
            return text
        stem = self.prefix.rsplit(".", 1)[0]
        text = text.replace(f"{stem}.{self.index}", f"{stem}.<i>")
        return text.replace(f"{stem}.{self.index - 1}", f"{stem}.<i-1>")


def _graph_lines(program: Program) -> list[str]:
    assert program.graph is not None
    names = _value_names(program)
    symbols: dict[str, str] = {}
    sites = {node: site for site in program.sites for node in site.nodes}
    blocks: list[_Block] = []
    header = ""
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            inputs = ", ".join(f"%{name}" for name in program.inputs)
            header = f"program({inputs}) -> {_argument(node.args[0], names)}"
            continue
        prefix = _layer_prefix(node)
        if not blocks or blocks[-1].prefix != prefix:
            blocks.append(_Block(prefix))
        blocks[-1].lines += _node_lines(program, node, names, symbols, sites.get(node.name))
    return [header, *_fold(blocks)]


def _node_lines(
    program: Program, node: fx.Node, names: dict[str, str], symbols: dict[str, str],
    site: Site | None,
) -> Iterator[str]:  # fmt: skip
    constants = [
        a for a in node.all_input_nodes if a.op == "get_attr" and str(a.target) in program.tensors
    ]
    values = [_argument(a, names) for a in node.args if not _is_constant(a)]
    values += [f"{key}={_argument(a, names)}" for key, a in node.kwargs.items()]
    kind = _type(node.meta.get("val"), symbols)
    yield f"  %{names[node.name]} = {_op(node)}({', '.join(values)}){kind}"
    for constant in constants:
        tensor = program.tensors[str(constant.target)]
        dtype = DTYPES.get(tensor.dtype, tensor.dtype)
        yield f"    @{constant.target}: {dtype}{list(tensor.shape)}"
    if site is not None:
        yield from (f"    {line}" for line in fact_lines(program, site))


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _op(node: fx.Node) -> str:
    target = node.target
    name = getattr(target, "__name__", str(target))
    parts = str(target).split(".") if isinstance(target, torch._ops.OpOverload) else [name]  # pyright: ignore
    return parts[1] if len(parts) > 1 and parts[0] == "aten" else ".".join(parts[:2])


def _argument(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{names.get(value.name, value.name)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _type(value: Any, symbols: dict[str, str]) -> str:
    if not isinstance(value, Tensor):
        return ""
    dims = [re.sub(r"[su]\d+", lambda m: _symbol(m[0], symbols), str(d)) for d in value.shape]
    return f" : {DTYPES.get(value.dtype, value.dtype)}[{', '.join(dims)}]"


def _symbol(name: str, symbols: dict[str, str]) -> str:
    return symbols.setdefault(name, chr(ord("a") + len(symbols)))


def _value_names(program: Program) -> dict[str, str]:
    """Node name -> printed name: a site's module, else layer, op and a count within the layer."""
    assert program.graph is not None
    counts: Counter[str] = Counter()
    names: dict[str, str] = {}
    modules = {node: site.name for site in program.sites for node in site.nodes}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node.name] = str(node.target)
            continue
        prefix = _layer_prefix(node)
        base = modules.get(node.name) or (f"{prefix}." if prefix else "") + _op(node)
        names[node.name] = f"{base}_{counts[base]}" if counts[base] else base
        counts[base] += 1
    return names


def _layer_prefix(node: fx.Node) -> str:
    """The module path of a node up to its first number, such as `model.layers.3`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    path = str(paths[-1]) if paths else ""
    found = re.match(r"(?:L\['self'\]\.)?(?:wrapped\.)?(.*?\.\d+)(?:\.|$)", path)
    return found[1] if found else ""


def _fold(blocks: list[_Block]) -> Iterator[str]:
    position = 0
    while position < len(blocks):
        block = blocks[position]
        end = position + 1
        while (
            block.index is not None
            and end < len(blocks)
            and blocks[end].index is not None
            and blocks[end].pattern() == block.pattern()
        ):
            end += 1
        if block.prefix:
            stem, first = block.prefix.rsplit(".", 1)
            many = end - position > 1
            yield f"{stem} {first}..{blocks[end - 1].index} alike" if many else block.prefix
        yield from block.lines
        position = end
