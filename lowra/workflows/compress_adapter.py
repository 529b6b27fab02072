"""Compressing PEFT adapters, one or a folder of them, and giving packed ones back as plain PEFT."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowra.adapters.factors import LowRank
from lowra.adapters.loraquant import LoRAQuant
from lowra.compiler.errors import AdapterError, LowraError, RecipeError
from lowra.compiler.packed_adapter import PackedAdapter, PackedSite
from lowra.compiler.progress import stage
from lowra.passes.budget.adapter_budget import Budget, quantize_sites
from lowra.runtime.adapter_files import (
    CONFIG,
    WEIGHTS,
    Base,
    factor_tensors,
    read_adapter,
    sign_file,
)
from lowra.runtime.checkpoint_writer import check_free, written_whole
from lowra.runtime.packed_adapter_files import PackedFile, read_packed, write_packed


@dataclass(frozen=True)
class CompressedAdapter:
    """What came of compressing one adapter.

    stored_bits: per parameter of the plain factors, 8 x the bytes of the packed tensors.
    file_bytes: of both files, names and all. error: the part of sum |scaling B A|_F^2 that is lost.
    sites: name, shape, rank, widths, stored bits and error of each.
    """

    source: str
    path: str
    method: str
    parameters: int
    stored_bits: float
    file_bytes: int
    plain_bytes: int
    error: float
    seconds: float
    sites: tuple[Mapping[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "sites": [dict(site) for site in self.sites]}


def compress_adapter(
    source: str | Path,
    path: str | Path,
    *,
    bit_budget: float | None = None,
    bits: int | None = None,
    rho: float = 0.8,
    group: int | None = None,
    split: str = "paper",
    clip: str = "search",
    overwrite: bool = False,
) -> CompressedAdapter:
    """Compress the PEFT adapter in a folder (or on the Hub) and write it packed to `path`.

    `bit_budget` (2.0 where `bits` is not given either) is a hard cap on stored bits per parameter
    of the whole adapter. `bits` asks for LoRAQuant (arXiv 2510.26690) instead: `bits`@`rho` with
    `split` "paper" or "released" and `clip` "search", "none", "ste" or "released". `group` is
    values per scale: by default one scale per vector, 128 for LoRAQuant.

    docs/adapter-format.md describes what is written; `export_adapter` gives plain PEFT back.
    Raises AdapterError for an adapter that cannot be read or never was trained, BudgetError,
    RecipeError and OutputError; nothing is written then.
    """
    method: Budget | LoRAQuant
    if bits is None:
        method = Budget(2.0 if bit_budget is None else bit_budget, -1 if group is None else group)
    elif bit_budget is not None:
        raise RecipeError("bits (LoRAQuant) and bit_budget exclude each other: leave one out")
    else:
        method = LoRAQuant(bits, rho, 128 if group is None else group, split, clip)
    return compress_by(method, source, path, overwrite=overwrite)


def compress_by(
    method: Budget | LoRAQuant, source: str | Path, path: str | Path, *, overwrite: bool = False
) -> CompressedAdapter:
    """Compress the PEFT adapter in a folder (or on the Hub) and write it packed to `path`.

    Raises as `compress_adapter` does.
    """
    begun = time.perf_counter()
    check_free(Path(path), overwrite)
    found = read_adapter(source, check_base=False)
    adapters = [LowRank(name, a, b, s) for name, (a, b, s) in found.factors.items()]
    done = quantize_sites(adapters, method, f"compress {Path(source).name}")
    energy = sum(quantized.energy for quantized in done)
    if not energy:
        raise AdapterError(
            f"{source}: scaling B A is zero at every site: it was never trained, or its lora_alpha "
            "is 0; there is nothing to store"
        )
    packed = [quantized.site for quantized in done]
    errors = {quantized.site.name: quantized.error for quantized in done}
    lost = sum(quantized.energy * quantized.error for quantized in done)
    base = {} if found.base is None else vars(found.base)
    content = PackedFile(PackedAdapter(tuple(packed)), str(method), found.config, base, errors)
    file_bytes = write_packed(path, content, overwrite=overwrite)
    return CompressedAdapter(
        source=str(source),
        path=str(path),
        method=str(method),
        parameters=content.adapter.parameters,
        stored_bits=content.adapter.stored_bits() / content.adapter.parameters,
        file_bytes=file_bytes,
        plain_bytes=sum(x.numel() * x.element_size() for f in adapters for x in (f.a, f.b)),
        error=lost / energy,
        seconds=time.perf_counter() - begun,
        sites=tuple(site_row(site, errors[site.name]) for site in packed),
    )


def compress_adapters(
    source: Path, path: Path, method: Budget | LoRAQuant, *, overwrite: bool = False
) -> Iterator[CompressedAdapter | tuple[str, LowraError]]:
    """Compress every adapter in a folder of adapters, each to a folder of the same name in `path`.

    Yields what came of each: one that fails is yielded with its error, and the others go on.
    """
    folders = adapter_folders(source)
    for folder in folders:
        check_free(path / folder.name, overwrite)
    with stage("compress adapters", len(folders)) as shown:
        for folder in folders:
            try:
                yield compress_by(method, folder, path / folder.name, overwrite=overwrite)
            except LowraError as error:
                yield folder.name, error
            shown.advance()


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter itself, and not a folder of adapters."""
    return (path / CONFIG).is_file() or (path / WEIGHTS).is_file()


def adapter_folders(source: Path) -> list[Path]:
    """The PEFT adapters right under a folder, by name. Raises AdapterError where there are none."""
    found = sorted(p for p in source.iterdir() if p.is_dir() and is_adapter(p))
    if not found:
        raise AdapterError(
            f"{source} holds no {CONFIG}, nor do the folders in it: give an adapter as peft saves "
            "it, or a folder of such folders"
        )
    return found


def export_adapter(source: str | Path, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write a packed adapter as plain PEFT: float32 factors with the packed ones' values.

    Its config is that of the adapter that was compressed, and its fingerprint of the base too.
    Raises AdapterError and OutputError.
    """
    from safetensors.torch import save_file

    target = Path(path)
    check_free(target, overwrite)
    content = read_packed(source)
    factors = {site.name: (*site.dense(), site.scaling) for site in content.adapter.sites}
    with written_whole(target) as folder:
        save_file(factor_tensors(factors), folder / WEIGHTS, metadata={"format": "pt"})
        if content.base:
            sign_file(folder / WEIGHTS, Base(**content.base))
        text = json.dumps(dict(content.config), indent=2, sort_keys=True) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
    return target


def site_row(site: PackedSite, error: float) -> dict[str, Any]:
    """A site as plain data."""
    return {
        "name": site.name,
        "shape": [site.n, site.k],
        "rank": site.rank,
        "scaling": site.scaling,
        "a": site.a.text(),
        "b": site.b.text(),
        "stored_bits": site.stored_bits() / site.parameters,
        "error": error,
    }
