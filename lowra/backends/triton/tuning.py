"""Which choice was the fastest where it was measured: tables by device, shipped and a user's own.

A table is a JSON file, `tuned/<device>.json` of this package or `$LOWRA_HOME/tuned/<device>.json`,
which goes first; `lowra bench --tune` writes the latter. What no table names, `schedule` decides.
Nothing is measured inside a product.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowra.backends.triton.keys import Blocks, WeightKey
from lowra.backends.triton.schedule import UNPACKED, Choice, choose, processors
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES, Weight
from lowra.compiler.home import home_folder

log = logging.getLogger("lowra")
FORMAT = 1
SHIPPED = Path(__file__).with_name("tuned")
MOST_RANK = 64
"""A choice is measured to have room for factors of this rank; above, `schedule` decides."""
MOST_PARTS = 4096
"""More than any device has programs for; a grid holds 65535."""

SIZES: Mapping[str, tuple[int, ...]] = {
    "rows": (32, 64, 128, 256), "tokens": (16, 32, 64, 128, 256), "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
}  # fmt: skip
"""What blocks may be."""


def choice_for(
    weight: Weight, m: int, dtype: torch.dtype, rank: int, target: Target, device: torch.device
) -> Choice:
    """How m tokens in `dtype` meet `weight` on `device`: as measured, or as `schedule` says."""
    place = ("choice", m, dtype, rank <= MOST_RANK, device, target.name, _read_times[0])
    found = weight.form.plans.get(place)
    if found is None:
        found = _choice(
            weight.key, weight.panels, weight.k, m, dtype, rank <= MOST_RANK, target, device
        )
        weight.form.keep(place, found)
    return found


_read_times = [0]
"""How often tables have been forgotten: what is kept of them elsewhere counts no more then."""


@functools.lru_cache(maxsize=8192)
def _choice(
    key: WeightKey, panels: tuple[int, ...], k: int, m: int, dtype: torch.dtype, fits: bool,
    target: Target, device: torch.device,
) -> Choice:  # fmt: skip
    text = case_of(key.text, sum(panels[1::2]), k, dtype, m)
    tuned = table_of(device_name(device)).get(text) if fits else None
    return tuned or choose(key, panels, k, m, dtype, processors(device), target)


def case_of(key: str, n: int, k: int, dtype: torch.dtype, m: int) -> str:
    """The name of a case in a table. Numbers of tokens up to the next power of two are one case."""
    return f"{key} {n}x{k} {NAMES[dtype]} m{1 << max(0, m - 1).bit_length()}"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def own_table(device: str) -> Path:
    """Where `lowra bench --tune` keeps what it measured on devices of this name."""
    return home_folder() / "tuned" / file_name(device)


@functools.cache
def table_of(device: str) -> Mapping[str, Choice]:
    """Choices by case, shipped ones and over them the user's. A user's file that cannot be read is
    left out, and said once."""
    shipped, own = SHIPPED / file_name(device), own_table(device)
    table = dict(read_table(shipped)) if shipped.exists() else {}
    try:
        table |= read_table(own)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s is left out (%s): delete it, or run lowra bench --tune anew", own, error)
    return table


def forget() -> None:
    """Read tables anew from now on."""
    table_of.cache_clear()
    _choice.cache_clear()
    _read_times[0] += 1


def read_table(path: Path) -> dict[str, Choice]:
    """Choices by case. Raises ValueError for what is no table; OSError."""
    return {case: _parsed(case, entry) for case, entry in read_entries(path).items()}


def read_entries(path: Path) -> dict[str, Any]:
    """The entries of a table as JSON data. Raises ValueError for what is no table; OSError."""
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"no table of format {FORMAT}")
    entries = data.get("choices")
    if not isinstance(entries, dict):
        raise ValueError("it has no choices")
    return entries


def _parsed(case: str, entry: Any) -> Choice:
    if not isinstance(entry, dict):
        raise ValueError(f"{case}: {entry!r} is no choice")
    if entry.get("unpacked") is True:
        return UNPACKED
    for name, legal in SIZES.items():
        if type(entry.get(name)) is not int or entry[name] not in legal:
            raise ValueError(f"{case}: {name} is {entry.get(name)!r}")
    if type(entry.get("parts")) is not int or not 1 <= entry["parts"] <= MOST_PARTS:
        raise ValueError(f"{case}: parts is {entry.get('parts')!r}")
    if entry["rows"] < 16 * entry["warps"]:
        raise ValueError(f"{case}: {entry['rows']} rows are fewer than 16 per warp")
    if entry["tokens"] > 16 and entry["parts"] > 1:
        raise ValueError(f"{case}: parts of sums of more than 16 tokens")
    sizes = (entry[name] for name in ("rows", "tokens", "warps", "stages"))
    return Choice(Blocks(*sizes), entry["parts"])


def entry_of(choice: Choice) -> dict[str, Any]:
    """A choice as JSON data."""
    if choice.blocks is None:
        return {"unpacked": True}
    b = choice.blocks
    return {"rows": b.rows, "tokens": b.tokens, "warps": b.warps, "stages": b.stages,
            "parts": choice.parts}  # fmt: skip


def add_to_table(device: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Put entries into the user's table, beside or in place of those there; whole or not at all.

    Raises ValueError where the file there is no table, which is not thrown away; OSError.
    """
    path = own_table(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a") as lock:
        with contextlib.suppress(ImportError):  # there is none on Windows, and no Triton either
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be adding its own
        there = read_entries(path) if path.exists() else {}
        data = {"format": FORMAT, "device": device, "choices": {**there, **entries}}
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False
        ) as scratch:
            scratch.write(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(scratch.name, path)
    forget()
    return path
