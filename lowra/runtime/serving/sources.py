"""Where a pool takes adapters from: folders of packed or PEFT adapters, and memory.

A source first says what it holds (`Facts`), of which a folder reads no tensor; its values come
later, as often as they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.compiler.adapter_delta import AdapterDelta, SiteDelta, dense_site, packed_site
from lowra.compiler.adapter_pages import POST, dense_run
from lowra.compiler.errors import AdapterError
from lowra.runtime import packed_adapter_files as packed
from lowra.runtime import trained_adapter as trained
from lowra.runtime.adapter_config import require_lora
from lowra.runtime.adapter_files import (
    BASE_KEY,
    CONFIG,
    MODEL_KEY,
    WEIGHTS,
    Base,
    factor_shapes,
    local_folder,
    read_adapter,
    read_config,
)
from lowra.runtime.modules import QuantizedLinear
from lowra.runtime.trained_adapter import load_trained, read_kind
from lowra.runtime.vera_files import read_vera, require_vera, vera_shapes

Layers = Mapping[str, QuantizedLinear]


@dataclass(frozen=True)
class Facts:
    """What an adapter is, before its values are read.

    shapes: (n, k) of each linear by module name, k = 0 where the file does not tell. size_bytes: of
    its tensors. base: what it was made for, if it says so.
    """

    kind: str
    shapes: Mapping[str, tuple[int, int]]
    size_bytes: int
    base: Base | None = None


class Source(Protocol):
    def facts(self) -> Facts: ...

    def seal(self) -> str:
        """Another one when what is on disk has changed; quick."""
        ...

    def load(self, layers: Layers, on_top: bool) -> AdapterDelta:
        """The values. `on_top`: whether a layer's own adapter is part of what lies under it."""
        ...


@dataclass(frozen=True)
class InMemory:
    """An adapter that is kept in memory beside the pool."""

    delta: AdapterDelta

    def facts(self) -> Facts:
        shapes = {name: (site.n, site.k) for name, site in self.delta.sites.items()}
        return Facts(self.delta.kind, shapes, self.delta.own_bytes())

    def seal(self) -> str:
        return ""

    def load(self, layers: Layers, on_top: bool) -> AdapterDelta:
        return self.delta


@dataclass(frozen=True)
class PackedFolder:
    """A folder that `lowra.compress_adapter` wrote."""

    path: Path

    def facts(self) -> Facts:
        manifest = packed.read_manifest(self.path)
        shapes = {name: (site["n"], site["k"]) for name, site in manifest["sites"].items()}
        base = Base(**manifest["base"]) if manifest["base"] else None
        return Facts("packed", shapes, _size_bytes(self.path / packed.WEIGHTS), base)

    def seal(self) -> str:
        return _seal(self.path, packed.MANIFEST, packed.WEIGHTS)

    def load(self, layers: Layers, on_top: bool) -> AdapterDelta:
        sites = packed.read_packed(self.path).adapter.sites
        return AdapterDelta({site.name: packed_site(site) for site in sites}, "packed")


@dataclass(frozen=True)
class PeftFolder:
    """A folder as PEFT saves LoRA, rsLoRA, DoRA or VeRA."""

    path: Path
    check_base: bool

    def facts(self) -> Facts:
        source, config = str(self.path), read_config(self.path / CONFIG)
        shapes, header = _shapes(self.path / WEIGHTS)
        if config.get("peft_type") == "VERA":
            require_vera(config, source)
            kind, sites = "vera", vera_shapes(shapes, source)
        else:
            require_lora(config, source, self.check_base, ("use_dora",))
            kind, sites = _lora_kind(config), factor_shapes(shapes, source)
        known = MODEL_KEY in header and BASE_KEY in header
        base = Base(header[MODEL_KEY], header[BASE_KEY]) if known else None
        return Facts(kind, sites, (self.path / WEIGHTS).stat().st_size, base)

    def seal(self) -> str:
        return _seal(self.path, CONFIG, WEIGHTS)

    def load(self, layers: Layers, on_top: bool) -> AdapterDelta:
        if read_config(self.path / CONFIG).get("peft_type") == "VERA":
            return read_vera(self.path / WEIGHTS, {name: layer.k for name, layer in layers.items()})
        found = read_adapter(self.path, check_base=self.check_base, dora=True)
        sites = {name: dense_site(name, *factors) for name, factors in found.factors.items()}
        for name, magnitude in found.magnitudes.items():
            sites[name] = dora_site(
                sites[name], magnitude, found.factors[name], layers[name], on_top
            )
        return AdapterDelta(sites, _lora_kind(found.config))


@dataclass(frozen=True)
class KindFolder:
    """A folder of LoRA-XS, NOLA or MultiLoRA, as `save_trained` writes it."""

    path: Path

    def facts(self) -> Facts:
        manifest = read_kind(self.path)
        shapes = {name: (site["n"], site["k"]) for name, site in manifest["sites"].items()}
        size = _size_bytes(self.path / trained.WEIGHTS)
        return Facts(manifest["kind"], shapes, size, Base(**manifest["base"]))

    def seal(self) -> str:
        return _seal(self.path, trained.MANIFEST, trained.WEIGHTS)

    def load(self, layers: Layers, on_top: bool) -> AdapterDelta:
        return load_trained(self.path, layers).delta()


def source_of(given: Any, check_base: bool = True) -> Source:
    """What a pool's `add` was given as a source: a folder, a Hub id, or an adapter in memory."""
    if isinstance(given, AdapterDelta):
        return InMemory(given)
    if isinstance(given, packed.PackedAdapter):
        return InMemory(AdapterDelta({s.name: packed_site(s) for s in given.sites}, "packed"))
    if isinstance(given, Mapping):
        return InMemory(AdapterDelta({name: dense_site(name, *f) for name, f in given.items()}))
    if not isinstance(given, (str, Path)):
        raise AdapterError(
            f"a {type(given).__name__} is no adapter: give a folder, a Hub id, an AdapterDelta, or "
            "(A, B, scaling) by module name"
        )
    if packed.is_packed(Path(given).expanduser()):
        return PackedFolder(Path(given).expanduser())
    if (Path(given).expanduser() / trained.MANIFEST).is_file():
        return KindFolder(Path(given).expanduser())
    return PeftFolder(local_folder(given), check_base)


@torch.no_grad()
def dora_site(
    site: SiteDelta, magnitude: Tensor, factors: tuple[Tensor, Tensor, float],
    layer: QuantizedLinear, on_top: bool,
) -> SiteDelta:  # fmt: skip
    """DoRA (Liu et al., arXiv 2402.09353): y = m / |W + s B A| * (W x + s B A x), norms by row.

    The quotient is fixed once the base is, so it is computed here. With `on_top` W includes the
    layer's own adapter, as what PEFT trains on does.
    """
    a, b, scaling = factors
    dense = layer.dequantize() if on_top else layer.weight
    dense = dense.as_subclass(Tensor).float()
    dense = dense + scaling * (b.float() @ a.float()).to(dense.device)
    ratio = magnitude.float() / dense.norm(dim=1).cpu().clamp(min=torch.finfo(torch.float32).tiny)
    parts = {**site.parts, POST: (dense_run(ratio[None]),)}
    return SiteDelta(site.name, site.n, site.k, site.scaling, parts)


def _size_bytes(file: Path) -> int:
    if not file.is_file():
        raise AdapterError(f"{file.parent} lacks {file.name}; fetch or write the adapter again")
    return file.stat().st_size


def _seal(folder: Path, *names: str) -> str:
    try:
        stats = [(folder / name).stat() for name in names]
    except OSError as error:
        raise AdapterError(f"{folder} cannot be read any more ({error.strerror})") from error
    return " ".join(f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}" for stat in stats)


def _lora_kind(config: Mapping[str, Any]) -> str:
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _shapes(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata in the header of a safetensors file; no tensor is read."""
    if not file.is_file():
        raise AdapterError(f"{file.parent} holds no {WEIGHTS}: save it as safetensors")
    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            return shapes, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged ({error}); fetch or save it again") from error
