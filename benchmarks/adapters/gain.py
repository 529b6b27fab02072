"""What is left of an adapter after it was compressed: the share of its gain on held-out text.

The gain of an adapter is how much lower the held-out loss is with it than with the base alone. A
compressed one keeps the share (loss without - loss compressed) / (loss without - loss with).
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.adapters import gain_chart
from benchmarks.adapters.baselines import BASELINES
from benchmarks.adapters.baselines.compressed import Compressed
from benchmarks.adapters.baselines.jd_diagonal import jd_diagonal
from benchmarks.adapters.tasks import TASKS, Rows, loss_of
from benchmarks.finetune.bases import RANK, base_of
from benchmarks.finetune.quality import train
from benchmarks.quality.protocol import Task, smollm2_task
from benchmarks.results_file import FOLDER, write_results
from lowra.adapters.factors import LowRank, balanced
from lowra.adapters.loraquant import LoRAQuant
from lowra.compiler.half_products import half_products
from lowra.compiler.progress import show_progress, stage
from lowra.passes.budget.adapter_budget import Budget, quantize_sites
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.models import inference

NAME, RATE = "adapters_gain", 1e-3
BUDGETS = (1.15, 1.25, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0)
LORAQUANT = (
    *((bits, rho, clip) for bits in (2, 3) for rho in (0.8, 0.9) for clip in ("none", "search")),
    (2, 0.8, "ste"), (3, 0.9, "ste"),
)  # fmt: skip
JD_RANKS = (4, 6, 9)
Factors = Mapping[str, tuple[Tensor, Tensor]]


def run(arguments: argparse.Namespace) -> None:
    """Train and measure what is missing; each row is written as soon as it is there."""
    task = smollm2_task(arguments.data, arguments.work_dir)
    known = _known()
    with show_progress():
        for base in arguments.bases:
            for seed in range(arguments.seeds):
                _measure_base(task, arguments, base, seed, known)
    Console().print(table_of(known["rows"]))
    for line in gain_chart.draw(known, FOLDER):
        Console().print(line)


def _measure_base(
    task: Task, arguments: argparse.Namespace, name: str, seed: int, known: dict[str, Any]
) -> None:
    model: Any = base_of(name, task).model
    examples = [TASKS[kind](arguments.data, task.tokenizer) for kind in arguments.tasks]
    places = [f"{name} / {k} / {arguments.steps} steps / seed {seed}" for k in arguments.tasks]
    family: list[list[LowRank]] = []
    for place, (rows, _) in zip(places, examples, strict=True):
        file = arguments.work_dir / f"{place.replace(' / ', '-').replace(' ', '_')}.safetensors"
        if not file.exists():
            _trained(model, name, rows, arguments.steps, seed, file)
        family.append(_read(file))
    joint = functools.cache(partial(jd_diagonal, family))
    for i, (place, adapter) in enumerate(zip(places, family, strict=True)):
        found = methods(adapter, partial(grams_of, model, examples[i].train, adapter))
        if len(family) > 1:
            found += [(f"JD-Diagonal {r}", partial(_one_of, joint, r, i)) for r in JD_RANKS]
        done = known["rows"].setdefault(place, {})
        known["spectra"].setdefault(place, spectrum(adapter))
        for method, compress in found:
            if method not in done:
                _add_row(model, examples[i].test, adapter, method, compress, done)
                write_results(NAME, {**known, "protocol": protocol()})


def protocol() -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct (bfloat16)", "rank": RANK, "alpha": RANK,
        "optimizer": f"AdamW, rate {RATE:g}, 1 x 512 tokens a step",
        "share": "(loss without - loss compressed) / (loss without - loss with)",
        "calibration of GPTQ, PB-LLM, BiLLM": "8 x 512 tokens of the task's own training text",
    }  # fmt: skip


def methods(
    adapter: Sequence[LowRank], grams: Callable[[], Mapping[str, Tensor]]
) -> list[tuple[str, Callable[[], Compressed]]]:
    """Every way of compressing one adapter, by name."""
    kept: dict[str, Mapping[str, Tensor]] = {}

    def baseline(name: str) -> Compressed:
        if not kept:
            kept["grams"] = grams()
        return BASELINES[name](adapter, kept["grams"])

    def packed(method: Budget | LoRAQuant) -> Compressed:
        sites = [quantized.site for quantized in quantize_sites(adapter, method)]
        return Compressed({s.name: s.dense() for s in sites}, sum(s.stored_bits() for s in sites))

    return [
        *((f"lowra {bits:g}", partial(packed, Budget(bits))) for bits in BUDGETS),
        *((f"LoRAQuant {bits}@{rho} {clip}", partial(packed, LoRAQuant(bits, rho, clip=clip)))
          for bits, rho, clip in LORAQUANT),
        *((name, partial(baseline, name)) for name in BASELINES),
    ]  # fmt: skip


def _one_of(joint: Callable[[int], list[Compressed]], rank: int, place: int) -> Compressed:
    """The adapter at `place` of those that were compressed together."""
    return joint(rank)[place]


def _add_row(
    model: nn.Module, test: Rows, adapter: Sequence[LowRank], method: str,
    compress: Callable[[], Compressed], done: dict[str, Any],
) -> None:  # fmt: skip
    with stage(method, None):
        if "without" not in done:
            set_factors(model, {f.name: (0 * f.a, 0 * f.b) for f in adapter})
            done["without"] = {"loss": loss_of(model, test)}
            set_factors(model, {f.name: (f.a, f.b) for f in adapter})
            done["with"] = {"bits": 16.0, "loss": loss_of(model, test), "share": 1.0}
        compressed = compress()
        set_factors(model, compressed.factors)
        loss = loss_of(model, test)
    without, whole = done["without"]["loss"], done["with"]["loss"]
    bits = compressed.bits / sum(f.parameters for f in adapter)
    done[method] = {"bits": bits, "loss": loss, "share": (without - loss) / (without - whole)}


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer with an adapter, lowra's or peft's, by the name of the dense model's linear."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.rank:
            yield name, module
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module


def factors_of(model: nn.Module) -> list[LowRank]:
    """Copies of the adapter's factors; every scaling of this benchmark is 1."""
    found = []
    for name, layer in layers_of(model):
        if isinstance(layer, QuantizedLinear):
            pair = layer.lora_A, layer.lora_B
        else:
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a, b = (factor.detach().clone().float() for factor in pair if factor is not None)
        found.append(LowRank(name, a, b, 1.0))
    return found


def set_factors(model: nn.Module, factors: Factors) -> None:
    """Let every layer compute with these A and B from now on."""
    for name, layer in layers_of(model):
        a, b = factors[name]
        if isinstance(layer, QuantizedLinear):
            layer.set_adapter(a, b, 1.0)
        else:
            layer.lora_A["default"].weight = nn.Parameter(a.contiguous())
            layer.lora_B["default"].weight = nn.Parameter(b.contiguous())


def _trained(model: Any, name: str, rows: Rows, steps: int, seed: int, file: Path) -> None:
    """Train from a fresh start, the seed's own: B = 0 on a dense base, and what compiling put
    there on ours."""
    drawn = f"-seed_{seed}" if seed else ""
    start = file.with_name(f"start-{name.replace(' ', '_')}{drawn}.safetensors")
    if not start.exists():
        _write(started(factors_of(model), seed), start)
    set_factors(model, {f.name: (f.a, f.b) for f in _read(start)})
    torch.manual_seed(seed)
    train(model, rows.ids, "adamw", RATE, steps, seed, labels=rows.labels)
    _write(factors_of(model), file)


def started(adapter: list[LowRank], seed: int) -> list[LowRank]:
    """Where a seed starts: 0 as the model came; above, with A drawn anew as peft draws it, uniform
    up to 1 / sqrt(k), unless the start is not drawn at random, which B tells."""
    if not seed or any(bool(f.b.any()) for f in adapter):
        return adapter
    generator = torch.Generator().manual_seed(seed)
    shares = [torch.rand(f.rank, f.k, generator=generator) for f in adapter]
    return [
        LowRank(f.name, (2 * share - 1) / f.k**0.5, f.b, f.scaling)
        for f, share in zip(adapter, shares, strict=True)
    ]


def _write(adapter: Sequence[LowRank], file: Path) -> None:
    tensors = {f"{f.name}.{role}": t for f in adapter for role, t in (("A", f.a), ("B", f.b))}
    temporary = file.with_suffix(".tmp")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
    temporary.replace(file)


def _read(file: Path) -> list[LowRank]:
    tensors = load_file(file)
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return [LowRank(name, tensors[f"{name}.A"], tensors[f"{name}.B"], 1.0) for name in names]


def grams_of(model: Any, rows: Rows, adapter: Sequence[LowRank]) -> dict[str, Tensor]:
    """X'X [k, k] of every layer's inputs, with the adapter in place."""
    set_factors(model, {f.name: (f.a, f.b) for f in adapter})
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            grams[name] = grams.get(name, 0) + x.T @ x

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers_of(model)]
    with inference(model), half_products():
        for ids in rows.ids[:8]:
            model(input_ids=ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return grams


def spectrum(adapter: Sequence[LowRank]) -> list[float]:
    """Mean over sites of sigma_i^2 / sum sigma^2, largest first."""
    parts = [balanced(factors).sigma.square() for factors in adapter]
    return torch.stack([p / p.sum().clamp_min(1e-30) for p in parts]).mean(0).tolist()


def _known() -> dict[str, Any]:
    path = FOLDER / f"{NAME}.json"
    if not path.exists():
        return {"rows": {}, "spectra": {}}
    data = json.loads(path.read_text())
    return {"rows": data["rows"], "spectra": data["spectra"]}


def table_of(rows: Mapping[str, Any]) -> Table:
    table = Table(title="share of the adapter's gain that is kept")
    for column in ("adapter", "method", "stored bits", "loss", "share"):
        table.add_column(column, justify="left" if column in ("adapter", "method") else "right")
    for where, done in rows.items():
        measured = [(m, row) for m, row in done.items() if "share" in row]
        for method, row in sorted(measured, key=lambda item: -item[1]["bits"]):
            table.add_row(
                where, method, f"{row['bits']:.3f}", f"{row['loss']:.4f}", f"{row['share']:.1%}"
            )
    return table
