"""Tiny models compiled once per run. They are shared by tests: deepcopy what a test changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowra
from lowra.compiler.capture import capture, fingerprint_of, first_tensor
from lowra.compiler.program import Program
from tests import models

SMALL: dict[str, Any] = {"calibration_tokens": 256, "context": 32, "rank": 4}
"""Options that keep a compile of a tiny model short."""

EIGHT: dict[str, Any] = {**SMALL, "bit_budget": 10, "widths": (8,)}
"""Every row at 8 bit: the tightest that there is. Small shapes need room for what stands beside."""


@dataclass(frozen=True)
class Case:
    """A dense model, its compiled twin, the keyword arguments of one forward, and how to build it.

    `before` is the dense model's state dict, copied before compile ran.
    """

    build: Callable[[], nn.Module]
    dense: nn.Module
    compiled: nn.Module
    inputs: dict[str, Tensor]
    before: dict[str, Tensor]

    @property
    def skeleton(self) -> nn.Module | None:
        """What `lowra.load` needs beside the folder: a dense module, for a plain module."""
        return None if hasattr(self.dense, "config") else self.build()


def compile_case(build: Callable[[], nn.Module], **options: Any) -> Case:
    dense = build()
    inputs = models.tokens(dense)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    if not hasattr(dense, "config"):
        options["example"] = tuple(inputs.values())
    return Case(build, dense, lowra.compile(dense, **options), inputs, before)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's first tensor (logits), without gradients."""
    with torch.no_grad():
        return first_tensor(model(**inputs))


def stored_rows(model: nn.Module) -> list[str]:
    """The widths that the rows of a compiled model take."""
    return sorted(cast("Any", model).lowra.report["totals"]["rows"])


END_TO_END: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tiny_llama": (models.tiny_llama, EIGHT),
    "tiny_gpt2": (models.tiny_gpt2, EIGHT),
    "tiny_bert": (models.tiny_bert, EIGHT),
    "tiny_t5": (models.tiny_t5, EIGHT),
    "tiny_bart": (models.tiny_bart, EIGHT),
    "tiny_mixtral": (models.tiny_mixtral, EIGHT),
    "plain_mlp": (models.plain_mlp, {**EIGHT, "bit_budget": 20}),
}


@functools.cache
def end_to_end(name: str) -> Case:
    """One of the models of `END_TO_END`, at 8 bit."""
    build, options = END_TO_END[name]
    return compile_case(build, **options)


class Stack(nn.Module):
    """Three linears, cheap to compile, whose shapes leave the budget room for several widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.middle = nn.Linear(64, 96, bias=False)
        self.last = nn.Linear(96, 32)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return self.norm(self.last(torch.relu(self.middle(hidden))))


def stack() -> Stack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack().eval()


STACK: dict[str, Any] = {"bit_budget": 3.5, "rank": 4}


@functools.cache
def compiled_stack() -> Case:
    """`Stack` at 3.5 bit, in several widths."""
    return compile_case(stack, **STACK)


@functools.cache
def low_llama() -> Case:
    """A llama of one layer in several widths, for training."""
    return compile_case(one_layer_llama, bit_budget=3, **SMALL)


def one_layer_llama() -> LlamaForCausalLM:
    return models.tiny_llama(layers=1)


@functools.cache
def half_llama() -> Case:
    """A llama of one layer that computes in bfloat16."""
    return compile_case(lambda: models.tiny_llama(layers=1).to(torch.bfloat16), **EIGHT)


@functools.cache
def tied_llama() -> Case:
    """A llama with a tied head, which is skipped."""
    return compile_case(lambda: models.tiny_llama(tied=True, layers=1), **EIGHT)


@functools.cache
def tied_llama_with_head() -> Case:
    """A llama with a tied head, which is included."""
    build = functools.partial(models.tiny_llama, tied=True, layers=1)
    return compile_case(build, **EIGHT, include=("lm_head",))


def wide_llama() -> LlamaForCausalLM:
    """One layer of width 256, where 1.5 bit are within reach."""
    config = LlamaConfig(
        vocab_size=models.VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@functools.cache
def _traces() -> dict[Any, Program]:
    return {}


def remembered_capture(model: nn.Module, example: Any = None) -> Program:
    """`capture`, run once for models of one class with the same weights and kind of example.

    A trace takes most of the time of a tiny compile. To stand in for `lowra.api.capture` in tests
    that compile one model in many ways.
    """
    if example is None and not hasattr(model, "config"):
        return capture(model, example)
    inputs = list(example.items()) if isinstance(example, Mapping) else list(example or ())
    shapes = [(i[0], i[1].shape) if isinstance(i, tuple) else i.shape for i in inputs]
    key = (type(model), fingerprint_of(model.state_dict()), str(shapes))
    if key not in _traces():
        _traces()[key] = capture(model, example)
    return replace(
        _traces()[key],
        example=_traces()[key].example
        if example is None
        else tuple(tensor[1] if isinstance(tensor, tuple) else tensor for tensor in inputs),
    )
