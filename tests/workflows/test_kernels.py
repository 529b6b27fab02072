"""The kernels that are printed are those that run."""

from __future__ import annotations

import torch
from torch import nn

from lowra.backends.activations import activations
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.bench import random_weight
from lowra.workflows.kernels import kernels_of


def test_many_tokens_show_the_kernel_that_unpacks() -> None:
    model = nn.ModuleDict({"a": QuantizedLinear(random_weight(512, 512, 2), None, torch.bfloat16)})
    for tokens, kind in ((1, "linear"), (64, "linear"), (512, "values")):
        (kernel,), declined = kernels_of(model, "sm90", tokens)
        assert kernel.name.startswith(f"{kind}-sm90-bfloat16-w2") and not declined
        assert kernel.sites == ("a",) and f"# {kernel.name}" in kernel.source


def test_where_integers_are_allowed_their_kernels_are_shown() -> None:
    model = nn.ModuleDict({
        "a": QuantizedLinear(random_weight(512, 512, 2), None, torch.bfloat16),
        "b": QuantizedLinear(random_weight(512, 512, 2), None, torch.float32),
    })  # fmt: skip
    with activations("int8"):
        for target, tokens, kinds in (
            ("sm90", 1, ["int8", "linear", "quantize8"]), ("sm90", 5, ["linear", "linear"]),
            ("gfx942", 1, ["linear", "linear"]),
        ):  # fmt: skip
            made, _ = kernels_of(model, target, tokens)
            assert [kernel.name.split("-")[0] for kernel in made] == kinds
