"""Products of packed weights: beside torch, with LoRA, and beside ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowra.backends.activations import activations
from lowra.backends.reference import linear as linear_reference
from lowra.compiler.ops import linear
from lowra.compiler.packing import TERNARY
from lowra.workflows.bench import (
    SHAPES,
    alternate,
    bench_shapes,
    cold_copies,
    cold_dense_copies,
    random_weight,
)

TOKENS = (1, 16, 64, 512)
WIDTHS = (1, TERNARY, 2, 4)
RANK = 16
BLOCK = 32
"""Columns per scale of MatMulNBits, its usual setting; with int8 activations (accuracy level 4)."""

Row = dict[str, Any]


def products(seconds: float) -> list[Row]:
    """Every shape, width and number of tokens, beside torch's bfloat16 linear by turns."""
    return [timing.to_dict() for timing in bench_shapes(TOKENS, torch.bfloat16, seconds)]


def with_lora(seconds: float) -> list[Row]:
    """The share of time that LoRA of rank 16 adds, by turns."""
    n, k = SHAPES[0]
    rows: list[Row] = []
    for width in WIDTHS:
        packed = cold_copies(random_weight(n, k, width))
        rows += [_lora_row(packed, n, k, width, m, seconds) for m in (1, 16)]
    return rows


def _lora_row(
    packed: list[tuple[Any, ...]], n: int, k: int, width: float, m: int, seconds: float
) -> Row:
    x = _tokens(m, k).bfloat16()
    half = len(packed) // 2  # not the weight that has just been read
    factors = (torch.randn(RANK, k).bfloat16(), torch.randn(n, RANK).bfloat16(), 1.0)
    best = _best(
        seconds,
        plain=lambda turn: linear(x, packed[turn % len(packed)], None, None),
        lora=lambda turn: linear(x, packed[(turn + half) % len(packed)], None, factors),
    )
    ratio = best["lora"] / best["plain"]
    return {"n": n, "k": k, "width": width, "m": m, "rank": RANK, **best, "ratio": ratio}


def read_as(seconds: float) -> list[Row]:
    """Products that read activations as integers of 15 or of 7 bits, beside torch's bfloat16."""
    rows: list[Row] = []
    for kind in ("int16", "int8"):
        with activations(kind):
            timings = bench_shapes((16, 64, 512), torch.bfloat16, seconds, widths=(2, 4))
            rows += [{"activations": kind, **timing.to_dict()} for timing in timings]
    return rows


def table_gradients(seconds: float) -> list[Row]:
    """Gradients of codebooks and scales: in C++, in plain torch, and the product that both need."""
    n, k, m = 4096, 4096, 512
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, 2, 4):
            packed = random_weight(n, k, width).op_args()
            grad, x = _tokens(m, n).to(dtype), _tokens(m, k).to(dtype)
            best = _best(
                seconds,
                lowra=partial(_run, torch.ops.lowra.table_gradients, grad, x, packed),
                torch=partial(_run, linear_reference.table_gradients, grad, x, packed),
                product=partial(_dense_gradient, grad, x),
            )
            kind = str(dtype).removeprefix("torch.")
            rows.append({"n": n, "k": k, "m": m, "width": width, "dtype": kind, **best})
    return rows


def _run(op: Any, grad: Tensor, x: Tensor, packed: tuple[Any, ...], _: int) -> object:
    return op(grad, x, *packed)


def _dense_gradient(grad: Tensor, x: Tensor, _: int) -> object:
    return grad.T @ x


def beside_onnx(seconds: float) -> list[Row]:
    """ONNX Runtime's MatMulNBits, lowra and torch's bfloat16 linear by turns, on equal threads."""
    return [row for bits in (2, 4) for row in _onnx_rows(bits, seconds)]


def onnx_missing() -> str | None:
    lacking = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def _onnx_rows(bits: int, seconds: float) -> Iterator[Row]:
    for n, k in SHAPES:
        packed = cold_copies(random_weight(n, k, bits))
        dense = cold_dense_copies(n, k, torch.bfloat16)
        # Larger than the caches together, as the others are.
        sessions = [_session(n, k, bits, seed) for seed in range(len(packed))]
        for m in TOKENS:
            best = _onnx_times(packed, sessions, dense, _tokens(m, k), seconds)
            over = best["onnx"] / best["lowra"]
            stored = bits + 32 / BLOCK
            yield {
                "n": n, "k": k, "bits": bits, "onnx_stored_bits": stored, "m": m, **best,
                "onnx_over_lowra": over,
            }  # fmt: skip


def _onnx_times(
    packed: list[tuple[Any, ...]], sessions: list[Any], dense: list[Tensor], x: Tensor,
    seconds: float,
) -> dict[str, float]:  # fmt: skip
    half, given = x.bfloat16(), {"x": x.numpy()}
    return _best(
        seconds,
        lowra=lambda turn: linear(half, packed[turn % len(packed)], None, None),
        onnx=lambda turn: sessions[turn % len(sessions)].run(None, given),
        dense=lambda turn: functional.linear(half, dense[turn % len(dense)]),
    )


def _tokens(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(0))


def _session(n: int, k: int, bits: int, seed: int) -> Any:
    """An ONNX Runtime session of one MatMulNBits [n, k] with random codes."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    blocks = k // BLOCK
    codes = random.integers(0, 256, (n, blocks, BLOCK * bits // 8), dtype=np.uint8)
    scales = random.random(n * blocks, dtype=np.float32) + 0.5
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=BLOCK, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on while the others have their turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _best(seconds: float, **runs: Callable[[int], object]) -> dict[str, float]:
    """Least seconds of each run, by turns, without gradients."""
    with torch.no_grad():
        return alternate(runs, seconds)
