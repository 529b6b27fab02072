"""Model -> Program: torch.export where it works, the module tree where it does not."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lowra.compiler.errors import CaptureError
from lowra.compiler.program import Program, Weight

log = logging.getLogger("lowra")
Inputs = Mapping[str, Tensor]


class FirstTensor(nn.Module):
    """Calls a model with named tensors in a fixed order and returns its first tensor.

    That is the logits of a language model, the last hidden state of an encoder, or the tensor
    (or first element) that a plain module returns.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], positional: bool) -> None:
        super().__init__()
        self.wrapped = model
        self.names = names
        self.positional = positional

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.positional:
            return first_tensor(self.wrapped(*inputs))
        return first_tensor(self.wrapped(**dict(zip(self.names, inputs, strict=True))))


def first_tensor(output: Any) -> Tensor:
    """The tensor that stands for a model's output. Raises CaptureError when there is none."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise CaptureError(f"the model returns {type(output).__name__}, which holds no first tensor")


def example_inputs(model: nn.Module) -> dict[str, Tensor] | None:
    """Small token inputs for a Hugging Face text model; None for anything else."""
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", "") != "input_ids":
        return None
    ids = torch.arange(6, dtype=torch.int64).view(2, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :2].contiguous()
    return inputs


def capture(model: nn.Module, example: Inputs | tuple[Tensor, ...] | None = None) -> Program:
    """A program of `model`, which is left as it was.

    `example`: inputs by name, or positional tensors; by default token inputs for a Hugging Face
    text model. Axes 0 and 1 of token inputs (all but the last of others) become dynamic. When
    export fails, or there is no example, the program comes from the module tree and `warning`
    says what is lost.
    """
    weights = find_weights(model)
    tensors = dict(_named_tensors(model))
    fingerprint = fingerprint_of(tensors)
    inputs = _beside(tensors, example_inputs(model) if example is None else example)
    graph, names, warning = None, (), "no example inputs to trace with"
    if not fingerprint:
        inputs, warning = None, "planned from shapes alone, nothing is traced"
    if inputs is not None:
        graph, names, warning = _try_export(model, inputs)
    if graph is None and fingerprint:
        log.warning("captured from the module tree, without a graph: %s", warning)
    aliases = tied_names(model)
    if graph is not None:
        tensors = _canonical_constants(graph, tensors, aliases)
    return Program(
        graph=graph, inputs=names, tensors=tensors, weights=weights,
        source=model if graph is None else None, fingerprint=fingerprint, warning=warning,
        example=() if inputs is None else tuple(_values(inputs)), causal=_is_causal(model),
    )  # fmt: skip


def _try_export(
    model: nn.Module, inputs: Inputs | tuple[Tensor, ...]
) -> tuple[fx.Graph | None, tuple[str, ...], str]:
    positional = not isinstance(inputs, Mapping)
    tensors = tuple(_values(inputs))
    names = tuple(f"input_{i}" for i in range(len(tensors))) if positional else tuple(inputs)
    try:
        return _export(FirstTensor(model, names, positional), tensors, names), names, ""
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises anything
        reason = f"torch.export failed with {type(error).__name__}: {error}".splitlines()[0]
        return None, names, reason


def _beside(
    tensors: Mapping[str, Tensor], inputs: Inputs | tuple[Tensor, ...] | None
) -> Inputs | tuple[Tensor, ...] | None:
    """Inputs on the device of the model's first tensor."""
    first = next(iter(tensors.values()), None)
    if first is None or inputs is None:
        return inputs
    if isinstance(inputs, Mapping):
        return {name: tensor.to(first.device) for name, tensor in inputs.items()}
    return tuple(tensor.to(first.device) for tensor in inputs)


def _values(inputs: Inputs | tuple[Tensor, ...]) -> Iterator[Tensor]:
    yield from inputs.values() if isinstance(inputs, Mapping) else inputs


def _export(wrapper: FirstTensor, inputs: tuple[Tensor, ...], names: tuple[str, ...]) -> fx.Graph:
    dynamic = tuple(dynamic_axes(tensor) for tensor in inputs)
    with _ready_to_trace(wrapper.wrapped):
        exported = torch.export.export(
            wrapper, inputs, dynamic_shapes={"inputs": dynamic}, strict=False
        )
    module = exported.module(check_guards=False)
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {})
    while isinstance(output, (tuple, list)):
        output = output[0]
    graph.output(output)
    for node in reversed(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    constants = {node.target for node in graph.nodes if node.op == "get_attr"}
    graph._lowra_constants = {name: _attribute(module, cast("str", name)) for name in constants}  # pyright: ignore
    for node, name in zip(graph.find_nodes(op="placeholder"), names, strict=True):
        node.target = name
    return graph


def dynamic_axes(tensor: Tensor) -> dict[int, Any]:
    """Axes that may change from call to call: two of token inputs, leading ones of others."""
    count = tensor.dim() if not tensor.is_floating_point() else tensor.dim() - 1
    return {axis: torch.export.Dim.AUTO for axis in range(min(count, 2))}


@contextmanager
def _ready_to_trace(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode, no gradients, no KV cache; all put back afterwards."""
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    training = {module: module.training for module in model.modules()}
    set_experts = getattr(model, "set_experts_implementation", None)
    experts = getattr(config, "_experts_implementation", None)
    try:
        model.eval()
        if set_experts is not None and experts is not None:
            set_experts("batched_mm")  # plain ATen; the grouped form is an op of transformers
        if cached is not None:
            cast("Any", config).use_cache = False
        with torch.no_grad():
            yield
    finally:
        if set_experts is not None and experts is not None:
            set_experts(experts)
        for module, mode in training.items():
            module.training = mode
        if cached is not None:
            cast("Any", config).use_cache = cached


def _attribute(module: nn.Module, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _canonical_constants(
    graph: fx.Graph, tensors: dict[str, Tensor], aliases: dict[str, str]
) -> dict[str, Tensor]:
    """Rename get_attr targets to the model's own names, tied ones to the first of them."""
    constants = cast("dict[str, Tensor]", graph.__dict__.pop("_lowra_constants"))
    used: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        plain = str(node.target).removeprefix("wrapped.")
        name = aliases.get(plain, plain)
        used[name] = tensors.get(name, constants[node.target])
        node.target = name
    return used


def _is_causal(model: nn.Module) -> bool:
    """True for a decoder-only language model."""
    can_generate = getattr(model, "can_generate", None)
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate is not None and bool(can_generate()) and not encoder


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def tied_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> its first name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _kind(module: nn.Module) -> str:
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def find_weights(model: nn.Module) -> tuple[Weight, ...]:
    """Every parameter with two or more axes, with its owners; tied ones once."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kind = _kind(module) if leaf == "weight" else "other"
            owners.setdefault(id(parameter), []).append((module_name, kind))
    head = _head(model)
    return tuple(
        Weight(name, tuple(p.shape), tuple(owners[id(p)]), head=p is head)
        for name, p in model.named_parameters()
        if p.dim() >= 2
    )


def _head(model: nn.Module) -> Tensor | None:
    get = getattr(model, "get_output_embeddings", None)
    module = get() if get is not None else None
    return getattr(module, "weight", None)


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of tensors, in name order.

    Empty for a model on the meta device, which has shapes but no bytes.
    """
    if any(tensor.is_meta for tensor in tensors.values()):
        return ""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore
    return digest.hexdigest()
