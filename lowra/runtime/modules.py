"""The module view: quantized layers that stand where the model had dense ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.compiler.correction import Correction
from lowra.compiler.ops import linear
from lowra.compiler.storage import PackedWeight
from lowra.runtime.dense_weight import DenseWeight, read_only
from lowra.runtime.quantized_module import QuantizedModule

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
        """Compute with these factors from now on, in their own dtype: A [r, k] and B [n, r].

        They go where the codes are.
        """
        device = self.codes.device
        self.lora_A = nn.Parameter(a.detach().to(device).contiguous())
        self.lora_B = nn.Parameter(b.detach().to(device).contiguous())
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
        packed = self.packed()
        if self._modules.get("tables") is not None and torch.is_grad_enabled():
            y = self._trained_product(x, packed, bias, factors)  # pyright: ignore
        else:
            y = linear(x, packed, bias, factors)
        return y if "correction_A" not in self._modules else self.corrected(x, y)

    @torch.compiler.disable
    def _trained_product(
        self, x: Tensor, packed: tuple[Any, ...], bias: Tensor | None, factors: Factors | None
    ) -> Tensor:
        assert self.tables is not None
        y = self.tables.product(x, packed)
        y = y if bias is None else y + bias.to(y.dtype)
        return y if factors is None else y + low_rank(x, *factors)

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
        trains = self.tables is not None and torch.is_grad_enabled()
        rows = functional.embedding(ids, self.weight) if trains else self._rows(ids)
        return rows if self.embed_scale is None else rows * self.embed_scale

    def _rows(self, ids: Tensor) -> Tensor:
        """The same, unpacking no more of the weight than those rows where they are few; of a
        correction, its small B' whole."""
        rows = torch.ops.lowra.embedding(ids, *self.packed(), self.dtype)
        if self.correction_A is None or self.correction_B is None:
            return rows
        return rows + self.correction_B.weight.T[ids] @ self.correction_A.weight
