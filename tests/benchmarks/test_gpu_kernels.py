"""Plain torch is never written as what lowra's GPU kernels take."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.gpu_kernels import refuse_replaced, require_kernels
from lowra.backends.triton import service
from lowra.backends.triton.targets import TARGETS


def test_without_kernels_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(service.SWITCH, "off")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(SystemExit, match="no kernel serves cuda:0"):
        require_kernels()
    service.target_of.cache_clear()


def test_a_kernel_that_failed_before_is_tried_again_and_one_that_fails_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(service.SWITCH, "off")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(service, "failures", {"linear-sm90": "OutOfResources: shared memory"})
    with pytest.raises(SystemExit, match="linear-sm90: OutOfResources: shared memory"):
        refuse_replaced()
    require_kernels()
    assert service.target_of(torch.device("cuda:0")) == TARGETS[1]
    refuse_replaced()
    service.target_of.cache_clear()
