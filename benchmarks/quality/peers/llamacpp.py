"""llama.cpp's K- and I-quants as formats: every site in one type (package llama-cpp-python).

Their blocks of 256 do not fit rows of 576 weights, and llama.cpp then falls back to other types of
4 bits and more (`llamacpp_file` measures that). Here four rows are joined into one of a multiple of
256, so that each format shows what it can do at its own size: kinder to it than any file is. The
importance of a column is E[x^2] over the calibration text, as in an importance matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.peers.column_energy import column_energy
from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.protocol import Task

JOINED, BLOCK = 4, 256
TYPES = (
    "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M",
    "IQ1_S",
)  # fmt: skip


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    energy = column_energy(task)

    def one(name: str) -> tuple[Tensor, int]:
        weight = task.sites[name].weight.detach().float()
        return round_trip(weight, energy[name], settings["type"])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # ctypes lets go of the interpreter
        made = dict(zip(task.sites, pool.map(one, task.sites), strict=True))
    weights = {name: dense for name, (dense, _) in made.items()}
    return Quantized(weights, 8 * sum(size for _, size in made.values()))


def round_trip(weight: Tensor, energy: Tensor, kind: str) -> tuple[Tensor, int]:
    """`weight` float32 [n, k] through ggml's `kind` and back, and its bytes.

    `energy` float32 [k] weights the columns.
    """
    import gguf

    n, k = weight.shape
    joined = JOINED if n % JOINED == 0 and (k * JOINED) % BLOCK == 0 else 1
    if k * joined % BLOCK:
        raise ValueError(f"{kind} stores blocks of {BLOCK} weights; [{n}, {k}] cannot be cut so")
    number = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    rows = np.ascontiguousarray(weight.numpy().reshape(n // joined, k * joined))
    importance = np.ascontiguousarray(np.tile(energy.numpy(), joined).astype(np.float32))
    data = np.zeros((rows.shape[0], rows.shape[1] // block * block_bytes), dtype=np.uint8)
    written = _ggml_quantize_chunk()(
        int(number), _floats(rows), data.ctypes.data_as(ctypes.c_void_p), 0, *rows.shape,
        _floats(importance),
    )  # fmt: skip
    if written != data.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {kind}, the format has {data.nbytes}")
    dense = gguf.quants.dequantize(data, number).reshape(n, k)
    return torch.from_numpy(dense), data.nbytes


def _floats(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def _ggml_quantize_chunk() -> Any:
    """size_t ggml_quantize_chunk(type, src, dst, start, rows, columns, importance)."""
    from llama_cpp import _ggml

    function = _ggml.libggml.ggml_quantize_chunk
    floats, whole = ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    function.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, whole, whole, whole, floats]
    function.restype = ctypes.c_size_t
    return function


PEER = Peer(
    name="llamacpp",
    title="llama.cpp type, rows joined",
    packages=("llama-cpp-python", "gguf"),
    settings={
        f"llamacpp-{kind}": {"type": kind, "rows_joined": JOINED, "importance": "E[x^2]"}
        for kind in TYPES
    },
    quantize=quantize,
)
