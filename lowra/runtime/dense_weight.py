"""A dequantized weight as other tools see it: to be read, not to be written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError


class DenseWeight(Tensor):
    """A dense copy of a packed weight. To assign its `data` raises AdapterError.

    That is how tools merge adapters into a layer, or start them by taking a part out of its
    weight (PiSSA, OLoRA). On a copy it would change nothing, and nobody would notice.
    """

    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        raise AdapterError(
            "the weight of a compiled layer is packed and cannot be written: `lowra adapter merge` "
            "merges an adapter into it and says what that costs; for a start of the factors that "
            "changes the weight (PiSSA, OLoRA, LoRA-GA), take init_lora_weights=True"
        )


def read_only(weight: Tensor) -> Tensor:
    """`weight` as a DenseWeight that shares its values; what a tracer made stays as it is."""
    if type(weight) is not Tensor or torch.compiler.is_compiling():
        return weight
    return weight.as_subclass(DenseWeight)
