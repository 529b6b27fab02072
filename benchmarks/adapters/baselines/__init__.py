"""Other ways of storing adapters: dequantised factors, and every bit that they would take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from benchmarks.adapters.baselines.billm import billm
from benchmarks.adapters.baselines.compressed import Compressed
from benchmarks.adapters.baselines.gptq import gptq
from benchmarks.adapters.baselines.pb_llm import pb_llm
from benchmarks.adapters.baselines.rtn import binary, rtn
from lowra.adapters.factors import LowRank

Baseline = Callable[[Sequence[LowRank], Mapping[str, Tensor]], Compressed]
"""Factors of one adapter and, by site, the Gram matrix X'X [k, k] of the inputs -> what is kept."""

BASELINES: dict[str, Baseline] = {
    "BIN": binary,
    **{f"RTN {bits}": partial(rtn, bits=bits) for bits in (1, 2, 3, 4)},
    **{f"RTN {bits} row-major": partial(rtn, bits=bits, row_major=True) for bits in (1, 2, 3, 4)},
    **{f"GPTQ {bits}": partial(gptq, bits=bits) for bits in (2, 3, 4)},
    "PB-LLM": pb_llm,
    "BiLLM": billm,
}
"""JD-Diagonal is not among them: it compresses several adapters at once (`jd_diagonal`)."""
