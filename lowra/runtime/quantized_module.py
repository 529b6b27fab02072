"""What quantized layers have in common: one packed weight, held as buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.correction import Correction
from lowra.compiler.ops import linear
from lowra.compiler.packing import panels_of, row_order, unpack_nibbles
from lowra.compiler.storage import PackedWeight, encode_tables, from_tensors
from lowra.runtime.trained_tables import TrainedTables


def is_lora(name: str) -> bool:
    """True for the name of a LoRA factor in a state dict."""
    return name.endswith((".lora_A", ".lora_B"))


class QuantizedModule(nn.Module):
    """Holds one packed weight [n, k] as buffers, in their storage dtypes whatever `.to` is asked.

    Buffers `codes`, `codebooks`, `scales` and `row_widths` are the stored tensors; the row order is
    derived from the widths and not stored. Only the compute dtype follows `.to(dtype)`. Codebooks
    and scales that take fewer bits in a file are held decoded; `encoded` has what the state dict
    gives in their place, made anew where they were trained.
    A frozen low-rank correction is two more packed weights, `correction_A` [r, k] and
    `correction_B` [r, n]; `weight` includes it. While codebooks or scales train, `tables` says how
    far they moved, and the buffers follow.
    """

    KEEP_DTYPE = ("codebooks", "scales")
    codes: Tensor
    codebooks: Tensor
    scales: Tensor | None
    row_widths: Tensor
    order: Tensor
    compute: Tensor
    correction_A: QuantizedModule | None
    correction_B: QuantizedModule | None
    tables: TrainedTables | None

    def __init__(
        self, weight: PackedWeight, dtype: torch.dtype, correction: Correction | None = None
    ) -> None:
        nn.Module.__init__(self)  # not super(): nn.Linear's would make a dense weight
        self.n, self.k = weight.n, weight.k
        self.group, self.rotation = weight.group, weight.rotation
        self.panels = weight.panels
        self.encoded = dict(weight.encoded)
        held = {"codes": weight.codes, "row_widths": weight.tensors()["row_widths"]}
        held |= {"codebooks": weight.codebooks, "scales": weight.scales}
        for role, tensor in held.items():
            self.register_buffer(role, tensor, persistent=role not in self.encoded)
        self.register_buffer("order", weight.order, persistent=False)
        self.register_buffer("compute", torch.empty(0, dtype=dtype), persistent=False)
        self.register_load_state_dict_post_hook(_refresh)
        self.correction_A = self.correction_B = self.tables = None
        self._followed: PackedWeight | None = None
        if correction is not None:
            self.correction_A = QuantizedModule(correction.a, dtype)
            self.correction_B = QuantizedModule(correction.b, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype in which the layer takes and gives activations."""
        return self.compute.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight [n, k], correction included, dequantized anew on every access."""
        return self._dense()

    def _dense(self) -> Tensor:
        packed = self.packed()
        if self.tables is not None and torch.is_grad_enabled():
            base = self.tables.dense(packed, self.dtype)
        else:
            base = torch.ops.lowra.dequantize(*packed, self.dtype)
        if self.correction_A is None or self.correction_B is None:
            return base
        return base + self.correction_B.weight.T @ self.correction_A.weight

    @property
    def correction(self) -> Correction | None:
        """The correction this layer holds, if any; shares its tensors."""
        if self.correction_A is None or self.correction_B is None:
            return None
        return Correction(self.correction_A.stored(), self.correction_B.stored())

    def corrected(self, x: Tensor, y: Tensor) -> Tensor:
        """y + C x for inputs x [..., k] and what the packed weight makes of them, y [..., n]."""
        if self.correction_A is None or self.correction_B is None:
            return y
        low = linear(x, self.correction_A.packed(), None, None)
        table = torch.ops.lowra.dequantize(*self.correction_B.packed(), x.dtype)
        return y + low @ table

    def packed(self) -> tuple[Any, ...]:
        """The packed arguments of the `lowra::` ops."""
        if self._modules.get("tables") is not None:
            self._follow_tables()  # pyright: ignore
        held, rotation = self._buffers, self.rotation  # attributes of a module are found slowly
        flat = [value for panel in self.panels for value in panel]
        return (
            held["codes"], held["codebooks"], held["scales"], held["order"],
            flat, self.k, self.group, rotation.seed, rotation.block,
        )  # fmt: skip

    @torch.compiler.disable
    def _follow_tables(self) -> None:
        """Hold the tables that training has moved, as they will be stored."""
        now = None if self.tables is None else self.tables.rounded()
        if now is self._followed or now is None:
            return
        device, self._followed = self.codes.device, now
        self.codebooks = now.codebooks.to(device)
        self.scales = None if now.scales is None else now.scales.to(device)
        self.encoded = dict(now.encoded)

    def stored(self) -> PackedWeight:
        """The packed weight this layer holds, without a correction; shares its tensors."""
        self._follow_tables()  # pyright: ignore
        widths = unpack_nibbles(self.row_widths, self.n)
        return PackedWeight(
            self.n, self.k, widths, self.codes, self.codebooks, self.scales,
            self.group, self.rotation, self.stored_tables(),
        )  # fmt: skip

    def stored_tables(self) -> dict[str, Tensor]:
        """By role, what a file holds in place of codebooks and scales in 16 bits; else empty."""
        self._follow_tables()  # pyright: ignore
        if not self.encoded:
            return {}
        old = self._decode(self.encoded)
        if torch.equal(old.codebooks, self.codebooks) and _same(old.scales, self.scales):
            return self.encoded
        widths = unpack_nibbles(self.row_widths, self.n)
        fresh = encode_tables(widths, self.codebooks, self.scales, self.group, old.compact)
        return {role: tensor for role, tensor in fresh.items() if role in self.encoded}

    def _decode(self, encoded: dict[str, Tensor]) -> PackedWeight:
        held = {"codes": self.codes, "row_widths": self.row_widths, "codebooks": self.codebooks}
        if self.scales is not None:
            held["scales"] = self.scales
        return from_tensors(held | encoded, self.n, self.k, self.group, self.rotation)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        self._follow_tables()  # pyright: ignore
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + role: t for role, t in self.stored_tables().items()}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        found = {r: state_dict[prefix + r] for r in self.encoded if prefix + r in state_dict}
        missing_keys += [prefix + role for role in self.encoded if role not in found]
        unexpected_keys[:] = [key for key in unexpected_keys if key[len(prefix) :] not in found]
        if found:
            packed = self._decode(self.encoded | found)
            self.encoded = dict(packed.encoded)
            self.codebooks, self.scales = packed.codebooks, packed.scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: getattr(self, name) for name in self.KEEP_DTYPE}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(device=new.device))
        return self


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _refresh(module: nn.Module, _incompatible: Any) -> None:
    """Derive panels and row order again after row widths were loaded."""
    assert isinstance(module, QuantizedModule)
    widths = unpack_nibbles(module.row_widths, module.n)
    module.panels = panels_of(widths)
    module.order = row_order(widths)
