"""A packed weight as kernels take it: checked arguments, its key, descriptors of its tiles."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowra.backends.triton.keys import TERNARY_ID, WeightKey, weight_key
from lowra.backends.triton.tables import DESCRIPTOR_SIZE
from lowra.backends.triton.workspace import outside_graphs
from lowra.compiler.packing import FORMATS, levels_of, row_words
from lowra.compiler.storage import scale_groups
from lowra.compiler.trellis import RUN

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
T = TypeVar("T")
MOST_PLANS = 256
LARGEST = 2**31
"""Above it offsets into codes, codebooks or scales pass 32 bits."""


@dataclass
class Form:
    """What is known of a packed weight once its tensors have been looked at; none of them is held.

    n: rows. dtypes: of activations, that kernels take it with. plans: what launches keep about it
    for as long as the codes live, by their own keys. tiles: descriptors by rows and device, which
    captured graphs read: they stay as long as the codes.
    """

    panels: tuple[int, ...]
    n: int
    k: int
    key: WeightKey
    dtypes: set[torch.dtype] = field(default_factory=set[torch.dtype])
    plans: dict[Any, Any] = field(default_factory=dict[Any, Any])
    tiles: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict[tuple[int, torch.device], Tensor]
    )

    def tiles_of(self, rows: int, device: torch.device) -> Tensor:
        """Descriptors of tiles of at most `rows` rows; see `descriptors`."""
        found = self.tiles.get((rows, device))
        if found is None:
            found = descriptors(self.panels, self.k, self.key.own, rows, device)
            self.tiles[rows, device] = found
        return found

    def keep(self, place: Any, plan: T) -> T:
        """Remember a plan. There is one per number of tokens, so a few hundred are enough."""
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[place] = plan
        return plan


@dataclass
class Weight:
    """The packed arguments of a `lowra::` op, and what kernels are chosen by."""

    codes: Tensor
    books: Tensor
    scales: Tensor | None
    order: Tensor
    form: Form

    @property
    def n(self) -> int:
        return self.form.n

    @property
    def k(self) -> int:
        return self.form.k

    @property
    def panels(self) -> tuple[int, ...]:
        return self.form.panels

    @property
    def key(self) -> WeightKey:
        return self.form.key

    def tensors(self) -> dict[str, Tensor | None]:
        """By the names that kernels give them."""
        found = {
            "codes": self.codes, "books": self.books, "scales": self.scales, "order": self.order,
        }  # fmt: skip
        if TERNARY_ID in self.form.panels[0::2]:
            found["code_bytes"] = self.codes.view(torch.uint8)
        return found


_forms: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], Form]] = {}
"""By the id of the codes, for as long as they live."""


def weight_of(packed: tuple[Any, ...]) -> Weight:
    """The weight of packed op arguments; looked at anew where one of its tensors is another.

    Raises ValueError where a size is not what kernels read.
    """
    return _with_form(packed, _known_form(packed) or _new_form(packed))


def taken(packed: tuple[Any, ...], dtype: torch.dtype) -> Weight | str:
    """The weight, or why no kernel takes it with activations of this dtype. Raises ValueError."""
    form = _known_form(packed)
    if form is None or dtype not in form.dtypes:
        why = declined(packed, dtype)
        if why is not None:
            return why
        form = form or _new_form(packed)
        form.dtypes.add(dtype)
    return _with_form(packed, form)


def _known_form(packed: tuple[Any, ...]) -> Form | None:
    found = _forms.get(id(packed[0]))
    if found is None or found[0]() is not packed[0] or found[1] != _place(packed):
        return None
    return found[2]


def _place(packed: tuple[Any, ...]) -> tuple[Any, ...]:
    codes, books, scales, order, panels, k, group, *_ = packed
    return (
        codes.data_ptr(), books.data_ptr(), 0 if scales is None else scales.data_ptr(),
        order.data_ptr(), codes.numel(), books.numel(), k, group, *panels,
    )  # fmt: skip


def _new_form(packed: tuple[Any, ...]) -> Form:
    codes, form = packed[0], _form_of(packed)
    if id(codes) not in _forms or _forms[id(codes)][0]() is not codes:
        weakref.finalize(codes, _forms.pop, id(codes), None).atexit = False
    _forms[id(codes)] = (weakref.ref(codes), _place(packed), form)
    return form


def _with_form(packed: tuple[Any, ...], form: Form) -> Weight:
    codes, books, scales, order, *_ = packed
    tensors = (codes, books, order) if scales is None else (codes, books, scales, order)
    if not all(tensor.is_contiguous() for tensor in tensors):
        codes, books, order = codes.contiguous(), books.contiguous(), order.contiguous()
        scales = None if scales is None else scales.contiguous()
    return Weight(codes, books, scales, order, form)


def _form_of(packed: tuple[Any, ...]) -> Form:
    codes, books, scales, order, panels, k, group, *_ = packed
    group = 0 if scales is None else group
    own = _check_sizes(codes, books, scales, order, panels, k, group)
    key = _weight_key(tuple(panels), k, group, own)
    return Form(tuple(panels), order.shape[0], k, key)


@functools.lru_cache(maxsize=4096)
def _weight_key(panels: tuple[int, ...], k: int, group: int, own: bool) -> WeightKey:
    # Rows of one width stay as they were: `row_order` is stable.
    return weight_key([*panels], k, group, own, permuted=len(panels) > 2)


def declined(packed: tuple[Any, ...], dtype: torch.dtype) -> str | None:
    """Why no kernel takes this weight or dtype; None where one does."""
    codes, books, scales, order, panels, *_ = packed
    if dtype not in NAMES:
        return f"activations are {dtype}, not one of {', '.join(NAMES.values())}"
    if unknown := {*panels[0::2]} - {*FORMATS}:
        return f"width ids {sorted(unknown)} are unknown"
    for what, tensor, wanted in (
        ("codes", codes, torch.int32), ("codebooks", books, torch.float16),
        ("scales", scales, torch.float16), ("row order", order, torch.int32),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype != wanted:
            return f"{what} are {tensor.dtype}, not {wanted}"
        if tensor is not None and tensor.numel() >= LARGEST:
            return f"{tensor.numel()} {what} are more than 32 bits count"
    return None


def _check_sizes(
    words: Tensor, tables: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int,
) -> bool:  # fmt: skip
    """Whether every row has its own codebook. Raises ValueError on a wrong size; row numbers are
    not looked at (that would wait for the device): kernels write none that is out of range."""
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    rows = sum(count for _, count in pairs)
    own = tables.numel() != sum(levels_of(id) for id, _ in pairs)
    sizes = [
        ("code words", words.numel(), sum(count * row_words(k, id) for id, count in pairs)),
        ("row numbers", order.numel(), rows),
    ]
    if own:
        values = sum(count * levels_of(id) for id, count in pairs)
        sizes.append(("codebook values", tables.numel(), values))
    if scales is not None:
        sizes.append(("scales", scales.numel(), rows * scale_groups(k, group)))
    for what, got, want in sizes:
        if got != want:
            raise ValueError(f"a packed weight [{rows}, {k}] has {got} {what}, not {want}")
    return own


@functools.lru_cache(maxsize=1024)
def descriptors(
    panels: tuple[int, ...], k: int, own: bool, rows: int, device: torch.device
) -> Tensor:
    """int32 [tiles, 8]: panels cut into tiles of at most `rows` rows, widest first (the longest
    work); see DESCRIPTOR and PAST in tables.py."""
    made: list[list[int]] = []
    word = stored = table = 0
    for id, count in zip(panels[0::2], panels[1::2], strict=True):
        planes = FORMATS[id].planes
        per_row = [row_words(k, bits) for bits in planes] or [row_words(k, id)]
        second = word + count * per_row[0]
        for first in range(0, count, rows):
            places = [word + first * per_row[0], second + first * per_row[-1]]
            values = table + (first * levels_of(id) if own else 0)
            made.append(
                [id, stored + first, min(rows, count - first), *places, values, first % RUN, 0]
            )
        word, stored = word + count * sum(per_row), stored + count
        table += levels_of(id) * (count if own else 1)
    assert not made or len(made[0]) == DESCRIPTOR_SIZE
    tiles = torch.tensor(made, dtype=torch.int32).view(-1, DESCRIPTOR_SIZE)
    return outside_graphs(lambda: tiles.to(device), device)
