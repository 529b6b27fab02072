"""Serving many packed adapters beside one base: memory, swap-in, and a mixed batch.

Random rank-16 adapters of every linear, packed as LoRAQuant 2@0.8 with a scale per vector; a
thousand are registered (folders that link to four), 64 fit into the pool. Times are CPU time of one
thread, which other work on the machine disturbs little. Writes benchmarks/results/adapters.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import lowra
from benchmarks.results_file import write_results
from lowra.runtime.adapter_files import write_files
from lowra.runtime.adapter_view import base_of
from lowra.runtime.compiled import compiled
from lowra.runtime.module_view import adapters_disabled, quantized_linears
from lowra.runtime.serving.pool import AdapterPool

RANK, FILES, REGISTERED, RESIDENT, BATCH = 16, 4, 1000, 64, 32
METHOD = {"bits": 2, "rho": 0.8, "group": -1, "clip": "none"}


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = lowra.load(arguments.model).eval()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), adapters_disabled(model):
        folders = adapter_folders(model, Path(scratch))
        about = {"model": arguments.name, "registered": REGISTERED, "rank": RANK}
        result = {**about, "method": METHOD, **measured(model, folders)}
    Console().print(result)
    Console().print(f"wrote {write_results('adapters', result)}")


def adapter_folders(model: nn.Module, scratch: Path) -> list[Path]:
    """REGISTERED folders of packed adapters, hard links to the files of a few."""
    made: list[Path] = []
    for seed in range(FILES):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        factors = {
            name: (normal(RANK, layer.k), 0.1 * normal(layer.n, RANK), 1.0)
            for name, layer in quantized_linears(model).items()
        }
        info = compiled(model)
        assert info is not None
        plain = scratch / f"plain{seed}"
        plain.mkdir()
        write_files(plain, factors, base_of(model, info, with_adapter=True), factors, "Model")
        lowra.compress_adapter(plain, scratch / f"packed{seed}", **METHOD)
        made.append(scratch / f"packed{seed}")
    folders: list[Path] = []
    for i in range(REGISTERED):
        folder = scratch / f"adapter{i:04}"
        folder.mkdir()
        for file in made[i % FILES].iterdir():
            os.link(file, folder / file.name)
        folders.append(folder)
    return folders


def measured(model: nn.Module, folders: list[Path]) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    pool = AdapterPool(model, int(RESIDENT * size * 1.05))
    begun = time.process_time()
    for folder in folders:
        pool.add(folder.name, folder)
    registered = time.process_time() - begun
    names, swaps = [folder.name for folder in folders], list[float]()
    for name in names[: 2 * RESIDENT]:
        begun = time.process_time()
        with pool.use(name):
            swaps.append(time.process_time() - begun)
    status = pool.status()
    ids = torch.randint(3, 1000, (BATCH, 1), generator=torch.Generator().manual_seed(0))

    def step(adapters: Any) -> float:
        with pool.use(adapters):
            return best_seconds(lambda: model(input_ids=ids, use_cache=False))

    none, shared, mixed = step(None), step(names[0]), step(names[:BATCH])
    return {
        "file_bytes": size, "bytes_in_pool": pool.size_bytes(names[0]),
        "resident": len(status.resident), "pool_bytes": status.budget_bytes,
        "register_seconds_each": registered / len(folders),
        "swap_in_ms": {"median": 1e3 * statistics.median(swaps), "worst": 1e3 * max(swaps)},
        "batch": BATCH, "step_ms": {
            "no adapter": 1e3 * none, "one adapter": 1e3 * shared,
            "as many as sequences": 1e3 * mixed,
        },
    }  # fmt: skip


def best_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    call()
    seconds: list[float] = []
    for _ in range(repeats):
        begun = time.process_time()
        call()
        seconds.append(time.process_time() - begun)
    return min(seconds)
