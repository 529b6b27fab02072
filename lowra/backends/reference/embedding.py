"""Plain-torch meaning of `lowra::embedding`: rows of a packed weight.

A few rows on a CPU are read without unpacking the others: every row as if it lay in each panel, and
the panel that it lies in is kept. Many rows, and rows on a GPU, are looked up in the whole weight,
which kernels unpack faster than torch gathers codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowra.backends.reference.linear import scale_columns, working_dtype
from lowra.compiler import trellis
from lowra.compiler.ops import LIBRARY
from lowra.compiler.packing import FORMATS, levels_of, row_words, stored_bits_of, unpack_rows
from lowra.compiler.rotation import Rotation, unrotate


def embedding(
    ids: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W[ids] [..., k]. Raises IndexError for an id that is no row."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    reads = ids.numel() * len(panels) // 2  # a row is read once per panel
    if codes.is_cpu and 0 < reads < order.shape[0]:
        return few_rows(ids, *packed, dtype)
    return functional.embedding(ids, torch.ops.lowra.dequantize(*packed, dtype))


def few_rows(
    ids: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same, to the bit, without unpacking other rows."""
    rotation, n = Rotation(seed, block), order.shape[0]
    working = working_dtype(dtype)
    place = torch.empty_like(order).scatter_(
        0, order.long(), torch.arange(n, dtype=order.dtype, device=order.device)
    )
    stored = place.index_select(0, ids.reshape(-1)).long()
    rows = torch.zeros(stored.shape[0], k, dtype=working, device=codes.device)
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    shared = codebooks.numel() == sum(levels_of(id) for id, _ in pairs)
    words = codes.split([count * row_words(k, id) for id, count in pairs])
    sizes = [levels_of(id) * (1 if shared else count) for id, count in pairs]
    first = 0
    for (id, count), panel, table in zip(pairs, words, codebooks.split(sizes), strict=True):
        inside = (stored - first).clamp(0, count - 1)
        fields = _codes_of(panel, inside, count, k, id).long()
        own = None if shared else table.view(count, -1)[inside].to(working)
        values = table.to(working)[fields] if own is None else own.gather(1, fields)
        here = (stored >= first) & (stored < first + count)
        rows = torch.where(here[:, None], values, rows)
        first += count
    if scales is not None:
        rows = rows * scale_columns(scales.view(n, -1)[stored].to(working), k, group)
    if not rotation.active:
        rows = rows.to(dtype)
    return unrotate(rows, rotation).to(dtype).view(*ids.shape, k)


def _codes_of(words: Tensor, rows: Tensor, count: int, k: int, id: int) -> Tensor:
    """Codes int32 [rows, k] of some rows of a panel."""
    if not FORMATS[id].trellis:
        return unpack_rows(_of_rows(words, rows, count, k, id), rows.shape[0], k, id)
    behind = trellis.window(rows)
    read = _of_rows(words, behind.clamp_min(0).reshape(-1), count, k, id)
    stored = stored_bits_of(read, behind.numel(), k, id).view(*behind.shape, k)
    return trellis.codes_in_window(torch.where((behind < 0).unsqueeze(2), 0, stored))


def _of_rows(words: Tensor, rows: Tensor, count: int, k: int, id: int) -> Tensor:
    """Of a panel's words, those of `rows`, plane after plane as `unpack_rows` takes them."""
    per_row = [row_words(k, bits) for bits in FORMATS[id].planes] or [row_words(k, id)]
    planes = words.split([count * each for each in per_row])
    chosen = [
        plane.view(count, each)[rows].reshape(-1)
        for plane, each in zip(planes, per_row, strict=True)
    ]
    return torch.cat(chosen)


torch.library.impl("lowra::embedding", "CompositeExplicitAutograd", embedding, lib=LIBRARY)
