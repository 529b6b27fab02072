"""The mapping and threshold learner of LowRA (ICML 2025, section 5, listing 1), to the letter.

Every output channel (row) learns a mapping, the level of each code, and thresholds, the borders
between codes, on values divided by the absmax of their block. A sample counts with that absmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.passes.rounding.feedback import scale_index
from lowra.passes.rounding.lloyd import normal_float

ITERATIONS = 2
"""Footnote 3 and appendix E: two iterations are enough."""

AVERAGES = ("iterations", "channels", "none")
"""How thresholds are averaged; see `learn_mapping`."""

START_THRESHOLDS: dict[float, tuple[float, ...]] = {1: (0.0,), 2: (-0.5, 0.16895762, 0.66895762)}
"""Listing 1; NormalFloat's midpoints at other widths, which these are too, up to rounding."""

CHUNK = 1 << 20
"""Weights whose bins are summed at once, so that float64 copies stay small."""


@dataclass(frozen=True)
class Mapping:
    """levels [n, L] and thresholds [n, L - 1], float64, both ascending."""

    levels: Tensor
    thresholds: Tensor


def block_absmax(weight: Tensor, group: int) -> Tensor:
    """float32 [n, groups]: the largest magnitude of each block of float32 [n, k]."""
    index = scale_index(weight.shape[1], group)
    start = torch.zeros(weight.shape[0], int(index[-1]) + 1)
    return start.scatter_reduce_(1, index.expand_as(weight), weight.abs(), "amax")


def start_mapping(width: float, rows: int) -> Mapping:
    """NormalFloat, the same for every row."""
    levels = normal_float(width)
    middle = (levels[1:] + levels[:-1]) / 2
    if width in START_THRESHOLDS:
        middle = torch.tensor(START_THRESHOLDS[width], dtype=torch.float64)
    return Mapping(levels.repeat(rows, 1), middle.repeat(rows, 1))


def learn_mapping(
    values: Tensor, weights: Tensor, width: float, average: str, iterations: int = ITERATIONS
) -> Mapping:
    """Lloyd on values [n, k] with sample weights [n, k], both float32.

    An iteration bins by the thresholds so far, moves each level to the weighted mean of its bin
    and each threshold to the middle of its levels. An empty bin keeps its level. No iteration
    raises a row's error, so stopping a row early would change nothing.

    The paper says that it "takes the average of all thresholds" and not over what:
    "iterations": what a row ends with is the mean of its starting thresholds and those after each
        iteration, so thresholds stay each channel's own, as figure 1 has them;
    "channels": after each iteration, thresholds are averaged over the rows, so that rows share
        them and own their levels;
    "none": the thresholds of the last iteration.
    """
    mapping = start_mapping(width, values.shape[0])
    seen = [mapping.thresholds]
    for _ in range(iterations):
        mapping = _step(values, weights, mapping)
        if average == "channels":
            shared = mapping.thresholds.mean(0, keepdim=True).expand_as(mapping.thresholds)
            mapping = Mapping(mapping.levels, shared)
        seen.append(mapping.thresholds)
    if average == "iterations":
        mapping = Mapping(mapping.levels, torch.stack(seen).mean(0))
    return mapping


def _step(values: Tensor, weights: Tensor, mapping: Mapping) -> Mapping:
    levels = mapping.levels.clone()
    rows = max(1, CHUNK // values.shape[1])
    for begin in range(0, len(values), rows):
        part = slice(begin, begin + rows)
        codes = torch.searchsorted(
            mapping.thresholds[part].float().contiguous(), values[part].contiguous()
        )
        mass = weights[part].double()
        empty = torch.zeros_like(levels[part])
        below = empty.scatter_add(1, codes, mass)
        above = empty.scatter_add(1, codes, mass * values[part])
        # A shared threshold may have passed a level of an empty bin; it stays inside its bin.
        edge = torch.full((empty.shape[0], 1), torch.inf, dtype=empty.dtype)
        borders = torch.cat((-edge, mapping.thresholds[part], edge), 1)
        kept = levels[part].maximum(borders[:, :-1]).minimum(borders[:, 1:])
        levels[part] = torch.where(below > 0, above / below.clamp_min(1e-300), kept)
    return Mapping(levels, (levels[:, 1:] + levels[:, :-1]) / 2)
