"""TrainedAdapter: an adapter of another kind on a compiled model, trained, saved, served."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowra.adapters.kinds import KINDS, Kind, LoRAXS, require_options, singular_basis
from lowra.adapters.philox import PRNG
from lowra.compiler.adapter_delta import AdapterDelta
from lowra.compiler.errors import AdapterError, nearest
from lowra.runtime.adapter_manifest import require, require_fields
from lowra.runtime.adapter_view import base_of, require_unwrapped
from lowra.runtime.checkpoint_writer import check_free, written_whole
from lowra.runtime.claim import claim
from lowra.runtime.compiled import compiled
from lowra.runtime.manifest import checksum, manifest_checksum
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.modules import Factors, QuantizedLinear
from lowra.version import __version__

FORMAT_VERSION = 1
MANIFEST = "lowra_kind.json"
WEIGHTS = "adapter_kind.safetensors"
KEYS = {"format_version", "lowra", "kind", "prng", "base", "sites", "checksums", "checksum"}


class TrainedAdapter(nn.Module):
    """One `Kind` per linear of a compiled model; only their parameters train.

    `with adapter.on(model):` the model computes with it. `delta()` is what a pool's `add` takes.
    """

    def __init__(self, sites: Sequence[Kind]) -> None:
        super().__init__()
        if not sites:
            raise AdapterError("an adapter without a single linear: there is nothing to train")
        self.sites = nn.ModuleList(sites)

    @property
    def by_name(self) -> dict[str, Kind]:
        return {site.name: site for site in self.sites if isinstance(site, Kind)}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model's layers add this adapter's changes, with gradients.

        Raises AdapterError for layers that are not there, or that serve adapters already.
        """
        layers = quantized_linears(model)
        chosen: dict[QuantizedLinear, Kind] = {}
        for name, site in self.by_name.items():
            layer = layers.get(name)
            if layer is None or (layer.n, layer.k) != (site.n, site.k):
                raise AdapterError(f"{name} [{site.n}, {site.k}] is no linear of this model")
            chosen[layer] = site
        with claim(chosen):
            try:
                for layer, site in chosen.items():
                    layer.served = _Applied(site)
                yield
            finally:
                for layer in chosen:
                    layer.served = None

    def delta(self) -> AdapterDelta:
        """The adapter as it is now, for a pool."""
        sites = self.by_name
        kind = next(iter(sites.values())).kind
        return AdapterDelta({name: site.site() for name, site in sites.items()}, kind)


class _Applied:
    """A layer's product and what a kind adds to it."""

    def __init__(self, site: Kind) -> None:
        self.site = site

    def __call__(
        self, layer: QuantizedLinear, x: Tensor, bias: Tensor | None, own: Factors | None
    ) -> Tensor:
        y = layer.product(x, bias, own)
        return y + self.site(x).to(y.dtype)


def new_adapter(
    model: nn.Module, kind: str, targets: Sequence[str] = ("*",), **options: Any
) -> TrainedAdapter:
    """An adapter of `kind` ("lora-xs", "nola", "multi-lora") for the linears of a compiled model
    whose names match a pattern of `targets`; `options` are those of the kind (adapters/kinds.py).

    NOLA's and MultiLoRA's seeds are those given plus the linear's place, so no two are alike.
    Raises AdapterError.
    """
    made = KINDS.get(kind)
    if made is None:
        raise AdapterError(f"no adapter kind {kind!r}; {nearest(kind, KINDS)}")
    layers = _layers(model)
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in targets)]
    if not chosen:
        raise AdapterError(f"no linear matches {', '.join(targets)}; {nearest(targets[0], layers)}")
    wanted = {name: dict(options) for name in chosen}
    if made is not LoRAXS:
        seed = options.get("seed", 0)
        wanted = {name: {**options, "seed": seed + i} for i, name in enumerate(chosen)}
    return TrainedAdapter(_made(kind, wanted, layers))


def _layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    info = compiled(model)
    if info is None:
        raise AdapterError("this model was not compiled by lowra: compile it first")
    require_unwrapped(model, info)
    return quantized_linears(model)


@torch.no_grad()
def _made(
    kind: str, wanted: Mapping[str, Mapping[str, Any]], layers: Mapping[str, QuantizedLinear]
) -> list[Kind]:
    shared: dict[str, Any] = {}
    if kind == LoRAXS.kind:
        ranks = {name: options.get("rank", 16) for name, options in wanted.items()}
        weights = {name: layers[name].weight.as_subclass(Tensor).float() for name in wanted}
        if len(set(ranks.values())) != 1:
            raise AdapterError("LoRA-XS takes one rank for all linears")
        shared = {"basis": singular_basis(weights, next(iter(ranks.values())))}
        wanted = {n: {k: v for k, v in o.items() if k != "rank"} for n, o in wanted.items()}
    try:
        return [
            KINDS[kind](name, layers[name].n, layers[name].k, **options, **shared)
            for name, options in wanted.items()
        ]
    except TypeError as error:
        raise AdapterError(f"{kind} takes no such option ({error})") from error


def save_trained(
    adapter: TrainedAdapter, model: nn.Module, path: str | Path, *, overwrite: bool = False
) -> Path:
    """Write what trains, and the seeds and numbers that the rest is made from, as a folder
    (docs/adapter-format.md, section 6). Raises OutputError as `lowra.save` does."""
    from safetensors.torch import save_file

    _layers(model)
    info = compiled(model)
    assert info is not None
    target = Path(path)
    check_free(target, overwrite)
    sites = adapter.by_name
    tensors = {
        f"{name}.{role}": parameter.detach().cpu().contiguous().clone()
        for name, site in sites.items() for role, parameter in site.named_parameters()
    }  # fmt: skip
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "lowra": __version__,
        "kind": next(iter(sites.values())).kind,
        "prng": PRNG,
        "base": vars(base_of(model, info, with_adapter=True)),
        "sites": {n: {"n": s.n, "k": s.k, "options": s.options()} for n, s in sites.items()},
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    manifest["checksum"] = manifest_checksum(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")) + "\n"
    with written_whole(target) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return target


def read_kind(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `save_trained` wrote, its seal checked. Raises AdapterError."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        whole = set(manifest) >= KEYS and manifest["checksum"] == manifest_checksum(manifest)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); write the adapter again") from error
    if not whole:
        raise AdapterError(f"{file} was damaged or edited; fetch or write the adapter again")
    if manifest["format_version"] != FORMAT_VERSION or manifest["prng"] != PRNG:
        raise AdapterError(
            f"{folder} has format version {manifest['format_version']!r} with the generator "
            f"{manifest['prng']!r}; this lowra reads {FORMAT_VERSION} with {PRNG}"
        )
    if manifest["kind"] not in list(KINDS):
        raise AdapterError(f"{folder} is of kind {manifest['kind']!r}; {nearest('', KINDS)}")
    require_fields(manifest, file)
    require(manifest["base"], file, "base", manifest["base"])
    for name, entry in manifest["sites"].items():
        options, wanted = entry.get("options"), KINDS[manifest["kind"]].numbers
        fits = isinstance(options, dict) and set(options) == set(wanted)
        require(fits, file, f"sites.{name}.options", options)
        require_options(f"{name} in {file}", entry["n"], entry["k"], options)
    return manifest


def load_trained(folder: str | Path, layers: Mapping[str, QuantizedLinear]) -> TrainedAdapter:
    """The adapter in a folder, for layers by name: its bases are made anew. Raises AdapterError."""
    path = Path(folder)
    manifest = read_kind(path)
    wanted = manifest["sites"]
    for name, entry in wanted.items():
        layer = layers.get(name)
        if layer is None or (layer.n, layer.k) != (entry["n"], entry["k"]):
            raise AdapterError(f"{path} adapts {name}, which is not here; {nearest(name, layers)}")
    tensors = _read(path / WEIGHTS, manifest["checksums"])
    for name, entry in wanted.items():
        shapes = KINDS[manifest["kind"]].shapes(entry["n"], entry["k"], entry["options"])
        for role, shape in shapes.items():
            found = tensors.get(f"{name}.{role}")
            if found is None or found.shape != shape or not found.isfinite().all():
                raise AdapterError(f"{path}: {role} of {name} is missing or broken")
    sites = _made(manifest["kind"], {n: entry["options"] for n, entry in wanted.items()}, layers)
    with torch.no_grad():
        for site in sites:
            for role, parameter in site.named_parameters():
                parameter.copy_(tensors[f"{site.name}.{role}"])
    return TrainedAdapter(sites)


def _read(file: Path, sums: Mapping[str, str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged ({error}); fetch or write it again") from error
    changed = [
        n for n in {*tensors, *sums} if n not in tensors or checksum(tensors[n]) != sums.get(n)
    ]
    if changed:
        raise AdapterError(f"{file}: {min(changed)} differs from its checksum; fetch it again")
    return tensors
