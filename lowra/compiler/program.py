"""Program: a torch.fx graph with its tensors, sites and facts. Passes return new programs."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
from torch import Tensor, fx, nn

from lowra.compiler.errors import PatternError, PipelineError, nearest
from lowra.compiler.facts import Fact
from lowra.compiler.spill import Spill

F = TypeVar("F")


@dataclass(frozen=True)
class Weight:
    """A parameter of the model: canonical name, tied names, and the modules that hold it.

    `owners` are (module name, kind), kind one of linear, conv1d, embedding, other.
    """

    name: str
    shape: tuple[int, ...]
    owners: tuple[tuple[str, str], ...]
    head: bool = False

    def modules(self, *kinds: str) -> tuple[str, ...]:
        return tuple(name for name, kind in self.owners if kind in kinds)


@dataclass(frozen=True)
class Site:
    """One weight [n, k] with every linear node that uses it; named after its first module.

    `dtype` is the dense weight's, in which the layer computes.
    `transposed`: the model stores the weight as [k, n] (Conv1D). `nodes` is empty in a program
    without dataflow. `embeddings` are the embedding modules tied to the weight.
    """

    name: str
    weight: str
    n: int
    k: int
    transposed: bool
    dtype: torch.dtype
    modules: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        return self.n * self.k


@dataclass(frozen=True)
class Skipped:
    """A tensor with two or more axes that is not compressed, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Program:
    """What the compiler works on.

    `graph` takes `inputs` in order and returns one tensor; its get_attr nodes name `tensors`.
    `calibration` are batches of inputs that passes learn from, `held_out` some that only judge.
    `example` are inputs it can be traced with; `causal` says that the output is next-token logits.
    It is None for a program captured from the module tree, which then runs `source` itself.
    `replaced` are the model's own tensors, by name, in whose place a pass has put others (tuned
    norms and biases).
    Nothing in a program is ever written to: passes copy what they change and share the rest.
    """

    graph: fx.Graph | None
    inputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    weights: tuple[Weight, ...]
    source: nn.Module | None = None
    sites: tuple[Site, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    facts: Mapping[str, Mapping[type, Fact]] = field(default_factory=dict[str, Mapping[type, Fact]])
    causal: bool = False
    replaced: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    example: tuple[Tensor, ...] = ()
    calibration: tuple[tuple[Tensor, ...], ...] = ()
    held_out: tuple[tuple[Tensor, ...], ...] = ()
    spill: Spill = field(default_factory=Spill.closed)
    fingerprint: str = ""
    history: tuple[str, ...] = ()
    warning: str = ""

    def module(self) -> fx.GraphModule:
        """The graph as a callable module that shares this program's tensors."""
        if self.graph is None:
            raise PipelineError(f"this program has no dataflow to run: {self.warning}")
        root = nn.Module()
        for name, tensor in self.tensors.items():
            _attach(root, name, tensor)
        return fx.GraphModule(root, self.graph)

    def site(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise PatternError(f"no site {name!r}; {nearest(name, [s.name for s in self.sites])}")

    def fact(self, site: str, kind: type[F]) -> F:
        """The fact of `kind` on a site. Raises PipelineError when no pass has written it."""
        found = self.find(site, kind)
        if found is None:
            raise PipelineError(f"site {site} has no {kind.__name__}: no earlier pass wrote it")
        return found

    def find(self, site: str, kind: type[F]) -> F | None:
        """The fact of `kind` on a site, or None."""
        return cast("F | None", self.facts.get(site, {}).get(kind))

    def with_facts(self, new: Mapping[str, Iterable[Fact]]) -> Program:
        """This program with facts added; a fact replaces the one of its kind."""
        facts = {name: dict(kinds) for name, kinds in self.facts.items()}
        for name, added in new.items():
            facts.setdefault(name, {}).update({type(fact): fact for fact in added})
        return replace(self, facts=facts)

    def weight(self, site: Site) -> Tensor:
        """The dense weight [n, k] of a site as float32."""
        stored = self.tensors[site.weight].detach()
        return (stored.T if site.transposed else stored).to(torch.float32)


def _attach(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = cast("nn.Module", getattr(root, part))
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor)


def matches(name: str, pattern: str) -> bool:
    """True when a pattern names `name`: a glob, or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise PatternError(f"{pattern!r} is no regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern)


def select(names: Iterable[str], patterns: Iterable[str], option: str) -> set[str]:
    """The names that any pattern matches. Raises PatternError for a pattern that matches none."""
    names = list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if matches(name, pattern)}
        if not found:
            raise PatternError(f"{option}={pattern!r} matches no weight; {nearest(pattern, names)}")
        chosen |= found
    return chosen
