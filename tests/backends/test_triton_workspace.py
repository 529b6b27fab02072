"""What captured graphs hold is theirs alone, and stays while they may be replayed. No GPU."""

from __future__ import annotations

import gc

import pytest
import torch

import lowra  # noqa: F401 - registers backends
from lowra.backends.triton import weight, workspace
from lowra.compiler.errors import LowraError
from tests.backends.test_cpu_product import Shape, packed_of

CPU = torch.device("cpu")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As within a capture; what was set aside before is here."""
    monkeypatch.setattr(workspace, "_arenas", {CPU: [workspace.Arena(workspace._zeros(300, CPU))]})
    monkeypatch.setattr(workspace, "_workspaces", {})
    workspace.workspace("product", 100, 50, CPU)
    monkeypatch.setattr(workspace, "capturing", lambda device: True)


@pytest.mark.usefixtures("captured")
def test_captured_launches_share_neither_sums_nor_counters() -> None:
    eager = workspace._workspaces["product", CPU, 0]
    made = [workspace.workspace("product", 100, 50, CPU) for _ in range(5)]
    for tensors in zip(eager, *made, strict=True):
        assert len({tensor.data_ptr() for tensor in tensors}) == 6
    for sums, counters in made:
        assert sums.numel() == 50 and counters.numel() == 100 and not counters.any()
    arena = workspace._arenas[CPU][0]
    inside = [arena.zeros.data_ptr() + 400 * i for i in range(3)]
    assert [counters.data_ptr() for _, counters in made[:3]] == inside  # the others are written


def test_launches_of_a_stream_share_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_workspaces", {})
    first, again = (workspace.workspace("product", 9, 50, CPU) for _ in range(2))
    assert all(map(torch.equal, first, again)) and first[0] is again[0] and first[1] is again[1]
    assert workspace.workspace("shrink", 9, 50, CPU)[0] is not first[0]
    assert workspace.workspace("product", 9, 60, CPU)[0].numel() == 60


def test_what_has_not_run_before_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    with pytest.raises(LowraError, match="call it once"):
        workspace.outside_graphs(lambda: torch.zeros(1), torch.device("cuda:0"))


def test_tiles_stay_with_the_codes_whatever_is_forgotten() -> None:
    packed = packed_of(Shape(20, 96, (2, 4))).op_args()
    form = weight.weight_of(packed).form
    place = form.tiles_of(64, CPU).data_ptr()
    for m in range(2 * weight.MOST_PLANS):
        form.keep(m, m)
    weight.descriptors.cache_clear()
    gc.collect()
    assert form.tiles_of(64, CPU).data_ptr() == place
