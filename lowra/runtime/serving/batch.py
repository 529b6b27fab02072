"""Which adapters each sequence, or each token, of a batch is given; and what layers do with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.runtime.modules import Factors, QuantizedLinear, low_rank

Choice = str | Mapping[str, float] | None
"""One adapter; a weighted sum of several, {name: weight}; or none."""

Choices = Choice | Sequence[Choice] | Sequence[Sequence[Choice]]
"""One choice for all, one per sequence, or one per token of each sequence."""


@dataclass(frozen=True)
class Entries:
    """What `apply_adapters` is told of m tokens: slots and weights [m, J]; `own`: bool [m], whether
    the model's own adapter counts for a token, or one value for all of them."""

    slots: Tensor
    weights: Tensor
    own: Tensor | bool


@dataclass
class Batch:
    """The choices of a batch as numbers.

    names: the adapters that occur; a slot is a place among them. slots, weights: [J] for all alike,
    [b, J] by sequence, [b, t, J] by token. own: whether a sequence's adapters stand on top of the
    model's own one, of the same shape but for J. expand: how many rows of the model's batch a
    sequence becomes, one after another, as `generate` makes them of beams.
    """

    names: tuple[str, ...]
    slots: Tensor
    weights: Tensor
    own: Tensor
    expand: int = 1
    gate: Callable[[str], Tensor | None] | None = None
    _known: dict[tuple[int, ...], Entries] = field(default_factory=dict[tuple[int, ...], Entries])

    def entries(self, where: str, shape: torch.Size, device: torch.device) -> Entries:
        """For the inputs [..., k] of a layer. Raises AdapterError where rows cannot be assigned."""
        key = tuple(shape[:-1])
        if key not in self._known:
            self._known[key] = self._made(where, key, device)
        found = self._known[key]
        weights = None if self.gate is None else self.gate(where)
        if weights is None:
            return found
        if weights.shape != (*key, found.slots.shape[1]):
            raise AdapterError(
                f"{where} is given tokens {list(key)}, its gate gave weights of "
                f"{weights.shape[-1]} adapters for {list(weights.shape[:-1])}: gates serve models "
                "whose linears read the tokens that their layer is given"
            )
        return Entries(found.slots, weights.reshape(found.slots.shape), found.own)

    def _made(self, where: str, shape: tuple[int, ...], device: torch.device) -> Entries:
        tables = (self.slots, self.weights, self.own[..., None])
        count = math.prod(shape)
        if self.slots.dim() == 1:
            rows = [table.expand(count, -1) for table in tables]
        else:
            rows = [self._rows(table, where, shape) for table in tables]
        slots, weights, own = (row.contiguous().to(device) for row in rows)
        alike = bool(own.all()) or (False if not bool(own.any()) else None)
        return Entries(slots, weights, own[:, 0] if alike is None else alike)

    def _rows(self, table: Tensor, where: str, shape: tuple[int, ...]) -> Tensor:
        """[b, J] or [b, t, J] as [m, J], row by row of the inputs [b, t]."""
        lead = table.dim() - 1
        times = 1 if shape[:lead] == tuple(table.shape[:-1]) else self.expand
        rows = table.repeat_interleave(times, dim=0)
        if shape[:lead] != tuple(rows.shape[:-1]) or len(shape) < lead:
            unit = "sequences" if lead == 1 else "sequences and tokens"
            raise AdapterError(
                f"{where} is given inputs [{', '.join(map(str, shape))}, k], the adapters are for "
                f"{' x '.join(map(str, rows.shape[:-1]))} {unit}: name one per row of the batch; "
                "layers that mix rows, such as experts, take one adapter for all"
            )
        inner = math.prod(shape[lead:])
        return rows.flatten(0, lead - 1).repeat_interleave(inner, dim=0)


@dataclass(frozen=True)
class SiteMix:
    """What one layer does while a batch is served: its own product, then the adapters' changes.

    chunks, bounds, scalings, rank: as in adapter_ops.py, slot by slot. rescales: whether an adapter
    multiplies the base's product, which the bias is no part of.
    """

    name: str
    batch: Batch
    pages: Tensor
    chunks: Tensor
    bounds: Tensor
    scalings: Tensor
    rank: int
    rescales: bool

    def __call__(
        self, layer: QuantizedLinear, x: Tensor, bias: Tensor | None, own: Factors | None
    ) -> Tensor:
        entries = self.batch.entries(self.name, x.shape, x.device)
        inside = None if self.rescales else bias
        y = layer.product(x, inside, own if entries.own is True else None)
        if own is not None and isinstance(entries.own, Tensor):
            y = y + low_rank(x, *own) * entries.own.view(*x.shape[:-1], 1).to(x.dtype)
        if len(self.chunks):
            y = torch.ops.lowra.apply_adapters(
                y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.pages, self.chunks,
                self.bounds, self.scalings, entries.slots, entries.weights, self.rank,
            ).view(y.shape)  # fmt: skip
        return y if bias is None or inside is not None else y + bias.to(y.dtype)


def read_choices(adapters: Choices, on_top: Callable[[str], bool], expand: int = 1) -> Batch:
    """Choices as people write them. `on_top` tells of an adapter whether the model's own one counts
    beside it. Raises AdapterError for what is no choice."""
    nested, depth = _nested(adapters)
    names = tuple(dict.fromkeys(name for mix in _flat(nested, depth) for name in mix))
    most = max((len(mix) for mix in _flat(nested, depth)), default=0) or 1

    def numbers(value: Any, level: int) -> tuple[Any, Any, Any]:
        if level:
            rows = [numbers(inner, level - 1) for inner in value]
            return [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
        rest = most - len(value)
        slots = [names.index(name) for name in value] + [-1] * rest
        return slots, [*value.values(), *[0.0] * rest], _counts(value, on_top)

    slots, weights, own = numbers(nested, depth)
    return Batch(
        names, torch.tensor(slots, dtype=torch.int32), torch.tensor(weights, dtype=torch.float32),
        torch.tensor(own), expand,
    )  # fmt: skip


def _counts(mix: Mapping[str, float], on_top: Callable[[str], bool]) -> bool:
    """Whether the model's own adapter counts beside these."""
    found = {name: on_top(name) for name in mix}
    if len(set(found.values())) > 1:
        upper = next(name for name, above in found.items() if above)
        lower = next(name for name, above in found.items() if not above)
        raise AdapterError(
            f"{upper!r} stands on top of the model's own adapter, {lower!r} in its place: their "
            "sum has no base; mix adapters of one kind, or add one of them anew with on_top="
        )
    return all(found.values())


def _nested(adapters: Choices) -> tuple[Any, int]:
    """Choices as {name: weight}, in lists 0, 1 or 2 deep."""
    if _is_choice(adapters):
        return _mix(adapters), 0
    rows: list[Any] = list(adapters)  # type: ignore[arg-type]
    if not rows:
        raise AdapterError("no sequence is given an adapter: pass one choice per row of the batch")
    if all(_is_choice(row) for row in rows):
        return [_mix(row) for row in rows], 1
    tokens = [[_mix(token) for token in row] for row in rows if not _is_choice(row)]
    if len(tokens) != len(rows) or len({len(row) for row in tokens}) != 1 or not tokens[0]:
        raise AdapterError(
            "adapters are named per sequence for some rows, or for unequal numbers of tokens: give "
            "one choice per sequence, or one per token for all sequences alike"
        )
    return tokens, 2


def _is_choice(value: Any) -> bool:
    return value is None or isinstance(value, (str, Mapping))


def _mix(choice: Any) -> dict[str, float]:
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    if not isinstance(choice, Mapping):
        raise AdapterError(f"{choice!r} is no adapter: give a name, {{name: weight}}, or None")
    mix = dict(choice)
    for name, weight in mix.items():
        number = type(weight) in (int, float) and math.isfinite(weight)
        if not isinstance(name, str) or not number:
            raise AdapterError(f"{{{name!r}: {weight!r}}} is no name and finite weight")
    return {name: float(weight) for name, weight in mix.items()}


def _flat(nested: Any, depth: int) -> list[dict[str, float]]:
    return [nested] if not depth else [mix for row in nested for mix in _flat(row, depth - 1)]
