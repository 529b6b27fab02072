"""What is measured as lowra's runs on lowra's kernels, or is not written."""

from __future__ import annotations

import os

import torch

from lowra.backends.triton import service


def require_kernels() -> None:
    """Switch the kernels on. Ends the program where none serve the device."""
    os.environ[service.SWITCH] = "on"
    service.target_of.cache_clear()
    service.failures.clear()
    device = torch.device("cuda", torch.cuda.current_device())
    if service.target_of(device) is None:
        raise SystemExit(f"nothing measured: no kernel serves {device}; the warning above says why")


def refuse_replaced() -> None:
    """Ends the program where a kernel failed: what served in its place is not what is measured."""
    if service.failures:
        why = "; ".join(f"{name}: {cause}" for name, cause in service.failures.items())
        raise SystemExit(f"no more is written, kernels failed: {why}")
