"""The module view: quantized layers that stand where the model had dense ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.compiler.correction import Correction
from lowra.compiler.ops import linear
from lowra.compiler.packing import panels_of, row_order, unpack_nibbles
from lowra.compiler.storage import PackedWeight, encode_tables, from_tensors
from lowra.runtime.dense_weight import DenseWeight, read_only


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
    `correction_B` [r, n]; `weight` includes it.
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
        self.correction_A = self.correction_B = None
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
        base = torch.ops.lowra.dequantize(*self.packed(), self.dtype)
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
        held, rotation = self._buffers, self.rotation  # attributes of a module are found slowly
        flat = [value for panel in self.panels for value in panel]
        return (
            held["codes"], held["codebooks"], held["scales"], held["order"],
            flat, self.k, self.group, rotation.seed, rotation.block,
        )  # fmt: skip

    def stored(self) -> PackedWeight:
        """The packed weight this layer holds, without a correction; shares its tensors."""
        widths = unpack_nibbles(self.row_widths, self.n)
        return PackedWeight(
            self.n, self.k, widths, self.codes, self.codebooks, self.scales,
            self.group, self.rotation, self.stored_tables(),
        )  # fmt: skip

    def stored_tables(self) -> dict[str, Tensor]:
        """By role, what a file holds in place of codebooks and scales in 16 bits; else empty."""
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


Factors = tuple[Tensor, Tensor, float]


class Served(Protocol):
    """What a layer computes while a pool serves adapters, in place of its own forward."""

    def __call__(
        self, layer: QuantizedLinear, x: Tensor, bias: Tensor | None, own: Factors | None
    ) -> Tensor: ...


class QuantizedLinear(QuantizedModule, nn.Linear):
    """A linear layer on a packed weight, with optional correction and LoRA:
    y = W x + C x + bias + scaling B A x.

    `lora_A` [r, k] and `lora_B` [n, r] are the only parameters that require grad. In training mode
    the adapter reads x with a share `dropout` of its elements dropped (LoRA's dropout).
    It is an `nn.Linear` to tools that look for one, such as PEFT, which put layers of their own
    around it. They may read `weight`; what would write into it raises.
    """

    def __init__(
        self, weight: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype,
        adapter: tuple[Tensor, Tensor, float] | None = None, correction: Correction | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weight, dtype, correction)
        self.in_features, self.out_features = weight.k, weight.n
        self.bias = bias
        self.adapter_enabled = True
        self.served: Served | None = None
        self.scaling = 0.0
        self.dropout = 0.0
        self.lora_A = self.lora_B = None
        if adapter is not None:
            a, b, scaling = adapter
            self.set_adapter(a.to(dtype), b.to(dtype), scaling)

    def set_adapter(self, a: Tensor, b: Tensor, scaling: float) -> None:
        """Compute with these factors from now on, in their own dtype: A [r, k] and B [n, r]."""
        self.lora_A = nn.Parameter(a.detach().contiguous())
        self.lora_B = nn.Parameter(b.detach().contiguous())
        self.scaling = scaling

    def drop_adapter(self) -> None:
        """Compute with the base alone from now on."""
        self.lora_A = self.lora_B = None
        self.scaling = 0.0

    @property
    def weight(self) -> DenseWeight | Tensor:
        """A dense copy of the weight [n, k], correction included, made anew on every access."""
        return read_only(self._dense())

    @property
    def W_q(self) -> Tensor:
        """The packed codes, under the name that PEFT looks at for a quantized layer's device.

        With it PEFT takes `dequantize` where it needs values, and leaves `weight` alone.
        """
        return self.codes

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The dense matrix [n, k] that the layer multiplies with, its own adapter included."""
        dense = self._dense()
        if self.lora_A is None or self.lora_B is None or not self.adapter_enabled:
            return dense
        return dense + self.scaling * (self.lora_B.to(dense.dtype) @ self.lora_A.to(dense.dtype))

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Attributes of a module are found slowly: here that would take as long as a small product.
        found = self._parameters.get
        a, b, bias = found("lora_A"), found("lora_B"), found("bias")
        factors = (a, b, self.scaling) if a is not None and b is not None else None
        if factors is None and self.lora_A is not None and self.lora_B is not None:
            factors = (self.lora_A, self.lora_B, self.scaling)
        factors = factors if self.adapter_enabled else None
        bias = self.bias if bias is None else bias
        if self.served is not None:
            return self.served(self, x, bias, factors)
        if factors is not None and self.dropout and self.training:
            y = self.product(x, bias, None)
            return y + low_rank(functional.dropout(x, self.dropout), *factors)
        return self.product(x, bias, factors)

    def product(self, x: Tensor, bias: Tensor | None, factors: Factors | None) -> Tensor:
        """W x + C x + bias, and scaling B A x for factors (A, B, scaling)."""
        y = linear(x, self.packed(), bias, factors)
        return y if "correction_A" not in self._modules else self.corrected(x, y)

    def extra_repr(self) -> str:
        correction = self.correction
        extra = 0 if correction is None else correction.stored_bits()
        bits = (self.stored().stored_bits() + extra) / (self.n * self.k)
        return f"in_features={self.k}, out_features={self.n}, bits={bits:.3f}, rank={self.rank}"


def low_rank(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """scaling (x A') B'"""
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scaling


class QuantizedEmbedding(QuantizedModule):
    """An embedding on a packed weight, for one that is tied to a compressed output head."""

    def __init__(
        self, weight: PackedWeight, dtype: torch.dtype, source: nn.Embedding,
        correction: Correction | None = None,
    ) -> None:  # fmt: skip
        super().__init__(weight, dtype, correction)
        self.num_embeddings, self.embedding_dim = weight.n, weight.k
        self.padding_idx = source.padding_idx
        # Some models multiply what their embedding returns (BART, Gemma).
        self.embed_scale = getattr(source, "embed_scale", None)

    def forward(self, ids: Tensor) -> Tensor:
        rows = functional.embedding(ids, self.weight)
        return rows if self.embed_scale is None else rows * self.embed_scale
