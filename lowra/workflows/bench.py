"""How fast packed products run here: beside torch's dense linear and beside the read rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.compiler.errors import LowraError
from lowra.compiler.ops import linear
from lowra.compiler.packing import FORMATS, TERNARY, levels_of, width_id
from lowra.compiler.rotation import Rotation, largest_block
from lowra.compiler.storage import ROW_SCALES, PackedWeight, pack_weight
from lowra.compiler.trellis import codes_of
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.models import inference

COLD_BYTES = 64 << 20
"""Weights in turn are at least so large together: larger than the caches of most machines."""

MOST_COPIES = 64
SHAPES = ((4096, 4096), (14336, 4096))
WIDTHS = (1, TERNARY, 2, 4)


@dataclass(frozen=True)
class Timing:
    """One kind of weight [n, k] and m tokens: the least seconds of one product, packed and dense
    by turns, and the bytes per second that summing a large tensor read meanwhile."""

    kernel: str
    n: int
    k: int
    bits: float
    m: int
    uses: int
    bytes: int
    seconds: float
    dense_seconds: float
    read_rate: float

    @property
    def ratio(self) -> float:
        """How many times faster than the dense linear."""
        return self.dense_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, and what follows from them."""
        rate = self.bytes / self.seconds
        derived = {"rate": rate, "share_of_read_rate": rate / self.read_rate, "ratio": self.ratio}
        return {**asdict(self), **derived}


def bench_shapes(
    tokens: tuple[int, ...], dtype: torch.dtype, seconds: float,
    shapes: tuple[tuple[int, int], ...] = SHAPES, widths: tuple[float, ...] = WIDTHS,
) -> Iterator[Timing]:  # fmt: skip
    """Timings of seeded random weights, every width and shape, for each number of tokens; narrow
    ones hold trellis codes, as the default makes them."""
    for n, k in shapes:
        for width in widths:
            weight = random_weight(n, k, width, trellis=True)
            for m in tokens:
                yield bench_weight(weight, m, dtype, seconds)


def bench_model(model: nn.Module, tokens: tuple[int, ...], seconds: float) -> Iterator[Timing]:
    """Timings of the different weights of a compressed model, without their adapters."""
    for alike in weights_of(model):
        for m in tokens:
            yield bench_weight(alike[0].stored(), m, alike[0].dtype, seconds, uses=len(alike))


def weights_of(model: nn.Module) -> list[list[QuantizedLinear]]:
    """Layers by shape and widths. Raises LowraError for a model without a packed one."""
    kinds: dict[tuple[Any, ...], list[QuantizedLinear]] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            widths = tuple(width for width, _ in module.panels)
            kinds.setdefault((module.n, module.k, widths), []).append(module)
    if not kinds:
        raise LowraError("the model has no packed weight to measure: compile it first")
    return list(kinds.values())


def random_weight(n: int, k: int, *widths: float, trellis: bool = False) -> PackedWeight:
    """A weight [n, k] with as many rows of each width, shared codebooks, row scales and rotation,
    as compiling makes; rows of 1, 2 and 3 bits with plain or with trellis codes."""
    generator = torch.Generator().manual_seed(0)
    of_width = {width: width_id(width, trellis) for width in widths}
    ids = torch.tensor([*of_width.values()], dtype=torch.uint8)
    row_widths = ids.repeat_interleave(-(-n // len(widths)))[:n]
    counts = {int(id): int((row_widths == id).sum()) for id in ids}
    codes = [_random_codes(id, rows, k, generator) for id, rows in counts.items()]
    books = {w: torch.linspace(-1.0, 1.0, levels_of(id)) ** 3 for w, id in of_width.items()}
    scales = torch.rand(n, 1, generator=generator) + 0.5
    rotation = Rotation(0, largest_block(k))
    return pack_weight(torch.cat(codes), row_widths, books, scales, ROW_SCALES, rotation)


def _random_codes(id: int, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """uint8 [rows, k]."""
    codes = torch.randint(levels_of(id), (rows, k), generator=generator, dtype=torch.uint8)
    return codes_of(codes >> 1) if FORMATS[id].trellis else codes


def bench_weight(
    weight: PackedWeight, m: int, dtype: torch.dtype, seconds: float, uses: int = 1
) -> Timing:
    """Packed and dense products by turns for about `seconds`, on weights that are in no cache."""
    packed = cold_copies(weight)
    dense = cold_dense_copies(weight.n, weight.k, dtype)
    x = torch.randn(m, weight.k, generator=torch.Generator().manual_seed(0)).to(dtype)
    buffer = torch.zeros(COLD_BYTES // 8, dtype=torch.int64)
    with torch.no_grad():
        best = alternate(
            {
                "packed": lambda turn: linear(x, packed[turn % len(packed)], None, None),
                "dense": lambda turn: functional.linear(x, dense[turn % len(dense)]),
                "read": lambda _: buffer.sum(),
            },
            seconds,
        )
    return Timing(
        kernel_name(packed[0], dtype), weight.n, weight.k, weight.stored_bits() / weight.weights,
        m, uses, weight.stored_bits() // 8, best["packed"], best["dense"],
        COLD_BYTES / best["read"],
    )  # fmt: skip


def kernel_name(packed: tuple[Any, ...], dtype: torch.dtype) -> str:
    """The kernel that serves the packed op arguments on this machine."""
    from lowra.backends.cpu.activations import activations_for
    from lowra.backends.cpu.product import prepared

    ready = prepared(packed, activations_for(dtype, packed[5]))
    return "reference" if ready is None else ready.name


def cold_copies(weight: PackedWeight) -> list[tuple[Any, ...]]:
    """The op arguments of equal weights, together larger than caches."""
    size_bytes = weight.codes.numel() * 4
    count = min(MOST_COPIES, -(-COLD_BYTES // size_bytes))
    _, *rest = weight.op_args()
    return [(weight.codes.clone(), *rest) for _ in range(count)]


def cold_dense_copies(n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    count = min(MOST_COPIES, -(-COLD_BYTES // (n * k * dtype.itemsize)))
    first = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [first, *(first.clone() for _ in range(count - 1))]


def alternate(runs: dict[str, Callable[[int], object]], seconds: float) -> dict[str, float]:
    """The least time of each run; they take turns, at least five times each."""
    best = dict.fromkeys(runs, float("inf"))
    end, turn = time.perf_counter() + seconds, 0
    while turn < 5 or time.perf_counter() < end:
        for name, run in runs.items():
            begun = time.perf_counter()
            run(turn)
            best[name] = min(best[name], time.perf_counter() - begun)
        turn += 1
    return best


def tokens_per_second(
    models: dict[str, nn.Module], prompt: Tensor, tokens: int, rounds: int = 3
) -> dict[str, float]:
    """Greedy tokens per second of each model at batch 1, the best of rounds that take turns.

    The time of the prompt [1, length] alone is taken off.
    """
    runs: dict[str, Callable[[int], object]] = {}
    for name, model in models.items():
        for count in (1, 1 + tokens):
            runs[f"{name} {count}"] = _writing(model, prompt, count)
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run(turn)
            best[name] = min(best[name], time.perf_counter() - begun)
    return {name: tokens / (best[f"{name} {1 + tokens}"] - best[f"{name} 1"]) for name in models}


def _writing(model: nn.Module, prompt: Tensor, count: int) -> Callable[[int], object]:
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise LowraError(f"{type(model).__name__} does not generate text")

    def write(_: int) -> object:
        with inference(model):
            return generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip

    return write
