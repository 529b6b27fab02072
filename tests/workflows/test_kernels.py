"""The kernels that are printed are those that run."""

from __future__ import annotations

import torch
from torch import nn

from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.bench import random_weight
from lowra.workflows.kernels import kernels_of


def test_many_tokens_show_the_kernel_that_unpacks() -> None:
    model = nn.ModuleDict({"a": QuantizedLinear(random_weight(512, 512, 2), None, torch.bfloat16)})
    for tokens, kind in ((1, "linear"), (64, "linear"), (512, "values")):
        (kernel,), declined = kernels_of(model, "sm90", tokens)
        assert kernel.name.startswith(f"{kind}-sm90-bfloat16-w2") and not declined
        assert kernel.sites == ("a",) and f"# {kernel.name}" in kernel.source
