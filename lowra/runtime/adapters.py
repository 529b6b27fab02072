"""Adapters of a compiled model, in and out of PEFT's folders.

An adapter knows its base: it carries the fingerprint of the dense model and of the packed tensors,
and is refused elsewhere. One that lowra did not write carries none, and can come in anywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from lowra.compiler.errors import AdapterError, OutputError, nearest
from lowra.compiler.program import Site
from lowra.runtime.adapter_config import WITH_PEFT, is_target, names_all_targets
from lowra.runtime.adapter_files import (
    CONFIG,
    WEIGHTS,
    AdapterFile,
    Base,
    read_adapter,
    sign_file,
    write_files,
)
from lowra.runtime.adapter_view import (
    base_of,
    dropout_of,
    factors_of,
    is_wrapped,
    require_unwrapped,
    stacked,
)
from lowra.runtime.checkpoint_writer import check_free, written_whole
from lowra.runtime.compiled import ATTRIBUTE, Compiled, compiled
from lowra.runtime.module_view import AdapterFactors, put_adapter, quantized_linears
from lowra.runtime.trained_norms import held_norms

log = logging.getLogger("lowra")

M = TypeVar("M", bound=nn.Module)


def save_adapter(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the adapter of a compiled model as a folder that PEFT loads on the original model.

    `model` is a compiled model, or a peft.PeftModel around one, whose active adapter is written.
    A and B go out bit for bit, in the dtype they have. Norms that trained beside them are no part
    of an adapter, which a warning says: `lowra.save` writes them. Raises AdapterError for a model
    without an adapter, OutputError as lowra.save does; `overwrite` replaces an adapter, and nothing
    else.
    """
    inner = _inside_peft(model)
    info = _info(inner)
    wrapped = is_wrapped(inner, info)
    if wrapped and inner is model:
        raise AdapterError("peft's layers stand in this model: pass the PeftModel that holds it")
    factors = {} if wrapped else factors_of(model)
    if not wrapped and not factors:
        raise AdapterError("this model has no adapter: compile it with a rank, or load one first")
    base = base_of(inner, info, with_adapter=wrapped)
    target = Path(path)
    _check_free(target, overwrite)
    _warn_of_norms(inner, target)
    with written_whole(target) as folder:
        if wrapped:
            _save_with_peft(model, folder, base)
        else:
            names = [name for name, _ in model.named_modules()]
            kind, dropout = type(model).__name__, dropout_of(model)
            write_files(folder, factors, base, names, kind, _hub_id(model), dropout)
    return target


def load_adapter(
    model: M, source: str | Path, *, on_top: bool = False, check_base: bool = True
) -> M:
    """Put the LoRA adapter in `source`, a folder or a Hub id, into a compiled model; returns it.

    The model is changed in place: layers that the adapter names compute
    y = W x + bias + s B A x with its A and B, bit for bit, which require grad; the others have no
    adapter. With `on_top` the model keeps its own adapter and computes the sum of the two, as one
    adapter of the joint rank: for an adapter that was trained on the original, on a base whose own
    adapter stands for what quantization lost.

    Raises AdapterError, with nothing changed, for anything but plain LoRA (docs/guide-adapters.md),
    for names or shapes that the model does not have, and for an adapter made for another base;
    `check_base=False` lets the last one pass.
    """
    info = _info(model)
    require_unwrapped(model, info)
    found = read_adapter(source, check_base=check_base)
    _require_fit(model, found)
    if check_base and found.base is not None:
        _require_base(found, found.base, base_of(model, info, with_adapter=on_top))
    own = factors_of(model)
    chosen = {site: _site_factors(site, found, own, on_top) for site in info.sites}
    for site, factors in chosen.items():
        put_adapter(model, site, factors)
    _update(model, info, own)
    return model


def _check_free(target: Path, overwrite: bool) -> None:
    check_free(target, overwrite)
    found = {file.name for file in target.iterdir()} if target.is_dir() else set[str]()
    if found - {CONFIG, WEIGHTS, "README.md"}:
        raise OutputError(f"{target} holds more than an adapter and is kept; choose another folder")


def _warn_of_norms(model: nn.Module, target: Path) -> None:
    norms = held_norms(model)
    if norms:
        log.warning(
            "%s trained beside this adapter and is no part of it: %s lacks %d norms, and the "
            "adapter alone computes something else; lowra.save writes the whole model",
            norms[0], target, len(norms),
        )  # fmt: skip


def _info(model: nn.Module) -> Compiled:
    info = compiled(model)
    if info is None:
        raise AdapterError(
            "this model was not compiled by lowra: compile it first, or use peft for dense models"
        )
    return info


def _inside_peft(model: nn.Module) -> nn.Module:
    """The model in a peft.PeftModel, told by its method; any other model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None or not hasattr(model, "peft_config") else cast("Any", unwrap)()


def _save_with_peft(model: Any, folder: Path, base: Base) -> None:
    active = list(model.active_adapters)
    if len(active) != 1:
        raise AdapterError(f"{len(active)} adapters are active; activate one with set_adapter")
    # Embeddings are never part of it; asking would send peft to the Hub for their size.
    model.save_pretrained(folder, selected_adapters=active, save_embedding_layers=False)
    inner = folder / active[0]
    if inner.is_dir():  # peft gives every adapter but "default" a folder of its own
        for file in inner.iterdir():
            file.rename(folder / file.name)
        inner.rmdir()
    sign_file(folder / WEIGHTS, base)


def _hub_id(model: nn.Module) -> str | None:
    """The name the original was loaded by, but no path: it means nothing on another machine."""
    name = getattr(model, "name_or_path", "")
    return name if name and name.count("/") == 1 and not Path(name).exists() else None


def _require_fit(model: nn.Module, found: AdapterFile) -> None:
    """Raise AdapterError unless every factor has a place in the model, and none is missing."""
    layers = quantized_linears(model)
    for name, (a, b, _) in found.factors.items():
        layer = layers.get(name)
        if layer is None:
            raise AdapterError(_no_place(model, name, found.source, list(layers)))
        if (a.shape[1], b.shape[0]) != (layer.k, layer.n):
            raise AdapterError(
                f"{found.source}: {name} has A {list(a.shape)} and B {list(b.shape)}, but this "
                f"model needs A [r, {layer.k}] and B [{layer.n}, r]: it is another model's"
            )
    if not names_all_targets(found.config):
        return
    for name in layers:
        if name not in found.factors and is_target(found.config, name):
            raise AdapterError(
                f"{found.source} lacks the factors of {name}, which its config targets: it is "
                "incomplete, or was trained on a model with fewer layers"
            )


def _no_place(model: nn.Module, name: str, source: str, layers: list[str]) -> str:
    if name in dict(model.named_modules()):
        return f"{source} adapts {name}, which is not compressed in this model: {WITH_PEFT}"
    return f"{source} adapts {name}, which this model does not have; {nearest(name, layers)}"


def _require_base(found: AdapterFile, carried: Base, here: Base) -> None:
    if carried.model != here.model:
        raise AdapterError(
            f"{found.source} was made for another model (fingerprint {carried.model[:12]}, this "
            f"one was compiled from {here.model[:12]}): load it on its own base, or pass "
            "check_base=False if you know that the two fit"
        )
    if carried.packed != here.packed:
        raise AdapterError(
            f"{found.source} was made for another compile of this model (fingerprint "
            f"{carried.packed[:12]}, this one is {here.packed[:12]}), and stands for what that one "
            "lost: load it there, or pass check_base=False to load it all the same"
        )


def _site_factors(
    site: Site, found: AdapterFile, own: Mapping[str, AdapterFactors], on_top: bool
) -> AdapterFactors | None:
    below = own.get(site.modules[0]) if on_top else None
    given = [found.factors.get(name) for name in site.modules]
    first = given[0]
    if any(not _same(first, other) for other in given[1:]):
        raise AdapterError(
            f"{found.source} treats {' and '.join(site.modules)} differently, which share one "
            f"weight here: {WITH_PEFT}"
        )
    return below if first is None else stacked(below, first)


def _same(one: AdapterFactors | None, other: AdapterFactors | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0].equal(other[0]) and one[1].equal(other[1]) and one[2] == other[2]


def _update(model: nn.Module, info: Compiled, before: Mapping[str, AdapterFactors]) -> None:
    """Keep what the model says of itself true after its factors have changed."""
    after = factors_of(model)
    fixed = [
        {name: (a.shape, b.shape, scaling) for name, (a, b, scaling) in factors.items()}
        for factors in (before, after)
    ]
    # Sites with factors and scaling are written into the graph; it is captured anew on demand.
    program = info.program if fixed[0] == fixed[1] else None
    setattr(model, ATTRIBUTE, replace(info, program=program, report=_report(info, after)))


def _report(info: Compiled, factors: Mapping[str, AdapterFactors]) -> dict[str, Any]:
    """The report with the adapter that the model has now; what it leaves lost is not known."""
    if "sites" not in info.report or "totals" not in info.report:
        return dict(info.report)
    adapted = {site.name: factors.get(site.modules[0]) for site in info.sites}
    ranks = {name: len(found[0]) for name, found in adapted.items() if found is not None}
    rows = [
        {**row, "rank": ranks.get(row["name"], 0), "error_with_adapter": None}
        for row in info.report["sites"]
    ]
    bits = sum(16 * ranks.get(site.name, 0) * (site.n + site.k) for site in info.sites)
    weights = sum(site.weights for site in info.sites)
    totals = {**info.report["totals"], "adapter_bits": bits / weights}
    return {**info.report, "sites": rows, "totals": totals}
