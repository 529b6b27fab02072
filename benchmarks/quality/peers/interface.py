"""What a peer is: a named quantizer of another package, its settings, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from benchmarks.quality.protocol import Task


@dataclass(frozen=True)
class Quantized:
    """A quantized model, dense again.

    `weights`: by site, [n, k], dequantised, any float dtype. `bits`: what the method stores for all
    of them, counted by the peer's file. `adapters`: by site, the low-rank product [n, k] that the
    method adds, where it has one, and `adapter_bits` for its factors at 16 bits. `facts`: what else
    a reader of the row must know, such as fallbacks.
    """

    weights: Mapping[str, Tensor]
    bits: int
    adapters: Mapping[str, Tensor] | None = None
    adapter_bits: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """One method of another package.

    `name` selects it on the command line, `title` names it in table and chart; `packages` are
    distributions it needs, the first giving the version of its rows; `settings` maps the name of
    each row to the options that `quantize` gets.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    settings: Mapping[str, Mapping[str, Any]]
    quantize: Callable[[Task, Mapping[str, Any]], Quantized]

    def version(self) -> str | None:
        """The package and its version, or None where a package is missing."""
        if self.missing() is not None:
            return None
        return f"{self.packages[0]} {metadata.version(self.packages[0])}"

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        absent = [name for name in self.packages if not _installed(name)]
        if not absent:
            return None
        return f"not installed: {', '.join(absent)}"


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
