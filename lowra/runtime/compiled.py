"""What a compiled model carries as `model.lowra`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lowra.compiler.printer import print_program
from lowra.compiler.program import Program, Site
from lowra.runtime.module_view import adapters_disabled

ATTRIBUTE = "lowra"


@dataclass(frozen=True)
class Compiled:
    """The compile behind a model: its program, plan and report.

    `program` is the rewritten program, or None for a model loaded from a checkpoint. `recipe`,
    `plan` and `report` are plain JSON data; `fingerprint` is the sha256 of the dense base.
    """

    sites: tuple[Site, ...]
    fingerprint: str
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    plan: Mapping[str, Any] = field(default_factory=dict[str, Any])
    report: Mapping[str, Any] = field(default_factory=dict[str, Any])
    program: Program | None = None

    @property
    def graph(self) -> fx.GraphModule | None:
        """The compressed torch.fx graph, or None where there is no dataflow."""
        if self.program is None or self.program.graph is None:
            return None
        return self.program.module()

    def text(self) -> str:
        """The program printed, or an empty string."""
        return "" if self.program is None else print_program(self.program)

    def adapters_disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which `model` runs without its adapters."""
        return adapters_disabled(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return self


def compiled(model: nn.Module) -> Compiled | None:
    """The Compiled of a model, or None for one that lowra has not compiled."""
    found = getattr(model, "__dict__", {}).get(ATTRIBUTE)
    return found if isinstance(found, Compiled) else None
