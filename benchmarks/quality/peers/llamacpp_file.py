"""Files that llama.cpp's own quantizer writes, dequantised (package llama-cpp-python).

Its mixes and its fallbacks: rows of 576 weights do not fit blocks of 256, so that most tensors get
another type than the file is named after; `stored_bits` counts the bytes of the tensors as they
are in the file, and the row says how many tensors have which type.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.peers.column_energy import column_energy
from benchmarks.quality.peers.gguf_model import from_llama, tensor_name, write_gguf
from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.protocol import Task

FILES = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_XXS", "IQ1_S")


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    import gguf

    energy = column_energy(task)
    with tempfile.TemporaryDirectory(dir=task.work_dir) as scratch:
        dense, small = Path(scratch) / "dense.gguf", Path(scratch) / "small.gguf"
        write_gguf(task.model, dense)
        importance = {tensor_name(name): values for name, values in energy.items()}
        run_llama_quantize(dense, small, settings["file"], importance)
        tensors = {t.name: t for t in gguf.GGUFReader(small).tensors}
        weights, bits, types = {}, 0, Counter[str]()
        for name, site in task.sites.items():
            tensor = tensors[tensor_name(name)]
            flat = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
            stored = torch.from_numpy(flat.astype(np.float32)).reshape(site.weight.shape)
            weights[name] = from_llama(name, stored, task.model)
            bits += 8 * int(tensor.n_bytes)
            types[tensor.tensor_type.name] += 1
    return Quantized(weights, bits, facts={"tensor_types": dict(types.most_common())})


def run_llama_quantize(
    source: Path, target: Path, file_type: str, importance: Mapping[str, Tensor]
) -> None:
    """Call `llama_model_quantize` with an importance matrix, float32 [k] per tensor name; empty
    for none. A source that is quantized itself is read as what it stands for."""
    import llama_cpp

    arrays = {name: np.ascontiguousarray(v.numpy(), np.float32) for name, v in importance.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = torch.get_num_threads()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.allow_requantize = True
    if importance:
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama_model_quantize to {file_type} failed with code {code}")


PEER = Peer(
    name="llamacpp-file",
    title="llama.cpp file",
    packages=("llama-cpp-python", "gguf"),
    settings={f"llamacpp-file-{name}": {"file": name, "importance": "E[x^2]"} for name in FILES},
    quantize=quantize,
)
